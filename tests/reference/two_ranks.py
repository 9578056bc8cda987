"""Two processes with gloo on the CPU, started once, that run the functions they are given."""

import multiprocessing
import os
import pickle
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

from conformance.recording.ranks import free_port

TIMEOUT = 120.0  # seconds for one function


@contextmanager
def two_ranks() -> Iterator[Callable[..., list[Any]]]:
    """A function ``on_both(function, *arguments)`` that gives what ``function`` returned on rank 0 and on rank 1.

    The function must be importable. The environment is that of torchrun, so that Fabric finds its rank there.
    """
    if torch.cuda.is_available():
        raise RuntimeError("the ranks are forked, which autograd refuses where it has met CUDA: hide the GPU")
    context = multiprocessing.get_context("fork")  # spares each rank the imports, some seconds
    port, pipes, processes = free_port(), [], []
    with warnings.catch_warnings():
        # Python 3.12 warns that a forked process may deadlock on locks held by other threads. Ours compute with one.
        warnings.simplefilter("ignore", DeprecationWarning)
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, port, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)

    def on_both(function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        answers = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(TIMEOUT):
                raise TimeoutError(f"rank {rank} did not answer within {TIMEOUT:.0f} s")
            answers.append(pickle.loads(pipe.recv_bytes()))
        failed = [failure for _, failure in answers if failure]
        if failed:
            raise AssertionError("\n".join(failed))
        return [value for value, _ in answers]

    try:
        yield on_both
    finally:
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.close()
            process.kill()
            process.join()


def serve(rank: int, port: int, pipe: Connection) -> None:
    """What each process does until its pipe is closed."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
    }
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = (function(*arguments), "")
        except BaseException:
            answer = (None, f"rank {rank}: {traceback.format_exc()}")
        pipe.send_bytes(pickle.dumps(answer))
