"""The optimizer's step as a CUDA graph: recorded once, replayed by one launch at every later step.

A fused AdamW keeps the host busy for 0.4 to 1.2 ms with GPT-2's 148 tensors, which it groups and launches kernels for;
on an H100 they take 1.3 ms (reports/bench). A replay takes as long on the device, but one launch of 0.1 ms:
it pays where the GPU waits for the host.

What a graph reads and writes is fixed at the time of its capture, by address. So the gradients stay where they are:
``zero_grad`` fills them with zeros instead of dropping them, and backward adds into them.
"""

import inspect
import operator
from typing import Any

import torch
from torch.optim import Optimizer

from reference.config import ConfigurationError


def captured(optimizer_class: type[Optimizer]) -> type[Optimizer]:
    """A subclass of ``optimizer_class`` whose ``step`` replays a CUDA graph; used and saved like the class itself.

    The first step of an optimizer without state runs as usual, since it creates the state. The learning rate of each
    group stays a plain number that a schedule may set; any other setting that changes, a state that is loaded or a
    gradient at another address leads to a new capture.

    Raises:
        ConfigurationError: if the class does not accept ``capturable``.
    """
    if "capturable" not in inspect.signature(optimizer_class).parameters:
        raise ConfigurationError(
            f"capture_step=True, but {optimizer_class.__name__} does not accept 'capturable', so its step cannot be "
            "captured in a CUDA graph: set capture_step=False, or choose torch.optim.AdamW."
        )
    base: Any = optimizer_class

    class Captured(base):
        """Steps by replaying a CUDA graph."""

        def __init__(self, params: Any, **keywords: Any) -> None:
            super().__init__(params, **(keywords | {"capturable": True}))
            self._warned_capturable_if_run_uncaptured = True  # the first step is meant to run without a graph
            self.graph: torch.cuda.CUDAGraph | None = None
            self.gradients: list[torch.Tensor | None] = []  # what the graph was captured with
            self.settings: list[dict[str, Any]] = []
            self.rates: list[torch.Tensor] = []  # learning rates, where the graph reads them
            self.written: list[float] = []  # what stands in them
            self.skip: torch.Tensor | None = None  # what the graph reads in place of found_inf
            self.register_load_state_dict_post_hook(forget)

        def zero_grad(self, set_to_none: bool = False) -> None:
            """Fill the gradients with zeros, in place. ``set_to_none`` is ignored: the graph reads their addresses."""
            super().zero_grad(set_to_none=False)

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            """One update."""
            if closure is not None:
                raise ConfigurationError("a captured step takes no closure: set capture_step=False.")
            if self.graph is None or not self.unchanged():
                if any(p.grad is not None and p not in self.state for p in parameters(self)):
                    plain_step(base)(self)  # creates the state
                    return
                self.capture()
            rates = [group["lr"] for group in self.param_groups]
            if rates != self.written:
                for tensor, rate in zip(self.rates, rates, strict=True):
                    tensor.fill_(rate)
                self.written = rates
            found_inf = getattr(self, "found_inf", None)
            if self.skip is not None and found_inf is not None:
                self.skip.copy_(found_inf)
            assert self.graph is not None
            self.graph.replay()

        def unchanged(self) -> bool:
            """Whether the graph is still right. Quick: the device may be waiting."""
            gradients = (p.grad for group in self.param_groups for p in group["params"])
            return all(map(operator.is_, gradients, self.gradients)) and self.settings == settings(self)

        def capture(self) -> None:
            """Record a graph of the step as it is now. Nothing is computed by that."""
            numbers = [group["lr"] for group in self.param_groups]
            device = next(p.device for p in parameters(self))
            self.rates = [torch.tensor(float(number), device=device) for number in numbers]
            self.graph = None  # gives its memory back first
            found_inf = getattr(self, "found_inf", None)
            self.skip = torch.zeros((), device=device) if getattr(self, "_step_supports_amp_scaling", False) else None
            graph = torch.cuda.CUDAGraph()
            try:
                for rate, group in zip(self.rates, self.param_groups, strict=True):
                    group["lr"] = rate
                self.found_inf = self.skip
                with torch.cuda.graph(graph):
                    plain_step(base)(self)
            finally:
                for number, group in zip(numbers, self.param_groups, strict=True):
                    group["lr"] = number
                self.found_inf = found_inf
            self.graph, self.written = graph, numbers
            self.gradients, self.settings = [p.grad for p in parameters(self)], settings(self)

    Captured.__name__ = Captured.__qualname__ = f"Captured{optimizer_class.__name__}"
    return Captured


def forget(optimizer: Any) -> None:
    """After a state was loaded: its tensors are others."""
    optimizer.graph = None


def plain_step(base: Any) -> Any:
    """The step of the class without the wrapper that calls the hooks, which the subclass's own step has already."""
    return base.step.__wrapped__ if getattr(base.step, "hooked", False) else base.step


def parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    """All parameters of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What is written into a graph of the step: all settings of the groups but the learning rates."""
    return [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
