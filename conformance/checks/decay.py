"""Rules of parameter groups and weight decay."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conformance.checks.optimizer import trainable_ids
from conformance.errors import Violation, quoted
from conformance.recording.trace import Step

# Relative: one rounding of the factor and one of the product are at most 1.2e-7. Healthy runs on the CPU in float32
# show 7.2e-8; the weakest mutant, a tensor that decays and should not (or the reverse), is off by lr * wd = 1e-3.
DECAY_BOUND = 2.5e-7


def covered_once(groups: Sequence[Collection[str]], trainable: Collection[str]) -> None:
    """Check that each trainable tensor is in exactly one group, exactly once.

    Args:
        groups: names of the tensors in each group; a tied tensor has one name.
        trainable: names of the tensors that shall be trained.

    Raises:
        Violation: naming tensors that are missing or there more than once.
    """
    count = Counter(name for group in groups for name in group)
    missing = [name for name in trainable if count[name] == 0]
    repeated = [f"{name} ({times} times)" for name, times in count.items() if times > 1]
    if missing or repeated:
        raise Violation(
            f"each of {len(trainable)} trainable tensors is in exactly one parameter group, once",
            f"missing: {quoted(missing) or 'none'}; more than once: {quoted(repeated) or 'none'}",
        )


def owned_as_declared(steps: Sequence[Step], owners: Mapping[str, str | None]) -> None:
    """Check that each tensor is stepped by the optimizer that is declared for it.

    Args:
        steps: of one update.
        owners: class path of the optimizer for each tensor; None: any.

    Raises:
        Violation: naming tensors that another optimizer steps.
    """
    wrong = [
        f"{name} by {step.optimizer[0].rpartition('.')[2]}"
        for step in steps
        for name in step.tensors
        if (owner := owners.get(name)) is not None and not any(is_class(owner, path) for path in step.optimizer)
    ]
    if wrong:
        wanted = sorted({owner.rpartition(".")[2] for owner in owners.values() if owner is not None})
        raise Violation(f"each tensor stepped by the optimizer declared for it ({', '.join(wanted)})", quoted(wrong))


def is_class(declared: str, path: str) -> bool:
    """Return True if a class path names a class, where it is defined or where a parent package exports it.

    >>> is_class("torch.optim.AdamW", "torch.optim.adamw.AdamW")
    True
    """
    (package, _, name), (module, _, found) = declared.rpartition("."), path.rpartition(".")
    return name == found and (module == package or module.startswith(f"{package}."))


def only_these(groups: Sequence[Collection[str]], trainable: Collection[str]) -> None:
    """Check that the groups hold nothing but trainable tensors of the model.

    Raises:
        Violation: naming frozen tensors and tensors that the model does not use.
    """
    strangers = [name for group in groups for name in group if name not in trainable]
    if strangers:
        raise Violation("only trainable tensors of the model are in the optimizer", f"also there: {quoted(strangers)}")


def decay_acts(before: Mapping[str, Tensor], after: Mapping[str, Tensor], factors: Mapping[str, float]) -> None:
    """Check that a step with zero gradients multiplies each tensor by its factor: 1 - lr * weight_decay, or 1.

    Raises:
        Violation: naming tensors and the factors seen.
    """
    wrong = []
    for name, factor in factors.items():
        expected = before[name].double() * factor
        error = (after[name].double() - expected).abs()
        limit = 0.0 if factor == 1.0 else DECAY_BOUND
        if not bool((error <= limit * expected.abs()).all()):
            used = before[name].double().abs() > 1e-6
            ratio = (after[name].double()[used] / before[name].double()[used]).median().item() if used.any() else 0.0
            wrong.append(f"{name} by {ratio:.7g} instead of {factor:.7g}")
    if wrong:
        raise Violation(
            "a step without gradients multiplies decayed tensors by 1 - lr * weight_decay and leaves the others as "
            "they are",
            f"it multiplies {len(wrong)} of {len(factors)} tensors by something else: {quoted(wrong)}",
        )


def moved(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    names: Collection[str],
    what: str = "every trainable tensor moves",
) -> None:
    """Check that every tensor named has changed.

    Raises:
        Violation: naming those that are as they were.
    """
    still = [name for name in names if torch.equal(before[name], after[name])]
    if still:
        raise Violation(what, f"{len(still)} of {len(names)} did not: {quoted(still)}")


def unmoved(before: Mapping[str, Tensor], after: Mapping[str, Tensor], names: Collection[str]) -> None:
    """Check that no tensor named has changed.

    Raises:
        Violation: naming those that have.
    """
    changed = [name for name in names if not torch.equal(before[name], after[name])]
    if changed:
        raise Violation("frozen tensors stay as they are", f"changed: {quoted(changed)}")


def decay_groups_cover(model: nn.Module, optimizer: Optimizer) -> None:
    """Check that each trainable tensor of a model is in one group of its optimizer, once, and nothing else is.

    >>> model = nn.Linear(2, 2)
    >>> decay_groups_cover(model, torch.optim.AdamW(model.parameters()))

    Raises:
        Violation: naming tensors that are missing, repeated, frozen or foreign.
    """
    names = trainable_ids(model)
    groups = [[names.get(id(p), f"a tensor {tuple(p.shape)}") for p in g["params"]] for g in optimizer.param_groups]
    covered_once(groups, list(names.values()))
    only_these(groups, list(names.values()))
