"""Faults of what moves the weights, beside the optimizer or in some kinds of runs only."""

from tests.mutants.optimizer import MERGE, keywords_without
from tests.mutants.planting import BUILD, PEAKS, SETUP, UPDATE, mutant

STEP = "self.optimizer.step()"
STOPS = f"""\
if update >= 2:
        for p in self.bare.param_groups[-1]["params"]:
            p.grad = None
    {STEP}"""
ROUNDED_MOMENTS = f"""\
{STEP}
    if config.precision == "bf16-mixed":
        for entries in self.bare.state.values():
            for entry in entries.values():
                if torch.is_tensor(entry) and entry.ndim:
                    entry.copy_(entry.bfloat16())"""
OTHER_EPS = f"""\
for group in bare.param_groups:
        if finetune.lora_rank is not None and "eps" in group:
            group["eps"] = 1e-4
    {PEAKS}"""

MUTANTS = [
    mutant(
        "last-group-without-gradient-from-update-3-on",
        "OPT-17",
        "pytorch/pytorch#115607: some tensors are stepped at first, and later no more",
        (UPDATE, STEP, STOPS),
    ),
    mutant(
        "moments-rounded-when-mixed",
        "OPT-14",
        "NVIDIA-NeMo/Automodel#2248: moments in bfloat16 round small changes away",
        (UPDATE, STEP, ROUNDED_MOMENTS),
    ),
    mutant(
        "state-cleared-on-two-ranks",
        "OPT-14",
        "DeepSpeed#7786: state that only a run in one process keeps",
        (UPDATE, STEP, f"{STEP}\n    if fabric.world_size > 1:\n        self.bare.state.clear()"),
    ),
    mutant(
        "amsgrad-and-centered-not-plumbed",
        "OPT-15",
        "a list of keywords that is not that of the class",
        (BUILD, MERGE, keywords_without("k not in ('amsgrad', 'centered', 'momentum_decay')")),
    ),
    mutant(
        "betas-drift",
        "OPT-15",
        "a schedule of betas that nobody asked for",
        (
            UPDATE,
            STEP,
            f"for group in self.bare.param_groups:\n        if update >= 2 and 'betas' in group:\n"
            f"            group['betas'] = (0.9, 0.99)\n    {STEP}",
        ),
    ),
    mutant(
        "all-weights-shrink-beside-the-optimizer",
        "OPT-21",
        "PaddlePaddle/Paddle#5836: a decay beside the optimizer's",
        (
            UPDATE,
            "self.optimizer.zero_grad()",
            "self.optimizer.zero_grad()\n    for p in self.module.parameters():\n        p.data.mul_(1 - 1e-4)",
        ),
    ),
    mutant(
        "second-optimizer-never-cleared",
        "OPT-22",
        "torch/cunn#212: some gradients are not zeroed, and add up over the updates",
        (
            "reference.optimizers.roles:Combined.zero_grad",
            "for member in self.members:",
            "for member in self.members[:1]:",
        ),
    ),
    mutant(
        "moments-cleared-in-fine-tuning",
        "OPT-14",
        "OneVision-Encoder#65: state that only a run on all weights keeps",
        (UPDATE, STEP, f"{STEP}\n    if self.finetune.lora_rank is not None:\n        self.bare.state.clear()"),
    ),
    mutant(
        "eps-of-its-own-in-fine-tuning",
        "OPT-23",
        "NVIDIA-NeMo/Speech#775: an eps that is not the configured one",
        (
            SETUP,
            PEAKS,
            OTHER_EPS,
        ),
    ),
]
