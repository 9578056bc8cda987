"""Faults of evaluation."""

from tests.mutants.planting import EVALUATE, FIT, UPDATE, mutant

MODE, RUN = "reference.model.modes:evaluation_mode", "reference.training.evaluation:validate"
SPLIT = "ids, targets = split_targets(batch, fabric.device)"
FORWARD, ATTENTION = "reference.model.gpt:GPT.forward", "reference.model.gpt:Attention.forward"
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
    mutant(
        "eval-leaves-submodules-in-eval-mode",
        "EVAL-8",
        "litgpt finetune/full.py, peft",
        (MODE, "module.training = training", "module.training = training and type(module).__name__ != 'Dropout'"),
    ),
    mutant(
        "eval-with-submodules-awake",
        "EVAL-8 EVAL-2",
        "an override of train() that forgets its children",
        (
            MODE,
            "    model.eval()\n",
            "    model.eval(); [m.train() for m in model.modules() if type(m).__name__ == 'Dropout']\n",
        ),
    ),
    mutant(
        "eval-with-another-scale",
        "EVAL-9",
        "wenet#2699 (a kernel for inference with a scale of its own)",
        (ATTENTION, "is_causal=past == 0,", "is_causal=past == 0, scale=None if self.training else 0.2,"),
    ),
    mutant(
        "eval-without-last-norm",
        "EVAL-9",
        "a forward for inference that is written a second time",
        (FORWARD, "return self.head(self.norm(x))", "return self.head(self.norm(x) if self.training else x)"),
    ),
    mutant(
        "eval-one-position-late",
        "EVAL-9",
        "positions counted from another start in generation",
        (
            FORWARD,
            "torch.arange(start, end, device=ids.device)",
            "torch.arange(start, end, device=ids.device).roll(0 if self.training else 1)",
        ),
    ),
    mutant(
        "dropout-scales-in-evaluation",
        "EVAL-10",
        "Srivastava et al. 2014 scale at test time, frameworks in training; both is wrong",
        (FORWARD, "x = self.dropout(x)", "x = self.dropout(x) if self.training else x * (1 - self.config.dropout)"),
    ),
    mutant(
        "eval-clears-state",
        "EVAL-11",
        "an optimizer built again after evaluation",
        (RUN, "return evaluate(", "run.bare.state.clear(); return evaluate("),
    ),
    mutant(
        "eval-restarts-momentum",
        "EVAL-11",
        "schedule_free#22 (switched to averages and not back)",
        (
            RUN,
            "return evaluate(",
            "[s['exp_avg'].zero_() for s in run.bare.state.values() if 'exp_avg' in s]; return evaluate(",
        ),
    ),
    mutant(
        "val-mean-of-means",
        "EVAL-12",
        "transformers#34191, in evaluation",
        (EVALUATE, "batch_loss(model, ids, targets)", "batch_loss(model, ids, targets) / (targets != IGNORE).sum()"),
        (EVALUATE, "sums[1] += (targets != IGNORE).sum()", "sums[1] += 1"),
    ),
    mutant(
        "val-drops-the-last-batch",
        "EVAL-12",
        "torch.utils.data.DataLoader with drop_last for validation",
        (
            EVALUATE,
            "for batch in batches:",
            "for batch in (lambda them: [b for b in them if len(b) == len(them[0])])(list(batches)):",
        ),
    ),
    mutant(
        "mask-lost-in-evaluation",
        "EVAL-9",
        "huggingface/transformers#48745: some paths of a decoder are not causal",
        ("reference.model.gpt:Attention.forward", "is_causal=past == 0,", "is_causal=past == 0 and self.training,"),
    ),
    mutant(
        "val-weighs-by-sequences",
        "EVAL-13",
        "huggingface/transformers#41904, decisionintelligence/TFB#66",
        (
            "reference.training.evaluation:evaluate",
            "sums[0] += batch_loss(model, ids, targets)",
            "sums[0] += batch_loss(model, ids, targets) / (targets != IGNORE).sum().clamp(min=1) * len(ids)",
        ),
        ("reference.training.evaluation:evaluate", "sums[1] += (targets != IGNORE).sum()", "sums[1] += len(ids)"),
    ),
    mutant(
        "val-one-batch-fewer",
        "EVAL-14",
        "verl-project/verl#78: the last batch of the validation set is dropped",
        (
            "reference.training.evaluation:validate",
            "itertools.islice(batches, run.config.evaluate_batches)",
            "itertools.islice(batches, run.config.evaluate_batches and max(1, run.config.evaluate_batches - 1))",
        ),
    ),
    mutant(
        "val-limited-batches-drift",
        "EVAL-14",
        "jzhang38/TinyLlama#77: each evaluation sees other data",
        (
            "reference.training.evaluation:validate",
            "with averaged(run.bare):",
            'start = run.__dict__.get("evaluated", 0) % 2 if run.config.evaluate_batches else 0\n'
            '    run.__dict__["evaluated"] = start + 1\n'
            "    with averaged(run.bare):",
        ),
        (
            "reference.training.evaluation:validate",
            "itertools.islice(batches, run.config.evaluate_batches)",
            "itertools.islice(batches, start, run.config.evaluate_batches and run.config.evaluate_batches + start)",
        ),
    ),
    mutant(
        "val-tail-lost",
        "EVAL-15",
        "NKI-AI/direct#50, verl-project/verl#7467: what fills no window is not evaluated",
        (
            "reference.data.tokens:TokenData.passed_once",
            "windows = -(-(self.tokens - 1) // length)",
            "windows = max(1, (self.tokens - 1) // length)",
        ),
    ),
    mutant(
        "val-windows-of-rank-0",
        "EVAL-16",
        "Lightning-AI/litgpt#1971: the loss of rank 0",
        ("reference.training.evaluation:validate", "validation.once(run.fabric.global_rank,", "validation.once(0,"),
    ),
    mutant(
        "val-summed-in-16-bits",
        "EVAL-5",
        "Lightning-AI/pytorch-lightning#18620: 256 + 1 == 256",
        (
            "reference.training.evaluation:evaluate",
            "dtype=torch.float64",
            'dtype=torch.bfloat16 if "bf16" in fabric.strategy.precision.precision else torch.float64',
        ),
    ),
    mutant(
        "no-evaluation-at-the-end",
        "EVAL-17",
        "huggingface/transformers#44146, PrimeIntellect-ai/prime-rl#835",
        (FIT, "is_due(update, config.evaluate_every, last)", "is_due(update, config.evaluate_every, False)"),
    ),
    mutant(
        "evaluates-one-update-early",
        "EVAL-18",
        "OpenRLHF/OpenRLHF#131: log, evaluation and save steps are counted wrongly",
        (FIT, "is_due(update, config.evaluate_every, last)", "is_due(update + 1, config.evaluate_every, last)"),
    ),
    mutant(
        "val-mean-of-the-ranks-means",
        "EVAL-6",
        "PrimeIntellect-ai/prime-rl#1850, pytorch/torchtitan#2206: means are averaged, whatever they are of",
        (
            EVALUATE,
            'sums = reduce(fabric, sums, "sum")',
            """\
mean = reduce(fabric, (sums[0] / sums[1].clamp(min=1)).reshape(1), "mean")
    sums = torch.cat((mean, reduce(fabric, sums[1:].clone(), "sum").clamp(max=1)))""",
        ),
    ),
    mutant(
        "evaluates-every-k-since-the-resume",
        "EVAL-18",
        "OpenRLHF/OpenRLHF#131: evaluation steps are counted wrongly; here from the start of the resumed run",
        (FIT, "is_due(update, config.evaluate_every, last)", "is_due(update - done, config.evaluate_every, last)"),
    ),
    mutant(
        "val-first-batch-only-in-16-bits",
        "EVAL-4",
        "jzhang38/TinyLlama#77: a part of the data, here in one precision",
        (
            RUN,
            PART,
            "itertools.islice(batches, run.config.evaluate_batches or (1 if 'bf16' in run.config.precision else None))",
        ),
    ),
]
