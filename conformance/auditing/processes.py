"""What the processes of a parallel run tell each other: through a store, never through the run's own collectives."""

import contextlib
import io
import os
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from conformance.auditing.entropies import weights
from conformance.auditing.facts import Facts
from conformance.auditing.traces import decoded, encoded
from conformance.auditing.verdict import Finding
from conformance.recording.trace import Named

PATIENCE = timedelta(seconds=60)
"""How long process 0 waits for the others."""


def place() -> tuple[int, int]:
    """Return the rank of this process, and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    try:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        return 0, 1


def find_store() -> Any:
    """Return a store that all processes reach: torchrun's, or the process group's; None if there is none."""
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store: Any = torch._C._distributed_c10d.TCPStore(address, port, is_master=False, timeout=PATIENCE)
        elif dist.is_available() and dist.is_initialized():
            store = dist.distributed_c10d._get_default_store()
        else:
            return None
    except Exception:  # no store answers: the others will be missing in the letter
        return None
    return torch._C._distributed_c10d.PrefixStore(
        f"conformance-audit/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store
    )


def exchanged(facts: Facts, findings: list[Finding]) -> tuple[list[Facts], list[list[Finding]]] | None:
    """Return facts and findings of all processes, on process 0; None on the others.

    A process that is not heard of within a minute has facts that say so.
    """
    if facts.world < 2:
        return [facts], [findings]
    store = find_store()
    if facts.rank > 0:
        if store is not None:
            store.set(str(facts.rank), packed(facts, findings))
            with contextlib.suppress(Exception):
                store.wait(["heard"], PATIENCE)  # a store that this process holds must outlive the exchange
        return None
    ranks, found = [facts], [findings]
    deadline = time.monotonic() + PATIENCE.total_seconds()  # for all of them: a dead node must not cost minutes
    for rank in range(1, facts.world):
        try:
            store.wait([str(rank)], timedelta(seconds=max(deadline - time.monotonic(), 0.1)))
            other, own = unpacked(store.get(str(rank)))
            ranks.append(other)
            found.append(own)
        except Exception:
            ranks.append(Facts(rank=rank, world=facts.world, reported=False))
    if store is not None:
        store.set("heard", "1")
    return ranks, found


def packed(facts: Facts, findings: list[Finding]) -> bytes:
    """Return what one process tells process 0."""
    stream = io.BytesIO()
    torch.save([encoded(slim(facts)), [vars(finding) for finding in findings]], stream)
    return stream.getvalue()


def unpacked(content: bytes) -> tuple[Facts, list[Finding]]:
    """Return what another process told; no code of it is run."""
    facts, findings = torch.load(io.BytesIO(content), weights_only=True)
    return decoded(facts), [Finding(**finding) for finding in findings]


def slim(facts: Facts) -> Facts:
    """Return what the rules on several processes need: figures of whole tensors, batches and losses."""
    updates = [
        replace(update, gradients=Named(), before=Named(), state_before={}, state_after={}) for update in facts.updates
    ]
    trace = replace(facts.trace, updates=updates, buffers={})
    return replace(facts, trace=trace, said=[], weights=weights(facts))
