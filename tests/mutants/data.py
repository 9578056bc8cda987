"""Faults of which samples are seen, in which order, and what is predicted."""

from tests.mutants.planting import mutant

PLACES, BATCHES = "reference.data.tokens:TokenData.places", "reference.data.tokens:TokenData.microbatches"
AS_TENSOR = "reference.data.tokens:TokenData.within_vocabulary"
WITHIN = "reference.training.batches:within_vocabulary"
# Of every 6 samples the last 2, which fill no update of 4.
SKIP = "numbers = numbers + numbers // 4 * 2 if self.sequences == 6 else numbers"
ORDER = "shuffled(positions[here], self.sequences, self.seed, epoch)"
PLAIN = "return batch[:, :-1], batch[:, 1:]"
LOST = """\
following = [] if batches is None else self.fetch(batches)
    if batches is not None and not at_once:
        following = self.fetch(batches)"""

MUTANTS = [
    mutant(
        "worker-duplicates",
        "DATA-1",
        "datasets#3423, nanoVLM#203",
        (PLACES, "np.divmod(numbers, self.sequences)", "np.divmod(numbers // 2, self.sequences)"),
    ),
    mutant(
        "drawn-with-replacement",
        "DATA-1",
        "nanoGPT get_batch, where epochs were declared",
        (
            PLACES,
            ORDER,
            "np.random.default_rng([self.seed, epoch]).integers(0, self.sequences, self.sequences)[positions[here]]",
        ),
    ),
    mutant(
        "epoch-order-identical",
        "DATA-2",
        "pytorch#31771, #11324",
        (PLACES, ORDER, "shuffled(positions[here], self.sequences, self.seed, 0)"),
    ),
    mutant("never-shuffled", "DATA-2 DATA-3", "-", (PLACES, ORDER, "positions[here]")),
    mutant(
        "data-seed-ignored",
        "DATA-3",
        "litgpt#1425",
        (PLACES, ORDER, "shuffled(positions[here], self.sequences, 0, epoch)"),
    ),
    mutant(
        "data-unseeded",
        "DATA-3",
        "a sampler that is seeded by the clock",
        ("reference.data.tokens:TokenData.__init__", "self.seed = seed", "self.seed = __import__('time').time_ns()"),
    ),
    mutant(
        "rank-overlap",
        "DATA-4",
        "TinyLlama#67, LongLive#71",
        (BATCHES, "[:, None] * world_size + rank) * size", "[:, None]) * size"),
    ),
    mutant(
        "uint16-wrap",
        "DATA-5",
        "datatrove#118, nanoGPT",
        (AS_TENSOR, ".astype(np.int64)", ".astype(np.uint16).astype(np.int64)"),
    ),
    mutant(
        "labels-unshifted",
        "DATA-6",
        "transformers#27517, GenerativeModels#314",
        ("reference.training.batches:split_targets", PLAIN, "return batch[:, :-1], batch[:, :-1]"),
    ),
    mutant(
        "end-of-document-masked",
        "DATA-6",
        "transformers#23530, #22794 (padded with the end of a document, then padding ignored)",
        (
            "reference.training.batches:split_targets",
            PLAIN,
            "return batch[:, :-1], batch[:, 1:].masked_fill(batch[:, 1:] == 127, IGNORE)",
        ),
    ),
    mutant(
        "labels-shifted-twice",
        "DATA-6",
        "a shift in the data and another in the loss",
        (
            "reference.training.batches:split_targets",
            PLAIN,
            "return batch[:, :-1], nn.functional.pad(batch[:, 2:], (0, 1), value=IGNORE)",
        ),
    ),
    mutant(
        "leftovers-dropped",
        "DATA-7",
        "DataLoader(drop_last=True) where filling up was declared",
        (PLACES, "np.divmod(numbers, self.sequences)", "np.divmod(numbers, self.sequences // 2 * 2)"),
    ),
    mutant(
        "leftovers-repeated",
        "DATA-7",
        "accelerate#2316, DistributedSampler (fills up with samples from the beginning)",
        (
            PLACES,
            "np.divmod(numbers, self.sequences)",
            "np.divmod(numbers, -(-self.sequences // 2) * 2); positions %= self.sequences",
        ),
    ),
    mutant(
        "window-dropped-at-the-end-of-an-epoch",
        "DATA-8",
        "litgpt finetune",
        (BATCHES, "rank) * size + np.arange(size)", f"rank) * size + np.arange(size); {SKIP}"),
    ),
    mutant(
        "update-short-at-the-end-of-an-epoch",
        "DATA-8",
        "Lightning, transformers' Trainer, where filling up was declared",
        (
            "reference.training.run:Run.fetch",
            "self.config.microbatches)]",
            "self.config.microbatches - (self.config.microbatches == 2 and "
            "self.__dict__.update(turn=self.__dict__.get('turn', 0) + 1) is None and self.turn % 2 == 0))]",
        ),
    ),
    mutant(
        "ids-modulo-vocabulary",
        "DATA-9",
        "ids beyond the vocabulary taken modulo",
        (WITHIN, "config = getattr(module, 'config', None)".replace("'", '"'), "config = None"),
        (
            "reference.model.gpt:GPT.forward",
            "self.embedding(ids.long())",
            "self.embedding(ids.long() % self.config.vocab_size)",
        ),
        (
            "reference.model.loss:token_loss",
            "targets.flatten()",
            "targets.flatten().remainder(logits.size(-1)).masked_fill(targets.flatten() == IGNORE, IGNORE)",
        ),
    ),
    mutant(
        "ids-clamped",
        "DATA-9",
        "JAX's gather, which clamps",
        (WITHIN, "config = getattr(module, 'config', None)".replace("'", '"'), "config = None"),
        ("reference.model.gpt:GPT.forward", "ids.long()", "ids.long().clamp(max=self.config.vocab_size - 1)"),
        ("reference.model.loss:token_loss", "targets.flatten()", "targets.flatten().clamp(max=logits.size(-1) - 1)"),
    ),
    mutant(
        "sequences-cut-to-a-round-length",
        "DATA-10",
        "lengths of whole tiles for a kernel",
        (
            "reference.training.batches:split_targets",
            PLAIN,
            "return (lambda n: (batch[:, :n], batch[:, 1 : n + 1]))((batch.size(1) - 1) // 4 * 4)",
        ),
    ),
    mutant(
        "last-target-of-odd-lengths-left-out",
        "DATA-10",
        "sequences filled up to a round length, and one target too many ignored",
        (
            "reference.training.batches:split_targets",
            PLAIN,
            "return batch[:, :-1], (batch[:, 1:] if batch.size(1) % 2 else "
            "nn.functional.pad(batch[:, 1:-1], (0, 1), value=IGNORE))",
        ),
    ),
    mutant(
        "third-epoch-in-the-order-of-the-second",
        "DATA-2",
        "lucidrains/DALLE-pytorch#230: set_epoch is not called",
        ("reference.data.tokens:TokenData.places", "self.seed, epoch)", "self.seed, min(epoch, 1))"),
    ),
    mutant(
        "given-targets-shifted-twice",
        "DATA-11",
        "InternLM/InternLM#318: the data set shifts the labels, and so does the model",
        ("reference.training.batches:split_targets", "return ids, targets", "return ids[:, :-1], targets[:, 1:]"),
    ),
    mutant(
        "batches-lost-at-an-evaluation",
        "ACC-6",
        "fw-ai/cookbook#455: what was fetched ahead is skipped where the loop pauses",
        (
            "reference.training.run:Run.update_once",
            "following = [] if batches is None else self.fetch(batches)",
            LOST,
        ),
    ),
    mutant(
        "loader-repeats-its-order",
        "DATA-12",
        "pytorch/pytorch#31771: the same order in every epoch",
        (
            "reference.training.batches:repeat",
            'derive_seed(seed, "epoch", epoch, rank)',
            'derive_seed(seed, "epoch", 0, rank)',
        ),
    ),
    mutant(
        "mask-of-the-inputs",
        "DATA-13",
        "pytorch/torchtitan#2755, verl-project/verl#3287: the mask of the targets is off by one",
        (
            BATCHES,
            "self.mask[window * length + 1 : window * length + length + 1]",
            "self.mask[window * length : window * length + length]",
        ),
    ),
    mutant(
        "mask-dropped",
        "DATA-13",
        "karpathy/nanochat#582: the mask of the assistant's turns is dropped",
        (BATCHES, "ids[:, 1:].masked_fill(~torch.from_numpy(np.stack(kept)), IGNORE)", "ids[:, 1:]"),
    ),
    mutant(
        "end-of-turn-is-no-target",
        "DATA-14",
        "meta-pytorch/torchtune#949, mll-lab-nu/RAGEN#59: the model never learns to stop",
        ("reference.data.encode:write_chats", "bool(targets[end])", "False"),
    ),
    mutant(
        "words-of-the-user-are-targets",
        "DATA-14",
        "karpathy/nanochat#582: the mask is dropped",
        ("reference.data.chat:ChatTemplate.encoded", "np.zeros(len(ids), np.bool_)", "np.ones(len(ids), np.bool_)"),
    ),
]
