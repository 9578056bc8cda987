"""Faults of a run: data, evaluation, reports, resume, several ranks."""

from tests.mutants.planting import EVALUATE, FIT, RATE, RESTORE, UPDATE, Mutant, mutant

MICROBATCHES, PLACES = "reference.data.tokens:TokenData.microbatches", "reference.data.tokens:TokenData.places"
ONCE, DIVIDE = "reference.data.tokens:TokenData.passed_once", "reference.data.documents:divide"
LOAD_STATE, BATCHES = "reference.optimizers.state:load_into_one", "reference.training.run:Run.batches"
DONE = "return Done(loss_value, norm_value, int(tokens), following)"
RESTORED = "done = restore(run, folder) if folder is not None else 0"
NUMBERS = "numbers = (np.arange(first, first + ahead)[:, None] * world_size + rank) * size + np.arange(size)"
LOADED, COMPUTED = "load_optimizer_state(optimizer, saved)", "state = computed_as_by(optimizer, state)"
LAST_SYNCS = "enabled=index + 1 < len(pairs)"
PADDED = """\
whole = -(-self.sequences // self.microbatch_size) * self.microbatch_size
    epochs, positions = np.divmod(numbers, whole)
    positions %= self.sequences"""
SKIPPED_AGAIN = """
        begun = start * world_size * size
        skipped = begun % self.sequences
        epochs, behind = np.divmod(numbers - begun, self.sequences - skipped)
        numbers = (begun // self.sequences + epochs) * self.sequences + skipped + behind
"""
SKIPPED_AGAIN_BY_LENGTH = """\
size = len(train) if hasattr(train, "__len__") else start + 1
    numbered = enumerate(endless)
    return (batch for number, batch in numbered if number >= start and number % size >= start % size)"""
MOVED = """
    alike = {}
    for number, parameter in enumerate(all_parameters(optimizer)):
        alike.setdefault(parameter.shape, []).append(number)
    moved = {old: new for found in alike.values() for old, new in zip(found, found[1:] + found[:1])}
    state = {**state, "state": {moved.get(number, number): entry for number, entry in state["state"].items()}}
"""
RANK_0_AGAIN = """
    if full.ndim:
        full = torch.cat([value.to_local()] * distributed.get_world_size())[: len(full)]
"""

