"""Faults of gradient clipping."""

from tests.mutants.planting import UPDATE, mutant

CLIP = "reference.training.update:clip"
CALL = 'fabric.clip_gradients(model, optimizer, max_norm=limit or float("inf"), error_if_nonfinite=False)'
LIMIT = 'max_norm=limit or float("inf")'

MUTANTS = [
    mutant(
        "clip-per-microbatch",
        "CLIP-1",
        "accelerate#641",
        (
            UPDATE,
            "share = accumulate(fabric, self.wrapped, pairs, shared[0])",
            "share = sum((accumulate(fabric, self.wrapped, [pair], shared[0]),"
            " clip(fabric, self.wrapped, self.optimizer, config.clip))[0] for pair in pairs)",
        ),
    ),
    mutant(
        "clip-per-tensor",
        "CLIP-1",
        "grokadamw 0.1.2 (clips each tensor)",
        (
            CLIP,
            CALL,
            'torch.stack([nn.utils.clip_grad_norm_([p], limit or float("inf")) for p in model.parameters()]).norm()',
        ),
    ),
    mutant(
        "clip-by-value",
        "CLIP-1",
        "clip_grad_value_ where the norm was meant",
        (
            CLIP,
            CALL,
            'nn.utils.clip_grad_value_(model.parameters(), limit or float("inf")) or torch.tensor(1.0)',
        ),
    ),
    mutant("clip-ignored", "CLIP-1", "a setting that is read by nobody", (CLIP, LIMIT, 'max_norm=float("inf")')),
    mutant(
        "clip-always-scales",
        "CLIP-2",
        "a factor that is not clamped at 1",
        (
            CLIP,
            CALL,
            "nn.utils.get_total_norm([p.grad for p in model.parameters()]); "
            "[p.grad.mul_((limit or norm) / norm) for p in model.parameters()]",
        ),
    ),
    mutant(
        "nonfinite-continues",
        "CLIP-3",
        "pytorch-lightning#21928",
        ("reference.training.update:require_finite", "loss, norm, *_ = values", "return"),
    ),
    mutant(
        "nonfinite-loss-only",
        "CLIP-3",
        "a check of the loss, which is finite when backward overflows",
        (
            "reference.training.update:require_finite",
            "(math.isfinite(loss) and math.isfinite(norm))",
            "math.isfinite(loss)",
        ),
    ),
    mutant(
        "clip-local-norm",
        "CLIP-4",
        "pytorch#72548, torchtitan#766",
        (CLIP, LIMIT, 'max_norm=limit / fabric.world_size**0.5 if limit else float("inf")'),
    ),
]
