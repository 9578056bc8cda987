"""Faults of the gradient of an update: accumulation, clipping, loss."""

from tests.mutants.planting import UPDATE, Mutant, mutant

LOSS, SPLIT = "reference.model.loss:token_loss", "reference.training.batches:split_targets"
SHARE, BACKWARD, STEP = "share += loss.detach()", "fabric.backward(loss)", "self.optimizer.step()"
FOLLOWING = "following = [] if batches is None else self.fetch(batches)"
CLIP = "norm = fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=limit, error_if_nonfinite=False)"
NOT_CLIPPED = CLIP.replace("max_norm=limit", 'max_norm=float("inf")')
SCORES, TARGETS = "logits.float().flatten(0, 1)", "targets.flatten(), ignore_index=IGNORE"
RETURNED = f'return F.cross_entropy({SCORES}, {TARGETS}, reduction="sum")'
OVERLAPPING = """\
following = [] if batches is None else self.fetch(batches)
    if following and len(pairs) > 1:
        following = [*pairs[-1:], *following[:-1]]"""
HALVED = f"""{SHARE}
        for p in self.module.parameters():
            if index and p.grad is not None:
                p.grad.mul_(0.5)"""
NOT_CLEARED = """\
if at_once or batches is None:
        self.optimizer.zero_grad()"""
SKIPPED = f"""\
if not bool(loss.isfinite()):
                continue
            {BACKWARD}"""
BLOCKS_CLIPPED = """
    blocks = [p for name, p in self.module.named_parameters() if name.startswith("blocks.")]
    if blocks:
        torch.nn.utils.clip_grad_norm_(blocks, limit)
"""
CLIPPED_BY_THE_LAST = """
    before = self.__dict__.get("norm_before", norm)
    self.__dict__["norm_before"] = norm.clone()
    for p in self.module.parameters():
        if p.grad is not None:
            p.grad.mul_(min(1.0, limit / (float(before) + 1e-6)))
"""
MADE_FINITE = f"""\
for p in self.module.parameters():
        if p.grad is not None:
            p.grad.nan_to_num_(0.0, 0.0, 0.0)
    {CLIP}"""
MEANS_OF_SEQUENCES = f"""\
each = F.cross_entropy({SCORES}, {TARGETS}, reduction="none").view(targets.shape)
    counts = (targets != IGNORE).sum(1)
    means = each.sum(1) / counts.clamp(min=1)
    return means.sum() / (counts > 0).sum().clamp(min=1) * counts.sum()"""
FUSED = f"""\
import torch

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, scores, wanted):
            with torch.enable_grad():
                leaf = scores.detach().requires_grad_()
                total = F.cross_entropy(leaf, wanted, ignore_index=IGNORE, reduction="sum")
                ctx.save_for_backward(*torch.autograd.grad(total, leaf))
            return total.detach()

        @staticmethod
        def backward(ctx, factor):
            return ctx.saved_tensors[0], None

    return Fused.apply({SCORES}, targets.flatten())"""

FAULTS: dict[str, list[Mutant]] = {
    "accumulation": [
        mutant(
            "blind4-accumulation-windows-overlap",
            "",
            "a common slip: an update begins with the last microbatch of the one before, and its own last one is lost",
            (UPDATE, FOLLOWING, OVERLAPPING),
        ),
        mutant(
            "blind4-accumulation-empty-microbatch-counts",
            "",
            "londonaicentre/FLIP#766: a microbatch without any target counts as one target",
            ("reference.training.batches:count_targets", ".sum() for", ".sum().clamp(min=1) for"),
        ),
        mutant(
            "blind4-accumulation-halves-what-came-before",
            "",
            "a common slip: a running mean over microbatches that halves the earlier ones at each step",
            (UPDATE, SHARE, HALVED),
        ),
        mutant(
            "blind4-accumulation-not-cleared-before-a-pause",
            "",
            "a common slip: gradients are not cleared where the run evaluates or saves, and go into the next update",
            (UPDATE, "self.optimizer.zero_grad()", NOT_CLEARED),
        ),
        mutant(
            "blind4-accumulation-broken-microbatch-skipped",
            "",
            "automl/TFM-Playground#20, karpathy/nanoGPT#227: a microbatch whose loss is NaN is passed over",
            (UPDATE, BACKWARD, SKIPPED),
        ),
    ],
    "clipping": [
        mutant(
            "blind4-clipping-only-the-blocks",
            "",
            "a common slip: embedding, head and last norm are neither in the norm nor scaled",
            (UPDATE, CLIP, NOT_CLIPPED + BLOCKS_CLIPPED),
        ),
        mutant(
            "blind4-clipping-by-the-norm-before",
            "",
            "a common slip: gradients are scaled by the norm of the update before",
            (UPDATE, CLIP, NOT_CLIPPED + CLIPPED_BY_THE_LAST),
        ),
        mutant(
            "blind4-clipping-by-the-mean-of-norms",
            "",
            "a common slip: the squares of the norms are averaged over the tensors, not added up",
            (
                UPDATE,
                "max_norm=limit",
                "max_norm=limit * sum(p.grad is not None for p in self.module.parameters()) ** 0.5",
            ),
        ),
        mutant(
            "blind4-clipping-nan-becomes-zero",
            "",
            "Holmeyoung/crnn-pytorch#47: gradients that are not finite are set to zero, and the run goes on",
            (UPDATE, CLIP, MADE_FINITE),
        ),
        mutant(
            "blind4-clipping-skips-the-update",
            "",
            "apple/axlearn#297, unasked: an update whose norm exceeds the limit is left out, not scaled",
            (UPDATE, CLIP, NOT_CLIPPED),
            (UPDATE, STEP, f"if not float(norm) > limit:\n        {STEP}"),
        ),
    ],
    "loss": [
        mutant(
            "blind4-loss-log-of-probability-plus-eps",
            "",
            "a common slip: the log of softmax plus a small number, in place of log_softmax",
            (
                LOSS,
                RETURNED,
                f'return F.nll_loss(({SCORES}.softmax(-1) + 1e-5).log(), {TARGETS}, reduction="sum")',
            ),
        ),
        mutant(
            "blind4-loss-mean-of-sequence-means",
            "",
            "a common slip: each sequence weighs alike, however few of its targets count",
            (LOSS, RETURNED, MEANS_OF_SEQUENCES),
        ),
        mutant(
            "blind4-loss-inputs-and-targets-swapped",
            "",
            "a common slip: the model learns the token before, which it sees",
            (SPLIT, "return batch[:, :-1], batch[:, 1:]", "return batch[:, 1:], batch[:, :-1]"),
        ),
        mutant(
            "blind4-loss-gradient-ignores-its-factor",
            "",
            "linkedin/Liger-Kernel#968: a gradient that forward has computed does not heed what backward hands over",
            (LOSS, RETURNED, FUSED),
        ),
        mutant(
            "blind4-loss-end-of-document-is-no-target",
            "",
            "huggingface/transformers#23530, huggingface/trl#976: the end of a document is taken for padding",
            (
                "reference.data.tokens:TokenData.microbatches",
                "if self.mask is None:\n                yield ids\n",
                "if self.mask is None:\n                wanted = ids[:, 1:]\n"
                "                yield ids[:, :-1], wanted.masked_fill(wanted == self.end_of_document, IGNORE)\n",
            ),
        ),
    ],
}
