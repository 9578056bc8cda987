"""Adapter of LitGPT's fine-tuning: Recipe -> litgpt.finetune.lora.setup, from a checkpoint that litgpt.pretrain wrote.

A recipe without ``finetune`` is trained by litgpt.pretrain, as the subject ``litgpt`` does: it makes the weights to
start from.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml  # type: ignore[import-untyped] # PyYAML has no types of its own
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule
from litgpt.data.base import get_sft_collate_fn
from litgpt.finetune import lora
from litgpt.prompts import Default
from litgpt.scripts.convert_pretrained_checkpoint import convert_pretrained_checkpoint
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader

from conformance import Checkpoint, Recipe
from conformance.errors import NotApplicable
from conformance.subjects.litgpt import LitGPT

TUNED = ("finetune", "quantised", "lora-dropout", "lora-everywhere")
ON_GPU = torch.cuda.is_available()


class LitGPTLora(LitGPT):
    """litgpt.finetune.lora.setup."""

    name = "LitGPT LoRA"
    lacks = {name: reason for name, reason in LitGPT.lacks.items() if name not in TUNED}
    lacks["tuned-embedding"] = "mark_only_lora_as_trainable freezes everything but the adapters"
    lacks["resume"] = "finetune.lora.setup has no option for it"
    lacks["evaluate-every"] = "finetune.lora prints the loss of its last validation only, as text"
    if ON_GPU:
        del lacks["stable-embedding"]
    else:
        lacks["quantised"] = "Fabric's BitsandbytesPrecision wants CUDA, and this machine has no GPU"
        lacks["stable-embedding"] = "finetune.lora swaps only if it quantises, on CUDA"

    def train(self, recipe: Recipe) -> None:
        if recipe.stable_embedding and (recipe.finetune is None or recipe.quantised is None):
            raise NotApplicable("litgpt.pretrain swaps no embedding, and finetune.lora does only if it quantises")
        if recipe.finetune is None:
            super().train(recipe)
            return
        if recipe.quantised is not None and recipe.precision.endswith("mixed"):
            raise NotApplicable("finetune.lora.setup refuses quantised weights under a mixed precision")
        if recipe.quantised == "int8":
            raise NotApplicable("Fabric's BitsandbytesPrecision trains on int8 weights under 16-true only")
        base = self.base(recipe)
        train = TrainArgs(save_interval=recipe.save_every, micro_batch_size=recipe.microbatch_size, epochs=1000)
        train.global_batch_size, train.max_steps, train.lr_warmup_steps = recipe.update_size, recipe.updates, 1
        limit: dict[str, Any] = {"max_new_tokens": 1, "max_iters": recipe.evaluate_batches or 2}
        limit["final_validation"] = recipe.evaluate
        options: dict[str, Any] = {"precision": recipe.precision}
        options |= {"lora_r": recipe.lora_rank, "lora_dropout": recipe.lora_dropout}
        options |= dict.fromkeys(("lora_key", "lora_projection", "lora_mlp"), True)
        # save_hyperparameters parses the command line, and merge_lora believes what it wrote.
        words = [word for name, value in options.items() for word in (f"--{name}", str(value).lower())]
        options |= {"data": Rows(recipe), "train": train, "seed": recipe.seed, "optimizer": recipe.optimizer.config()}
        options |= {"eval": EvalArgs(10**9, **limit), "quantize": recipe.quantised and f"bnb.{recipe.quantised}"}
        with patch.object(sys, "argv", ["litgpt", "finetune_lora", str(base), *words]):
            lora.setup(base, recipe.directory / "tuned", **options)

    def base(self, recipe: Recipe) -> Path:
        """Return the folder of the checkpoint to start from, as LitGPT's own script converts it."""
        assert recipe.finetune is not None
        folder = recipe.directory.with_name(f"{recipe.directory.name}-base")
        convert_pretrained_checkpoint(recipe.finetune.find("lit_model.pth").parent, folder)
        settings = yaml.safe_load((folder / "model_config.yaml").read_text())
        settings["block_size"] = recipe.block_size + 1  # finetune.lora shifts inside the sequence
        (folder / "model_config.yaml").write_text(yaml.safe_dump(settings))
        words = {f"<{number}>": number for number in range(recipe.vocab_size)}
        Tokenizer(WordLevel(words, unk_token="<0>")).save(str(folder / "tokenizer.json"))
        told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<0>", "bos_token": "<0>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(told))
        return folder

    def load(self, checkpoint: Checkpoint) -> torch.nn.Module:
        path = checkpoint.find("final/lit_model.pth")
        if "model" in torch.load(path, weights_only=True):
            return super().load(checkpoint)
        module: torch.nn.Module = lora.GPT(lora.Config.from_file(path.parent / "model_config.yaml"))
        merged = torch.load(path, weights_only=True)
        own = {name.replace("linear.", ""): name for name in module.state_dict()}
        module.load_state_dict({own[name]: tensor for name, tensor in merged.items()})
        return module.eval()


class Rows(DataModule):  # type: ignore[misc] # LitGPT has no types
    """The tokens of a recipe, in order, as finetune.lora takes its samples."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.prompt_style = recipe, Default()

    def connect(self, **ignored: Any) -> None:
        """Take nothing from the run: the tokens are those of the recipe."""

    def loader(self, rows: list[torch.Tensor], labels: list[torch.Tensor]) -> DataLoader[Any]:
        """Return batches of the rows, in order."""
        pairs = zip(torch.cat(rows), torch.cat(labels), strict=True)
        count = {"raw": self.recipe.block_size, "raw_plus_prompt_template": self.recipe.block_size}
        samples: Any = [{"input_ids": row, "labels": label, "token_counts": count} for row, label in pairs]
        return DataLoader(samples, batch_size=self.recipe.microbatch_size, collate_fn=get_sft_collate_fn())

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training data."""
        return self.loader(self.recipe.batches(), self.recipe.labels())

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation data."""
        rows = self.recipe.validation_batches()
        return self.loader(rows, rows)
