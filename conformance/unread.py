"""Which fields of a recipe an adapter reads: one that was written before a field existed is not judged by it."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.recipe import Recipe


class Watched(Recipe):
    """A recipe that remembers in ``_read`` what is read of it, but for what its own methods read."""

    if not TYPE_CHECKING:  # or every name would be an attribute to a type checker

        def __getattribute__(self, name: str) -> Any:
            if sys._getframe(1).f_globals["__name__"] != Recipe.__module__:
                object.__getattribute__(self, "__dict__").get("_read", set()).add(name)
            return object.__getattribute__(self, name)


def watched(recipe: Recipe, directory: Path, read: set[str]) -> Recipe:
    """Return a recipe for a run in ``directory``, which adds the names of fields that are read to ``read``."""
    copy = dataclasses.replace(recipe, directory=directory)
    object.__setattr__(copy, "_read", read)
    object.__setattr__(copy, "__class__", Watched)
    return copy
