"""The rules of fine-tuning on small examples, and what they make of transformers with peft."""

import pytest
import torch

from conformance.checks import finetuning
from conformance.clause import catalogue
from conformance.errors import NotApplicable, Violation
from conformance.recording.trace import TensorInfo
from conformance.session import Session


def info(name: str, dtype: torch.dtype = torch.float32, trainable: bool = False) -> TensorInfo:
    return TensorInfo(name, (name,), (2, 2), dtype, "cpu", trainable, "Linear")


@pytest.mark.parametrize(
    "message",
    [
        "start: the first loss is 2.6100 nats, and that of base is 2.5000, so it moves by +0.1100",
        "loss changed by 0.11",
        "the LOSS differs by 1.1e-1",
    ],
)
def test_a_loss_that_moves_and_is_told(message: str) -> None:
    finetuning.same_first_loss(2.5, 2.61, ["something else", message])


@pytest.mark.parametrize(
    "message",
    [
        "update 1/4: loss 2.6100, lr 0.01, gradient norm 0.113",  # 0.113 is near, but nothing moves
        "loss 2.50",  # one of two
        "the first value is 2.6100, and that of base is 2.5000",  # of what?
        "the loss moves by -0.11",
        "the loss moves by 0.2",
        "loss: step 1 of 2",
    ],
)
def test_a_loss_that_moves_unsaid(message: str) -> None:
    with pytest.raises(Violation, match=r"a first loss of 2\.5000") as caught:
        finetuning.same_first_loss(2.5, 2.61, [message])
    assert "2.6100, which is +0.1100, and no message about it" in str(caught.value)


def test_a_loss_that_does_not_move_needs_no_message() -> None:
    finetuning.same_first_loss(2.5, 2.5 + 0.9 * finetuning.UNSAID, [])
    with pytest.raises(Violation):
        finetuning.same_first_loss(2.5, 2.5 + 1.1 * finetuning.UNSAID, [])


def test_quantised_tensors_are_frozen_integers() -> None:
    tensors = {"a": info("a", torch.uint8), "b": info("b", torch.int8), "c": info("c")}
    assert finetuning.quantised(tensors) == ["a", "b"]
    with pytest.raises(Violation, match="tensors in float32 only"):
        finetuning.quantised({"c": info("c")})
    with pytest.raises(Violation, match="trainable: a"):
        finetuning.quantised({"a": info("a", torch.uint8, trainable=True)})


def test_a_run_without_adapters_is_not_judged() -> None:
    finetuning.has_adapters(["a"], ["a", "a.lora_A"])
    with pytest.raises(NotApplicable, match="must name finetune in lacks"):
        finetuning.has_adapters(["a", "b"], ["a", "b"])


def test_a_linear_layer_without_an_adapter_is_named() -> None:
    names = ("blocks.0.qkv.weight", "blocks.0.fc.weight", "head.weight")
    base = {name: info(name) for name in names}
    adapted = {
        name: info(name) for name in ("m.blocks.0.qkv.base_layer.weight", "m.blocks.0.fc.weight", "m.head.weight")
    }
    adapted["m.blocks.0.qkv.lora_A.weight"] = info("m.blocks.0.qkv.lora_A.weight", trainable=True)
    with pytest.raises(Violation, match=r"none on 1 of them: blocks\.0\.fc"):
        finetuning.adapted_everywhere(base, adapted)
    adapted["m.blocks.0.fc.lora_A"] = info("m.blocks.0.fc.lora_A", trainable=True)
    finetuning.adapted_everywhere(base, adapted)


def test_a_swap_thaws_the_embedding_only() -> None:
    plain = ["x.lora_A"]
    finetuning.frozen_alike(plain, [*plain, "wte.weight", "wte.norm.bias"], ["wte"])
    with pytest.raises(Violation, match=r"trained only with it: x\.norm"):
        finetuning.frozen_alike(plain, [*plain, "wte.weight", "x.norm"], ["wte"])
    with pytest.raises(Violation, match=r"only without: x\.lora_A"):
        finetuning.frozen_alike(plain, ["wte.weight"], ["wte"])


def test_storage_may_be_wider_than_declared() -> None:
    wide, narrow = info("a", trainable=True), info("b", torch.bfloat16, trainable=True)
    finetuning.storage({"a": wide, "b": narrow}, torch.bfloat16)
    with pytest.raises(Violation, match="b in bfloat16"):
        finetuning.storage({"a": wide, "b": narrow}, torch.float32)


# What the Trainer does otherwise (reports/findings/fine-tuning.md). EMB-9 depends on the processor.
OTHERWISE = {"EMB-18": "fail"}
ALL = {key for key, clause in catalogue().items() if "finetune" in clause.needs}
QUICK = {"EMB-11", "EMB-12", "EMB-18"}  # one of each outcome


@pytest.mark.filterwarnings("ignore")  # of transformers and peft, about each other
@pytest.mark.parametrize("ids", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
def test_outcomes_of_transformers_with_peft(ids: set[str]) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers accelerate")
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install transformers accelerate")
    pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    from bitsandbytes.functional import has_avx512bf16

    from conformance.subjects.transformers_peft import TransformersPeft

    wanted = {key: catalogue()[key] for key in ids}
    with Session(TransformersPeft()) as session:
        found = {key: session.judge(clause) for key, clause in wanted.items()}
    lacking = {key for key, clause in wanted.items() if set(clause.needs) & set(TransformersPeft.lacks)}
    assert lacking == ids & {"EMB-12", "EMB-13"}
    expected = dict.fromkeys(wanted, "pass") | dict.fromkeys(lacking, "n/a")
    expected |= {key: outcome for key, outcome in OTHERWISE.items() if key in ids}
    expected |= {"EMB-9": "error"} if "EMB-9" in ids and has_avx512bf16() else {}
    assert {key: result.outcome for key, result in found.items()} == expected
