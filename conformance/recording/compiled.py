"""Runs that torch.compile really compiles. Nothing inside them is recorded: hooks would change what is compiled."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from conformance.recording.isolation import everything_put_back, inductor_not_imported


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Let torch.compile compile inside the block, and forget the code afterwards.

    Without a GPU, AOTAutograd's graphs run as they are: they are what inductor starts from, and inductor would take a
    minute for its C++ compiler.
    """
    wrapper: Any = torch._TorchCompileInductorWrapper
    original = wrapper.__call__
    with everything_put_back(), inductor_not_imported(), torch.compiler.set_stance("default"):
        torch.set_num_threads(1)
        if not torch.cuda.is_available():
            wrapper.__call__ = without_inductor
        try:
            yield
        finally:
            wrapper.__call__ = original
            torch._dynamo.reset()


def without_inductor(self: object, model: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    """Return the compiled function of a graph, as inductor's wrapper does, but by AOTAutograd alone."""
    from torch._dynamo.backends.debugging import aot_eager

    return aot_eager(model, inputs)
