"""Faults of the gradient of one update: split into microbatches, over ranks, and over tokens."""

from tests.mutants.planting import UPDATE, mutant

LOSS = "loss = batch_loss(self.wrapped, ids, targets) * scale"
COUNT = "shared[0].clamp(min=1)"
NO_SYNC = """\
        with fabric.no_backward_sync(self.wrapped, enabled=index + 1 < len(pairs)):
            loss = batch_loss(self.wrapped, ids, targets) * scale if early is None else early * scale
            fabric.backward(loss)
"""
OUTSIDE = """\
        with fabric.no_backward_sync(self.wrapped, enabled=True):
            loss = batch_loss(self.wrapped, ids, targets) * scale
        with fabric.no_backward_sync(self.wrapped, enabled=index + 1 < len(pairs)):
            fabric.backward(loss)
"""
FORWARD = "reference.model.gpt:GPT.forward"

MUTANTS = [
    mutant(
        "accum-not-divided",
        "ACC-1",
        "nanoGPT#168, #206",
        (UPDATE, LOSS, LOSS + " * len(pairs)"),
    ),
    mutant(
        "accum-gradients-cleared",
        "ACC-1",
        "zero_grad() inside the loop over microbatches",
        (UPDATE, "fabric.backward(loss)", "self.wrapped.zero_grad(); fabric.backward(loss)"),
    ),
    mutant(
        "accum-mean-of-means",
        "ACC-2",
        "transformers#34191, torchtune#1878",
        (UPDATE, LOSS, "loss = batch_loss(self.wrapped, ids, targets) / (targets != -100).sum() / len(pairs)"),
    ),
    mutant(
        "rank-mean-of-means",
        "ACC-4",
        "transformers#34242, #34373",
        (UPDATE, COUNT, "(count_targets(pairs) * fabric.world_size).clamp(min=1)"),
    ),
    mutant("no-sync-order", "ACC-3", "build-nanogpt#30", (UPDATE, NO_SYNC, OUTSIDE)),
    mutant("no-sync-always", "ACC-3", "litgpt 9892d1b8", (UPDATE, "enabled=index + 1 < len(pairs)", "enabled=True")),
    mutant(
        "ddp-bypassed",
        "ACC-3",
        "minimind#853, openvla-oft#160",
        (
            "reference.model.loss:batch_loss",
            "return token_loss(model(ids), targets)",
            "bare = model._forward_module; return token_loss(getattr(bare, 'module', bare)(ids), targets)",
        ),
    ),
    mutant(
        "rank-gradients-summed",
        "ACC-3",
        "burn#5695 (world size counted twice)",
        (UPDATE, "scale = fabric.world_size / shared", "scale = fabric.world_size**2 / shared"),
    ),
    mutant(
        "chunked-ce-ignore-index",
        "ACC-5",
        "litgpt#751",
        ("reference.training.batches:count_targets", "(targets != IGNORE).sum()", "torch.tensor(targets.numel())"),
    ),
    mutant(
        "loss-counts-one-token-too-many",
        "ACC-5",
        "transformers#46204",
        (UPDATE, COUNT, "(shared[0] + fabric.world_size * sum(len(ids) for ids, _ in pairs))"),
    ),
    mutant(
        "ac-rng-mismatch",
        "ACC-7",
        "OLMo-core#828, OLMo#702",
        ("reference.model.gpt:GPT.forward", "preserve_rng_state=True", "preserve_rng_state=False"),
    ),
    mutant(
        "ac-detaches",
        "ACC-7",
        "pytorch#7617, open_clip#573 (an input that needs no gradient: the block gets none)",
        (
            "reference.model.gpt:GPT.forward",
            "checkpoint(block, x, ",
            "x + checkpoint(lambda x, *rest: (block(x, *rest) - x).detach(), x, ",
        ),
    ),
    mutant(
        "global-batch-wrong",
        "ACC-6",
        "litgpt#1927, axolotl#134",
        ("reference.training.run:Run.fetch", "self.config.microbatches)]", "self.config.microbatches // 3 * 3 or 1)]"),
        ("reference.training.trainer:Trainer.fit", "len(upcoming) < config.microbatches", "not upcoming"),
    ),
    mutant(
        "accum-not-divided-in-16-bits",
        "ACC-8",
        "a loss that a scaler's code path was to divide",
        (UPDATE, LOSS, LOSS + ' * (1 if config.precision == "32-true" else len(pairs))'),
    ),
    mutant(
        "accum-last-microbatch-only-in-16-bits",
        "ACC-8",
        "DeepSpeed#2768 (a gradient buffer of another dtype)",
        (
            UPDATE,
            "fabric.backward(loss)",
            'config.precision == "32-true" or self.wrapped.zero_grad(); fabric.backward(loss)',
        ),
    ),
    mutant(
        "ac-in-another-precision",
        "ACC-9",
        "fairscale#1199",
        (
            FORWARD,
            "checkpoint(block, x, ",
            "checkpoint(lambda x, *rest, seen=[0], block=block: block(x * (1 + 4e-3 * (seen.append(0) or len(seen) > 2)"
            " * torch.is_autocast_enabled('cpu')), *rest), x, ",
        ),
    ),
    mutant(
        "accum-smaller-microbatch-weighs-more",
        "ACC-10",
        "transformers#34191, torchtune#1878",
        (UPDATE, LOSS, "loss = batch_loss(self.wrapped, ids, targets) / len(ids) / targets.size(1) / len(pairs)"),
    ),
    mutant(
        "count-of-the-update-before",
        "ACC-5",
        "huggingface/transformers#35438, #38448: the number of items is that of another batch",
        (
            "reference.training.run:Run.update_once",
            "scale = fabric.world_size / shared[0].clamp(min=1)",
            'scale = fabric.world_size / self.__dict__.get("counted", shared[0]).clamp(min=1)\n'
            '    self.__dict__["counted"] = shared[0].clone()',
        ),
    ),
]
