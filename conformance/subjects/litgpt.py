"""Adapter of LitGPT's pretraining: Recipe -> litgpt.pretrain.setup. Installed by the extra ``litgpt``."""

import importlib.metadata
import math
import sys
from typing import Any
from unittest.mock import patch

import torch
from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from torch import nn
from torch.utils.data import DataLoader

from conformance.recipe import Recipe
from conformance.subject import Constant, Distribution, Normal
from conformance.trace import Checkpoint, TensorInfo


class Loader(DataLoader[torch.Tensor]):
    """A DataLoader with a position, as litdata's StreamingDataLoader, LitGPT's usual one, has it.

    A plain DataLoader would be pickled whole into the checkpoint, and torch >= 2.6 refuses to load that.
    """

    position, skip = 0, 0

    def __iter__(self) -> Any:
        skip, self.skip = self.skip, 0  # only the first pass after a load goes on in the middle
        for self.position, batch in enumerate(super().__iter__(), start=1):
            if self.position > skip:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["position"]


class Tokens(DataModule):
    """The recipe's token ids, in order."""

    def __init__(self, train: list[torch.Tensor], validation: list[torch.Tensor]) -> None:
        super().__init__()
        self.train, self.validation = train, validation

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        self.batch_size = batch_size

    def train_dataloader(self) -> Loader:
        return Loader(torch.cat(self.train), batch_size=self.batch_size)  # type: ignore[arg-type] # has getitem and len

    def val_dataloader(self) -> Loader:
        return Loader(torch.cat(self.validation), batch_size=self.batch_size)  # type: ignore[arg-type] # as above


class LitGPTPolicy:
    """What litgpt/pretrain.py declares: ``initialize_weights`` (GPT-NeoX's design), plain parameters(), ``get_lr``."""

    def initial(self, recipe: Recipe, tensor: TensorInfo) -> Distribution:
        if tensor.name.endswith(".bias"):
            return Constant(0.0)
        if "norm" in tensor.name or "ln_f" in tensor.name:
            return Constant(1.0)
        if tensor.name.endswith(".proj.weight"):
            return Normal(0.0, 1 / math.sqrt(recipe.n_embd) / recipe.n_layer)
        return Normal(0.0, math.sqrt(2.0 / 5 / recipe.n_embd))

    def decays(self, recipe: Recipe, tensor: TensorInfo) -> bool:
        return True  # pretrain.main passes model.parameters(): everything decays

    def learning_rate(self, recipe: Recipe, update: int) -> float:
        peak: float = dict(recipe.optimizer.arguments).get("lr", 1e-3)
        # Set for each microbatch from the iterations done before; the last one of an update counts.
        iteration, warmup = (update + 1) * recipe.microbatches - 1, recipe.warmup * recipe.microbatches
        return peak * min(1.0, iteration / warmup) if warmup else peak


class LitGPT:
    """litgpt.pretrain.setup."""

    name = "LitGPT"
    version = importlib.metadata.version("litgpt")
    policy = LitGPTPolicy()
    lacks = {
        "foreign-module": "pretrain.setup builds litgpt.GPT from a Config",
        "fused": "pretrain.main asks for fused on CUDA only",
        "ndim-policy": "pretrain.main passes model.parameters(), without groups",
        "16-mixed": "pretrain.setup offers bf16-true, bf16-mixed and 32-true",
        "logits-opt-out": "pretrain.setup has no setting for Fabric's conversion of outputs",
        "stable-embedding": "pretrain has none; only litgpt.finetune swaps embeddings",
        "meta-init": "on one device pretrain.main initialises at once; the meta device is used by FSDP only",
        "compile": "pretrain.main always compiles",
        "two-ranks": "several devices mean FSDP, which Fabric offers on GPUs only",
    }

    def train(self, recipe: Recipe) -> None:
        llama = recipe.shape == "llama"
        config = Config(
            name="conformance",
            n_layer=recipe.n_layer,
            n_head=recipe.n_head,
            n_embd=recipe.n_embd,
            block_size=recipe.block_size,
            vocab_size=recipe.vocab_size,
            padded_vocab_size=recipe.vocab_size,
            bias=not llama,
            parallel_residual=not llama,
            norm_class_name="RMSNorm" if llama else "LayerNorm",
            mlp_class_name="LLaMAMLP" if llama else "GptNeoxMLP",
            intermediate_size=3 * recipe.n_embd if llama else None,
            rotary_percentage=1.0,
        )
        peak = dict(recipe.optimizer.arguments).get("lr", 1e-3)
        sequences = recipe.microbatch_size * recipe.microbatches
        train = TrainArgs(
            save_interval=recipe.save_every,
            global_batch_size=sequences,
            micro_batch_size=recipe.microbatch_size,
            max_tokens=recipe.updates * sequences * recipe.block_size,
            lr_warmup_steps=recipe.warmup,
            max_norm=1e9 if recipe.clip is None else recipe.clip,
            min_lr=peak if recipe.minimum_lr is None else recipe.minimum_lr,
            tie_embeddings=recipe.tied,
        )
        # save_checkpoint() records the command line by parsing sys.argv, which here is pytest's.
        with patch.object(sys, "argv", ["litgpt", "pretrain", "conformance"]):
            pretrain.setup(
                model_name="conformance",
                model_config=config,
                out_dir=recipe.directory,
                precision=recipe.precision,
                resume=recipe.resume.find("lit_model.pth") if recipe.resume else False,
                data=Tokens(recipe.batches(), recipe.validation_batches()),
                train=train,
                eval=EvalArgs(interval=10**9, max_iters=2, final_validation=recipe.evaluate),
                optimizer=recipe.optimizer.config(),
                devices=1,
                logger_name="csv",
                seed=recipe.seed,
            )

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        path = checkpoint.find("lit_model.pth")
        model = pretrain.GPT(Config.from_file(path.parent / "model_config.yaml"))
        # The file holds a pickled DataLoader beside the weights; it was written by this run.
        model.load_state_dict(torch.load(path, weights_only=False)["model"])
        return model.eval()
