"""A recipe on several processes, each recorded: started as torchrun starts them, so any stack finds its rank."""

import dataclasses
import faulthandler
import importlib
import io
import multiprocessing
import os
import re
import socket
import sys
import warnings
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

from conformance.errors import REFUSED, NotApplicable, RunFailed, describe_error, signal_name
from conformance.recipe import Recipe
from conformance.subject import Subject

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from conformance.recording.trace import Trace

TIMEOUT = 120.0  # seconds for the whole run; a rank that waits for a dead one would wait forever


def run_on_ranks(subject: Subject, recipe: Recipe, directory: Path) -> "list[Trace]":
    """Train ``recipe`` on ``recipe.world_size`` processes and give back their traces, by rank.

    Raises:
        NotApplicable: if a rank raised it before its first update: the stack refuses the recipe by design.
        RunFailed: if a rank raised something else, or did not end in time.
    """
    if recipe.sharded:
        for module in ("torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"):
            importlib.import_module(module)  # once, before the ranks fork
    port = free_port()
    ranks = []
    with warnings.catch_warnings():
        # Python 3.12 warns that a forked process may deadlock on locks held by other threads. Ours compute with one.
        warnings.simplefilter("ignore", DeprecationWarning)
        context = multiprocessing.get_context("fork" if works_in_a_fork() else "spawn")
        for rank in range(recipe.world_size):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (rank, subject, recipe, directory, port, theirs)
            process = context.Process(target=run_rank, args=arguments)  # type: ignore[attr-defined] # not of their base
            process.start()
            theirs.close()
            ranks.append((process, ours))
    try:
        return receive_all(ranks, directory)
    except BaseException:
        for process, _ in ranks:
            process.kill()  # the others wait for the one that failed
        raise
    finally:
        for process, pipe in ranks:
            pipe.close()
            process.join()


def works_in_a_fork() -> bool:
    """Return True if autograd does, by trying it: forking spares each rank the imports, some seconds.

    Where there is a GPU, autograd has a thread for it from the first backward on, also of a run on the CPU, and refuses
    to work in a fork. The same holds where PyTorch is built for CUDA and there is no GPU, if a ``FakeTensorMode``,
    which torch.compile uses, came before the first backward: it puts a pretended device in CUDA's place.
    """
    import torch

    if sys.platform != "linux" or torch.cuda.is_available():
        return False
    if torch.accelerator.current_accelerator() is None:  # PyTorch was built for none
        return True
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.ones(1, requires_grad=True).sum().backward()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def run_rank(rank: int, subject: Subject, recipe: Recipe, directory: Path, port: int, pipe: Connection) -> None:
    """Find this process's place by torchrun's variables, train, and send the trace."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(recipe.world_size),
        "LOCAL_WORLD_SIZE": str(recipe.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "conformance",
    }
    import torch

    from conformance.recording import record

    failure = refusal = ""
    with open(os.devnull, "w") as nowhere, crash_log(directory, rank).open("w") as log:
        faulthandler.enable(log)  # who reads what a crash prints there: describe_death()
        for stream in (1, 2):  # by number: handlers of loggers and native code keep the streams they once had
            os.dup2(nowhere.fileno(), stream)
        keep = directory.with_name(f"{directory.name}-kept-{rank}")
        with record(directory, recipe.zero_gradients, rank, recipe.nan_gradient, keep, recipe.dropping) as trace:
            try:
                subject.train(dataclasses.replace(recipe, directory=directory))
            except BaseException as error:
                failure = f"rank {rank} raised {describe_error(error)}"
                if isinstance(error, NotApplicable) and not trace.updates:  # after one, it is the adapter's mistake
                    refusal = f"{REFUSED}{error}"
        # Sent before the process group is left, which makes the others fail; so the first to arrive is the cause. As
        # bytes: a tensor sent as an object would be passed by a file descriptor that dies with this process. By
        # torch.save: pickle alone writes an archive for each of a trace's thousand tensors.
        sent = io.BytesIO()
        torch.save((trace, failure, refusal), sent)
        pipe.send_bytes(sent.getbuffer())
        pipe.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def receive_all(ranks: "list[tuple[BaseProcess, Connection]]", directory: Path) -> "list[Trace]":
    """Return the traces that the ranks send, by rank.

    Raises:
        NotApplicable: as soon as a rank sent that the stack refuses the recipe.
        RunFailed: as soon as a rank raised or died, with the first to do so: the others only lose their peer.
    """
    import torch

    from conformance.recording.masters import complete

    traces: dict[int, Trace] = {}
    waiting = {pipe: rank for rank, (_, pipe) in enumerate(ranks)}
    while waiting:
        ready = wait(list(waiting), TIMEOUT)
        if not ready:
            raise RunFailed(f"rank {min(waiting.values())} did not end within {TIMEOUT:.0f} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                sent = io.BytesIO(pipe.recv_bytes())
            except EOFError:
                raise RunFailed(describe_death(rank, ranks[rank][0], crash_log(directory, rank))) from None
            traces[rank], failure, refusal = torch.load(sent, weights_only=False)
            if refusal:
                raise NotApplicable(refusal)
            if failure:
                raise RunFailed(failure)
    found = [traces[rank] for rank in sorted(traces)]
    complete(found)
    return found


def crash_log(directory: Path, rank: int) -> Path:
    """Return the file beside the run's folder in which a crash of native code leaves the lines of Python behind it."""
    return directory.with_name(f"{directory.name}-crash-{rank}.txt")


def describe_death(rank: int, process: "BaseProcess", log: Path) -> str:
    """Say how the process of a rank ended that sent no trace: by which signal, where, or with which exit code."""
    process.join(5)  # its pipe is closed, so it has ended, or is about to
    code = process.exitcode
    if code is None:
        return f"rank {rank} closed its pipe without sending its trace"
    how = f"by {signal_name(-code)}" if code < 0 else f"with exit code {code}"
    crashed = log.read_text(encoding="utf-8", errors="replace").partition("Current thread")[2] if log.is_file() else ""
    frame = re.search(r'File "(.*)", line (\d+) in (\S+)', crashed)
    where = f" in {frame[3]} ({Path(frame[1]).name}:{frame[2]})" if frame else ""
    return f"the process of rank {rank} ended {how}{where} before it sent its trace"


def free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
