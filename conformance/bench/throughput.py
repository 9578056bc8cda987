"""Tokens per second and MFU of a row, and the refusal of figures that cannot be."""

from collections.abc import Mapping
from typing import Any

import torch

from conformance.subject import UsageError
from reference.training.throughput import dense_peak

# How many times longer than the other each of a row's clocks may be. On an H100 wall over device was 1.000 to 1.003;
# a timestamp that is taken for a duration is off by thousands.
AGREE = 2.0


def throughput(row: Mapping[str, Any]) -> dict[str, float]:
    """Tokens per second and MFU of a row of the result file; empty for one that was unavailable.

    Returns:
        ``tokens_per_second`` by the synchronised wall clock, ``tokens_per_second_device`` by the device's; and where
        the card's peak is known ``mfu`` and ``mfu_causal``, both by the wall clock: by the formula that
        the row names (conformance.bench.training.FORMULA).

    Raises:
        UsageError: if the figures cannot be: clocks that contradict each other, a peak above the card's dense one
            (data sheets print the rate with sparsity, double of it), or more FLOPs than the card can do.
    """
    if row["unavailable"]:
        return {}
    facts = row["facts"]
    name = f"{row['size']}, {row['name']}"
    device, wall = row["device_ms"]["median"] / 1e3, row["wall_ms"]["median"] / 1e3
    host = row["host_ms"] / 1e3
    if not 0.0 < device <= AGREE * wall <= AGREE * AGREE * (device + host):
        raise UsageError(
            f"{name}: a step of {device * 1e3:.3f} ms on the device, {wall * 1e3:.3f} ms on the wall clock and "
            f"{host * 1e3:.3f} ms on the host cannot be: a duration is wrong, for example a timestamp. Measure again."
        )
    figures = {"tokens_per_second": facts["tokens"] / wall, "tokens_per_second_device": facts["tokens"] / device}
    if "dense_peak" not in facts:
        return figures
    peak, known = facts["dense_peak"], dense_peak(facts["card"], torch.bfloat16)
    if known is None or peak > known:
        raise UsageError(
            f"{name}: a peak of {peak / 1e12:.1f} TFLOP/s is not the dense one of {facts['card']}, "
            f"{'which is unknown' if known is None else f'{known / 1e12:.1f}'}: see CARDS in reference.training."
        )
    for key in ("flops_per_token", "flops_per_token_causal"):
        mfu = figures["tokens_per_second"] * facts[key] / peak
        if mfu > 1.0:
            raise UsageError(
                f"{name}: an MFU of {mfu:.2f} is more than the card can do: {facts['tokens']:.0f} tokens in "
                f"{wall * 1e3:.3f} ms. A duration or a count is wrong. Measure again."
            )
        figures[key.replace("flops_per_token", "mfu")] = mfu
    return figures
