"""The bench's fine-tuning step: every row begins again after a reset, and trains what its name says."""

import importlib.util

import pytest
import torch

from conformance.bench import finetuning
from conformance.bench.case import Case, Setting, judged_by
from conformance.bench.measure import check_inputs
from conformance.errors import Unavailable

CPU = Setting(torch.device("cpu"))
CASES = finetuning.cases(CPU.device, quick=False)
PEFT = importlib.util.find_spec("peft") is not None
rows = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@rows
def test_a_row_steps_and_begins_again(case: Case) -> None:
    if "LoRA" in case.name and not PEFT:
        with pytest.raises(Unavailable, match="needs peft"):
            case.build(CPU)
        return
    prepared = case.build(CPU)
    check_inputs(prepared.inputs)

    def losses() -> list[float]:
        found = []
        for _ in range(3):
            prepared.step()
            found.append(float(prepared.later_facts()["last loss"]))
        return found

    first = losses()
    prepared.reset()
    assert losses() == first
    assert len(set(first)) == 3
    facts = prepared.facts | prepared.later_facts()
    whole, trained = float(facts["parameters"]), float(facts["trained parameters"])
    assert (trained >= whole) is case.name.startswith("every weight")
    assert facts["embedding"] == ("StableEmbedding" if "StableEmbedding" in case.name else "Embedding")
    assert 0 < float(facts["state bytes"]) <= 4 * trained * (2 if "8bit" not in case.name else 2.1)
    assert ("flops_per_token" in facts) is case.name.startswith("every weight")


def test_the_rows() -> None:
    assert len(CASES) == 12
    assert {case.beside for case in CASES} == {None, finetuning.FIRST}
    assert judged_by(CASES[0].group) == "wall"
    assert not finetuning.cases(CPU.device, quick=True)
    large = finetuning.cases(torch.device("cuda"), quick=False)
    assert [case.name for case in large] == [case.name for case in CASES]
    assert {case.size for case in large} == {"llama-1.2b"}
