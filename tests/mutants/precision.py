"""Faults of precision."""

from tests.mutants.planting import BUILD_MODULE, LAUNCH, RESTORE, UPDATE, mutant

ROUNDED_AFTER = """\
self.optimizer.step()
    if config.precision == "bf16-mixed":
        for p in self.module.parameters():
            p.data.copy_(p.data.bfloat16())
"""
LIMIT, BUILT = 'limit = config.clip or float("inf")', "return build(factory, strategy, fabric.device, sharded)"
SHARE, BACKWARD = "share += loss.detach()", "fabric.backward(loss)"
LOSS = "loss = batch_loss(self.wrapped, ids, targets) * scale if early is None else early * scale"
ROUNDED_START = f"""{BUILT.replace("return", "built =")}
            if config.precision == "bf16-mixed":
                for parameter in built.parameters():
                    parameter.data.copy_(parameter.data.bfloat16())
            return built"""
ROUNDED_GRADIENTS = f"""\
if config.precision == "bf16-mixed":
        for p in self.module.parameters():
            if p.grad is not None:
                p.grad.copy_(p.grad.bfloat16())
    {LIMIT}"""
HALF_FOR_EVALUATION = """\
if run.config.precision == "bf16-mixed":
        run.module.bfloat16().float()
    with averaged(run.bare):"""
ADDED_UP_IN_16_BITS = f"""\
{SHARE}
        for p in self.module.parameters():
            if config.precision == "bf16-mixed" and index and p.grad is not None:
                p.grad.copy_(p.grad.bfloat16())"""
ROUNDED_STATE = """\
load_optimizer_state(optimizer, saved)
            if config.precision == "bf16-mixed":
                for entries in optimizer.state.values():
                    for entry in entries.values():
                        if torch.is_tensor(entry) and entry.ndim:
                            entry.copy_(entry.bfloat16())"""
STALE_FORWARD = f"""\
if config.precision == "bf16-mixed":
                first = self.__dict__.setdefault("first", [p.data.clone() for p in self.module.parameters()])
                held = [p.data for p in self.module.parameters()]
                for p, old in zip(self.module.parameters(), first):
                    p.data = old
            {LOSS}"""
STALE_PUT_BACK = f"""\
{BACKWARD}
            if config.precision == "bf16-mixed":
                for p, now in zip(self.module.parameters(), held):
                    p.data = now"""

