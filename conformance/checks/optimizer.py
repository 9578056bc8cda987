"""Rules of optimizers and their keyword arguments."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conformance.errors import Violation, quoted
from conformance.recording.snapshot import bits_equal, equal_values, plain_value
from conformance.recording.trace import Group, Update

STAYS = 1e-6
"""Of a tensor's length. Healthy runs show 0, and stacks that normalise their weights 1e-7; the weakest mutant 1e-4."""


def keywords_arrive(groups: Sequence[Group], arguments: Mapping[str, Any], varying: Sequence[str] = ()) -> None:
    """Check that every keyword that the user gave is in every parameter group, exactly.

    Args:
        groups: the optimizer's groups.
        arguments: what the user gave.
        varying: keywords that a stack may set to something else in some groups (weight_decay: 0 where nothing
            decays); one group must have the user's value.

    Raises:
        Violation: naming keyword, value given and values found.
    """
    for key, given in arguments.items():
        found = [group.settings.get(key, "nothing") for group in groups]
        matching = [equal_values(plain_value(given), as_given(value, given)) for value in found]
        if not (any(matching) if key in varying else all(matching)):
            raise Violation(f"{key}={given!r} in the optimizer, as the user gave it", f"{key} is {quoted(found)}")


def as_given(found: Any, given: Any) -> Any:
    """Return the number given if a tensor holds it, as compiled optimizers want the rate; otherwise what was found."""
    if isinstance(found, Tensor) and found.ndim == 0 and isinstance(given, float):
        return given if bool(found == torch.tensor(given, dtype=found.dtype)) else found
    return found


def keeps_learning(gradients: Sequence[Mapping[str, Tensor | None]]) -> None:
    """Check that no tensor which the first update gave a gradient is left without one for good.

    A tensor may miss some updates: an expert that no token was sent to has no gradient. Nor does the last update alone
    say anything.

    >>> keeps_learning([{"weight": torch.ones(2)}, {"weight": torch.ones(2)}, {"weight": torch.ones(2)}])

    Args:
        gradients: of each update, by tensor; None where there is none.

    Raises:
        Violation: naming tensors that have no gradient in the last two updates or more, and since when.
    """
    given = [{name for name, one in each.items() if one is not None and bool(one.any())} for each in gradients]
    last = {name: max(n for n, names in enumerate(given, start=1) if name in names) for name in given[0]}
    lost = {name: update for name, update in last.items() if update < len(given) - 1}
    if lost:
        first = min(lost.values())
        raise Violation(
            f"every tensor that update 1 gave a gradient, and so moved, has one again in updates {first + 1} to "
            f"{len(given)}",
            f"{len(lost)} of {len(last)} have none after update {first}, and move no more: {quoted(list(lost))}",
        )


def moves_no_more_than(
    plain: Sequence[Update], others: Sequence[Update], names: Mapping[str, Sequence[str]], what: str
) -> None:
    """Check that between the updates of a run no tensor changes that stays as it is between those of a plain run.

    What a stack does there by design, such as normalising its weights, it does in every run.

    Args:
        plain: updates of the plain run.
        others: of the other run.
        names: all names of each tensor of the other run: a tied one has several.
        what: the other run is, for the message.

    Raises:
        Violation: naming the tensors.
    """
    usual = {name for name, _ in changed_between(plain)}
    found = [(name, number) for name, number in changed_between(others) if usual.isdisjoint(names.get(name, (name,)))]
    if found:
        number = found[0][1]
        changed = [name for name, update in found if update == number]
        raise Violation(
            f"{what}: weights that stay, between update {number} and the next, as the optimizer's step has left them",
            f"something else changes {quoted(changed)}; in the plain run it does not",
        )


def stays(updates: Sequence[Update]) -> None:
    """Check that weights which no step moves stay where they are, from one update to the next.

    A stack that normalises its weights after each update has done so by the second one, and then moves them by rounding
    at most.

    Raises:
        Violation: naming the tensors and how far the first one moves.
    """
    for one, other in pairwise(updates):
        moved = {
            name: (other.before[name].double() - tensor.double()).norm().item() / max(tensor.norm().item(), 1e-12)
            for name, tensor in one.before.items()
            if tensor.is_floating_point()
        }
        wrong = {name: error for name, error in moved.items() if not error <= STAYS}
        if wrong:
            first = next(iter(wrong))
            raise Violation(
                f"weights that stay where they are, within {STAYS:g} of their length, as no step moves them",
                f"{len(wrong)} of {len(moved)} tensors move: {quoted(list(wrong))}; {first} by {wrong[first]:.2g}",
            )


def changed_between(updates: Sequence[Update]) -> list[tuple[str, int]]:
    """Return the tensors that are not before an update what they were after the one before it, with its number."""
    return [
        (name, number)
        for number, (one, other) in enumerate(pairwise(updates), start=1)
        for name, tensor in one.after.items()
        if name in other.before and not bits_equal(tensor, other.before[name])
    ]


def config_untouched(changed: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
    """Check that the user's configuration is the same after the run as before.

    Raises:
        Violation: with the configuration before and after.
    """
    if changed:
        given, found = changed[0]
        raise Violation(f"the user's configuration stays {given}", f"after the run it is {found}")


def names_nearest(message: str, nearest: str, accepted: Sequence[str]) -> None:
    """Check that an error about a misspelt keyword names the right one first: a list of all is not a hint.

    Raises:
        Violation: with the message.
    """
    places = {key: match.start() for key in accepted if (match := re.search(rf"\b{key}\b", message))}
    if nearest not in places or min(places, key=lambda key: places[key]) != nearest:
        raise Violation(f"the error names the nearest accepted keyword, {nearest!r}", message)


def accepts_only_supported_keywords(build: Callable[[type[Optimizer], dict[str, Any]], Optimizer]) -> None:
    """Check that a builder of optimizers passes on the user's keywords, drops only its own, and refuses misspelt ones.

    >>> import torch
    >>> parameters = [torch.nn.Parameter(torch.zeros(2))]
    >>> accepts_only_supported_keywords(lambda kind, keywords: kind(parameters, **keywords))

    Args:
        build: makes an optimizer from a class and the user's keywords, over parameters of its own.

    Raises:
        Violation: if a class cannot be built, a keyword is lost or changed, or a misspelt one is swallowed.
    """
    from conformance.probes import AnyKeywords, WithoutFused

    kinds: tuple[type[Optimizer], ...] = (torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop)
    for kind in (*kinds, WithoutFused, AnyKeywords):
        given = {"lr": 0.00123, "weight_decay": 0.0617}
        try:
            optimizer = build(kind, dict(given))
        except Exception as error:
            raise Violation(f"{kind.__name__} is built", f"{type(error).__name__}: {error}") from error
        groups = [
            Group((), {key: plain_value(value) for key, value in group.items() if key != "params"})
            for group in optimizer.param_groups
        ]
        keywords_arrive(groups, given, varying=("weight_decay",))
    try:
        build(torch.optim.AdamW, {"lr": 1e-3, "wieght_decay": 0.5})
    except Exception:
        return
    raise Violation("wieght_decay=0.5 is refused by AdamW's builder", "an optimizer was built without it")


def trainable_ids(module: nn.Module) -> dict[int, str]:
    """Return names of the trainable tensors of a module, by identity."""
    return {id(p): name for name, p in module.named_parameters() if p.requires_grad}
