"""GrokAdamW with its moments where the parameters are, and its state where torch keeps it, so that a load finds it.

The arithmetic of the package grokadamw 0.1.2, bit for bit on the CPU, with its peculiarities: each tensor's gradient is
clipped by itself, in ``p.grad``. The first moment's rate is ``beta1 * (1 - gamma)**i`` for the i-th tensor of its group
that has a gradient; the bias correction is that of ``beta1``. ``eps`` is added to the root of the uncorrected second
moment. Without functions the signal comes from ``train_loss`` and ``eval_loss`` in the group, and is 0 without those.
Functions are not saved; after a load those of the constructor hold. Moments have the parameter's dtype.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

logger = logging.getLogger("reference")
MOMENTS = ("exp_avg", "exp_avg_sq", "grok_ema")


Closure = Callable[[], float] | None


class GrokAdamW(Optimizer):
    """AdamW that amplifies what is slow in the gradient (Grokfast, https://arxiv.org/abs/2405.20233).

    It adds ``lamb`` times an average of gradients, which decays by
    ``alpha_init * exp(-grokking_signal_decay_rate * s)``, s being the mean of what ``grokking_signal_fns`` return.
    """

    def __init__(
        self, params: ParamsT, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, alpha_init: float = 0.98, lamb: float = 2.0, gamma: float = 0.1,
        grokking_signal_fns: list[Callable[[], float | None]] | None = None, grokking_signal_decay_rate: float = 0.1,
        gradient_clipping: float = 1.0,
    ) -> None:  # fmt: skip
        defaults = {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")}
        if min(lr, eps, weight_decay) < 0 or not 0 <= min(betas) <= max(betas) < 1 or not 0 <= alpha_init <= 1:
            raise ValueError(f"GrokAdamW needs numbers of at least 0, betas < 1 and alpha_init <= 1, not {defaults}.")
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Closure = None) -> float | None:  # type: ignore[override] # torch's overloads say no more
        """Update all parameters that have a gradient; return what ``closure`` returns."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            rate, given = group["grokking_signal_decay_rate"], signal(group)
            alpha = group["alpha_init"] * (1.0 if given is None else math.exp(-rate * given))
            alike: dict[Any, list[tuple[int, Tensor, dict[str, Any]]]] = {}  # what one foreach operation can take
            for place, p in enumerate(p for p in group["params"] if p.grad is not None):
                if not self.state[p]:
                    self.state[p] = {"step": 0} | {key: torch.zeros_like(p) for key in MOMENTS}
                self.state[p]["step"] += 1
                alike.setdefault((p.device, p.dtype), []).append((place, p, self.state[p]))
            for members in alike.values():
                update(group, members, alpha)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return groups and state, without the functions."""
        saved = super().state_dict()
        saved["param_groups"] = [{**group, "grokking_signal_fns": None} for group in saved["param_groups"]]
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; the functions stay those of the constructor."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["grokking_signal_fns"] = self.defaults["grokking_signal_fns"]


def signal(group: dict[str, Any]) -> float | None:
    """Return the functions' mean, or without functions how far evaluation's loss lies above training's."""
    if group["grokking_signal_fns"] is None:
        train, evaluation = group.get("train_loss"), group.get("eval_loss")
        if train is None or evaluation is None or max(evaluation, train) <= 0:
            return 0.0
        return max(0, evaluation - train) / max(evaluation, train)
    told: list[float] = []
    for function in group["grokking_signal_fns"]:
        try:
            told += [value] if (value := function()) is not None else []
        except Exception as error:
            logger.warning("GrokAdamW: a grokking_signal_fn raised %r and is left out of this step.", error)
    return sum(told) / len(told) if told else None


def scale(tensors: list[Tensor], factors: list[float]) -> None:
    """Multiply in place; on the CPU one by one, where _foreach_mul_ rounds a factor to bfloat16."""
    if tensors[0].device.type != "cpu":
        torch._foreach_mul_(tensors, factors)
        return
    for tensor, factor in zip(tensors, factors, strict=True):
        tensor.mul_(factor)


def update(group: dict[str, Any], members: list[tuple[int, Tensor, dict[str, Any]]], alpha: float) -> None:
    """Update tensors of one device and dtype, given with their places in the group and their states."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    parameters, gradients = [p for _, p, _ in members], [p.grad for _, p, _ in members if p.grad is not None]
    firsts, seconds, averages = ([state[key] for *_, state in members] for key in MOMENTS)
    if group["gradient_clipping"] > 0:
        shares = group["gradient_clipping"] / (torch.stack(torch._foreach_norm(gradients)) + 1e-6)
        torch._foreach_mul_(gradients, [*shares.clamp(max=1.0)])
    scale(averages, [alpha] * len(members))
    torch._foreach_add_(averages, gradients, alpha=1 - alpha)
    amplified: Any = torch._foreach_mul(averages, group["lamb"])
    torch._foreach_add_(amplified, gradients)
    rates1 = [beta1 * (1 - group["gamma"]) ** place for place, *_ in members]
    scale(firsts, rates1)
    for first, gradient, rate1 in zip(firsts, amplified, rates1, strict=True):
        first.add_(gradient, alpha=1 - rate1)  # foreach takes one alpha for all
    scale(seconds, [beta2] * len(members))
    torch._foreach_addcmul_(seconds, amplified, amplified, value=1 - beta2)
    rates = [-(lr * math.sqrt(1 - beta2 ** s["step"]) / (1 - beta1 ** s["step"])) for *_, s in members]
    denominators = torch._foreach_sqrt(seconds)
    torch._foreach_add_(denominators, group["eps"])
    scale(parameters, [1 - lr * group["weight_decay"]] * len(members))
    torch._foreach_addcdiv_(parameters, firsts, denominators, scalars=rates)
