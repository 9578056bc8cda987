"""Rules of optimizers and their keyword arguments."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conformance.errors import Violation, quoted
from conformance.recording.snapshot import equal_values, plain_value
from conformance.recording.trace import Group


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
