"""Faults of the learning rate schedule."""

from tests.mutants.planting import RATE, UPDATE, mutant

SCHEDULE = "reference.training.schedule:learning_rate"

MUTANTS = [
    mutant(
        "sched-per-microbatch",
        "LR-1",
        "pytorch-lightning#1476, accelerate#963",
        (UPDATE, RATE, RATE.replace("update", "update * config.microbatches")),
    ),
    mutant(
        "sched-per-process",
        "LR-2",
        "axolotl#1566, diffusers#2632",
        (UPDATE, RATE, RATE.replace("update", "update * fabric.world_size")),
    ),
    mutant(
        "warmup-units",
        "LR-1",
        "litgpt b78ebcb6, e38704e6",
        (
            SCHEDULE,
            "warmup, updates = config.warmup, config.updates",
            "warmup, updates = config.warmup * config.microbatches, config.updates",
        ),
    ),
    mutant(
        "warmup-first-lr-zero",
        "LR-1 LR-3",
        "nanoGPT dc81cb36, transformers#34754",
        (SCHEDULE, "peak * (update + 1) / (warmup + 1)", "peak * update / warmup"),
    ),
    mutant(
        "minimum-ignored",
        "LR-1",
        "a setting that is read by nobody",
        (SCHEDULE, "lowest = peak / 10 if config.min_lr is None else config.min_lr", "lowest = peak / 10"),
    ),
    mutant("one-update-late", "LR-1", "torchtune#2010", (UPDATE, RATE, RATE.replace("update", "max(0, update - 1)"))),
    mutant(
        "warmup-of-at-least-one",
        "LR-4",
        "nanoGPT get_lr (it < warmup_iters, with a warm-up of none)",
        (
            SCHEDULE,
            "warmup, updates = config.warmup, config.updates",
            "warmup, updates = max(1, config.warmup), config.updates",
        ),
    ),
    mutant(
        "single-update-at-the-peak",
        "LR-4",
        "a division by zero that was caught the wrong way",
        (SCHEDULE, "if span > 0 else 1.0", "if span > 0 else 0.0"),
    ),
    mutant(
        "warmup-cut-to-the-run",
        "LR-4",
        "a warm-up longer than the run, cut the wrong way",
        (SCHEDULE, "if update < warmup:", "if update < min(warmup, updates - 1):"),
    ),
    mutant(
        "group-rate-lost",
        "LR-1",
        "peft#3499, speculators#1066",
        (
            UPDATE,
            "zip(self.bare.param_groups, self.peaks, strict=True)",
            "zip(self.bare.param_groups[:1], self.peaks[:1], strict=True)",
        ),
    ),
    mutant(
        "cooldown-ignored",
        "LR-5",
        "mlc-ai/pith-train#55: the length of the decay",
        (
            "reference.training.schedule:learning_rate",
            "max(1, updates // 5) if config.cooldown is None else config.cooldown",
            "max(1, updates // 5)",
        ),
    ),
    mutant(
        "cooldown-linear",
        "LR-5",
        "karpathy/nanochat#513, kozistr/pytorch_optimizer#382",
        (
            "reference.training.schedule:learning_rate",
            "math.sqrt(min(1.0, max(0, passed) / length))",
            "min(1.0, max(0, passed) / length)",
        ),
    ),
    mutant(
        "rate-rounded-to-16-bits",
        "LR-1",
        "tinygrad/tinygrad#4297, PaddlePaddle/Paddle#34316: the learning rate is kept in 16 bits",
        (
            "reference.training.run:Run.update_once",
            "learning_rate(config, update, peak)",
            "float(torch.tensor(learning_rate(config, update, peak), dtype=torch.bfloat16 if "
            '"bf16" in config.precision else torch.float64))',
        ),
    ),
    mutant(
        "lowest-rate-of-zero-is-a-tenth",
        "LR-4",
        "unslothai/unsloth-zoo#818: an explicit zero is taken for a missing setting",
        ("reference.training.schedule:learning_rate", "if config.min_lr is None else", "if not config.min_lr else"),
    ),
]
