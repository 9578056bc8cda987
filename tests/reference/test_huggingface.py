"""The files that are exported, and what is imported from files of several releases of transformers."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reference import checkpoint
from reference.checkpoint import load_for_inference
from reference.config import GPTConfig
from reference.data.tokenizer import load_tokenizer
from reference.errors import CheckpointError, ConfigurationError
from reference.interchange.huggingface import export_huggingface, import_huggingface
from tests.reference.exports import (
    GROUPED,
    TINY,
    edit,
    every_shape,
    ids,
    rewrite,
    saved,
    stable_run,
    tokenizer_of,
)
from tests.sentences import sentence_of


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A Llama, as transformers would have saved it."""
    return export_huggingface(saved(tmp_path / "run", GROUPED), tmp_path / "exported")


def test_stable_embeddings_are_plain_and_untied_in_the_files(tmp_path: Path) -> None:
    folder = stable_run(tmp_path)
    out = export_huggingface(folder, tmp_path / "exported")
    tensors = load_file(out / "model.safetensors")
    assert not [name for name in tensors if re.search(r"wte\.norm|wpe\.norm", name)]
    raw = load_file(folder / "model.safetensors")
    rows = torch.nn.functional.layer_norm(
        raw["embedding.weight"], (16,), raw["embedding.norm.weight"], raw["embedding.norm.bias"]
    )
    torch.testing.assert_close(tensors["transformer.wte.weight"], rows, rtol=0, atol=1e-6)
    assert torch.equal(tensors["lm_head.weight"], raw["embedding.weight"])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_the_files_of_a_gpt2(tmp_path: Path) -> None:
    config = GPTConfig.gpt2(**TINY | {"n_layer": 1}, dropout=0.1)
    folder = saved(tmp_path / "run", config)
    out = export_huggingface(folder, tmp_path / "exported")
    assert sorted(os.listdir(out)) == ["SHA256SUMS", "config.json", "model.safetensors"]
    assert json.loads((out / "config.json").read_text()) == {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 300,
        "n_positions": 32,
        "n_layer": 1,
        "n_head": 4,
        "n_embd": 16,
        "n_inner": 64,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "float32",
    }
    own = load_for_inference(folder).state_dict()
    tensors = load_file(out / "model.safetensors")
    block = "transformer.h.0."
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "transformer.wte.weight": (300, 16),
        "transformer.wpe.weight": (32, 16),
        f"{block}ln_1.weight": (16,),
        f"{block}ln_1.bias": (16,),
        f"{block}attn.c_attn.weight": (16, 48),
        f"{block}attn.c_attn.bias": (48,),
        f"{block}attn.c_proj.weight": (16, 16),
        f"{block}attn.c_proj.bias": (16,),
        f"{block}ln_2.weight": (16,),
        f"{block}ln_2.bias": (16,),
        f"{block}mlp.c_fc.weight": (16, 64),
        f"{block}mlp.c_fc.bias": (64,),
        f"{block}mlp.c_proj.weight": (64, 16),
        f"{block}mlp.c_proj.bias": (16,),
        "transformer.ln_f.weight": (16,),
        "transformer.ln_f.bias": (16,),
    }
    assert torch.equal(tensors[f"{block}attn.c_attn.weight"], own["blocks.0.attention.qkv.weight"].t())
    assert torch.equal(tensors[f"{block}attn.c_proj.weight"], own["blocks.0.attention.proj.weight"].t())
    assert torch.equal(tensors[f"{block}ln_2.bias"], own["blocks.0.norm_mlp.bias"])


