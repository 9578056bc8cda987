"""All rows of the bench, in the order in which they run, and the choice among them."""

from collections.abc import Sequence

import torch

from conformance.bench import finetuning, optimizer_step, peers, training
from conformance.bench.case import AGAINST_ITSELF, Case
from conformance.errors import UsageError


def collect(device: torch.device, quick: bool) -> list[Case]:
    """Return all cases, in the order in which they run."""
    found = [case for source in (optimizer_step, training, peers, finetuning) for case in source.cases(device, quick)]
    check_names(found)
    return sorted(found, key=lambda case: case.priority)  # which keeps the order of equals


def check_names(cases: Sequence[Case]) -> None:
    """Raise ValueError if two cases have the same name, or one is to be interleaved with one that does not exist."""
    keys = [case.key for case in cases]
    for case in cases:
        if keys.count(case.key) > 1:
            raise ValueError(f"two rows are named {case.key}.")
        if case.beside is not None and (case.group, case.size, case.beside) not in keys:
            raise ValueError(f"{case.key} must be interleaved with {case.beside!r}, but there is no such row.")


def choose(cases: Sequence[Case], only: Sequence[str]) -> list[Case]:
    """Return the cases that were asked for, and always the one that gives the noise floor; all if none was named.

    Args:
        cases: all of them.
        only: texts in 'group / size / name'.

    Raises:
        UsageError: if a text is found in no case.
    """
    names = {case.key: " / ".join(case.key).lower() for case in cases}
    for text in only:
        if not any(text.lower() in name for name in names.values()):
            raise UsageError(f"--only {text!r} matches no row's 'group / size / name': try 'optimizer step' or '8bit'.")
    return [
        case
        for case in cases
        if not only or case.name.endswith(AGAINST_ITSELF) or any(text.lower() in names[case.key] for text in only)
    ]
