"""Plain data of a JSON file to frozen dataclasses and back; each field's own type says what is accepted."""

import dataclasses
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

T = TypeVar("T")

Positive = Annotated[float, "a number above 0"]
"""A finite number above 0: a duration, a rate, a share."""

WORDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", dict: "an object"}
WORDS |= {list: "a list", Positive: "a number above 0", types.NoneType: "null"}


def to_plain(value: Any) -> dict[str, Any]:
    """Return a dataclass as plain data. A field named like a Python keyword, ``with_``, loses its underscore."""
    return dataclasses.asdict(value, dict_factory=lambda pairs: {name.rstrip("_"): item for name, item in pairs})


def from_plain(kind: type[T], value: object, place: str) -> T:
    """Return plain data as a dataclass, without keys that it does not have: a newer release may have added some.

    Args:
        kind: the dataclass. Its fields are dataclasses, ``str``, ``bool``, ``int``, ``float``, ``Positive``, tuples of
            one type, mappings from ``str``, and unions of these.
        value: what json.loads() gave.
        place: where the value stands, for the message.

    Raises:
        ValueError: if a field without a default is missing, or a value has another type.
    """
    known, hints, found = checked(dict, value, place), typing.get_type_hints(kind, include_extras=True), {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type] # T is a dataclass
        key = field.name.rstrip("_")
        if key in known:
            found[field.name] = checked(hints[field.name], known[key], f"{place}.{key}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{place} has no {key!r}")
    try:
        return kind(**found)
    except ValueError as error:
        raise ValueError(f"{place} {error}") from error


def checked(kind: Any, value: Any, place: str) -> Any:
    """Return a value in the type that a field declares; raise ValueError if it has another."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        kind = next((argument for argument in arguments if fits(argument, value)), arguments[0])
        return checked(kind, value, place)
    if not fits(kind, value):
        what = WORDS[kind if kind in WORDS else list if origin is tuple else dict]
        raise ValueError(f"{place} is {reprlib.repr(value)}, not {what}")
    if origin is tuple:
        return tuple(checked(arguments[0], item, f"{place}[{number}]") for number, item in enumerate(value))
    if origin in (dict, Mapping):
        return {key: checked(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return from_plain(typing.cast("type[Any]", kind), value, place)
    return float(value) if kind in (float, Positive) else value


def fits(kind: Any, value: Any) -> bool:
    """Return whether a value is of a type, without a look inside; a whole number is a ``float``, a ``bool`` is not."""
    if kind in (float, Positive):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (kind is float or 0 < value < math.inf)
    if kind in WORDS:
        return type(value) is kind
    return isinstance(value, list if typing.get_origin(kind) is tuple else dict)
