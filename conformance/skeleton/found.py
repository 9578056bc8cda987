"""What the facts of an audit say about a script, in an adapter's terms."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conformance.auditing.facts import Facts
from conformance.auditing.held import first_steps
from conformance.recording.files import NOT_A_CHECKPOINT


@dataclass(frozen=True)
class Found:
    """What an audit found out about a script. Texts are words for a comment; None: not seen."""

    updates: int
    ended: bool
    """The script ended by itself within the updates that were watched."""
    model: str
    sizes: str
    seen: Mapping[str, Any]
    """By field of the recipe: sizes and settings of the run."""
    shape: str | None
    """The capability: ``gpt-shape`` or ``llama-shape``."""
    tied: bool
    optimizers: tuple[str, ...]
    """Class paths."""
    groups: tuple[str, ...]
    decays: str
    """An expression of an adapter."""
    initial: Mapping[str, str]
    """By pattern of names: the distribution, as an expression."""
    precision: str
    rates: str
    constant_rate: bool
    clips: str
    dropout: bool
    evaluates: bool
    seed: int | None
    device: str
    processes: int
    said: tuple[str, ...]
    files: tuple[str, ...]
    checkpoint: str | None
    reads: tuple[str, ...]
    """Relative paths."""


def found_in(facts: Facts, ended: bool, files: Mapping[str, int], reads: Sequence[str] = ()) -> Found:
    """Return what an adapter's skeleton says of a run.

    Args:
        facts: of the audit; at least one update.
        ended: whether the script ended by itself.
        files: those that it wrote, with their sizes in bytes.
        reads: relative paths of those that it read.
    """
    trace = facts.trace
    rates = [step.groups[0].settings.get("lr") for update in facts.updates for step in update.steps[:1] if step.groups]
    numbers = [float(rate) for rate in rates if isinstance(rate, int | float)]
    constant = len(set(numbers)) == 1
    seen = sizes_of(facts)
    if facts.made_with:
        seen["lr"] = facts.made_with[0]
    elif constant:
        seen["lr"] = numbers[0]
    norms = [clip for clip in facts.clips if clip.kind == "norm"]
    if norms:
        seen["clip"] = norms[0].limit
    weights = sum(math.prod(info.shape) for info in trace.tensors.values())
    owners = {info.owner for info in trace.tensors.values()}
    steps = first_steps(facts)
    return Found(
        updates=len(facts.updates),
        ended=ended,
        model=facts.model or "a model whose class was not seen",
        sizes=f"{weights:,} weights in {len(trace.tensors)} tensors",
        seen=seen,
        shape="llama-shape" if any("RMSNorm" in o for o in owners) else "gpt-shape" if "LayerNorm" in owners else None,
        tied=any(len(info.names) > 1 for info in trace.tensors.values()),
        optimizers=tuple(dict.fromkeys(usual_path(step.optimizer[0]) for step in steps if step.optimizer)),
        groups=tuple(
            f"{len(group.tensors)} tensors, weight_decay {group.settings.get('weight_decay', 'none')}"
            for step in steps
            for group in step.groups
        ),
        decays=decays_of(facts),
        initial=initial_of(facts),
        precision=precision_of(facts),
        rates=", ".join(f"{number:.3g}" for number in numbers) or "not seen",
        constant_rate=constant,
        clips=f"the global norm, to {norms[0].limit:g}" if norms else "",
        dropout=bool(facts.dropout),
        evaluates=any(not f.training or not f.grad_enabled for f in trace.forwards),
        seed=facts.seed,
        device=facts.device,
        processes=facts.world,
        said=tuple(dict.fromkeys(shortened(line.text) for line in facts.said))[:4],
        files=tuple(map(shortened, files)),
        checkpoint=next((shortened(n) for n, size in files.items() if is_checkpoint(n, size, weights)), None),
        reads=tuple(reads),
    )


def usual_path(path: str) -> str:
    """Return a class path as users write it: torch.optim.AdamW for torch.optim.adamw.AdamW."""
    return f"torch.optim.{path.rpartition('.')[2]}" if path.startswith("torch.optim.") else path


def shortened(line: str) -> str:
    """Return a line as it can stand in a comment or a docstring."""
    text = "".join(c if c.isprintable() else " " for c in line).strip().replace('"', "'").replace("\\", "/")
    return text if len(text) <= 100 else f"{text[:97]}..."


def is_checkpoint(name: str, size: int, weights: int) -> bool:
    """Return True if a file is no log, and large enough to hold the weights in 16 bits."""
    return not NOT_A_CHECKPOINT.search(Path(name).name) and size >= 2 * weights


def sizes_of(facts: Facts) -> dict[str, Any]:
    """Return the sizes of the model and its batches, by field of the recipe."""
    trace, found = facts.trace, dict[str, Any]()
    if trace.embeddings:
        found["vocab_size"], found["n_embd"] = trace.embeddings[0].shape
    forwards = trace.training_forwards()
    if forwards and forwards[0].ids.ndim == 2:
        found["microbatch_size"], found["block_size"] = forwards[0].ids.shape
    layers = {int(part) for name in trace.tensors for part in re.findall(r"\.(\d+)\.", f".{name}.")[:1]}
    if layers:
        found["n_layer"] = max(layers) + 1
    if facts.updates:
        found["microbatches"] = sum(b.update == 0 for b in facts.backwards)
    return found


def decays_of(facts: Facts) -> str:
    """Return in which tensors weight decay acts, as an expression: of two classes that groups usually form, or all."""
    held = {
        name: bool(group.settings.get("weight_decay"))
        for step in first_steps(facts)
        for group in step.groups
        for name in group.tensors
        if name in facts.trace.tensors
    }
    if not held or len(set(held.values())) == 1:
        return "True"
    matrices = {name: len(facts.trace.tensors[name].shape) >= 2 for name in held}
    if matrices == held:
        return "len(tensor.shape) >= 2"
    patterns = sorted({re.sub(r"\d+", "*", name) for name, decays in held.items() if not decays})
    return f"not any(fnmatch(tensor.name, pattern) for pattern in {patterns!r})"


def initial_of(facts: Facts) -> dict[str, str]:
    """Return the distribution from which each kind of tensor seems to be drawn, by its name with * for numbers."""
    trace, kinds = facts.trace, dict[str, list[str]]()
    for name in trace.tensors:
        kinds.setdefault(re.sub(r"(?<![A-Za-z_])\d+", "*", name), []).append(name)
    return {
        pattern: distribution(facts, names)
        for pattern, names in kinds.items()
        if all(name in trace.initial and len(trace.initial[name]) for name in names)
    }


def distribution(facts: Facts, names: list[str]) -> str:
    """Return one of the distributions of a policy, as an expression: from samples, and norms of whole tensors."""
    trace = facts.trace
    samples = torch.cat([flat(trace.initial[name]) for name in names])
    if bool((samples == samples[0]).all()):
        return f"Constant({samples[0].item():g})"
    squares = sum(norm_of(facts, name) ** 2 for name in names)
    size = sum(math.prod(trace.tensors[name].shape) for name in names)
    deviation = math.sqrt(squares / size)
    mean = samples.mean().item()
    if abs(mean) > deviation / 2:  # the norm is that of the mean, too
        return f"Normal({mean:.2g}, {samples.std().item():.2g})"
    if is_uniform(samples / deviation):
        bound = rounded(math.sqrt(3) * deviation, math.sqrt(0.2 / size))
        return f"Uniform(-{bound}, {bound})"
    return f"Normal(0.0, {rounded(deviation, math.sqrt(0.5 / size))})"


def rounded(value: float, error: float) -> str:
    """Return the shortest number within two standard errors of a measured one: what somebody may have written.

    Args:
        value: measured, above 0.
        error: its standard error, relative to it: sqrt((kurtosis - 1) / 4n) of a deviation.
    """
    texts = [f"{value:.{digits}g}" for digits in range(1, 5)]
    return next((text for text in texts if abs(float(text) - value) <= 2 * error * value), texts[-1])


def is_uniform(samples: Tensor) -> bool:
    """Return True if samples with a standard deviation of 1 are far likelier to be uniform than normal.

    By the logarithms of the likelihoods: 64 uniform samples differ by 11 on average. One in a hundred sets of 64 normal
    samples lies within the bounds of a uniform distribution, too, and differs by 2.
    """
    bound = math.sqrt(3)
    if samples.abs().max().item() > 1.06 * bound:
        return False
    normal = -len(samples) * math.log(2 * math.pi) / 2 - (samples**2).sum().item() / 2
    return -len(samples) * math.log(2 * bound) - normal > 5


def flat(tensor: Tensor) -> Tensor:
    """Return the samples of a tensor as float64 in one dimension."""
    return tensor.detach().double().reshape(-1)


def norm_of(facts: Facts, name: str) -> float:
    """Return the norm of a tensor at the start."""
    measured = facts.trace.measured_initial
    if measured is not None and name in measured.norms:
        return measured.norms[name].item()
    return flat(facts.trace.initial[name]).norm().item()


def precision_of(facts: Facts) -> str:
    """Return in words what the weights are stored in, and what the model computes in."""
    dtypes = sorted({str(info.dtype).removeprefix("torch.") for info in facts.trace.tensors.values()})
    casts = {f.autocast for f in facts.trace.training_forwards() if f.autocast is not None}
    words = f"weights in {' and '.join(dtypes)}"
    return words + "".join(f", autocast to {str(dtype).removeprefix('torch.')}" for dtype in casts)