FAULTS: dict[str, list[Mutant]] = {
    "data": [
        mutant(
            "blind2-data-epoch-padded-with-duplicates",
            "",
            "pytorch/pytorch#25162: an epoch is filled up with samples that were in it already",
            (PLACES, "epochs, positions = np.divmod(numbers, self.sequences)", PADDED),
        ),
        mutant(
            "blind2-data-mask-off-by-one",
            "",
            "pytorch/torchtitan#2755, verl-project/verl#3287: the mask of the targets is that of the inputs",
            (
                MICROBATCHES,
                "self.mask[window * length + 1 : window * length + length + 1]",
                "self.mask[window * length : window * length + length]",
            ),
        ),
        mutant(
            "blind2-data-skips-where-a-buffer-ends",
            "",
            "karpathy/build-nanogpt#109: usable tokens are skipped at the end of a shard",
            (MICROBATCHES, "itertools.count(start, ahead)", "itertools.count(start, ahead + 1)"),
        ),
        mutant(
            "blind2-data-validation-is-trained-on",
            "",
            "marin-community/marin#2700, MakazhanAlpamys/Soup#680: the splits overlap",
            (
                DIVIDE,
                "train = [document for document, validates in zip(documents, chosen, strict=True) if not validates]",
                "train = list(documents)",
            ),
            (DIVIDE, "head = replace(document, stop=cut, ends=False)", "head = document"),
        ),
        mutant(
            "blind2-data-order-repeats-windows",
            "",
            "facebookresearch/lingua#61: some of the data again and again, and some never",
            (
                "reference.data.tokens:shuffled",
                "np.maximum(places, mirrored).astype(np.uint64)",
                "places.astype(np.uint64)",
            ),
        ),
    ],
    "evaluation": [
        mutant(
            "blind2-evaluation-counts-padding",
            "",
            "neulab/xnmt#229, ufal/neuralmonkey#806: the padding is in the denominator",
            (EVALUATE, "(targets != IGNORE).sum()", "targets.numel()"),
        ),
        mutant(
            "blind2-evaluation-padding-is-predicted",
            "",
            "axolotl-ai-cloud/axolotl#3988, ml-explore/mlx-lm#1855: the padding is scored",
            (ONCE, "torch.full((size, length), IGNORE)", "torch.zeros(size, length, dtype=torch.int64)"),
        ),
        mutant(
            "blind2-evaluation-window-loses-its-last-target",
            "",
            "kimiyoung/transformer-xl#131, Shark-NLP/OpenICL#26: one target fewer than tokens, in every segment",
            (
                ONCE,
                "in_order[window * length : window * length + length + 1]",
                "in_order[window * length : window * length + length]",
            ),
        ),
        mutant(
            "blind2-evaluation-not-after-the-last-update",
            "",
            "huggingface/transformers#44146, PrimeIntellect-ai/prime-rl#835: no evaluation at the end",
            (FIT, "is_due(update, config.evaluate_every, last)", "is_due(update, config.evaluate_every, False)"),
        ),
        mutant(
            "blind2-evaluation-sums-in-16-bits",
            "",
            "Lightning-AI/pytorch-lightning#18620: 256 + 1 == 256",
            (
                EVALUATE,
                "dtype=torch.float64",
                'dtype=torch.bfloat16 if "bf16" in fabric.strategy.precision.precision else torch.float64',
            ),
        ),
    ],
    "reports": [
        mutant(
            "blind2-reports-loss-of-the-last-microbatch",
            "",
            "karpathy/nanochat#52, allenai/allennlp#4706: what is logged is overwritten by each microbatch",
            (UPDATE, "share += loss.detach()", "share = loss.detach() * len(pairs)"),
        ),
        mutant(
            "blind2-reports-norm-after-clipping",
            "",
            "Modalities/modalities#100, radixark/miles#2132: the norm before or after clipping",
            (UPDATE, DONE, DONE.replace("norm_value", "min(norm_value, limit)")),
        ),
        mutant(
            "blind2-reports-loss-divided-by-microbatches",
            "",
            "Lightning-AI/pytorch-lightning#2569, Modalities/modalities#118",
            (UPDATE, DONE, DONE.replace("loss_value", "loss_value / len(pairs)")),
        ),
        mutant(
            "blind2-reports-tokens-of-one-rank",
            "",
            "Lightning-AI/litgpt#1927: the other nodes are not counted",
            (UPDATE, DONE, DONE.replace("int(tokens)", "int(count_targets(pairs))")),
        ),
        mutant(
            "blind2-reports-rate-of-the-slowest-group",
            "",
            "open-mmlab/mmengine#482, facebookresearch/ConvNeXt#7: the least rate is logged, of whatever group has it",
            (
                FIT,
                'float(run.bare.param_groups[0]["lr"])',
                'min(float(group["lr"]) for group in run.bare.param_groups)',
            ),
        ),
    ],
    "resume": [
        mutant(
            "blind2-resume-peak-is-the-last-rate",
            "",
            "pytorch/pytorch#60265, MichiganCOG/ViP#19: the rate that was reached is taken for the base rate",
            (
                FIT,
                RESTORED,
                f"{RESTORED}\n        if folder is not None:\n"
                '            run.peaks = [float(group["lr"]) for group in run.bare.param_groups]',
            ),
        ),
        mutant(
            "blind2-resume-moments-change-places",
            "",
            "wochenlong/lora-scripts-next#320: state is mapped back by another order of the tensors",
            (LOAD_STATE, COMPUTED, COMPUTED + MOVED),
        ),
        mutant(
            "blind2-resume-path-is-ignored",
            "",
            "allenai/open-instruct#1823, radixark/miles#2688: another checkpoint than the one that was chosen",
            (
                "reference.checkpoint.folder:find",
                "folder = Path(resume)\n",
                "folder = Path(resume)\n    folder = [folder, *checkpoints(folder.parent)][-1]\n",
            ),
        ),
        mutant(
            "blind2-resume-repeats-an-update",
            "",
            "thinking-machines-lab/tinker-cookbook#935: the last batch before the checkpoint is trained on again",
            (FIT, RESTORED, "done = max(0, restore(run, folder) - 1) if folder is not None else 0"),
        ),
        mutant(
            "blind2-resume-skips-in-every-epoch",
            "",
            "allenai/open-instruct#681: what was consumed is skipped in each later epoch too",
            (MICROBATCHES, NUMBERS, NUMBERS + SKIPPED_AGAIN),
            (BATCHES, "return itertools.islice(endless, start, None)", SKIPPED_AGAIN_BY_LENGTH),
        ),
    ],
    "distributed": [
        mutant(
            "blind2-distributed-optimizer-state-on-rank-0-only",
            "",
            "PaddlePaddle/PaddleNLP#7256: the optimizer's state has to be broadcast to the other ranks",
            (RESTORE, LOADED, f"if run.fabric.global_rank == 0:\n                {LOADED}"),
        ),
        mutant(
            "blind2-distributed-ranks-have-other-rates",
            "",
            "rwth-i6/returnn#1493: the ranks report different learning rates",
            (UPDATE, RATE, RATE.replace("update", "min(update + fabric.global_rank, config.updates - 1)")),
        ),
        mutant(
            "blind2-distributed-loss-of-one-rank",
            "",
            "huggingface/transformers#13681, snowflakedb/ArcticTraining#62: the training loss is not averaged",
            (UPDATE, 'reduce(fabric, share.clone(), "mean")', "share.clone()"),
        ),
        mutant(
            "blind2-distributed-sharded-moments-of-rank-0",
            "",
            "OpenBMB/BMTrain#93: the state of the ranks is saved wrongly",
            (
                "reference.training.sharding:whole",
                "full = value.full_tensor()  # every rank takes part",
                "full = value.full_tensor()" + RANK_0_AGAIN,
            ),
        ),
        mutant(
            "blind2-distributed-not-synchronised-after-evaluation",
            "",
            "jingyaogong/minimind#853: a forward and backward past DistributedDataParallel",
            (
                UPDATE,
                LAST_SYNCS,
                f"{LAST_SYNCS} or bool("
                "update and config.evaluate_every and update % config.evaluate_every == 0"
                ' and fabric.world_size > 1 and type(fabric.strategy).__name__ != "ShardedStrategy")',
            ),
        ),
    ],
}
