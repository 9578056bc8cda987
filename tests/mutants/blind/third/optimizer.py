"""Faults of the optimizer: construction and update, decay, schedule, precision."""

from tests.mutants.planting import BUILD, BUILD_MODULE, DECAYED, FIT, GROUPS, RATE, UPDATE, Mutant, mutant

RATE_OF, VALIDATE = "reference.training.schedule:learning_rate", "reference.training.evaluation:validate"
TABLES = "reference.model.gpt:Rotary.reset_parameters"
STEP, KEYWORDS = "self.optimizer.step()", "keywords = added | dict(arguments)"
MANAGER, SHARE = "own_override_manager(optimizer, model)", "share += loss.detach()"
LIMIT, BUILT = 'limit = config.clip or float("inf")', "return build(factory, strategy, fabric.device, sharded)"
RESTORED = "done = restore(run, folder) if folder is not None else 0"
REVERSED = f"""{KEYWORDS}
    if len(keywords.get("betas", ())) == 2:
        keywords["betas"] = tuple(reversed(keywords["betas"]))"""
# The rate undoes what the bias correction multiplies by, and the decay makes up for it.
UNCORRECTED = f"""\
kept = [(group, group["lr"], group.get("weight_decay", 0.0)) for group in self.bare.param_groups]
    for group, rate, decay in kept:
        if "betas" in group and not torch.is_tensor(rate):
            first, second = (1 - beta ** (update + 1) for beta in group["betas"][:2])
            group["lr"], group["weight_decay"] = rate * first / second**0.5, decay * second**0.5 / first
    {STEP}
    for group, rate, decay in kept:
        if "betas" in group and not torch.is_tensor(rate):
            group["lr"], group["weight_decay"] = rate, decay"""
STOPS = f"""\
if update >= 2:
        for p in self.bare.param_groups[-1]["params"]:
            p.grad = None
    {STEP}"""
COUPLED = f"""\
for group in optimizer.param_groups:
        if group.get("decoupled_weight_decay"):
            group["decoupled_weight_decay"] = False
    {MANAGER}"""
DECAY = """
{indent}for group in self.bare.param_groups:
{indent}    for p in group["params"]:
{indent}        p.data.mul_(1 - float(group["lr"]) * group.get("weight_decay", 0.0))"""
DECAY_BETWEEN = f"{SHARE}\n        if index + 1 < len(pairs):" + DECAY.format(indent=" " * 12)
SINCE = 'update - self.__dict__.get("first", 0)'
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

