"""Faults of what a run reports: the training is right, and the numbers about it are not."""

from tests.mutants.planting import FIT, UPDATE, mutant

DONE = "return Done(loss_value, norm_value, int(tokens), following)"

MUTANTS = [
    mutant(
        "reported-loss-not-divided",
        "REPORT-1",
        "transformers#35204",
        (UPDATE, "Done(loss_value, ", "Done(loss_value * len(pairs), "),
    ),
    mutant(
        "reported-loss-of-the-last-microbatch",
        "REPORT-1",
        "allennlp#4706, nanoGPT train.py",
        (UPDATE, "share += loss.detach()", "share = loss.detach() * len(pairs)"),
    ),
    mutant(
        "reported-rate-of-the-next-update",
        "REPORT-2",
        "transformers#35942",
        (
            FIT,
            'float(run.bare.param_groups[0]["lr"])',
            "run.peaks[0] * (update + 2) / (config.warmup + 1)",
        ),
    ),
    mutant(
        "reported-norm-after-clipping",
        "REPORT-3",
        "ray#4965",
        (UPDATE, "assert norm is not None", "norm = norm.clamp(max=limit)"),
    ),
    mutant(
        "reported-norm-times-microbatches",
        "REPORT-3",
        "NVIDIA-NeMo/RL#1426",
        (
            "reference.training.run:Run.update_once",
            DONE,
            "return Done(loss_value, norm_value * len(pairs), int(tokens), following)",
        ),
    ),
    mutant(
        "ignored-targets-counted",
        "REPORT-4",
        "axolotl-ai-cloud/axolotl#3291: tokens that were not trained on are counted",
        (
            "reference.training.run:Run.update_once",
            DONE,
            "return Done(loss_value, norm_value, fabric.world_size * sum(ids.numel() for ids, _ in pairs), following)",
        ),
    ),
    mutant(
        "evaluation-logged-again",
        "REPORT-5",
        "mosaicml/composer#3206: a value of another step is logged",
        (
            "reference.training.trainer:Trainer.fit",
            "validation_loss = None",
            "validation_loss = result.records[-1].validation_loss if result.records else None",
        ),
    ),
    mutant(
        "reported-update-restarts",
        "REPORT-6",
        "facebookresearch/ParlAI#2106: the count of a resumed run begins anew",
        ("reference.training.trainer:Trainer.fit", "update=update + 1,", "update=update + 1 - done,"),
    ),
    mutant(
        "loss-summed-in-16-bits",
        "REPORT-1",
        "pytorch/xla#2425: losses are added up in bfloat16",
        (
            "reference.training.run:Run.update_once",
            "share = torch.zeros((), device=device)",
            'share = torch.zeros((), device=device, dtype=torch.bfloat16 if "bf16" in config.precision else None)',
        ),
    ),
    mutant(
        "reported-loss-of-rank-0",
        "REPORT-7",
        "huggingface/transformers#13681, snowflakedb/ArcticTraining#62: the training loss is not averaged",
        (UPDATE, 'reduce(fabric, share.clone(), "mean")', "share.clone()"),
    ),
    mutant(
        "reported-targets-of-rank-0",
        "REPORT-4",
        "Lightning-AI/litgpt#1927: the other nodes are not counted",
        (UPDATE, DONE, DONE.replace("int(tokens)", "int(count_targets(pairs))")),
    ),
    mutant(
        "reported-loss-since-the-start",
        "REPORT-8",
        "kohya-ss/musubi-tuner#79, allenai/allennlp#1706: an average over all that was trained so far",
        (
            FIT,
            "loss=did.loss,",
            'loss=run.__dict__.setdefault("losses", []).append(did.loss) or sum(run.losses) / len(run.losses),',
        ),
    ),
    mutant(
        "reported-update-counts-microbatches",
        "REPORT-9",
        "awslabs/slapo#31, deepspeedai/DeepSpeed#2603: what is counted as a step is a microbatch",
        (FIT, "update=update + 1,", "update=(update + 1) * config.microbatches,"),
    ),
    mutant(
        "reported-loss-is-a-mean-of-means",
        "REPORT-1",
        "huggingface/transformers#35204: the loss is right in the gradient, and another one in the report",
        (
            UPDATE,
            "share += loss.detach()",
            "share += loss.detach() / scale / (targets != -100).sum().clamp(min=1) / len(pairs)",
        ),
    ),
    mutant(
        "reported-loss-weighs-ranks-alike",
        "REPORT-7",
        "PrimeIntellect-ai/prime-rl#1850: means of ranks are averaged, whatever they are of",
        (
            UPDATE,
            'reduce(fabric, share.clone(), "mean")',
            'reduce(fabric, share * shared[0] / count_targets(pairs).clamp(min=1) / fabric.world_size, "mean")',
        ),
    ),
    *(
        mutant(
            f"reported-{what}-of-the-update-before",
            clause,
            "mosaicml/composer#3206: a value of another step is logged",
            (FIT, f"={value},", f'=run.__dict__.setdefault("told", [{value}]).append({value}) or run.told[-2],'),
        )
        for what, clause, value in (
            ("rate", "REPORT-2", 'float(run.bare.param_groups[0]["lr"])'),
            ("norm", "REPORT-3", "did.gradient_norm"),
            ("targets", "REPORT-4", "did.tokens"),
            ("loss", "REPORT-9", "did.loss"),
        )
    ),
]