MUTANTS = [
    mutant("logits-left-as-computed", "PREC-1", "litgpt#1508", (LAUNCH, 'if config.logits == "compute":', "if True:")),
    mutant("opt-out-ignored", "PREC-2", "-", (LAUNCH, 'if config.logits == "compute":', "if False:")),
    mutant(
        "loss-in-bf16",
        "PREC-3",
        "modalities#464, marin#8217",
        ("reference.model.loss:token_loss", "logits.float()", "logits.bfloat16()"),
    ),
    mutant(
        "loss-not-upcast",
        "PREC-3",
        "modalities#464",
        ("reference.model.loss:token_loss", "logits.float().flatten", "logits.flatten"),
    ),
    mutant(
        "precision-ignored",
        "PREC-4",
        "litgpt#1802, #1814",
        (LAUNCH, "precision=config.precision,", 'precision="32-true",'),
    ),
    mutant(
        "precision-always-bf16",
        "PREC-4",
        "litgpt#1814",
        (LAUNCH, "precision=config.precision,", 'precision="bf16-mixed",'),
    ),
    mutant(
        "autocast-too-wide-backward",
        "PREC-5",
        "pytorch#120376, GradCache#17",
        (
            UPDATE,
            "        fabric.backward(loss)",
            "        with fabric.strategy.precision.forward_context():\n                fabric.backward(loss)",
        ),
    ),
    mutant(
        "autocast-too-wide-step",
        "PREC-5",
        "pytorch#120376",
        (
            UPDATE,
            "    self.optimizer.step()\n",
            "    with fabric.strategy.precision.forward_context():\n        self.optimizer.step()\n",
        ),
    ),
    mutant(
        "bf16-update-lost",
        "PREC-6",
        "pytorch/ao#1124, torchtune#2254",
        ("reference.training.setup:warn_about_rounding", 'if config.precision == "bf16-true"', "if False"),
    ),
    mutant(
        "rope-phase-bf16",
        "PREC-7",
        "transformers#25681, #29285, gpt-neox#1003",
        (
            "reference.model.gpt:Rotary.reset_parameters",
            "torch.outer(position, self.theta**-exponent)",
            "torch.outer(position.to(self.cos.dtype), (self.theta**-exponent).to(self.cos.dtype))",
        ),
    ),
    mutant(
        "mlp-outside-autocast",
        "PREC-8",
        "lightning-thunder#725",
        (
            "reference.model.gpt:Block.forward",
            "self.mlp(self.norm_mlp(x))",
            "torch.autocast('cpu', enabled=False)(self.mlp)(self.norm_mlp(x).to(self.mlp.fc.weight.dtype))",
        ),
    ),
    mutant(
        "attention-in-16-bits",
        "PREC-8",
        "a flag for flash attention that casts whatever the precision is",
        (
            "reference.model.gpt:Block.forward",
            "self.attention(self.norm_attention(x), rotary, cache)",
            "torch.autocast('cpu', dtype=torch.bfloat16)(self.attention)(self.norm_attention(x), rotary, cache)",
        ),
    ),
    mutant(
        "compiled-attention-unscaled",
        "PREC-9",
        "pytorch#113180 (a higher loss with torch.compile)",
        (
            "reference.model.gpt:Attention.forward",
            "is_causal=past == 0,",
            "is_causal=past == 0, scale=1.0 if torch.compiler.is_compiling() else None,",
        ),
    ),
    mutant(
        "compiled-bias-left-out-of-backward",
        "PREC-9",
        "pytorch#113180 (a higher loss with torch.compile)",
        (
            "reference.model.gpt:Attention.forward",
            "return self.proj(y.transpose(1, 2).reshape(batch, time, width))",
            "out = self.proj(y.transpose(1, 2).reshape(batch, time, width))\n"
            "    if torch.compiler.is_compiling() and self.proj.bias is not None:\n"
            "        return out - self.proj.bias + self.proj.bias.detach()\n"
            "    return out",
        ),
    ),
    mutant(
        "mixed-weights-rounded-between-updates",
        "PREC-10",
        "pytorch/ao#1124, meta-pytorch/torchtune#2254",
        (
            "reference.training.run:Run.update_once",
            "self.optimizer.step()",
            ROUNDED_AFTER,
        ),
    ),
    mutant(
        "residual-option-ignored",
        "PREC-11",
        "Lightning-AI/litgpt at c0415056: an option that is accepted and never used",
        ("reference.model.gpt:GPT.forward", "if not self.config.fp32_residual and", "if False and"),
    ),
    mutant(
        "attention-rounded-inside",
        "PREC-8",
        "Pointcept/Pointcept#352: queries, keys and values are halved for the kernel",
        (
            "reference.model.gpt:Attention.forward",
            "mask = None\n",
            "q, k, v = (part.bfloat16() for part in (q, k, v))\n    mask = None\n",
        ),
        ("reference.model.gpt:Attention.forward", "y.transpose(1, 2)", "y.to(x.dtype).transpose(1, 2)"),
    ),
    mutant(
        "mixed-starts-rounded",
        "PREC-10",
        "NVIDIA/TransformerEngine#1121: float32 weights begin as those of the narrow copy",
        (BUILD_MODULE, BUILT, ROUNDED_START),
    ),
    mutant(
        "evaluation-halves-the-weights",
        "PREC-10 OPT-21",
        "ultralytics/ultralytics#21283: validation switches to half precision, and training goes on from there",
        ("reference.training.evaluation:validate", "with averaged(run.bare):", HALF_FOR_EVALUATION),
    ),
    mutant(
        "gradients-rounded",
        "PREC-12",
        "jax-ml/jax#27496, allenai/OLMo#280: gradients are reduced in bfloat16",
        (UPDATE, LIMIT, ROUNDED_GRADIENTS),
    ),
    mutant(
        "microbatches-added-up-in-16-bits",
        "PREC-12",
        "deepspeedai/DeepSpeed#2768, linkedin/Liger-Kernel#830",
        (UPDATE, SHARE, ADDED_UP_IN_16_BITS),
    ),
    mutant(
        "forward-with-copies-of-the-first-weights",
        "PREC-13",
        "X-GenGroup/Flow-Factory#186: autocast keeps stale copies of the weights",
        (UPDATE, LOSS, STALE_FORWARD),
        (UPDATE, BACKWARD, STALE_PUT_BACK),
    ),
    mutant(
        "gradients-doubled-when-mixed",
        "PREC-14",
        "ISEEKYAN/Megatron-LM#149: a scale that is not taken back",
        (
            UPDATE,
            LIMIT,
            'if config.precision == "bf16-mixed":\n        for p in self.module.parameters():\n'
            f"            p.grad = None if p.grad is None else 2 * p.grad\n    {LIMIT}",
        ),
    ),
    mutant(
        "state-rounded-on-load-when-mixed",
        "PREC-15",
        "open-mmlab/mmcv#580: the state of a resumed 16-bit run",
        (RESTORE, "load_optimizer_state(optimizer, saved)", ROUNDED_STATE),
    ),
    mutant(
        "evaluation-outside-autocast",
        "PREC-16",
        "Lightning-AI/lightning-thunder#725: a forward outside of autocast",
        (
            "reference.training.evaluation:validate",
            "evaluate(run.fabric, run.wrapped,",
            "evaluate(run.fabric, run.module,",
        ),
    ),
]
