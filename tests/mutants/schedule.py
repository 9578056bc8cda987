"""Faults of the learning rate schedule."""

from tests.mutants.planting import UPDATE, mutant

RATE, NUMBER = "reference.training.schedule:learning_rate", "learning_rate(\n            update,"

MUTANTS = [
    mutant(
        "sched-per-microbatch",
        "LR-1",
        "pytorch-lightning#1476, accelerate#963",
        (UPDATE, NUMBER, NUMBER.replace("update", "update * config.microbatches")),
    ),
    mutant(
        "sched-per-process",
        "LR-2",
        "axolotl#1566, diffusers#2632",
        (UPDATE, NUMBER, NUMBER.replace("update", "update * fabric.world_size")),
    ),
    mutant(
        "warmup-units",
        "LR-1",
        "litgpt b78ebcb6, e38704e6",
        (UPDATE, "warmup=config.warmup", "warmup=config.warmup * config.microbatches"),
    ),
    mutant(
        "warmup-first-lr-zero",
        "LR-1 LR-3",
        "nanoGPT dc81cb36, transformers#34754",
        (RATE, "peak * (update + 1) / (warmup + 1)", "peak * update / warmup"),
    ),
    mutant(
        "minimum-ignored",
        "LR-1",
        "a setting that is read by nobody",
        (RATE, "lowest = peak / 10 if minimum is None else minimum", "lowest = peak / 10"),
    ),
    mutant(
        "one-update-late", "LR-1", "torchtune#2010", (UPDATE, NUMBER, NUMBER.replace("update", "max(0, update - 1)"))
    ),
]
