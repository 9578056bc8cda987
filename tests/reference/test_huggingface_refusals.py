"""Models that the other side cannot express, and files that are damaged, hostile or do not fit: one sentence each."""

import contextlib
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.checkpoint import load_for_inference
from reference.config import GPTConfig
from reference.errors import CheckpointError, ConfigurationError
from reference.interchange.huggingface import export_huggingface, import_huggingface
from tests.reference.exports import (
    GROUPED,
    TINY,
    edit,
    rewrite,
    saved,
)
from tests.sentences import sentence_of


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A Llama, as transformers would have saved it."""
    return export_huggingface(saved(tmp_path / "run", GROUPED), tmp_path / "exported")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (GPTConfig.gpt2(**TINY, norm="rmsnorm"), "norm is 'rmsnorm', but GPT2LMHeadModel, the class with learned pos"),
        (GPTConfig.gpt2(**TINY, mlp="swiglu"), "mlp is 'swiglu', but GPT2LMHeadModel, the class with learned positio"),
        (GPTConfig.gpt2(**TINY, n_kv_head=2), "n_kv_head is 2 and n_head 4, but GPT2LMHeadModel, the class with lear"),
        (GPTConfig.gpt2(**TINY, position="rotary"), "norm is 'layernorm', but LlamaForCausalLM, the class with rota"),
        (GPTConfig.llama(**TINY, mlp="gelu"), "mlp is 'gelu', but LlamaForCausalLM, the class with rotary positions, "),
    ],
    ids=["rmsnorm", "swiglu", "grouped", "rotary", "gelu"],
)
def test_a_model_that_transformers_has_no_class_for(config: GPTConfig, sentence: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", config)
    message = sentence_of(ConfigurationError, lambda: export_huggingface(folder, tmp_path / "exported"))
    assert message.startswith(sentence)
    assert message.endswith("transformers has no class for this model.")
    assert not (tmp_path / "exported").exists()


def test_an_export_replaces_nothing(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "step-00000003"
    for place in (exported, exported / "config.json"):
        message = sentence_of(ConfigurationError, lambda place=place: export_huggingface(folder, place))  # type: ignore[misc] # a default
        assert message == f"{place} is there already, and is not an empty folder: give another place."
    (tmp_path / "empty").mkdir()
    assert export_huggingface(folder, tmp_path / "empty" / ".") == tmp_path / "empty"
    with contextlib.chdir(tmp_path):
        Path("here").mkdir()
        os.chdir("here")
        assert export_huggingface(folder, ".") == Path(".")
    assert sorted(os.listdir(tmp_path / "here")) == ["SHA256SUMS", "config.json", "model.safetensors"]
    again = import_huggingface(exported, tmp_path / "back")
    message = sentence_of(CheckpointError, lambda: import_huggingface(exported, tmp_path / "back"))
    assert message == f"{again} is there already: give another directory."


def test_an_export_that_the_disk_does_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    folder = saved(tmp_path / "run", GROUPED)
    monkeypatch.setattr(Path, "write_bytes", full)
    message = sentence_of(CheckpointError, lambda: export_huggingface(folder, tmp_path / "exported"))
    assert "could not be written: No space left on device. Make room, or give another place." in message
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "mistral"}, "is 'mistral', but only gpt2 and llama can be read."),
        ({"model_type": ...}, "is None, but only gpt2 and llama can be read."),
        ({"model_type": ["llama"]}, "is ['llama'], but only gpt2 and llama can be read."),
        ({"hidden_act": "gelu"}, "is 'gelu', but reference.GPT can express 'silu' or 'swish' only."),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "is 'linear', but reference.GPT can express 'default'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "is 'llama3', but reference.GPT can express 'default' only."),
        ({"rope_parameters": 3}, "is 3, but must be an object."),
        ({"partial_rotary_factor": 0.5}, "is 0.5, but reference.GPT can express None or 1.0 only."),
        ({"sliding_window": 8}, "is 8, but reference.GPT can express None only."),
        ({"quantization_config": {}}, "is {}, but reference.GPT can express None only."),
        ({"mlp_bias": True}, "is True, but reference.GPT can express False only."),
        ({"attention_bias": True}, "mlp_bias in "),
        ({"head_dim": 8}, "is 8, but reference.GPT can express None or 4 only."),
        ({"hidden_size": ...}, "hidden_size in "),
        ({"hidden_size": "16"}, "is '16', but must be a whole number (n_embd here)."),
        ({"hidden_size": True}, "is True, but must be a whole number (n_embd here)"),
        ({"hidden_size": 1 << 40, "head_dim": ...}, "no model can be as large as GPTConfig("),
        ({"hidden_size": 1 << 80, "head_dim": ...}, f"n_embd is {1 << 80}, but must lie between -2**40 and 2**40."),
        ({"hidden_size": 18}, "n_embd 18 is not divisible by n_head 4"),
        ({"num_hidden_layers": 0}, "n_layer is 0, but must be at least 1."),
        ({"rms_norm_eps": float("nan")}, "is nan, but must be a number (norm_eps here)"),
        ({"rope_theta": 10**400}, "but must be a number (rope_theta here)"),
        ({"tie_word_embeddings": 1}, "is 1, but must be true or false (tie_embeddings here)"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_expressed(exported: Path, changes: dict[str, Any], sentence: str) -> None:
    edit(exported, **changes)
    message = sentence_of(ConfigurationError, lambda: import_huggingface(exported, exported / "run"))
    assert sentence in message
    assert not (exported / "run").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"activation_function": "relu"}, "is 'relu', but reference.GPT can express 'gelu_new' or 'gelu_pytorch_tanh'"),
        ({"scale_attn_weights": False}, "is False, but reference.GPT can express True only."),
        ({"scale_attn_by_inverse_layer_idx": True}, "is True, but reference.GPT can express False only."),
        ({"add_cross_attention": True}, "is True, but reference.GPT can express False only."),
        ({"resid_pdrop": []}, "is [], but must be a number (dropout here)"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_settings_of_a_gpt2_that_cannot_be_expressed(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    exported = export_huggingface(saved(tmp_path / "run", GPTConfig.gpt2(**TINY)), tmp_path / "exported")
    edit(exported, **changes)
    message = sentence_of(ConfigurationError, lambda: import_huggingface(exported, tmp_path / "back"))
    assert message.startswith(f"{next(iter(changes))} in {exported / 'config.json'} ")
    assert sentence in message


def test_different_dropouts_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    exported = export_huggingface(saved(tmp_path / "run", GPTConfig.gpt2(**TINY)), tmp_path / "exported")
    edit(exported, resid_pdrop=0.25)
    with caplog.at_level("INFO", logger="reference"):
        folder = import_huggingface(exported, tmp_path / "back")
    assert load_for_inference(folder).config.dropout == 0.25
    assert "embd_pdrop and attn_pdrop become 0.25, as resid_pdrop" in caplog.text


def test_more_layers_than_there_are_tensors(exported: Path, tmp_path: Path) -> None:
    edit(exported, num_hidden_layers=10_000)  # refused at the third, and not after building them all
    message = sentence_of(CheckpointError, lambda: import_huggingface(exported, tmp_path / "back"))
    assert "has no tensor layers.2.input_layernorm.weight, but config.json demands it: the files" in message


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("model.norm.weight"), "has no tensor norm.weight, but config.json demands it"),
        (
            lambda t: t.update(extra=torch.ones(2)),
            "has tensors that the model of its config.json does not have (extra): give",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(17)}),
            "norm.weight in {} has the shape (17,), but config.json demands (16,).",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)}),
            "norm.weight in {} has the dtype I8, but only BF16, F16, F32 are read: save the model unquantised.",
        ),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_tensors_that_do_not_fit(exported: Path, change: Any, sentence: str, tmp_path: Path) -> None:
    rewrite(exported, change)
    message = sentence_of(CheckpointError, lambda: import_huggingface(exported, tmp_path / "back"))
    assert sentence.format(exported) in message
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000], ids=lambda c: str(c[:9]))
def test_a_damaged_config(exported: Path, content: bytes, tmp_path: Path) -> None:
    (exported / "config.json").write_bytes(content)
    message = sentence_of(CheckpointError, lambda: import_huggingface(exported, tmp_path / "back"))
    assert message.startswith(f"{exported / 'config.json'} ")


def test_damaged_and_missing_weights(exported: Path, tmp_path: Path) -> None:
    path = exported / "model.safetensors"
    content = path.read_bytes()
    for damaged in (b"", content[:7], content[: len(content) // 2], b"\xff" * 99):
        path.write_bytes(damaged)
        message = sentence_of(CheckpointError, lambda: import_huggingface(exported, tmp_path / "back"))
        assert message.startswith(f"{path} is missing or damaged (")
    path.unlink()
    (exported / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    message = sentence_of(CheckpointError, lambda: import_huggingface(exported, tmp_path / "back"))
    assert message.endswith("Pickled weights (pytorch_model.bin) are not read, since they can hold code.")
    shutil.rmtree(exported)
    message = sentence_of(CheckpointError, lambda: import_huggingface(exported, tmp_path / "back"))
    assert message.startswith(f"{exported / 'config.json'} cannot be read (")


def test_a_tokenizer_that_is_none(exported: Path, tmp_path: Path) -> None:
    (exported / "tokenizer.json").write_text("{}", encoding="utf-8")
    message = sentence_of(ConfigurationError, lambda: import_huggingface(exported, tmp_path / "back"))
    assert "tokenizer.json is not a tokenizer.json of the tokenizers library" in message
    assert not (tmp_path / "back").exists()
