"""Faults of evaluation."""

from tests.mutants.planting import EVALUATE, FIT, UPDATE, mutant

MODE, RUN = "reference.model.modes:evaluation_mode", "reference.training.evaluation:validate"
SPLIT = "ids, targets = split_targets(batch, fabric.device)"
PART = "itertools.islice(batches, run.config.evaluate_batches)"

MUTANTS = [
    mutant("eval-in-training-mode", "EVAL-1 EVAL-2", "torchtune#1791", (MODE, "    model.eval()\n", "")),
    mutant("eval-mode-left", "EVAL-1", "litgpt finetune/full.py", (MODE, "module.training = training", "pass")),
    mutant("eval-with-gradients", "EVAL-1", "-", (EVALUATE, SPLIT, f"torch.set_grad_enabled(True); {SPLIT}")),
    mutant(
        "eval-dropout-on",
        "EVAL-2",
        "nanoGPT 7399dfe3, pytorch#124464",
        ("reference.model.gpt:Attention.forward", "self.dropout if self.training else 0.0", "self.dropout"),
    ),
    mutant(
        "val-subset-drifts",
        "EVAL-2 EVAL-4",
        "TinyLlama#77",
        (RUN, PART, "[list(batches)[next(run.__dict__.setdefault('turns', itertools.count())) % 2]]"),
    ),
    mutant(
        "eval-casts-weights",
        "EVAL-3",
        "transformers bf16_full_eval",
        (RUN, "return evaluate(", "run.module.bfloat16().float(); return evaluate("),
    ),
    mutant(
        "val-is-train",
        "EVAL-4",
        "transformers#8295, jasmine#185",
        (FIT, "validate(run, validation)", "validate(run, train[:2])"),
    ),
    mutant(
        "val-unshifted",
        "EVAL-5",
        "litgpt#419",
        (EVALUATE, "batch_loss(model, ids, targets)", "batch_loss(model, ids, ids)"),
    ),
    mutant(
        "val-loss-rank-local",
        "EVAL-6",
        "litgpt#1971",
        (EVALUATE, 'sums = reduce(fabric, sums, "sum")', "pass"),
    ),
    mutant(
        "eval-draws-random-numbers",
        "EVAL-7",
        "torch.utils.data.DataLoader, which draws a seed at each pass",
        (UPDATE, "seed_dropout(derive_seed(config.seed, update, fabric.global_rank), device)", "pass"),
        (EVALUATE, SPLIT, f"torch.rand(1); {SPLIT}"),
    ),
]
