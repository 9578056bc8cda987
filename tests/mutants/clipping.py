"""Faults of gradient clipping."""

from tests.mutants.planting import UPDATE, mutant

FINITE = "reference.training.run:Run.require_finite"
CALL = "fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=limit, error_if_nonfinite=False)"
LIMIT = 'limit = config.clip or float("inf")'
PARAMETERS = "self.module.parameters()"

MUTANTS = [
    mutant(
        "clip-per-microbatch",
        "CLIP-1",
        "accelerate#641",
        (
            UPDATE,
            "share += loss.detach()",
            "share += loss.detach(); fabric.clip_gradients(self.wrapped, self.optimizer, "
            'max_norm=config.clip or float("inf"), error_if_nonfinite=False)',
        ),
    ),
    mutant(
        "clip-per-tensor",
        "CLIP-1",
        "grokadamw 0.1.2 (clips each tensor)",
        (
            UPDATE,
            CALL,
            f"torch.stack([nn.utils.clip_grad_norm_([p], limit) for p in {PARAMETERS}]).norm()",
        ),
    ),
    mutant(
        "clip-by-value",
        "CLIP-1",
        "clip_grad_value_ where the norm was meant",
        (
            UPDATE,
            CALL,
            f"nn.utils.clip_grad_value_({PARAMETERS}, limit) or torch.tensor(1.0)",
        ),
    ),
    mutant("clip-ignored", "CLIP-1", "a setting that is read by nobody", (UPDATE, LIMIT, 'limit = float("inf")')),
    mutant(
        "clip-always-scales",
        "CLIP-2",
        "a factor that is not clamped at 1",
        (
            UPDATE,
            CALL,
            f"nn.utils.get_total_norm([p.grad for p in {PARAMETERS}]); "
            f"[p.grad.mul_((config.clip or norm) / norm) for p in {PARAMETERS}]",
        ),
    ),
    mutant(
        "nonfinite-continues",
        "CLIP-3",
        "pytorch-lightning#21928",
        (FINITE, "(loss, norm, *_), fabric = values, self.fabric", "return"),
    ),
    mutant(
        "nonfinite-loss-only",
        "CLIP-3",
        "a check of the loss, which is finite when backward overflows",
        (
            FINITE,
            "(math.isfinite(loss) and math.isfinite(norm))",
            "math.isfinite(loss)",
        ),
    ),
    mutant(
        "clip-local-norm",
        "CLIP-4",
        "pytorch#72548, torchtitan#766",
        (UPDATE, LIMIT, 'limit = config.clip / fabric.world_size**0.5 if config.clip else float("inf")'),
    ),
    mutant(
        "clip-in-float32-only",
        "CLIP-5",
        "accelerate#641 (another path under mixed precision)",
        (UPDATE, LIMIT, 'limit = (config.clip if config.precision == "32-true" else None) or float("inf")'),
    ),
    mutant(
        "clip-norm-in-16-bits",
        "CLIP-5",
        "NVIDIA/apex multi_tensor_l2norm in half precision",
        (
            UPDATE,
            CALL,
            f"nn.utils.get_total_norm([p.grad for p in {PARAMETERS}]); "
            f"[p.grad.mul_((limit / norm).clamp(max=1).half() * 0.99) for p in {PARAMETERS} "
            "if config.precision != '32-true'] or fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=limit, "
            "error_if_nonfinite=False)",
        ),
    ),
    mutant(
        "nan-replaced-by-zero",
        "CLIP-6",
        "torch.nan_to_num_ on gradients",
        (UPDATE, CALL, f"[p.grad.nan_to_num_(0.0) for p in {PARAMETERS}] and {CALL}"),
    ),
    mutant(
        "tensor-with-nan-left-out",
        "CLIP-6",
        "a check of each tensor alone, so that the others step",
        (
            UPDATE,
            CALL,
            f"[setattr(p, 'grad', None) for p in {PARAMETERS} if p.grad.isnan().any()] and False or {CALL}",
        ),
    ),
    mutant(
        "tied-table-counted-twice-in-the-norm",
        "CLIP-1 REPORT-3",
        "NVIDIA-NeMo/RL#3788: a gradient that is there twice is counted twice",
        (
            "reference.training.run:Run.update_once",
            "norm = fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=limit, error_if_nonfinite=False)",
            'norm = fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=float("inf"), '
            "error_if_nonfinite=False)\n"
            "    named = self.module.named_parameters(remove_duplicate=False)\n"
            "    norm = torch.nn.utils.get_total_norm([p.grad for _, p in named if p.grad is not "
            "None])\n"
            '    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm\n'
            "    torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), limit, norm)\n",
        ),
    ),
    mutant(
        "clips-each-tensor",
        "CLIP-1",
        "keras-team/keras#13575, carpedm20/MemN2N-tensorflow#19: each gradient is clipped by itself",
        (
            "reference.training.run:Run.update_once",
            "norm = fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=limit, error_if_nonfinite=False)",
            'norm = fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=float("inf"), '
            "error_if_nonfinite=False)\n"
            "    for p in self.module.parameters():\n"
            "        torch.nn.utils.clip_grad_norm_(p, limit)",
        ),
    ),
    mutant(
        "clips-each-stage",
        "CLIP-1",
        "pytorch/torchtitan#596, nvidia-cosmos/cosmos-rl#120: each part of the model by its own norm",
        (
            "reference.training.run:Run.update_once",
            "norm = fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=limit, error_if_nonfinite=False)",
            'norm = fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=float("inf"), '
            "error_if_nonfinite=False)\n"
            "    for inside in (True, False):\n"
            "        stage = [p for name, p in self.module.named_parameters() if "
            'name.startswith("blocks.") == inside]\n'
            "        torch.nn.utils.clip_grad_norm_(stage, limit)\n",
        ),
    ),
    mutant(
        "clips-before-the-last-backward",
        "CLIP-1",
        "simchowitzlabpublic/nano-world-model#22: clipped before the backward that comes last",
        (
            "reference.training.run:Run.update_once",
            "for index, (ids, targets) in enumerate(pairs):",
            "for index, (ids, targets) in enumerate(pairs):\n"
            "        if index + 1 == len(pairs):\n"
            "            torch.nn.utils.clip_grad_norm_(self.module.parameters(), config.clip or "
            'float("inf"))\n',
        ),
        (
            "reference.training.run:Run.update_once",
            "norm = fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=limit, error_if_nonfinite=False)",
            'norm = fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=float("inf"), '
            "error_if_nonfinite=False)",
        ),
    ),
    mutant(
        "clips-after-the-step",
        "CLIP-1",
        "awslabs/graphstorm#1366, VGraphRNN/VGRNN#4: clipped when the optimizer has stepped",
        (
            "reference.training.run:Run.update_once",
            "norm = fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=limit, error_if_nonfinite=False)",
            'norm = fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=float("inf"), '
            "error_if_nonfinite=False)",
        ),
        (
            "reference.training.run:Run.update_once",
            "self.optimizer.step()",
            "self.optimizer.step()\n    torch.nn.utils.clip_grad_norm_(self.module.parameters(), limit)",
        ),
    ),
]