def test_the_files_of_a_llama(tmp_path: Path) -> None:
    config = GPTConfig.llama(**TINY | {"n_layer": 1}, n_kv_head=2, rope_theta=500.0)
    folder = saved(tmp_path / "run", config, torch.bfloat16)
    out = export_huggingface(folder, tmp_path / "exported")
    assert json.loads((out / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 300,
        "max_position_embeddings": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "hidden_size": 16,
        "intermediate_size": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "bfloat16",
    }
    own = load_for_inference(folder).state_dict()
    tensors = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    block = "model.layers.0."
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "model.embed_tokens.weight": (300, 16),
        f"{block}input_layernorm.weight": (16,),
        f"{block}self_attn.q_proj.weight": (16, 16),
        f"{block}self_attn.k_proj.weight": (8, 16),
        f"{block}self_attn.v_proj.weight": (8, 16),
        f"{block}self_attn.o_proj.weight": (16, 16),
        f"{block}post_attention_layernorm.weight": (16,),
        f"{block}mlp.gate_proj.weight": (64, 16),
        f"{block}mlp.up_proj.weight": (64, 16),
        f"{block}mlp.down_proj.weight": (16, 64),
        "model.norm.weight": (16,),
        "lm_head.weight": (300, 16),
    }
    qkv = [tensors[f"{block}self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(qkv), own["blocks.0.attention.qkv.weight"])
    assert torch.equal(tensors[f"{block}mlp.up_proj.weight"], own["blocks.0.mlp.fc.weight"])


@pytest.mark.parametrize("kind", ["bytes", "tokenizer.json"])
def test_the_files_of_a_tokenizer(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", GROUPED, tokenizer=tokenizer_of(kind, tmp_path))
    ours = load_tokenizer(folder)
    out = export_huggingface(folder, tmp_path / "exported")
    exported = load_tokenizer(out / "tokenizer.json")
    text = "def f(x):\n\treturn  x\u00e9 + '\u20ac\U0001f600'" + "".join(map(chr, range(0x180)))
    assert exported.encode(text) == ours.encode(text)
    assert exported.decode(ours.encode(text)) == text
    assert exported.end_of_document == ours.end_of_document
    assert exported.vocab_size == ours.vocab_size
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"] == config["bos_token_id"] == ours.end_of_document
    assert json.loads((out / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    back = import_huggingface(out, tmp_path / "back")
    assert checkpoint.load_config(back)["tokenizer"] == kind  # data of plain bytes fits one as well as the other
    assert load_tokenizer(back).encode(text) == ours.encode(text)


@every_shape
def test_there_and_back(config: GPTConfig, tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", config)
    back = import_huggingface(export_huggingface(folder, tmp_path / "exported"), tmp_path / "back")
    assert back == tmp_path / "back" / "step-00000000"
    first, second = load_for_inference(folder), load_for_inference(back)
    assert torch.equal(first(ids()), second(ids()))
    assert second.config.tie_embeddings is config.tie_embeddings
    assert second.config.bias is (config.bias or config.position == "learned")
    for name in ("vocab_size", "block_size", "n_embd", "hidden_size", "kv_heads", "norm_eps", "rope_theta", "init_std"):
        assert getattr(second.config, name) == getattr(config, name), name
    assert second.config.dropout == (config.dropout if config.position == "learned" else 0.0)
    assert checkpoint.load_state(back)["optimizer"] is None
    assert checkpoint.load_state(back)["update"] == 0


def test_settings_where_other_releases_put_them(exported: Path, tmp_path: Path) -> None:
    edit(exported, rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 500})
    folder = import_huggingface(exported, tmp_path / "new")
    assert load_for_inference(folder).config.rope_theta == 500.0
    old = {"rope_parameters": ..., "rope_scaling": None, "head_dim": ..., "mlp_bias": ..., "attention_bias": ...}
    edit(exported, **old, rms_norm_eps=..., num_key_value_heads=2)
    config = load_for_inference(import_huggingface(exported, tmp_path / "old")).config
    assert (config.rope_theta, config.norm_eps, config.bias, config.kv_heads) == (10000.0, 1e-6, False, 2)


def test_tensors_of_other_releases(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", GPTConfig.gpt2(**TINY))
    exported = export_huggingface(folder, tmp_path / "exported")

    def as_on_the_hub(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()
        tensors["h.1.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.uint8).tril()
        tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(exported, as_on_the_hub)
    model = load_for_inference(import_huggingface(exported, tmp_path / "back"))
    assert torch.equal(model(ids()), load_for_inference(folder)(ids()))

    rewrite(exported, lambda tensors: tensors["lm_head.weight"].add_(1.0))
    message = sentence_of(CheckpointError, lambda: import_huggingface(exported, tmp_path / "other"))
    assert "has tensors that the model of its config.json does not have (lm_head.weight): give the folder" in message


def shard(folder: Path, **changes: Any) -> None:
    """Spread the tensors over two files with an index, in which ``changes`` then change entries of weight_map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {name: f"model-0000{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(index.values()):
        save_file({name: tensor for name, tensor in tensors.items() if index[name] == file}, folder / file)
    content = json.dumps({"metadata": {"total_size": 0}, "weight_map": index | changes})
    (folder / "model.safetensors.index.json").write_text(content, encoding="utf-8")


def test_shards(exported: Path, tmp_path: Path) -> None:
    expected = load_for_inference(import_huggingface(exported, tmp_path / "whole"))(ids())
    shard(exported)
    assert torch.equal(load_for_inference(import_huggingface(exported, tmp_path / "sharded"))(ids()), expected)
    (exported / "model-00001.safetensors").unlink()
    message = sentence_of(CheckpointError, lambda: import_huggingface(exported, tmp_path / "lost"))
    assert "model-00001.safetensors is missing or damaged (" in message
    assert not (tmp_path / "lost").exists()


@pytest.mark.parametrize("name", ["../../etc/passwd", "/tmp/x.safetensors", "a/b.safetensors", "model.bin", 3, None])
def test_an_index_that_points_elsewhere(exported: Path, name: Any, tmp_path: Path) -> None:
    shard(exported, extra=name)
    message = sentence_of(CheckpointError, lambda: import_huggingface(exported, tmp_path / "run"))
    assert message.endswith("model.safetensors.index.json does not map tensors to files of this folder.")


def test_an_index_without_a_map(exported: Path, tmp_path: Path) -> None:
    shard(exported)
    (exported / "model.safetensors.index.json").write_text('{"weight_map": []}', encoding="utf-8")
    message = sentence_of(CheckpointError, lambda: import_huggingface(exported, tmp_path / "run"))
    assert "does not map tensors" in message


def test_the_end_of_a_document_has_the_name_that_the_config_gives_it(tmp_path: Path) -> None:
    """A tokenizer whose end is called <eos>, as Gemma's is, and config.json says which id that is."""
    import tokenizers
    from tokenizers import models

    built = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    built.add_special_tokens(["<bos>", "<eos>"])
    exported = export_huggingface(saved(tmp_path / "run", GROUPED), tmp_path / "exported")
    built.save(str(exported / "tokenizer.json"))
    with pytest.raises(ConfigurationError, match="has no token for the end of a document"):
        import_huggingface(exported, tmp_path / "none")
    for number, said in enumerate((3, [3, 2])):
        edit(exported, eos_token_id=said)
        folder = import_huggingface(exported, tmp_path / str(number))
        assert load_tokenizer(folder).end_of_document == 3
        back = export_huggingface(folder, tmp_path / f"again-{number}")
        assert json.loads((back / "config.json").read_text())["eos_token_id"] == 3
