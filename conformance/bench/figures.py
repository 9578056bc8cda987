"""From a measurement to a row: medians, the floor, ratios, tokens per second and MFU."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from conformance.bench.bootstrap import Interval, median_interval, paired_ratio
from conformance.bench.case import Case, Facts, judged_by
from conformance.bench.measure import Measurement, doubts_about
from conformance.bench.summary import Beside, Card, Row, Samples

# How many times longer than the other each of a row's clocks may be. On an H100 wall over device was 1.000 to 1.003;
# a timestamp that is taken for a duration is off by thousands.
AGREE = 2.0


def make_row(case: Case, measured: Measurement, facts: Facts, card: Card) -> Row:
    """Return the row of a case that was measured."""
    device, wall = [r.device for r in measured.device_rounds], [r.wall for r in measured.rounds]
    moved = facts.get("floor bytes")
    floor = None if moved is None else float(moved) / card.copy_bandwidth
    row = Row(
        group=case.group,
        size=case.size,
        name=case.name,
        device_ms=in_ms(device),
        wall_ms=in_ms(wall),
        host_ms=median(r.host for r in measured.rounds) * 1e3,
        waits_for_host=measured.waits_for_host if judged_by(case.group) == "device" else None,
        rounds=len(device),
        warm_up=measured.warm_up.calls,
        facts=dict(facts),
        floor_ms=None if floor is None else floor * 1e3,
        share_of_floor=None if floor is None else floor / median(device),
        peak_allocated=measured.peak_allocated,
        peak_reserved=measured.peak_reserved,
        interleaved=ratio_beside(case, measured),
        doubts=tuple(doubts_about(measured, floor)),
        samples_ms=Samples(tuple(round(s * 1e3, 6) for s in device), tuple(round(s * 1e3, 6) for s in wall)),
    )
    try:
        return with_throughput(row, card)
    except ValueError as error:
        return replace(row, doubts=(*row.doubts, str(error)))


def in_ms(seconds: Sequence[float]) -> Interval:
    """Return median and interval of seconds in milliseconds."""
    return median_interval([value * 1e3 for value in seconds])


def ratio_beside(case: Case, measured: Measurement) -> Beside | None:
    """Return the ratio to the row that a case was interleaved with; None if it was measured alone."""
    if case.beside is None or not measured.beside:
        return None
    own, other = [r.wall for r in measured.rounds], [r.wall for r in measured.beside]
    if judged_by(case.group) == "device":
        own = [r.device for r in measured.device_rounds]
        other = [r.device for r in measured.beside_ahead or measured.beside]
    found, host = paired_ratio(own, other), median(r.host for r in measured.beside)
    return Beside(found.median, found.low, found.high, case.beside, median(other) * 1e3, host * 1e3)


def with_throughput(row: Row, card: Card) -> Row:
    """Return a row of training with tokens per second, and with MFU where the card's peak is known.

    Both come from the synchronised wall clock; MFU by the formula that the row names (conformance.bench.models).

    Raises:
        ValueError: if the figures cannot be: clocks that contradict each other, or more FLOPs than the card can do.
    """
    tokens, flops, causal = (row.number(f) for f in ("tokens", "flops_per_token", "flops_per_token_causal"))
    if tokens is None or row.device_ms is None or row.wall_ms is None or row.host_ms is None:
        return row
    device, wall, host = row.device_ms.median, row.wall_ms.median, row.host_ms
    if not 0.0 < device <= AGREE * wall <= AGREE * AGREE * (device + host):
        raise ValueError(
            f"a step cannot take {device:.3f} ms on the device, {wall:.3f} ms on the wall clock and {host:.3f} ms on "
            "the host: one of them is not a duration, perhaps a timestamp"
        )
    rate = tokens / wall * 1e3
    if card.dense_peak is None or flops is None or causal is None:
        return replace(row, tokens_per_second=rate)
    mfu, mfu_causal = rate * flops / card.dense_peak, rate * causal / card.dense_peak
    if mfu > 1.0:
        raise ValueError(
            f"an MFU of {mfu:.2f} is more than the card can do ({tokens:.0f} tokens in {wall:.3f} ms): a duration or a "
            "count is wrong"
        )
    return replace(row, tokens_per_second=rate, mfu=mfu, mfu_causal=mfu_causal)
