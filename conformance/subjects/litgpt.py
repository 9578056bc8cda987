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

from conformance import Checkpoint, Constant, Normal, Recipe, TensorInfo
from conformance.subjects.loader import ResumableLoader


class Policy:
    """What litgpt/pretrain.py declares: initialize_weights (GPT-NeoX's design), plain parameters(), get_lr."""

    def initial(self, recipe: Recipe, tensor: TensorInfo) -> Constant | Normal:
        if tensor.owner.endswith("Norm") or tensor.name.endswith(".bias"):
            return Constant(0.0 if tensor.name.endswith(".bias") else 1.0)
        residual = tensor.name.endswith(".proj.weight")
        return Normal(0.0, recipe.n_embd**-0.5 / recipe.n_layer if residual else (2.0 / 5 / recipe.n_embd) ** 0.5)

    def decays(self, recipe: Recipe, tensor: TensorInfo) -> bool:
        return True

    def learning_rate(self, recipe: Recipe, update: int) -> float:  # set for each microbatch; an update's last counts
        peak: float = dict(recipe.optimizer.arguments).get("lr", 1e-3)
        low, warmup = peak if recipe.minimum_lr is None else recipe.minimum_lr, recipe.warmup * recipe.microbatches
        if (iteration := (update + 1) * recipe.microbatches - 1) < warmup:
            return peak * iteration / warmup
        progress = (iteration - warmup) / (recipe.updates * recipe.microbatches - warmup)
        return low + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - low)


class LitGPT:
    """litgpt.pretrain.setup."""

    name, version, policy = "LitGPT", importlib.metadata.version("litgpt"), Policy()
    lacks = {
        "foreign-module": "pretrain.setup builds litgpt.GPT from a Config",
        "ignored-targets": "pretrain.fit takes ids and targets from the same tokens",
        "dropout": "litgpt.Config has no dropout",
        "sampler": "pretrain.fit takes batches as the DataModule's loader gives them",
        "fused": "pretrain.main asks for fused on CUDA only",
        "ndim-policy": "pretrain.main passes model.parameters(), without groups",
        "16-mixed": "pretrain.setup offers bf16-true, bf16-mixed and 32-true",
        "logits-opt-out": "pretrain.setup has no setting for Fabric's conversion of outputs",
        "stable-embedding": "pretrain has no option for it; litgpt.finetune swaps only if it quantises, on CUDA",
        "finetune": "litgpt.pretrain trains every weight; litgpt.finetune.lora is the subject litgpt-lora",
        "quantised": "litgpt.pretrain has no option for it",
        "meta-init": "on one device pretrain.main initialises at once; the meta device is used by FSDP only",
        "activation-checkpointing": "pretrain.setup has no option for it; only litgpt.finetune's FSDPStrategy has",
        "compile": "pretrain.main always compiles",
        "two-ranks": "several devices mean FSDP, which Fabric offers on GPUs only",
        "sharded": "several devices mean FSDP, which Fabric offers on GPUs only",
        "initial-std": "initialize_weights in pretrain.py computes it from the width",
        "second-optimizer": "pretrain.main builds one optimizer, over all parameters",
        "decay-all": "pretrain.main passes model.parameters(), so everything always decays",
        "cooldown": "get_lr in pretrain.py is a cosine",
        "loader": "pretrain.fit takes batches as the DataModule's loader gives them",
        "keep-last": "pretrain.fit keeps every checkpoint",
        "ignored-validation": "pretrain.validate takes ids and targets from the same tokens",
        "masked-samples": "pretrain.fit takes ids and targets from the same tokens",
        "module-factory": "pretrain.setup builds litgpt.GPT from a Config",
        "validation-document": "the DataModule divides documents; here that is the adapter's",
        "residual-opt-out": "litgpt.Config has no setting for the residual stream",
        "lora-dropout": "litgpt.pretrain has no adapters",
        "lora-everywhere": "litgpt.pretrain has no adapters",
        "finds-newest": "this adapter names the checkpoint",
        "chats": "pretrain.fit takes ids and targets from the same tokens",
        "tuned-embedding": "litgpt.pretrain has no adapters",
    }

    def train(self, recipe: Recipe) -> None:
        shape = {"n_layer": recipe.n_layer, "n_head": recipe.n_head, "n_embd": recipe.n_embd, "head_size": None}
        size: dict[str, Any] = {"block_size": recipe.block_size, "padded_vocab_size": recipe.vocab_size}
        size["n_query_groups"] = recipe.n_kv_head
        given = {"rope_base": recipe.rotary_base, "norm_eps": recipe.norm_eps}
        size |= {name: value for name, value in given.items() if value is not None}
        name = "pythia-14m" if recipe.shape == "gpt" else "tiny-llama-1.1b"
        config = Config.from_name(name, **shape, **size, vocab_size=recipe.vocab_size, intermediate_size=96)
        batch, lr = recipe.update_size, dict(recipe.optimizer.arguments).get("lr", 1e-3)
        train = TrainArgs(save_interval=recipe.save_every, micro_batch_size=recipe.microbatch_size)
        train.global_batch_size, train.max_tokens = batch, recipe.updates * batch * recipe.block_size
        train.lr_warmup_steps, train.min_lr = recipe.warmup, lr if recipe.minimum_lr is None else recipe.minimum_lr
        train.max_norm, train.tie_embeddings = 1e9 if recipe.clip is None else recipe.clip, recipe.tied
        interval, final = recipe.evaluate_every or 10**9, recipe.evaluate or recipe.evaluate_every is not None
        limit, data = recipe.evaluate_batches or 2, DataModule()
        evaluation = EvalArgs(interval, max_iters=limit, final_validation=final)
        data.connect = lambda **_: None
        data.train_dataloader = lambda: ResumableLoader(torch.cat(recipe.batches()), recipe.microbatch_size)
        data.val_dataloader = lambda: ResumableLoader(torch.cat(recipe.validation_batches()), recipe.microbatch_size)
        resume = recipe.resume.find("lit_model.pth") if recipe.resume else False
        rest = {"devices": 1, "logger_name": "csv", "seed": recipe.seed, "optimizer": recipe.optimizer.config()}
        rest |= {"precision": recipe.precision, "resume": resume, "data": data, "train": train, "eval": evaluation}
        with patch.object(sys, "argv", ["litgpt", "pretrain", name]):  # save_hyperparameters parses the command line
            pretrain.setup(name, config, recipe.directory, **rest)

    def load(self, checkpoint: Checkpoint) -> torch.nn.Module:
        path = checkpoint.find("lit_model.pth")
        model: torch.nn.Module = pretrain.GPT(Config.from_file(path.parent / "model_config.yaml"))
        model.load_state_dict(torch.load(path, weights_only=True)["model"])
        return model.eval()
