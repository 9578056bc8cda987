"""The optimizer's step as cases: shapes, floors, state."""

import pytest
import torch

from conformance.bench.case import AGAINST_ITSELF, Setting
from conformance.bench.models import tensor_shapes
from conformance.bench.optimizer_state import states
from conformance.bench.optimizer_step import (
    TRAFFIC,
    VARIANTS,
    Variant,
    build,
    bytes_per_parameter,
    cases,
    find_optimizer,
)
from conformance.errors import Unavailable

CPU = torch.device("cpu")


def test_the_shapes_are_those_of_the_trainer() -> None:
    assert sum(shape.numel() for shape in tensor_shapes("gpt2-124m")) == 124_475_904
    assert len(tensor_shapes("gpt2-124m")) == 148  # the tied head once
    assert sum(shape.numel() for shape in tensor_shapes("llama-1.2b")) == 1_340_704_768


def test_the_floors_are_the_sums_that_are_written_out() -> None:
    floors = {f"{moments}, {dtype}": bytes_per_parameter(text) for (moments, dtype), text in TRAFFIC.items()}
    assert floors == {
        "moments like the parameter, float32": 28,
        "moments like the parameter, bfloat16": 14,
        "32-bit moments, float32": 28,
        "32-bit moments, bfloat16": 22,
        "8-bit moments, float32": 16.0625,
        "8-bit moments, bfloat16": 10.0625,
        "moments and average, float32": 36,
        "moments and average, bfloat16": 18,
    }


def test_the_rows() -> None:
    full, quick, small = cases(torch.device("cuda"), False), cases(torch.device("cuda"), True), cases(CPU, False)
    assert full[0].name == f"AdamW fused, fp32, {AGAINST_ITSELF}"
    assert {case.size for case in full} == {"gpt2-124m", "llama-1.2b"}
    assert {case.size for case in quick} == {"gpt2-124m"}
    assert {case.size for case in small} == {"tiny"}
    assert len({case.key for case in full}) == len(full)
    assert all(case.beside is None or case.beside in {c.name for c in full if c.size == case.size} for case in full)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:CUDA is not available:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "variant", [variant for variant in VARIANTS if not variant.compiles], ids=lambda variant: variant.name
)
def test_every_variant_steps_and_starts_again(variant: Variant, dtype: torch.dtype) -> None:
    if variant.paged:
        with pytest.raises(Unavailable, match="through CUDA's unified memory only"):
            build(variant, "tiny", dtype, Setting(CPU))
        return
    prepared = build(variant, "tiny", dtype, Setting(CPU))
    parameter = prepared.inputs[0]
    start = parameter.detach().clone()
    assert start.unique().numel() > 100
    prepared.step()
    first = parameter.detach().clone()
    prepared.step()
    assert not torch.equal(first, start)
    prepared.reset()
    assert torch.equal(parameter, start)
    prepared.step()
    assert torch.equal(parameter, first)  # moments and step count begin again, too
    state = prepared.later_facts()["state bytes per parameter"]
    expected = {
        "moments like the parameter": 2 * dtype.itemsize,
        "32-bit moments": 8,
        "8-bit moments": 3.83,  # of tiny tensors many are under 4,096 elements, and keep 32 bits
        "moments and average": 3 * dtype.itemsize,
    }[variant.traffic]
    assert state == pytest.approx(expected, rel=0.02)


def test_what_is_not_installed_says_so() -> None:
    with pytest.raises(Unavailable, match="pip install nowhere"):
        find_optimizer("nowhere.AdamW")
    with pytest.raises(Unavailable, match="has no AdamW9bit"):
        find_optimizer("torch.optim.AdamW9bit")


def test_the_state_is_found_where_the_optimizer_keeps_it() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.param_groups[0]["state"] = {parameter: {"grok_ema": torch.ones(2)}}
    assert [list(state) for state in states(optimizer)] == [["grok_ema"]]
