"""Rules of initial weights."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from conformance.errors import Violation, quoted
from conformance.subject import Constant, Distribution, Normal, Uniform

SIGMAS = 3.0  # standard errors; a tensor beyond them is drawn again under other seeds before it is called wrong
FOURTH_MOMENT_SIZE = 1000  # elements from which the shape of a distribution can be told from its fourth moment
LOSS_MARGIN = 0.5  # nats above or below ln V


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


def deviation(tensor: Tensor, declared: Distribution) -> str:
    """Return what is wrong with a tensor that should come from ``declared``; empty if nothing is.

    A normal with n elements has a mean within 3 std / sqrt(n), a standard deviation within 3 / sqrt(2 n) of the
    declared one, and a kurtosis within 3 sqrt(24 / n) of 3. (A uniform with the same standard deviation has 1.8.)
    """
    values, n = tensor.double().flatten(), tensor.numel()
    if isinstance(declared, Constant):
        wrong = int((values != torch.tensor(declared.value).to(tensor.dtype).double()).sum())
        return f"{wrong} of {n} elements are not {declared.value:g}" if wrong else ""
    if isinstance(declared, Uniform):
        mean, std = (declared.low + declared.high) / 2, (declared.high - declared.low) / math.sqrt(12)
        fourth, fourth_error = 1.8, 0.0  # of a uniform
        outside = int(((values < declared.low) | (values > declared.high)).sum())
        if outside:
            return f"{outside} of {n} elements lie outside [{declared.low:g}, {declared.high:g}]"
        std_error = std * math.sqrt((fourth - 1) / (4 * n))
    else:
        mean, std, fourth, fourth_error = declared.mean, declared.std, 3.0, math.sqrt(24 / n)
        std_error = std / math.sqrt(2 * n)
    seen_mean, seen_std = values.mean().item(), values.std().item()
    if not abs(seen_mean - mean) <= SIGMAS * std / math.sqrt(n):
        return f"mean {seen_mean:.4g} instead of {mean:g}"
    if not abs(seen_std - std) <= SIGMAS * std_error:
        return f"std {seen_std:.4g} instead of {std:.4g}"
    if isinstance(declared, Normal) and n >= FOURTH_MOMENT_SIZE:
        kurtosis = ((values - seen_mean) ** 4).mean().item() / seen_std**4
        if not abs(kurtosis - fourth) <= SIGMAS * fourth_error:
            return f"kurtosis {kurtosis:.2f} instead of 3: not a normal distribution"
    return ""


def starts_differ(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Check that under another seed every tensor that is drawn at random is another.

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


def starts_ignorant(loss: float, vocabulary: int) -> None:
    """Check that the first loss is that of a model that knows nothing: ln V nats per token.

    Raises:
        Violation: with the loss.
    """
    expected = math.log(vocabulary)
    if not abs(loss - expected) <= LOSS_MARGIN:
        raise Violation(f"a first loss of ln {vocabulary} = {expected:.3f}, within {LOSS_MARGIN} nats", f"{loss:.3f}")
