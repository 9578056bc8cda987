"""LoRA beside frozen and quantised weights: what is trained, what is kept, exact resume, one plain model at the end."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference import checkpoint
from reference.checkpoint import load_for_inference
from reference.config import GPTConfig
from reference.errors import CheckpointError, ConfigurationError
from reference.finetuning.quantised import dense, dense_weights, is_quantised, quantised
from reference.model.embedding import is_stable
from reference.training.trainer import Trainer
from tests.reference.checkpoints import sum_up
from tests.reference.finetuning import EIGHT_BIT, SHAPES, SIZE, batches, settings, trained, tune

pytest.importorskip("peft", reason="peft is not installed: pip install 'gpt-conformance[finetune]'")

KINDS = ("none", "nf4", "nf4-dq", "fp4", "fp4-dq", "int8")
# Of the logits in float32, which go up to 8: 3e-6 is seen. int8 also rounds the inputs of its layers: 0.06.
MERGED = {kind: 0.3 if kind == "int8" else 3e-5 for kind in KINDS}
OPTIONS: dict[str, dict[str, Any]] = {"plain": EIGHT_BIT, "stable": {**EIGHT_BIT, "stable_embedding": True}}


@pytest.fixture(scope="module", params=SHAPES.values(), ids=list(SHAPES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("base"), request.param)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_exactly_and_ends_in_a_plain_model(
    base: Path, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    finetune = {"lora_rank": 4, "quantize": kind, "lora_dropout": 0.1}
    whole = tune(base, tmp_path, finetune, **options)
    resumed = tune(None, tmp_path, {}, resume=tmp_path / "step-00000002", **options)  # the checkpoint says how
    assert [record.loss for record in resumed.records] == [record.loss for record in whole.records[2:]]
    weights = resumed.model.state_dict()
    assert weights.keys() == whole.model.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in whole.model.state_dict().items())

    plain = load_for_inference(tmp_path / "step-00000004")
    assert {type(part) for part in plain.modules() if isinstance(part, nn.Embedding | nn.Linear)} == {
        nn.Embedding,
        nn.Linear,
    }
    ids = batches()[0][:, :-1]
    with torch.no_grad():
        expected, seen = whole.model.eval()(ids), plain(ids)
    assert float((seen - expected).abs().max()) <= MERGED[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_are_kept_bit_for_bit_and_all_others_move(base: Path, kind: str, tmp_path: Path) -> None:
    finetune = {"lora_rank": 4, "quantize": kind}
    start = tune(base, tmp_path / "a", finetune, updates=1, optimizer_args={"lr": 1e-30, "weight_decay": 0.0})
    run = tune(base, tmp_path / "b", finetune, **OPTIONS["plain"])
    assert any(map(is_quantised, run.model.modules())) is (kind != "none")
    before = dict(start.model.named_parameters())
    owned = {id(tensor) for group in run.optimizer.param_groups for tensor in group["params"]}
    for name, parameter in run.model.named_parameters():
        assert parameter.requires_grad is (".lora_" in name), name
        assert (id(parameter) in owned) is parameter.requires_grad, name
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name


def test_a_stable_embedding_is_trained_with_its_norm_and_in_32_bits(base: Path, tmp_path: Path) -> None:
    run = tune(base, tmp_path, {"lora_rank": 4, "quantize": "nf4"}, **OPTIONS["stable"])
    trainable = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    tables = {name for name, part in run.model.named_modules() if is_stable(part)}
    wanted = {f"{name}.{tensor}" for name in tables for tensor in ("weight", "norm.weight", "norm.bias")}
    assert {name for name in trainable if ".lora_" not in name} == wanted
    state = run.optimizer.state[run.model.get_parameter("embedding.weight")]
    assert {tensor.dtype for tensor in state.values() if isinstance(tensor, Tensor) and tensor.ndim} == {torch.float32}


def test_adapters_start_as_nothing_and_from_the_seed_alone(base: Path, tmp_path: Path) -> None:
    still: dict[str, Any] = {"updates": 1, "optimizer_args": {"lr": 1e-30, "weight_decay": 0.0}}
    first = tune(base, tmp_path / "a", {"lora_rank": 4}, **still)
    torch.rand(3)
    second = tune(base, tmp_path / "b", {"lora_rank": 4}, **still)
    other = tune(base, tmp_path / "c", {"lora_rank": 4}, **still, seed=2)
    for name, parameter in first.model.named_parameters():
        if ".lora_A." in name:
            assert torch.equal(parameter, second.model.get_parameter(name))
            assert not torch.equal(parameter, other.model.get_parameter(name))
    plain = Trainer(None, settings(**still), tmp_path / "d").fit(batches(), init_from=base)
    assert first.records[0].loss == plain.records[0].loss


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", ["none", "nf4-dq", "int8"])
def test_in_16_bits(base: Path, kind: str, precision: str, tmp_path: Path) -> None:
    finetune = {"lora_rank": 4, "quantize": kind}
    whole = tune(base, tmp_path, finetune, precision=precision)
    resumed = tune(None, tmp_path, {}, resume=tmp_path / "step-00000002", precision=precision)
    assert [record.loss for record in resumed.records] == [record.loss for record in whole.records[2:]]
    wanted = torch.float32 if precision == "bf16-mixed" else torch.bfloat16
    assert {p.dtype for p in whole.model.parameters() if p.requires_grad} == {wanted}
    load_for_inference(tmp_path / "step-00000004")


def test_a_tuned_model_can_be_started_from(base: Path, tmp_path: Path) -> None:
    tune(base, tmp_path / "once", {"lora_rank": 4, "quantize": "nf4"}, **OPTIONS["stable"])
    once = load_for_inference(tmp_path / "once" / "step-00000004")
    again = tune(tmp_path / "once", tmp_path / "twice", {}, updates=1)
    ids, targets = batches()[0][:, :-1], batches()[0][:, 1:]
    with torch.no_grad():
        loss = nn.functional.cross_entropy(once(ids).flatten(0, 1), targets.flatten())
    assert again.records[0].loss == pytest.approx(float(loss), abs=1e-6)
    assert again.model.config == once.config


def test_other_settings_are_refused_on_resume(base: Path, tmp_path: Path) -> None:
    tune(base, tmp_path, {"lora_rank": 4}, updates=2)
    with pytest.raises(
        ConfigurationError, match=r"\(quantize is 'int8' now and was 'none'\): leave them out, or start"
    ):
        tune(None, tmp_path, {"lora_rank": 4, "quantize": "int8"}, resume=True)


def test_layers_that_bitsandbytes_gets_wrong_on_the_cpu_are_refused(tmp_path: Path) -> None:
    base = trained(tmp_path / "base", GPTConfig.gpt2(**{**SIZE, "n_embd": 32}), updates=1, save_every=1)
    with pytest.raises(ConfigurationError, match=r"wrong on the CPU for layers whose inputs are not a multiple of 64"):
        tune(base, tmp_path / "a", {"lora_rank": 4, "quantize": "nf4"})
    tune(base, tmp_path / "b", {"lora_rank": 4, "quantize": "int8"})


@pytest.mark.parametrize(
    ("kind", "most"), [("nf4", 0.1), ("nf4-dq", 0.1), ("fp4", 0.13), ("fp4-dq", 0.13), ("int8", 0.01)]
)
def test_a_quantised_layer_is_near_its_weight(kind: Any, most: float) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(128, 64)
    with torch.no_grad():
        plain.weight.normal_(generator=generator)
        layer = quantised(plain, kind, torch.float32)
        assert most / 3 < float((dense(layer) - plain.weight).norm() / plain.weight.norm()) < most
        one = torch.eye(128)
        seen = layer(one) - layer.bias
        assert torch.allclose(seen.T, dense(layer), rtol=1e-2 if kind == "int8" else 1e-6, atol=1e-6)


@pytest.mark.parametrize("inputs", [32, 96, 160])
def test_layers_of_a_gpu_are_unpacked_right_on_the_cpu(inputs: int) -> None:
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(48, inputs, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    parts = {f"layer.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    found = dense_weights({"layer.weight": packed, **parts})["layer.weight"]
    assert float((found - weight).norm() / weight.norm()) < 0.1  # 0.25 if the scales are those of other blocks


def test_only_a_gpt_of_ours_gets_adapters(tmp_path: Path) -> None:
    from reference.finetuning import FinetuneConfig
    from tests.reference.trainers import Bigram

    trainer = Trainer(Bigram, settings(), tmp_path, finetune=FinetuneConfig(lora_rank=2))
    with pytest.raises(ConfigurationError, match=r"LoRA works on reference\.GPT, not on Bigram"):
        trainer.fit([batch % 16 for batch in batches()])


@pytest.mark.parametrize(
    ("forged", "problem"),
    [
        ({"lora_rank": "x"}, "lora_rank is 'x', but must be"),
        ({"rank": 4}, "finetune has a field that is unknown here"),
        ([1], "cannot be read"),
        ({"lora_rank": 4, "quantize": "int8"}, "belongs to another model"),
    ],
)
def test_a_forged_checkpoint_is_told(base: Path, forged: Any, problem: str, tmp_path: Path) -> None:
    tune(base, tmp_path, {"lora_rank": 4, "quantize": "nf4"}, updates=2)
    folder = tmp_path / "step-00000002"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "finetune": forged}))
    sum_up(folder)
    with pytest.raises((CheckpointError, ConfigurationError), match=problem):
        tune(None, tmp_path, {}, resume=folder)


@pytest.mark.parametrize("part", ["weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"])
def test_forged_scales_are_told(base: Path, part: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tune(base, tmp_path, {"lora_rank": 4, "quantize": "nf4"}, updates=2)
    folder = tmp_path / "step-00000002"
    tensors = load_file(folder / "model.safetensors")
    name = f"blocks.0.attention.qkv.base_layer.{part}"
    tensors[name] = tensors[name][:2].clone()
    save_file(tensors, folder / "model.safetensors")
    sum_up(folder)
    with pytest.raises(CheckpointError):
        load_for_inference(folder)
    with pytest.raises(CheckpointError):
        tune(None, tmp_path, {}, resume=folder)


def test_what_is_said(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tune(base, tmp_path, {"lora_rank": 4, "quantize": "int8"}, updates=1)
    told = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("fine-tuning: LoRA of rank 4 on") and "kept as int8" in line for line in told)
    assert any(
        line.startswith("start: the first loss is ") and "int8 weights (they change by 0." in line for line in told
    )
    assert sum("float16" in line for line in told) == 1
    assert checkpoint.load_config(tmp_path / "step-00000001")["finetune"]["quantize"] == "int8"
