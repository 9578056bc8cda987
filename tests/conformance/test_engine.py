"""A sitting: what it changes in its process, and that it puts that back."""

import gc

import torch

from conformance.engine import Sitting
from conformance.options import Options


def test_a_sitting_computes_on_one_thread_and_puts_back_what_it_found() -> None:
    thresholds, threads = gc.get_threshold(), torch.get_num_threads()
    gc.set_threshold(700, 10, 10)  # Python's own
    torch.set_num_threads(2)
    try:
        with Sitting(Options(clauses=("INIT-1",))):
            assert torch.get_num_threads() == 1
            assert gc.get_threshold()[0] > 700
        assert (gc.get_threshold(), torch.get_num_threads()) == ((700, 10, 10), 2)
    finally:
        gc.set_threshold(*thresholds)
        torch.set_num_threads(threads)
