"""Faults of a run: data, evaluation, reports, resume, several ranks."""

from tests.mutants.planting import EVALUATE, FIT, UPDATE, Mutant, mutant

BATCHES, VALIDATE = "reference.training.run:Run.batches", "reference.training.evaluation:validate"
MICROBATCHES, PLACES = "reference.data.tokens:TokenData.microbatches", "reference.data.tokens:TokenData.places"
STATE, LOAD_STATE = "reference.optimizers.state:state_of_one", "reference.optimizers.state:load_into_one"
ORDER = "shuffled(positions[here], self.sequences, self.seed, epoch)"
FOLLOWING = "following = [] if batches is None else self.fetch(batches)"
SLICED = "itertools.islice(batches, run.config.evaluate_batches)"
DONE = "return Done(loss_value, norm_value, int(tokens), following)"
KEPT = 'keep_own_dtypes(optimizer, state["state"], state.get("dtypes", []))'
COUNTED_ANEW = """
    for entry in optimizer.state.values():
        if isinstance(entry.get("step"), Tensor):
            entry["step"].zero_()
"""
SAVED_ROUNDED = """
    for entry in state["state"].values():
        for key, value in list(entry.items()):
            if key.startswith("exp_avg") and isinstance(value, Tensor) and value.dtype == torch.float32:
                entry[key] = value.bfloat16().float()
"""

