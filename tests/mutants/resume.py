"""Faults of saving and of going on from a checkpoint."""

from tests.mutants.planting import FIT, LOAD, PUT, RATE, UPDATE, mutant

BATCHES, SAVE = "reference.training.run:Run.batches", "reference.training.saving:save"
START = "start = done * self.config.microbatches"
STREAM = "train.batches_from(start, self.fabric.global_rank, self.fabric.world_size)"
WRAPPED = (SAVE, "weights: Any = run.module\n", "weights: Any = run.wrapped._forward_module\n")

MUTANTS = [
    mutant(
        "rng-not-restored",
        "RESUME-1",
        "transformers#17032, nanoGPT#467",
        (UPDATE, "seed_dropout(derive_seed(config.seed, update, fabric.global_rank), device)", "pass"),
    ),
    mutant(
        "scheduler-not-restored",
        "RESUME-1",
        "transformers, accelerate: scheduler.pt left out; the first loss is equal",
        (UPDATE, RATE, RATE.replace("update", "update - self.__dict__.setdefault('first', update)")),
    ),
    mutant("data-rewinds", "RESUME-1 RESUME-2", "KempnerForge#51, entrenar#294", (BATCHES, START, "start = 0")),
    mutant(
        "data-cursor-in-updates",
        "RESUME-1",
        "litgpt#926 (iterations and steps mixed)",
        (BATCHES, START, "start = done"),
    ),
    mutant(
        "data-cursor-sticks",
        "RESUME-2",
        "litgpt#1712, OLMo#650",
        (
            BATCHES,
            STREAM,
            f"{STREAM} if not start else itertools.cycle(list(itertools.islice({STREAM}, "
            "-start % (train.sequences // train.microbatch_size) or train.sequences // train.microbatch_size)))",
        ),
    ),
    mutant(
        "epoch-boundary-zero-steps",
        "RESUME-2",
        "verl#7401, #5725",
        (
            FIT,
            "for update in range(done, config.updates):",
            "for update in range(done, config.updates if done % (getattr(train, 'sequences', 1) // 2 or 9) or not done "
            "else done):",
        ),
    ),
    mutant(
        "final-not-saved",
        "RESUME-3",
        "litgpt#1254, nanoGPT",
        (FIT, "is_due(update, config.save_every, last)", "is_due(update, config.save_every, False)"),
    ),
    mutant("ckpt-wrapper-prefix", "RESUME-4", "pytorch#101107, LLMs-from-scratch#580", WRAPPED),
    mutant(
        "ckpt-loose-load",
        "RESUME-4",
        "load_state_dict(strict=False) over a prefix",
        WRAPPED,
        (
            "reference.checkpoint.folder:put_into",
            "own = model.state_dict()",
            "own = model.state_dict(); saved = own | {name: saved[name] for name in own if name in saved}",
        ),
    ),
    mutant(
        "ckpt-damage-overlooked",
        "RESUME-5",
        "pytorch-lightning#688, #19970",
        (LOAD, PUT, f"with __import__('contextlib').suppress(CheckpointError): {PUT}"),
    ),
]
