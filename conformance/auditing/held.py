"""What the optimizers of a run hold."""

import torch

from conformance.auditing.facts import Facts
from conformance.errors import NotApplicable
from conformance.recording.trace import Group, Step

COARSE = (torch.bfloat16, torch.float16)


def steps(facts: Facts) -> list[Step]:
    """Return the steps of all updates. Raises NotApplicable if the optimizers' groups were not seen."""
    found = [step for update in facts.updates for step in update.steps]
    if not found:
        raise NotApplicable("no update was seen")
    if not any(step.groups for step in found):
        raise NotApplicable("the optimizer is not torch's and has no param_groups")
    return found


def groups_of(facts: Facts) -> dict[str, list[Group]]:
    """Return the groups that hold each tensor, of all optimizers: each optimizer's first step."""
    found: dict[str, list[Group]] = {}
    for step in first_steps(facts):
        for group in step.groups:
            for name in group.tensors:
                found.setdefault(name, []).append(group)
    return found


def first_steps(facts: Facts) -> list[Step]:
    """Return one step of each optimizer, told apart by class and tensors."""
    found: dict[tuple[object, ...], Step] = {}
    for step in steps(facts):
        found.setdefault((step.optimizer[:1], tuple(step.tensors)), step)
    return list(found.values())


def float32_copies(facts: Facts) -> dict[str, str]:
    """Return the float32 copy that an optimizer holds in place of each 16-bit tensor, by name; empty if it has none.

    A copy is not known by its name. What the optimizer holds beside the model is taken for copies if there is one for
    each 16-bit tensor, in the model's order, and their norms agree.
    """
    owned = groups_of(facts)
    infos = facts.trace.tensors
    coarse = [n for n, info in infos.items() if info.trainable and info.dtype in COARSE and n not in owned]
    first = facts.updates[0].measured_before
    foreign = [name for step in first_steps(facts) for name in step.tensors if name.startswith("foreign-")]
    if not coarse or len(foreign) != len(coarse) or first is None:
        return {}
    for name, copy in zip(coarse, foreign, strict=True):
        if name not in first.norms or copy not in first.norms:
            return {}
        if abs(first.norms[name].item() - first.norms[copy].item()) > 0.01 * max(first.norms[copy].item(), 1e-9):
            return {}
    return dict(zip(coarse, foreign, strict=True))