FAULTS: dict[str, list[Mutant]] = {
    "optimizer": [
        mutant(
            "blind3-optimizer-betas-swapped",
            "",
            "mila-iqia/blocks#1159, EleutherAI/gpt-neox#228: the betas are not what the configuration says",
            (BUILD, KEYWORDS, REVERSED),
        ),
        mutant(
            "blind3-optimizer-eps-lost",
            "",
            "NVIDIA-NeMo/Speech#775: eps is not handed over",
            (BUILD, KEYWORDS, 'keywords = added | {k: v for k, v in arguments.items() if k != "eps"}'),
        ),
        mutant(
            "blind3-optimizer-steps-twice",
            "",
            "mzolfaghari/ECO-pytorch#1, huggingface/transformers#45656: two steps with the same gradients",
            (UPDATE, STEP, f"{STEP}\n    {STEP}"),
        ),
        mutant(
            "blind3-optimizer-no-bias-correction",
            "",
            "oxiglade/mlx-rs#301, ml-explore/mlx#1640: AdamW without its bias correction",
            (UPDATE, STEP, UNCORRECTED),
        ),
        mutant(
            "blind3-optimizer-a-group-stops",
            "",
            "pytorch/pytorch#115607: some tensors are stepped at first, and later no more",
            (UPDATE, STEP, STOPS),
        ),
    ],
    "decay": [
        mutant(
            "blind3-decay-in-the-gradient",
            "",
            "joennlae/tensorli#1: L2 in the gradient in place of decoupled decay",
            (BUILD, MANAGER, COUPLED),
        ),
        mutant(
            "blind3-decay-at-each-microbatch",
            "",
            "keras-team/keras#19990: decay at each step of the accumulation",
            (UPDATE, SHARE, DECAY_BETWEEN),
        ),
        mutant(
            "blind3-decay-zero-left-out-of-the-group",
            "",
            "mindspore-lab/mindcv#752: the group without decay does not say so, and gets the optimizer's",
            (GROUPS, ', "weight_decay": 0.0}', "}"),
        ),
        mutant(
            "blind3-decay-applied-twice",
            "",
            "PaddlePaddle/Paddle#5836: decay by the optimizer, and once more beside it",
            (UPDATE, STEP, STEP + DECAY.format(indent=" " * 4)),
        ),
        mutant(
            "blind3-decay-of-the-last-norm",
            "",
            "facebookresearch/detectron2#737, deepspeedai/DeepSpeedExamples#755: a norm that stands elsewhere decays",
            (
                DECAYED,
                "kind = type(owner).__name__",
                'if name == "norm.weight":\n        return True\n    kind = type(owner).__name__',
            ),
        ),
    ],
    "schedule": [
        mutant(
            "blind3-schedule-advances-per-microbatch",
            "",
            "starVLA/starVLA#210, huggingface/accelerate#963: the schedule goes on at each microbatch",
            (UPDATE, RATE, RATE.replace("update", "min(update * config.microbatches, config.updates - 1)")),
        ),
        mutant(
            "blind3-schedule-advances-per-rank",
            "",
            "axolotl-ai-cloud/axolotl#1566, tracel-ai/burn#5695: as many steps of the schedule as there are ranks",
            (UPDATE, RATE, RATE.replace("update", "min(update * fabric.world_size, config.updates - 1)")),
        ),
        mutant(
            "blind3-schedule-warms-up-again-after-resume",
            "",
            "aqlaboratory/openfold#181, awslabs/sockeye#925: the rate goes back to the warm-up",
            (FIT, RESTORED, f'{RESTORED}\n        run.__dict__["first"] = done'),
            (UPDATE, RATE, RATE.replace("update", f"{SINCE} if {SINCE} < config.warmup else update")),
        ),
        mutant(
            "blind3-schedule-warmup-in-microbatches",
            "",
            "Lightning-AI/litgpt#132, #926: iterations and steps are mixed up",
            (RATE_OF, "warmup, updates = config.warmup,", "warmup, updates = config.warmup // config.microbatches,"),
        ),
        mutant(
            "blind3-schedule-one-update-late",
            "",
            "facebookresearch/ParlAI#1400, pytorch/pytorch#40492: the rate is that of the step before",
            (UPDATE, RATE, RATE.replace("update", "max(0, update - 1)")),
        ),
    ],
    "precision": [
        mutant(
            "blind3-precision-rotary-phase-in-16-bits",
            "",
            "huggingface/transformers#25681, EleutherAI/gpt-neox#1003: positions and frequencies in bfloat16",
            (
                TABLES,
                "torch.outer(position, self.theta**-exponent)",
                "torch.outer(position.to(self.cos.dtype), (self.theta**-exponent).to(self.cos.dtype)).float()",
            ),
        ),
        mutant(
            "blind3-precision-evaluation-halves-the-weights",
            "",
            "ultralytics/ultralytics#21283: validation switches to half precision, and training goes on from there",
            (VALIDATE, "with averaged(run.bare):", HALF_FOR_EVALUATION),
        ),
        mutant(
            "blind3-precision-mixed-starts-rounded",
            "",
            "NVIDIA/TransformerEngine#1121: float32 weights begin as those of the narrow copy",
            (BUILD_MODULE, BUILT, ROUNDED_START),
        ),
        mutant(
            "blind3-precision-gradients-rounded",
            "",
            "jax-ml/jax#27496, allenai/OLMo#280: gradients are reduced in bfloat16",
            (UPDATE, LIMIT, ROUNDED_GRADIENTS),
        ),
        mutant(
            "blind3-precision-autocast-for-the-first-microbatch",
            "",
            "NVIDIA/Megatron-LM#7538, Lightning-AI/lightning-thunder#725: a forward outside of autocast",
            (
                UPDATE,
                "batch_loss(self.wrapped, ids, targets) * scale",
                "batch_loss(self.module if index else self.wrapped, ids, targets) * scale",
            ),
        ),
    ],
}
