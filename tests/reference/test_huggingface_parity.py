"""Export and import against the real classes of transformers: the same logits and the same continuations."""

from pathlib import Path
from typing import Any

import pytest
import torch

from reference.checkpoint import load_for_inference
from reference.config import GPTConfig
from reference.data.tokenizer import load_tokenizer
from reference.interchange.huggingface import export_huggingface, import_huggingface
from reference.model.generation import generate
from reference.model.gpt import GPT
from tests.reference.exports import GROUPED, every_shape, ids, saved, stable_run, tokenizer_of

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'gpt-conformance[transformers]'"
)


@torch.no_grad()
def largest_difference(model: GPT, theirs: Any) -> float:
    """Of the logits in float32, which go up to 5. The tests allow 1e-5; 3.1e-6 at most is seen, 0 for plain Llamas."""
    return float((model(ids()) - theirs.eval()(ids()).logits).abs().max())


@torch.no_grad()
def require_equal_generation(model: GPT, theirs: Any) -> None:
    """Greedy, 20 tokens."""
    prompt = ids()[0, :5]
    expected = theirs.generate(
        prompt[None], attention_mask=torch.ones(1, 5), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    assert list(generate(model, prompt, tokens=20, temperature=0.0)) == expected[0, 5:].tolist()


@every_shape
def test_an_export_is_the_same_model_there(config: GPTConfig, tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", config)
    out = export_huggingface(folder, tmp_path / "exported")
    name = "GPT2LMHeadModel" if config.position == "learned" else "LlamaForCausalLM"
    theirs, report = getattr(transformers, name).from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (theirs.lm_head.weight is theirs.get_input_embeddings().weight) is config.tie_embeddings
    model = load_for_inference(folder)
    assert largest_difference(model, theirs) <= 1e-5
    require_equal_generation(model, theirs)
    assert type(transformers.AutoModelForCausalLM.from_pretrained(out)).__name__ == name


SMALL: dict[str, Any] = {"vocab_size": 300, "initializer_range": 0.2}
GPT2: dict[str, Any] = {**SMALL, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}
LLAMA: dict[str, Any] = {
    **SMALL,
    "max_position_embeddings": 32,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied": ("GPT2", {**GPT2, "tie_word_embeddings": False, "n_inner": 24, "layer_norm_epsilon": 1e-3}),
    "llama": ("Llama", {**LLAMA, "rms_norm_eps": 1e-3}),
    "llama-tied": ("Llama", {**LLAMA, "tie_word_embeddings": True}),
    "llama-grouped": ("Llama", {**LLAMA, "num_key_value_heads": 2}),
    "llama-bias": ("Llama", {**LLAMA, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
}


def built(family: str, settings: dict[str, Any]) -> Any:
    """A model of theirs in which no parameter is at its start."""
    torch.manual_seed(5)
    head = "GPT2LMHeadModel" if family == "GPT2" else "LlamaForCausalLM"
    # Its default tokens lie beyond this vocabulary.
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    model = getattr(transformers, head)(getattr(transformers, f"{family}Config")(**settings, **none))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model.eval()


@pytest.mark.parametrize("name", THEIRS)
def test_an_import_is_the_same_model_here(name: str, tmp_path: Path) -> None:
    theirs = built(*THEIRS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    folder = import_huggingface(tmp_path / "theirs", tmp_path / "run")
    model = load_for_inference(folder)
    assert largest_difference(model, theirs) <= 1e-5
    require_equal_generation(model, theirs)
    back = export_huggingface(folder, tmp_path / "back")
    again = type(theirs).from_pretrained(back)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in theirs.state_dict().items())


def test_an_import_of_shards_and_of_half_precision(tmp_path: Path) -> None:
    theirs = built("Llama", LLAMA).bfloat16()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    model = load_for_inference(import_huggingface(tmp_path / "theirs", tmp_path / "run"))
    assert model.head.weight.dtype == torch.float32
    # Read again: .float() would leave their rotary frequencies rounded to bfloat16.
    theirs = type(theirs).from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    assert largest_difference(model, theirs) <= 1e-5


def test_a_model_without_its_head_that_is_tied(tmp_path: Path) -> None:
    theirs = built("GPT2", GPT2)
    theirs.transformer.save_pretrained(tmp_path / "theirs")
    model = load_for_inference(import_huggingface(tmp_path / "theirs", tmp_path / "run"))
    assert largest_difference(model, theirs) <= 1e-5


@pytest.mark.parametrize("kind", ["bytes", "tokenizer.json"])
def test_the_exported_tokenizer_encodes_as_ours(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", GROUPED, tokenizer=tokenizer_of(kind, tmp_path))
    ours = load_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(export_huggingface(folder, tmp_path / "exported"))
    text = "def f(x):\n\treturn  x\u00e9 + '\u20ac\U0001f600'\x00\x7f  \u200b\n"
    assert theirs.encode(text) == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.end_of_document == theirs.bos_token_id
    assert theirs.model_max_length == 32


def test_a_run_with_stable_embedding_exports_plain_ones(tmp_path: Path) -> None:
    folder = stable_run(tmp_path)
    out = export_huggingface(folder, tmp_path / "exported")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(out)
    assert largest_difference(load_for_inference(folder), theirs) <= 1e-5