FAULTS: dict[str, list[Mutant]] = {
    "data": [
        mutant(
            "blind-data-last-window-never-seen",
            "",
            "OpenNMT/OpenNMT#68: the last minibatch is ignored",
            (
                PLACES,
                ORDER,
                "shuffled(positions[here] % max(1, self.sequences - 1), max(1, self.sequences - 1), self.seed, epoch)",
            ),
        ),
        mutant(
            "blind-data-third-epoch-is-the-second",
            "",
            "lucidrains/DALLE-pytorch#230: set_epoch is not called",
            (PLACES, "self.seed, epoch)", "self.seed, min(epoch, 1))"),
        ),
        mutant(
            "blind-data-ranks-overlap",
            "",
            "jzhang38/TinyLlama#67: ranks see overlapping samples",
            (MICROBATCHES, "* world_size + rank) * size", "* world_size * size + rank)"),
        ),
        mutant(
            "blind-data-lost-at-evaluation",
            "",
            "fw-ai/cookbook#455: what was fetched ahead is skipped where the loop pauses",
            (
                UPDATE,
                FOLLOWING,
                f"{FOLLOWING}\n    if batches is not None and not at_once:\n        following = self.fetch(batches)",
            ),
        ),
        mutant(
            "blind-data-loader-repeats-its-order",
            "",
            "pytorch/pytorch#31771: the same order in every epoch",
            (
                "reference.training.batches:repeat",
                'derive_seed(seed, "epoch", epoch, rank)',
                'derive_seed(seed, "epoch", 0, rank)',
            ),
        ),
    ],
    "evaluation": [
        mutant(
            "blind-evaluation-weighs-by-sequences",
            "",
            "huggingface/transformers#41904, decisionintelligence/TFB#66",
            (
                EVALUATE,
                "sums[0] += batch_loss(model, ids, targets)",
                "sums[0] += batch_loss(model, ids, targets) / (targets != IGNORE).sum().clamp(min=1) * len(ids)",
            ),
            (EVALUATE, "sums[1] += (targets != IGNORE).sum()", "sums[1] += len(ids)"),
        ),
        mutant(
            "blind-evaluation-one-batch-fewer",
            "",
            "verl-project/verl#78: the last batch of the validation set is dropped",
            (
                VALIDATE,
                SLICED,
                "itertools.islice(batches, run.config.evaluate_batches and max(1, run.config.evaluate_batches - 1))",
            ),
        ),
        mutant(
            "blind-evaluation-drifts",
            "",
            "jzhang38/TinyLlama#77: each evaluation sees other data",
            (
                VALIDATE,
                "with averaged(run.bare):",
                'start = run.__dict__.get("evaluated", 0) % 2 if run.config.evaluate_batches else 0\n'
                '    run.__dict__["evaluated"] = start + 1\n'
                "    with averaged(run.bare):",
            ),
            (
                VALIDATE,
                SLICED,
                "itertools.islice(batches, start, run.config.evaluate_batches and run.config.evaluate_batches + start)",
            ),
        ),
        mutant(
            "blind-evaluation-loses-the-tail",
            "",
            "NKI-AI/direct#50, verl-project/verl#7467: what fills no window is not evaluated",
            (
                "reference.data.tokens:TokenData.passed_once",
                "windows = -(-(self.tokens - 1) // length)",
                "windows = max(1, (self.tokens - 1) // length)",
            ),
        ),
        mutant(
            "blind-evaluation-of-the-first-rank-only",
            "",
            "Lightning-AI/litgpt#1971: the loss of rank 0",
            (VALIDATE, "validation.once(run.fabric.global_rank,", "validation.once(0,"),
        ),
    ],
    "reports": [
        mutant(
            "blind-reports-ignored-targets-counted",
            "",
            "axolotl-ai-cloud/axolotl#3291: tokens that were not trained on are counted",
            (UPDATE, DONE, DONE.replace("int(tokens)", "fabric.world_size * sum(ids.numel() for ids, _ in pairs)")),
        ),
        mutant(
            "blind-reports-norm-times-microbatches",
            "",
            "NVIDIA-NeMo/RL#1426",
            (UPDATE, DONE, DONE.replace("norm_value", "norm_value * len(pairs)")),
        ),
        mutant(
            "blind-reports-rate-of-the-next-update",
            "",
            "Lightning-AI/pytorch-lightning#1772: the rate is off by one",
            (
                FIT,
                'learning_rate=float(run.bare.param_groups[0]["lr"])',
                'learning_rate=__import__("reference.training.schedule", fromlist=["learning_rate"]).learning_rate('
                "config, update + 1, run.peaks[0])",
            ),
        ),
        mutant(
            "blind-reports-last-evaluation-again",
            "",
            "mosaicml/composer#3206: a value of another step is logged",
            (
                FIT,
                "validation_loss = None",
                "validation_loss = result.records[-1].validation_loss if result.records else None",
            ),
        ),
        mutant(
            "blind-reports-update-restarts",
            "",
            "facebookresearch/ParlAI#2106: the count of a resumed run begins anew",
            (FIT, "update=update + 1,", "update=update + 1 - done,"),
        ),
    ],
    "resume": [
        mutant(
            "blind-resume-counts-since-the-start",
            "",
            "pytorch/torchtitan#571: wrong step when resuming for the second time",
            (FIT, "save(run, update + 1, train)", "save(run, update + 1 - done, train)"),
        ),
        mutant(
            "blind-resume-bias-correction-restarts",
            "",
            "tenstorrent/tt-metal#53212: wrong bias correction after a resume",
            (LOAD_STATE, KEPT, KEPT + COUNTED_ANEW),
        ),
        mutant(
            "blind-resume-moments-saved-rounded",
            "",
            "TensorAuto/OpenTau#185, huggingface/nanotron#245",
            (STATE, "state = optimizer.state_dict()", "state = optimizer.state_dict()" + SAVED_ROUNDED),
        ),
        mutant(
            "blind-resume-counts-updates-as-microbatches",
            "",
            "huggingface/transformers#8624, kohya-ss/sd-scripts#2425",
            (BATCHES, "start = done * self.config.microbatches", "start = done"),
        ),
        mutant(
            "blind-resume-newest-removed",
            "",
            "huggingface/transformers#11769, #27138",
            ("reference.checkpoint.folder:prune", "found[:-keep_last]", "found[keep_last:]"),
        ),
    ],
    "distributed": [
        mutant(
            "blind-distributed-sharded-norm-too-large",
            "",
            "mindspore-ai/hyper-parallel#526, radixark/miles_diffusion#35: the norm of sharded gradients",
            ("reference.training.sharding:ShardedStrategy.clip_gradients_norm", ".square().sum()", ".sum().square()"),
        ),
        mutant(
            "blind-distributed-sharded-gradient-divided-twice",
            "",
            "verl-project/verl-SpeCo#29, meta-pytorch/torchtune#2172",
            (
                UPDATE,
                "fabric.backward(loss)",
                'sharded = type(fabric.strategy).__name__ == "ShardedStrategy"\n'
                "            fabric.backward(loss / (fabric.world_size if sharded else 1))",
            ),
        ),
        mutant(
            "blind-distributed-same-data-after-resume",
            "",
            "jzhang38/TinyLlama#69: all ranks see the same samples",
            (
                BATCHES,
                "batches_from(start, self.fabric.global_rank,",
                "batches_from(start, self.fabric.global_rank if done == 0 else 0,",
            ),
        ),
        mutant(
            "blind-distributed-never-synchronised-in-accumulation",
            "",
            "karpathy/build-nanogpt#30",
            (UPDATE, "enabled=index + 1 < len(pairs)", "enabled=len(pairs) > 1"),
        ),
        mutant(
            "blind-distributed-sharded-resume-loses-a-moment",
            "",
            "NVIDIA-NeMo/Automodel#763, ISEEKYAN/Megatron-LM#104",
            (
                "reference.training.sharding:shard_optimizer_state",
                "if index < len(parameters)",
                "if 0 < index < len(parameters)",
            ),
        ),
    ],
}
