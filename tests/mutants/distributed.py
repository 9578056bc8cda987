"""Faults of several ranks."""

from tests.mutants.planting import RESTORE, UPDATE, mutant

BATCHES = "reference.data.tokens:TokenData.microbatches"
NUMBERS = "rank) * size + np.arange(size)"
SHARD = "reference.training.sharding:ShardedStrategy"
LOSS = "loss = batch_loss(self.wrapped, ids, targets) * scale"

MUTANTS = [
    mutant(
        "rank-decays-otherwise",
        "DIST-1",
        "a setting that is read on rank 0 only",
        (
            UPDATE,
            "    self.optimizer.step()\n",
            "    [g.update(weight_decay=0.0) for g in self.bare.param_groups if fabric.global_rank]\n"
            "    self.optimizer.step()\n",
        ),
    ),
    mutant(
        "ranks-clip-apart",
        "CLIP-4",
        "DeepSpeed#1801",
        (
            UPDATE,
            'limit = config.clip or float("inf")',
            'limit = (config.clip or float("inf")) * (1 + fabric.global_rank)',
        ),
    ),
    mutant(
        "replicas-average-their-weights-late",
        "DIST-1 DIST-2",
        "local SGD where every update was to be exchanged",
        (UPDATE, "enabled=index + 1 < len(pairs)", "enabled=index + 1 < len(pairs) or update % 2"),
    ),
    mutant(
        "ranks-summed-from-the-second-update-on",
        "DIST-2",
        "burn#5695 (world size counted twice), after the first update",
        (UPDATE, LOSS, f"{LOSS} * (fabric.world_size if update else 1)"),
    ),
    mutant(
        "rank-one-batch-ahead",
        "DIST-3",
        "openspeech#149",
        (
            "reference.training.run:Run.batches",
            "itertools.islice(endless, start, None)",
            "itertools.islice(endless, start + self.fabric.global_rank, None)",
        ),
    ),
    mutant(
        "ranks-on-the-same-batches",
        "DIST-3",
        "TinyLlama#67, LongLive#71",
        (
            "reference.training.run:Run.fetch",
            "split_targets(b, self.fabric.device)",
            "split_targets((self.fabric.world_size > 1 and isinstance(b, Tensor) and "
            "torch.distributed.broadcast(b, 0), b)[1], self.fabric.device)",
        ),
    ),
    mutant(
        "dropout-masks-shared-by-ranks",
        "DIST-4",
        "mlcommons/training#844",
        (UPDATE, "derive_seed(config.seed, update, fabric.global_rank)", "derive_seed(config.seed, update, 0)"),
    ),
    mutant(
        "ranks-save-no-state",
        "DIST-5",
        "DeepSpeed#7786",
        (
            "reference.training.saving:save",
            "packed or optimizer_state(run.bare)",
            "packed or (None if run.fabric.world_size > 1 else optimizer_state(run.bare))",
        ),
    ),
    mutant(
        "state-loaded-on-one-rank",
        "DIST-6",
        "a checkpoint that reaches one rank only",
        (
            RESTORE,
            "load_optimizer_state(optimizer, saved)",
            "run.fabric.global_rank or load_optimizer_state(optimizer, saved)",
        ),
    ),
    mutant(
        "weights-loaded-on-one-rank",
        "DIST-6",
        "DDP broadcasts when it wraps, and not again",
        (
            RESTORE,
            "checkpoint.load_model(folder, run.module)",
            "run.fabric.global_rank or checkpoint.load_model(folder, run.module)",
        ),
    ),
    mutant(
        "rank-leftovers-repeated",
        "DIST-7",
        "accelerate#2316, DistributedSampler",
        (BATCHES, NUMBERS, f"{NUMBERS}; numbers = numbers // 8 * 7 + numbers % 8 % 7 if world_size > 1 else numbers"),
    ),
    mutant(
        "rank-leftovers-dropped",
        "DIST-7",
        "DistributedSampler(drop_last=True) where filling up was declared",
        (BATCHES, NUMBERS, f"{NUMBERS}; numbers = numbers // 6 * 7 + numbers % 6 if world_size > 1 else numbers"),
    ),
    mutant(
        "each-shard-drawn-by-its-rank",
        "DIST-8",
        "litgpt#269",
        (
            f"{SHARD}.shard",
            "    fully_shard(module, mesh=ranks)\n",
            "    [p.data.mul_(1 + 0.1 * distributed.get_rank()) for p in module.parameters()]\n"
            "    fully_shard(module, mesh=ranks)\n",
        ),
    ),
    mutant(
        "shards-clipped-apart",
        "DIST-9",
        "pytorch#72548, torchtitan#766",
        (f"{SHARD}.clip_gradients_norm", "    distributed.all_reduce(squares)\n", ""),
    ),
    mutant(
        "sharded-gradients-summed",
        "DIST-9",
        "burn#5695",
        (UPDATE, LOSS, f"{LOSS} * (fabric.world_size if config.strategy == 'fsdp' else 1)"),
    ),
    mutant(
        "shards-joined-in-another-order",
        "DIST-10",
        "parts of a checkpoint joined in the order of their names",
        ("reference.training.sharding:whole", "full.cpu() if", "full.cpu().roll(len(full) // 2, 0) if"),
    ),
    mutant(
        "state-of-another-shard",
        "DIST-11",
        "state split from another end than the parameter",
        (
            "reference.training.sharding:split_like",
            "return distribute_tensor(here,",
            "return distribute_tensor(here.roll(len(here) // 2, 0),",
        ),
    ),
    mutant(
        "ranks-share-data-after-a-resume",
        "DIST-12",
        "jzhang38/TinyLlama#69: all ranks see the same samples",
        (
            "reference.training.run:Run.batches",
            "batches_from(start, self.fabric.global_rank,",
            "batches_from(start, self.fabric.global_rank if done == 0 else 0,",
        ),
    ),
    mutant(
        "sharded-gradients-raised-to-the-limit",
        "DIST-9",
        "pytorch/pytorch#72548: clipping of sharded gradients, written by hand",
        (
            "reference.training.sharding:ShardedStrategy.clip_gradients_norm",
            "(max_norm / (norm + 1e-6)).clamp(max=1.0)",
            '(max_norm / (norm + 1e-6)) if max_norm < float("inf") else torch.ones_like(norm)',
        ),
    ),
]
