"""What was fine-tuned, in transformers: merged, or as an adapter that peft loads beside the model it started from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.__main__ import main
from reference.checkpoint import load_for_inference
from reference.interchange.adapter import export_adapter
from reference.interchange.huggingface import export_huggingface, import_huggingface
from tests.reference.finetuning import EIGHT_BIT, SIZE, batches, tune

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'gpt-conformance[finetune]'"
)
peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'gpt-conformance[finetune]'")

SMALL = {"vocab_size": 128, "initializer_range": 0.2}
GPT2 = {**SMALL, "n_positions": 16, "n_embd": 64, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0}
LLAMA = {
    **SMALL,
    "max_position_embeddings": 16,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-untied": ("GPT2LMHeadModel", {**GPT2, "tie_word_embeddings": False}),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama-tied": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adapters": ({"lora_rank": 4, "lora_alpha": 4}, {}),
    "embeddings": ({"lora_rank": 4, "embeddings": True}, {}),
    "stable": ({"lora_rank": 4}, {**EIGHT_BIT, "stable_embedding": True}),
}


@pytest.fixture(params=KINDS.values(), ids=list(KINDS))
def theirs(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    name, config = request.param
    torch.manual_seed(0)
    kind = transformers.GPT2Config if name.startswith("GPT2") else transformers.LlamaConfig
    getattr(transformers, name)(kind(**config)).save_pretrained(tmp_path / "theirs")
    import_huggingface(tmp_path / "theirs", tmp_path / "base")
    return tmp_path / "theirs"


@torch.no_grad()
def difference(model: Any, folder: Path) -> float:
    """Of the logits, which go up to 8, in float32."""
    ids = batches()[0][:, :-1]
    return float((model.eval()(ids).logits - load_for_inference(folder)(ids)).abs().max())


# peft 0.21 reads a name that transformers 5.24 has replaced, and warns that embedding and head are apart from now on.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and a tied layer:UserWarning")
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_adapter_beside_their_model_is_the_tuned_model(theirs: Path, run: Any, tmp_path: Path) -> None:
    finetune, options = run
    tune(tmp_path / "base", tmp_path / "tuned", finetune, **options)
    folder = tmp_path / "tuned" / "step-00000004"
    adapter = export_adapter(folder, tmp_path / "adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(theirs)
    ids = batches()[0][:, :-1]
    with torch.no_grad():
        before = model.eval()(ids).logits
    loaded = peft.PeftModel.from_pretrained(model, adapter)
    assert difference(loaded, folder) <= 2e-5  # 5e-6 is seen
    with torch.no_grad():
        assert float((loaded.eval()(ids).logits - before).abs().max()) > 0.1
    embedding = loaded.get_input_embeddings()
    assert "StableEmbedding" not in {type(part).__name__ for part in embedding.modules()}


def test_merged_it_is_a_plain_model_there(theirs: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**EIGHT_BIT, "stable_embedding": True}
    tune(tmp_path / "base", tmp_path / "tuned", {"lora_rank": 4, "quantize": "nf4"}, **options)
    folder = tmp_path / "tuned" / "step-00000004"
    model = transformers.AutoModelForCausalLM.from_pretrained(export_huggingface(folder, tmp_path / "merged"))
    assert difference(model, folder) <= 2e-5
    assert not any("Linear4bit" in type(part).__name__ for part in model.modules())


def test_the_command_writes_one(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune(tmp_path / "base", tmp_path / "tuned", {"lora_rank": 4, "quantize": "nf4"})
    words = ["export", "--format", "peft", "--checkpoint", str(tmp_path / "tuned"), "--out"]
    assert main([*words, str(tmp_path / "adapter")]) == 0
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["modules_to_save"]) == (4, 8, None)
    assert main([*words, str(tmp_path / "adapter")]) == 2
    assert "is there already, and is not an empty folder" in capsys.readouterr().err
    assert SIZE["n_embd"] == 64
