"""Speed: whether the GPU waits, and what it reaches. Judged on a GPU only."""

import math

import torch

from conformance.auditing.facts import Facts
from conformance.auditing.rule import Seen, rule
from conformance.errors import NotApplicable, Violation

WAITS = 0.3
SLOW = 0.3
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "L40S": 362e12, "B200": 2250e12, "L4": 121e12}
"""Dense bfloat16 FLOP/s by NVIDIA's data sheets."""


@rule(
    "gpu-waits",
    "speed",
    why="A GPU with nothing to do is paid for all the same.",
    mend="Load data in workers with pinned memory, do not call .item() or print in every microbatch, compile the "
    "model, and use larger microbatches.",
    source="PyTorch performance tuning guide",
    advice=True,
)
def busy(seen: Seen) -> None:
    """The GPU always has work waiting, and never waits for the host."""
    idle, asked = seen.facts.idle
    if asked < 8:
        raise NotApplicable("the model is not on a GPU, or too little was seen")
    if idle > WAITS * asked:
        raise Violation("work in the GPU's queue", f"the queue was empty at {idle} of {asked} gates")


@rule(
    "mfu",
    "speed",
    why="A dense GPT reaches 40 to 60 % of a GPU's bfloat16 peak; less has a cause that can be found.",
    mend="In this order: autocast to bfloat16, torch.compile, fused attention, larger microbatches, a fused optimizer.",
    source="nanoGPT: estimate_mfu; Chowdhery et al. 2022, PaLM, appendix B",
    advice=True,
)
def utilisation(seen: Seen) -> None:
    """The run reaches at least 30 % of the GPU's bfloat16 peak."""
    facts = seen.facts
    if facts.device != "cuda":
        raise NotApplicable("the model is not on a GPU")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((value for known, value in sorted(PEAK.items(), key=lambda item: -len(item[0])) if known in name), 0.0)
    if not peak or len(facts.seconds) < 2 or facts.sharded:
        raise NotApplicable(f"the peak of {name or 'the device'} is not known, or too few updates were timed")
    tokens = sum(f.ids.numel() for f in facts.trace.forwards if f.grad_enabled and f.update == 1)
    weights = sum(math.prod(info.shape) for info in facts.trace.tensors.values())
    # The audit itself slows the recorded updates down, so a share just below is not told.
    reached = 6 * weights * tokens / min(facts.seconds[1:]) / peak
    if reached < SLOW * 0.9:
        raise Violation(f"an MFU of at least {SLOW:.0%}", f"{reached:.0%}; {guess(facts)}")


def guess(facts: Facts) -> str:
    """Return a guess why the utilisation is low."""
    forwards = [forward for forward in facts.trace.forwards if forward.grad_enabled]
    dtypes = {info.dtype for info in facts.trace.tensors.values()}
    if not any(f.autocast for f in forwards) and dtypes == {torch.float32}:
        return "the model computes in float32"
    if facts.idle[0] > WAITS * facts.idle[1]:
        return "the GPU waits for the host"
    if not facts.compiled:
        return "the model is not compiled"
    if forwards and forwards[0].ids.numel() < 4096:
        return "microbatches are small"
    return "no single cause was seen"
