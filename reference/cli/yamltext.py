"""YAML from a user or a foreign file, in bounded time and memory: settings are small."""

from typing import Any

from jsonargparse import get_loader

from reference.errors import ConfigurationError, first_line

LONGEST = 1 << 16  # bytes of a file or an option; the longest file of settings that is printed has some 3,000
DEEPEST = 32  # levels of nesting
NODES = 10_000  # values, each alias counted as what it stands for


def load_yaml(text: str, source: str) -> Any:
    """Return what a YAML text holds, with 3e-4 as a number.

    Raises:
        ConfigurationError: if the text is not YAML, or not of bounded size.
    """
    import yaml  # type: ignore[import-untyped] # PyYAML has no types of its own

    try:
        require_bounded(text, source)
        return get_loader("yaml")(text)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigurationError(f"{source} is not valid YAML{where}: {problem or 'it cannot be read'}.") from error
    except ConfigurationError:
        raise
    except Exception as error:  # of values, whose constructors raise anything: a date that is none, a list as key
        raise ConfigurationError(
            f"{source} holds a value that cannot be read: {first_line(error)[:100].rstrip('.')}."
        ) from error


def require_bounded(text: str, source: str) -> None:
    """Raise ConfigurationError if a YAML text is too long, nested too deeply, or grows too large by its aliases.

    Raises:
        yaml.YAMLError: if it is not YAML.
    """
    import yaml

    if len(text) > LONGEST:
        raise ConfigurationError(f"{source} has {len(text):,} characters, but settings have at most {LONGEST:,}.")
    sizes: dict[str, int] = {}  # by anchor
    begun: list[tuple[str | None, int]] = []  # anchor, and the nodes before it
    nodes = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):  # one by one: what is too deep is not read to its end
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ConfigurationError(
                    f"{source} refers to *{event.anchor} before its definition ends: write the values out."
                )
            nodes += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            begun.append((event.anchor, nodes))
            nodes += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = begun.pop()
            if anchor is not None:
                sizes[anchor] = nodes - before
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if len(begun) > DEEPEST:
            raise ConfigurationError(f"{source} is nested deeper than {DEEPEST} levels, but settings have three.")
        if nodes > NODES:
            raise ConfigurationError(f"{source} has more than {NODES:,} values: settings have about fifty.")
