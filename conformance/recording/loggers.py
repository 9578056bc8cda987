"""Metrics that a run gives to a logger: wandb, TensorBoard, Lightning's, MLflow's.

No line of the run is changed: the logger's method is watched while the run is recorded, and then put back.
"""

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

from conformance.recording.metrics import line

Hear = Callable[[str], None]

LOGGERS: dict[str, tuple[str, str, Callable[..., str]]] = {
    "wandb.sdk.wandb_run": ("Run", "log", lambda data, step="", **_: line(data, "" if step is None else step)),
    "torch.utils.tensorboard.writer": (
        "SummaryWriter",
        "add_scalar",
        lambda tag, value, global_step="", **_: line({tag: number(value)}, global_step),
    ),
    "tensorboardX.writer": (
        "SummaryWriter",
        "add_scalar",
        lambda tag, value, global_step="", **_: line({tag: number(value)}, global_step),
    ),
    "lightning.pytorch.trainer.connectors.logger_connector.logger_connector": (
        "_LoggerConnector",
        "log_metrics",
        lambda metrics, step="", **_: line({k: number(v) for k, v in metrics.items()}, "" if step is None else step),
    ),
    "mlflow.tracking.fluent": ("", "log_metrics", lambda metrics, step="", **_: line(metrics, step or "")),
}
"""By module: class and method that take metrics, and what they say as a line."""


def number(value: Any) -> Any:
    """Return a plain number for a tensor with one element."""
    return value.item() if hasattr(value, "item") else value


class Loggers:
    """Watches the common loggers. The run imports them when it likes, so they are looked for at every update."""

    def __init__(self, hear: Hear) -> None:
        self.hear = hear
        self.waiting = dict(LOGGERS)
        self.undo: list[Callable[[], None]] = []

    def look(self) -> None:
        """Watch those that have been imported since."""
        for name in [name for name in self.waiting if name in sys.modules]:
            kind, method, said = self.waiting[name]
            owner: Any = getattr(sys.modules[name], kind, None) if kind else sys.modules[name]
            original = getattr(owner, method, None)
            if original is not None:
                del self.waiting[name]
                setattr(owner, method, self.telling(original, said, bound=bool(kind)))
                self.undo.append(functools.partial(setattr, owner, method, original))

    def telling(self, original: Callable[..., Any], said: Callable[..., str], bound: bool) -> Callable[..., Any]:
        """Return a logger's method that also tells what it was given."""

        @functools.wraps(original)
        def log(*args: Any, **kwargs: Any) -> Any:
            with contextlib.suppress(Exception):  # other arguments than we know: nothing is heard
                if text := said(*args[bound:], **kwargs):
                    self.hear(text)
            return original(*args, **kwargs)

        return log

    def leave(self) -> None:
        """Put the loggers' methods back."""
        for action in self.undo:
            action()
