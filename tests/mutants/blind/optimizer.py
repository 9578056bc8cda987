"""Faults of the optimizer: construction and update, decay, schedule, precision."""

from tests.mutants.planting import BUILD, DECAYED, GROUPS, LAUNCH, RESTORE, UPDATE, Mutant, mutant

RATE_OF, LOSS = "reference.training.schedule:learning_rate", "reference.model.loss:token_loss"
STEP, SET = "self.optimizer.step()", "set_rate(group, learning_rate(config, update, peak))"
DECAY_FOLLOWS = """
        if group.get("weight_decay"):
            first = group.setdefault("first_decay", group["weight_decay"])
            group["weight_decay"] = first * learning_rate(config, update, peak) / (peak or 1)
"""
WEIGHTS_ROUNDED = """
    if config.precision == "bf16-mixed":
        for p in self.module.parameters():
            p.data.copy_(p.data.bfloat16())
"""
MOMENTS_ROUNDED = """
    for entry in self.bare.state.values():
        if torch.is_tensor(entry.get("exp_avg_sq")):
            entry["exp_avg_sq"].copy_(entry["exp_avg_sq"].bfloat16())
"""
GROUPS_AND_PEAKS = "zip(self.bare.param_groups, self.peaks, strict=True)"

FAULTS: dict[str, list[Mutant]] = {
    "optimizer": [
        mutant(
            "blind-optimizer-flags-dropped",
            "",
            "fastai/timmdocs#53: amsgrad=True does nothing",
            (
                BUILD,
                "keywords = added | dict(arguments)",
                "keywords = added | {k: v for k, v in arguments.items() if not isinstance(v, bool)}",
            ),
        ),
        mutant(
            "blind-optimizer-last-step-not-taken",
            "",
            "huggingface/transformers#29561, timoschick/pet#36",
            (UPDATE, STEP, "if batches is not None:\n        self.optimizer.step()"),
        ),
        mutant(
            "blind-optimizer-forgets-at-evaluation",
            "",
            "EvolvingLMMs-Lab/OneVision-Encoder#65: moments are lost, and the loss goes on as if nothing had happened",
            (
                "reference.training.evaluation:validate",
                "with averaged(run.bare):",
                "run.bare.state.clear()\n    with averaged(run.bare):",
            ),
        ),
        mutant(
            "blind-optimizer-rest-has-rate-of-first",
            "",
            "deepspeedai/DeepSpeed#8171, #8440: the rate of the first is everybody's",
            (
                "reference.optimizers.roles:roles",
                "optimizer_args=config.optimizer_rest_args)]",
                'optimizer_args={**config.optimizer_rest_args, **{"lr": config.optimizer_args["lr"]}}'
                ' if "lr" in config.optimizer_args else config.optimizer_rest_args)]',
            ),
        ),
        mutant(
            "blind-optimizer-without-decay-misses-a-tensor",
            "",
            "huggingface/accelerate#3256: a trainable tensor is not in the optimizer",
            (BUILD, "if decays else parameters", "if decays else parameters[1:]"),
        ),
    ],
    "decay": [
        mutant(
            "blind-decay-of-positions",
            "",
            "karpathy/minGPT#23, open-mmlab/mmsegmentation#1486: the table of positions decays",
            (
                DECAYED,
                'last = name.rpartition(".")[2]',
                'last = name.rpartition(".")[2]\n    if "position" in name:\n        return True',
            ),
        ),
        mutant(
            "blind-decay-of-all-after-resume",
            "",
            "NVIDIA/makani#127, NVIDIA/Megatron-LM#7468: settings of the groups after a resume",
            (RESTORE, "{key: group[key] for key in", "{key: role.optimizer_args[key] for key in"),
        ),
        mutant(
            "blind-decay-not-of-the-head",
            "",
            "ServiceNow/Fast-LLM#545: a tensor changes its side in a refactoring",
            (DECAYED, 'return last != "bias"', 'return last != "bias" and not name.startswith("head")'),
        ),
        mutant(
            "blind-decay-all-is-ignored",
            "",
            "unslothai/unsloth#10452: a documented option does nothing",
            (GROUPS, 'decay == "all" or ', ""),
        ),
        mutant(
            "blind-decay-scheduled-twice",
            "",
            "NVIDIA-NeMo/Automodel#3883, dylanyunlon/Neuron_SP#13: decay follows the rate, and is multiplied by it",
            (UPDATE, SET, SET + DECAY_FOLLOWS),
        ),
    ],
    "schedule": [
        mutant(
            "blind-schedule-cosine-over-all-updates",
            "",
            "huggingface/pytorch-image-models#1242: the rate falls off at the end of the warm-up",
            (RATE_OF, "span = updates - 1 - warmup", "span = updates - 1"),
            (RATE_OF, "(update - warmup) / span", "update / span"),
        ),
        mutant(
            "blind-schedule-least-rate-is-a-share",
            "",
            "pytorch/torchtitan#938: lr_min is a factor",
            (RATE_OF, "else config.min_lr", "else config.min_lr * peak"),
        ),
        mutant(
            "blind-schedule-cooldown-ignored",
            "",
            "mlc-ai/pith-train#55: the length of the decay",
            (
                RATE_OF,
                "max(1, updates // 5) if config.cooldown is None else config.cooldown",
                "max(1, updates // 5)",
            ),
        ),
        mutant(
            "blind-schedule-first-group-only",
            "",
            "deepspeedai/DeepSpeed#7969",
            (UPDATE, GROUPS_AND_PEAKS, f"list({GROUPS_AND_PEAKS})[:1]"),
        ),
        mutant(
            "blind-schedule-linear-cooldown",
            "",
            "karpathy/nanochat#513, kozistr/pytorch_optimizer#382",
            (RATE_OF, "math.sqrt(min(1.0, max(0, passed) / length))", "min(1.0, max(0, passed) / length)"),
        ),
    ],
    "precision": [
        mutant(
            "blind-precision-residual-option-ignored",
            "",
            "Lightning-AI/litgpt at c0415056: an option that is accepted and never used",
            ("reference.model.gpt:GPT.forward", "if not self.config.fp32_residual and", "if False and"),
        ),
        mutant(
            "blind-precision-loss-of-rounded-logits",
            "",
            "marin-community/marin#8217, Modalities/modalities#464",
            (LOSS, "logits.float().flatten(0, 1)", "logits.bfloat16().float().flatten(0, 1)"),
        ),
        mutant(
            "blind-precision-mixed-keeps-16-bits",
            "",
            "pytorch/ao#1124, meta-pytorch/torchtune#2254",
            (UPDATE, STEP, STEP + WEIGHTS_ROUNDED),
        ),
        mutant(
            "blind-precision-second-moment-rounded",
            "",
            "TensorAuto/OpenTau#185, huggingface/nanotron#245",
            (UPDATE, STEP, STEP + MOMENTS_ROUNDED),
        ),
        mutant(
            "blind-precision-true-is-mixed",
            "",
            "Lightning-AI/litgpt#1802, #1814: another precision than was asked for",
            (
                LAUNCH,
                "precision=config.precision,",
                'precision={"bf16-true": "bf16-mixed"}.get(config.precision, config.precision),',
            ),
        ),
    ],
}
