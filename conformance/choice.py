"""The optimizer that a recipe asks for, and a record of the configurations that were handed out for it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

_handed_out: ContextVar[list[tuple[dict[str, Any], dict[str, Any]]] | None] = ContextVar("handed_out", default=None)


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer by class path, with keyword arguments as a user would write them in a config file."""

    class_path: str = "torch.optim.AdamW"
    arguments: tuple[tuple[str, Any], ...] = (("lr", 1e-2),)

    @classmethod
    def of(cls, class_path: str, **arguments: Any) -> "OptimizerChoice":
        """``OptimizerChoice.of("torch.optim.SGD", lr=0.1)``."""
        return cls(class_path, tuple(arguments.items()))

    @property
    def rate(self) -> float:
        """The learning rate among the arguments; every choice of the suite has one."""
        return float(dict(self.arguments)["lr"])

    def config(self) -> dict[str, Any]:
        """``{"class_path": ..., "init_args": {...}}``: a fresh dictionary, as a config file would give it.

        The recording remembers it, so that a clause can see whether the stack changed its user's configuration.
        """
        config = {"class_path": self.class_path, "init_args": dict(self.arguments)}
        remembered = _handed_out.get()
        if remembered is not None:
            remembered.append((config, copy.deepcopy(config)))
        return config


@contextmanager
def remember_configs() -> Iterator[list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Collect every configuration handed out inside, as pairs (the live one, a copy made when it was given)."""
    configs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    token = _handed_out.set(configs)
    try:
        yield configs
    finally:
        _handed_out.reset(token)
