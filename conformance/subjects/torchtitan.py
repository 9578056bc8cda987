"""Adapter of torchtitan: Recipe -> torchtitan.train.Trainer, on one GPU. Installed by the extra ``torchtitan``."""

import gc
import importlib.metadata
import math
import os
from contextlib import closing
from unittest.mock import patch

import torch
from torchtitan.config import ConfigManager
from torchtitan.tools.utils import device_type
from torchtitan.train import Trainer

from conformance import Constant, Normal, NotApplicable, Recipe, TensorInfo, TruncatedNormal
from conformance.errors import UsageError
from conformance.recording.ranks import free_port
from conformance.subject import Leftovers, Place, Setting, Winner
from conformance.subjects.torchtitan_data import register
from conformance.subjects.torchtitan_settings import command_line


class Policy:
    """What init_weights in models/llama3/model/model.py declares, and components/optimizer.py and lr_scheduler.py."""

    def initial(self, recipe: Recipe, tensor: TensorInfo) -> Constant | Normal | TruncatedNormal:
        if "norm" in tensor.name:
            return Constant(1.0)
        if tensor.name == "tok_embeddings.weight":
            return Normal(0.0, 1.0)
        if tensor.name == "output.weight":
            std = recipe.n_embd**-0.5
            return TruncatedNormal(0.0, std, -3 * std, 3 * std)
        scaled = tensor.name.endswith(("wo.weight", "w2.weight", "w3.weight"))
        depth = int(tensor.name.split(".")[1]) + 1 if scaled else 0.5
        return TruncatedNormal(0.0, 0.02 / (2 * depth) ** 0.5, -2.0, 2.0)

    def decays(self, recipe: Recipe, tensor: TensorInfo) -> bool:
        return True

    def learning_rate(self, recipe: Recipe, update: int) -> float:
        peak, low = recipe.optimizer.rate, recipe.minimum_lr
        if update < recipe.warmup or low is None:
            return peak * min(1.0, (update + 1) / max(recipe.warmup, 1))
        progress = (update - recipe.warmup) / (recipe.updates - recipe.warmup)
        return low + (peak - low) * (1 + math.cos(math.pi * progress)) / 2

    def leftovers(self, recipe: Recipe, place: Place) -> Leftovers | None:
        return "weighed" if place == "microbatch" else None

    def wins_on_resume(self, recipe: Recipe, setting: Setting) -> Winner:
        return "checkpoint"


class Torchtitan:
    """torchtitan.train.Trainer, with the settings that its command line has."""

    name, version, policy = "torchtitan", importlib.metadata.version("torchtitan"), Policy()
    lacks = {
        "gpt-shape": "its language models have RMSNorm and SwiGLU",
        "tied": "models/llama3 has no option for it; models/qwen3 has",
        "foreign-module": "Trainer builds a ModelProtocol from its arguments, on the meta device",
        "dropout": "models/llama3 has none",
        "sampler": "HuggingFaceTextDataset takes the samples in order",
        "any-optimizer": "build_optimizers knows Adam and AdamW",
        "ndim-policy": "build_optimizers makes one group of all tensors",
        "load": "a checkpoint holds tensors, and nothing of the model that they belong to",
        "16-mixed": "mixed_precision_param is bfloat16 or float32",
        "loader": "build_dataloader_fn returns a BaseDataLoader, which can save its state; torch's DataLoader cannot",
        "ignored-validation": "Validator makes the targets of the text itself, and ignores none",
        "meta-init": "Trainer always builds on the meta device",
        "residual-opt-out": "the residual stream has the dtype of the embedding, and no setting changes it",
    }
    lacks |= dict.fromkeys(("float32-logits", "logits-opt-out"), "the loss converts the logits, not the model")
    lacks |= dict.fromkeys(("stable-embedding", "finetune", "quantised"), "no converter of models does that")
    lacks |= dict.fromkeys(
        ("lora-dropout", "lora-everywhere", "tuned-embedding"), "no converter of models adds adapters"
    )
    lacks |= dict.fromkeys(("second-optimizer", "decay-all"), "build_optimizers makes one group of all tensors")
    lacks["initial-std"] = "models/llama3 has no option for it"
    settings = ("grouped-query", "rotary-base", "norm-eps", "cooldown", "keep-last", "finds-newest")
    lacks |= dict.fromkeys(settings, "this adapter does not map it")
    lacks |= dict.fromkeys(("validation-document", "masked-samples", "chats"), "the data set is this adapter's")
    lacks["module-factory"] = "Trainer builds a ModelProtocol from its arguments, on the meta device"
    lacks["final-evaluation"] = "should_validate in validate.py: after update 1, and where freq divides the updates"
    lacks |= dict.fromkeys(("two-ranks", "sharded"), "each process takes a GPU of its own")

    def __init__(self) -> None:
        if device_type == "cuda" and not torch.cuda.is_available():
            raise UsageError("torchtitan trains on a GPU, and PyTorch finds none: run this on a machine that has one.")

    def train(self, recipe: Recipe) -> None:
        if recipe.block_size % 2:
            raise NotApplicable("parallelize_llama wants sequences of an even length, also on one GPU")
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ |= place | {"MASTER_PORT": str(free_port())}
        settings = ConfigManager().parse_args(command_line(recipe, *register(recipe)))
        try:
            with closing(Trainer(settings)) as trainer, patch("time.sleep"):  # train() ends with two seconds of sleep
                trainer.train()
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            gc.enable()  # Trainer stops the collector
