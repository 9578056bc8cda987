"""The closed forms of optimizers' steps, in float64: weights, gradient, settings and state to movement and state.

Each takes elements of one tensor, of any shape, and names its state as torch.optim does. A movement of NaN means that
rounding decides it. Sources: the papers, and torch.optim's pages, whose order of operations these follow.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Settings = Mapping[str, Any]
State = dict[str, Any]
Moved = tuple[Tensor, State]
"""The movement, and the state after it."""
Fault = tuple[str, dict[str, Any]]
"""What is wrong, in words, and the settings under which the closed form does the same."""

UNBIASED = "bias_correction"  # a setting that only these forms know: False leaves the correction out
COUPLED = "decoupled_weight_decay"  # as torch calls it in the groups of Adam


def number(settings: Settings, key: str, default: float) -> float:
    """Return a setting as a float: compiled optimizers keep some in tensors."""
    value = settings.get(key)
    return default if value is None else float(value)


def pair(settings: Settings, default: tuple[float, float]) -> tuple[float, float]:
    """Return the betas."""
    first, second = (settings.get("betas") or default)[:2]
    return float(first), float(second)


def decayed(weights: Tensor, gradient: Tensor, settings: Settings, decoupled: bool) -> tuple[Tensor, Tensor]:
    """Return what weight decay makes of weights (decoupled) or of the gradient (coupled)."""
    decay = number(settings, "weight_decay", 0.0)
    if decoupled:
        return weights * (1 - number(settings, "lr", 1e-3) * decay), gradient
    return weights, gradient + decay * weights


def moment(state: State, key: str, gradient: Tensor, beta: float) -> Tensor:
    """Return an exponential average of gradients, which begins at zero."""
    return beta * state.get(key, torch.zeros_like(gradient)) + (1 - beta) * gradient


def count(state: State) -> float:
    """Return the number of this step, from 1."""
    return float(state.get("step", 0)) + 1


def adam(weights: Tensor, gradient: Tensor, settings: Settings, state: State, decoupled: bool = False) -> Moved:
    """Adam (https://arxiv.org/abs/1412.6980), with amsgrad and, if ``decoupled``, the decay of AdamW."""
    lr, eps, step = number(settings, "lr", 1e-3), number(settings, "eps", 1e-8), count(state)
    first_beta, second_beta = pair(settings, (0.9, 0.999))
    shrunk, gradient = decayed(weights, gradient, settings, bool(settings.get(COUPLED, decoupled)))
    first = moment(state, "exp_avg", gradient, first_beta)
    second = moment(state, "exp_avg_sq", gradient.square(), second_beta)
    following = {**state, "step": step, "exp_avg": first, "exp_avg_sq": second}
    if settings.get("amsgrad"):
        second = torch.maximum(state.get("max_exp_avg_sq", torch.zeros_like(second)), second)
        following["max_exp_avg_sq"] = second
    unbiased = settings.get(UNBIASED, True) is not False
    one = 1 - first_beta**step if unbiased else 1.0
    root = (1 - second_beta**step) ** 0.5 if unbiased else 1.0
    # The paper's efficient form, which transformers and TensorFlow had, adds eps before it corrects the bias.
    eps = eps / root if settings.get("eps_first") else eps
    moved = -lr * first / one / (second.sqrt() / root + eps)
    if settings.get("decay_last"):
        return moved - number(settings, "lr", 1e-3) * number(settings, "weight_decay", 0.0) * (
            weights + moved
        ), following
    return shrunk - weights + moved, following


def adamw(weights: Tensor, gradient: Tensor, settings: Settings, state: State) -> Moved:
    """AdamW (https://arxiv.org/abs/1711.05101): its name promises decoupled decay, whatever a group says."""
    return adam(weights, gradient, {**settings, COUPLED: settings.get("coupled") is not True}, state)


def nadam(weights: Tensor, gradient: Tensor, settings: Settings, state: State) -> Moved:
    """NAdam (Dozat 2016) as torch has it: the momentum's weight grows with the step."""
    lr, eps, step = number(settings, "lr", 2e-3), number(settings, "eps", 1e-8), count(state)
    first_beta, second_beta = pair(settings, (0.9, 0.999))
    speed = number(settings, "momentum_decay", 4e-3)
    shrunk, gradient = decayed(weights, gradient, settings, bool(settings.get(COUPLED)))
    first = moment(state, "exp_avg", gradient, first_beta)
    second = moment(state, "exp_avg_sq", gradient.square(), second_beta)
    now, then = (first_beta * (1 - 0.5 * 0.96 ** (at * speed)) for at in (step, step + 1))
    product = float(state.get("mu_product", 1.0)) * now
    denominator = (second / (1 - second_beta**step)).sqrt() + eps
    moved = -lr * ((1 - now) / (1 - product) * gradient + then / (1 - product * then) * first) / denominator
    following = {**state, "step": step, "exp_avg": first, "exp_avg_sq": second, "mu_product": product}
    return shrunk - weights + moved, following


def sgd(weights: Tensor, gradient: Tensor, settings: Settings, state: State) -> Moved:
    """Gradient descent, with torch's momentum, dampening and nesterov."""
    lr, momentum = number(settings, "lr", 1e-3), number(settings, "momentum", 0.0)
    shrunk, direction = decayed(weights, gradient, settings, bool(settings.get("decoupled")))
    following = state
    if momentum:
        gradient, earlier = direction, state.get("momentum_buffer")
        buffer = (
            gradient if earlier is None else momentum * earlier + (1 - number(settings, "dampening", 0.0)) * gradient
        )
        direction = gradient + momentum * buffer if settings.get("nesterov") else buffer
        following = {**state, "momentum_buffer": buffer}
    return shrunk - weights - lr * direction, following


def rmsprop(weights: Tensor, gradient: Tensor, settings: Settings, state: State) -> Moved:
    """RMSprop (Hinton 2012) as torch has it, centred and with momentum if asked for."""
    lr, alpha, eps = number(settings, "lr", 1e-2), number(settings, "alpha", 0.99), number(settings, "eps", 1e-8)
    shrunk, gradient = decayed(weights, gradient, settings, bool(settings.get("decoupled")))
    square = moment(state, "square_avg", gradient.square(), alpha)
    following = {**state, "step": count(state), "square_avg": square}
    if settings.get("centered"):
        mean = moment(state, "grad_avg", gradient, alpha)
        square, following = square - mean.square(), {**following, "grad_avg": mean}
    direction = gradient / (square.clamp(min=0).sqrt() + eps)
    if momentum := number(settings, "momentum", 0.0):
        direction = momentum * state.get("momentum_buffer", torch.zeros_like(gradient)) + direction
        following["momentum_buffer"] = direction
    return shrunk - weights - lr * direction, following


def lion(weights: Tensor, gradient: Tensor, settings: Settings, state: State) -> Moved:
    """Lion (https://arxiv.org/abs/2302.06675): the sign of momentum; NaN where rounding decides the sign."""
    lr, (first_beta, second_beta) = number(settings, "lr", 1e-4), pair(settings, (0.9, 0.99))
    shrunk, gradient = decayed(weights, gradient, settings, settings.get("coupled") is not True)
    average = state.get("exp_avg", torch.zeros_like(gradient))
    kept, added = first_beta * average, (1 - first_beta) * gradient
    direction = (kept + added).sign()
    unsure = (kept + added).abs() < 1e-5 * torch.maximum(kept.abs(), added.abs())
    moved = (shrunk - weights - lr * direction).masked_fill(unsure, torch.nan)
    return moved, {**state, "exp_avg": second_beta * average + (1 - second_beta) * gradient}


def muon(weights: Tensor, gradient: Tensor, settings: Settings, state: State) -> Moved:
    """Return, for Muon (kellerjordan.github.io/posts/muon), the matrix that is made orthogonal, not the movement."""
    momentum = number(settings, "momentum", 0.95)
    buffer = moment(state, "momentum_buffer", gradient, momentum)
    nesterov = settings.get("nesterov", True)
    target = (1 - momentum) * gradient + momentum * buffer if nesterov else buffer
    return target, {**state, "momentum_buffer": buffer}


@dataclass(frozen=True)
class Form:
    """The closed form of one optimizer."""

    predict: Callable[[Tensor, Tensor, Settings, State], Moved]
    settings: frozenset[str]
    """Those that it takes into account."""
    squares: bool = False
    """It keeps squares of gradients."""
    variants: tuple[dict[str, Any], ...] = ({},)
    """Ways in which classes of this name differ outside torch, as settings."""
    flaws: tuple[Fault, ...] = ()

    def faults(self, settings: Settings) -> list[Fault]:
        """Return simple faults, the most direct first, with the settings under which the form makes them."""
        found = list(self.flaws)
        if number(settings, "weight_decay", 0.0):
            decay = number(settings, "weight_decay", 0.0)
            found.append(("it moves as if there were no weight decay", {"weight_decay": 0.0}))
            found.append(("it moves as if weight decay were applied twice", {"weight_decay": 2 * decay}))
        if "eps" in self.settings:
            found += [
                (f"it moves as if eps were {eps:g}", {"eps": eps}) for eps in (1e-8, 1e-6, 1e-5, 1e-10, 1e-12, 0.0)
            ]
        return found


BASIC = {"lr", "weight_decay", "maximize"}
MOMENTS = BASIC | {"betas", "eps"}
UNCORRECTED: Fault = ("it moves as if the bias of the moments were not corrected", {UNBIASED: False})
LATE: tuple[dict[str, Any], ...] = (
    {},
    {"eps_first": True},
    {"decay_last": True},
    {"eps_first": True, "decay_last": True},
)
COUPLING: Fault = ("it moves as if weight decay were coupled: added to the gradient", {"coupled": True})
DECOUPLING: Fault = (
    "it moves as if weight decay were decoupled: taken off the weights",
    {"decoupled": True, COUPLED: True},
)

FORMS = {
    "AdamW": Form(adamw, frozenset(MOMENTS | {"amsgrad", COUPLED}), True, LATE, (COUPLING, UNCORRECTED)),
    "NAdam": Form(nadam, frozenset(MOMENTS | {"momentum_decay", COUPLED}), True, flaws=(DECOUPLING,)),
    "Adam": Form(adam, frozenset(MOMENTS | {"amsgrad", COUPLED}), True, LATE[:2], (DECOUPLING, UNCORRECTED)),
    "SGD": Form(sgd, frozenset(BASIC | {"momentum", "dampening", "nesterov"}), flaws=(DECOUPLING,)),
    "RMSprop": Form(rmsprop, frozenset(BASIC | {"alpha", "eps", "momentum", "centered"}), True, flaws=(DECOUPLING,)),
    "Lion": Form(lion, frozenset(BASIC | {"betas"}), flaws=(COUPLING,)),
    "Muon": Form(muon, frozenset(BASIC | {"momentum", "nesterov", "eps"})),
}
"""By class name."""
