"""Rules of initial weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conformance.errors import Violation, quoted
from conformance.subject import Constant, Distribution, Normal, TruncatedNormal, Uniform

SIGMAS = 3.0  # standard errors; a tensor beyond them is drawn again under other seeds before it is called wrong
FOURTH_MOMENT_SIZE = 1000  # elements from which the shape of a distribution can be told from its fourth moment
LOSS_MARGIN = 0.5  # nats below ln V
# Nats above it. Logits of variance 1, of a head that is drawn with 1 / sqrt(width) behind a norm, cost 0.5 by design.
LOSS_ABOVE = 0.8


def initialised(tensors: nn.Module | Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None = None) -> None:
    """Check that every floating tensor is finite, and that no buffer holds NaN: a causal mask may hold -inf.

    >>> initialised(nn.Linear(2, 2))

    Build under ``torch.utils.deterministic.fill_uninitialized_memory`` (with deterministic algorithms on), and
    memory that nobody initialised is NaN.

    Raises:
        Violation: naming the tensors with NaN or infinity.
    """
    parameters = tensors.named_parameters() if isinstance(tensors, nn.Module) else tensors.items()
    named: dict[str, Tensor] = {**dict(parameters), **(buffers or {})}
    bad = {}
    for name, tensor in named.items():
        if tensor.is_floating_point():
            wrong = tensor.isnan() if name in (buffers or {}) else ~tensor.isfinite()
            bad[name] = int(wrong.sum())
    bad = {name: count for name, count in bad.items() if count}
    if bad:
        listed = quoted([f"{name} ({count} of {named[name].numel()})" for name, count in bad.items()])
        raise Violation("every element is finite", f"NaN or infinity in {len(bad)} of {len(named)} tensors: {listed}")


@dataclass(frozen=True)
class Moments:
    """The statistics to expect of a tensor that is drawn from a distribution."""

    mean: float
    std: float
    kurtosis: float
    """Fourth central moment over the fourth power of ``std``: 3 of a normal, 1.8 of a uniform distribution."""
    low: float = -math.inf
    high: float = math.inf


def moments(declared: Normal | TruncatedNormal | Uniform) -> Moments:
    """Return the statistics to expect of a tensor drawn from ``declared``."""
    if isinstance(declared, Uniform):
        low, high = declared.low, declared.high
        return Moments((low + high) / 2, (high - low) / math.sqrt(12), 1.8, low, high)
    if isinstance(declared, Normal):
        return Moments(declared.mean, declared.std, 3.0)
    # N. L. Johnson, S. Kotz, Continuous Univariate Distributions 1, 13.10.1: moments of a standard normal in [a, b],
    # by integration by parts: m_k = (k - 1) m_(k-2) - (b^(k-1) f(b) - a^(k-1) f(a)) / (F(b) - F(a)).
    a, b = ((edge - declared.mean) / declared.std for edge in (declared.low, declared.high))
    density = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (a, b)]
    share = (math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2))) / 2
    raw = [1.0]
    for k in range(1, 5):
        edges = (b ** (k - 1) * density[1] - a ** (k - 1) * density[0]) / share
        raw.append((k - 1) * (raw[k - 2] if k > 1 else 0.0) - edges)
    mean, variance = raw[1], raw[2] - raw[1] ** 2
    fourth = raw[4] - 4 * mean * raw[3] + 6 * mean**2 * raw[2] - 3 * mean**4
    mean, std = declared.mean + declared.std * mean, declared.std * math.sqrt(variance)
    return Moments(mean, std, fourth / variance**2, declared.low, declared.high)


def deviation(tensor: Tensor, declared: Distribution) -> str:
    """Return what is wrong with a tensor that should come from ``declared``; empty if nothing is.

    With n elements, the mean must be within 3 std / sqrt(n) of the declared one, the standard deviation within
    3 std sqrt((kurtosis - 1) / (4 n)), and of a normal the kurtosis within 3 sqrt(24 / n) of 3.
    """
    values, n = tensor.double().flatten(), tensor.numel()
    if isinstance(declared, Constant):
        wrong = int((values != torch.tensor(declared.value).to(tensor.dtype).double()).sum())
        return f"{wrong} of {n} elements are not {declared.value:g}" if wrong else ""
    expected = moments(declared)
    slack = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0  # an edge rounds to the dtype
    outside = int(((values < expected.low - slack) | (values > expected.high + slack)).sum())
    if outside:
        return f"{outside} of {n} elements lie outside [{expected.low:g}, {expected.high:g}]"
    seen_mean, seen_std = values.mean().item(), values.std().item()
    if not abs(seen_mean - expected.mean) <= SIGMAS * expected.std / math.sqrt(n):
        return f"mean {seen_mean:.4g} instead of {expected.mean:.4g}"
    if not abs(seen_std - expected.std) <= SIGMAS * expected.std * math.sqrt((expected.kurtosis - 1) / (4 * n)):
        return f"std {seen_std:.4g} instead of {expected.std:.4g}"
    if not isinstance(declared, Uniform) and n >= FOURTH_MOMENT_SIZE:
        kurtosis = ((values - seen_mean) ** 4).mean().item() / seen_std**4
        if not abs(kurtosis - expected.kurtosis) <= SIGMAS * math.sqrt(24 / n):
            return f"kurtosis {kurtosis:.2f} instead of {expected.kurtosis:.2f}: not the declared distribution"
    return ""


def starts_differ(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Check that every tensor that is drawn at random differs under another seed.

    Raises:
        Violation: naming random tensors that are equal.
    """
    equal = [
        name
        for name, tensor in first.items()
        if tensor.numel() > 1 and tensor.unique().numel() > 2 and torch.equal(tensor, second[name])
    ]
    if equal:
        raise Violation("another seed gives other random weights", f"equal under both seeds: {quoted(equal)}")


def starts_apart(tensors: Mapping[str, Tensor]) -> None:
    """Check that no two tensors that are drawn at random start with the same values.

    Raises:
        Violation: naming tensors that do.
    """
    drawn = {name: t for name, t in tensors.items() if t.numel() > 1 and t.unique().numel() > 2}
    names = list(drawn)
    alike = [
        f"{other} = {name}"
        for number, name in enumerate(names)
        for other in names[number + 1 :]
        if drawn[name].shape == drawn[other].shape and torch.equal(drawn[name], drawn[other])
    ]
    if alike:
        raise Violation("every random tensor starts with values of its own", f"the same values: {quoted(alike)}")


def starts_ignorant(loss: float, vocabulary: int) -> None:
    """Check that the first loss is that of a model that knows nothing: ln V nats per token.

    Raises:
        Violation: with the loss.
    """
    expected = math.log(vocabulary)
    if not -LOSS_MARGIN <= loss - expected <= LOSS_ABOVE:
        raise Violation(
            f"a first loss of ln {vocabulary} = {expected:.3f}, or at most {LOSS_ABOVE} nats more",
            f"a first loss of {loss:.3f}",
        )
