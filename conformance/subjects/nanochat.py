"""Adapter of nanochat: Recipe -> scripts.base_train, from a checkout that the environment variable NANOCHAT names.

Installed by the extra ``nanochat``. Its one shape of model (RMSNorm, squared ReLU, no biases) is judged as llama-shape.
"""

import runpy
import shutil
import sys
from contextlib import chdir
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from conformance import Checkpoint, Constant, Normal, NotApplicable, Recipe, TensorInfo, Uniform, everything_but
from conformance.subjects.checkout import checkout, commit, own_modules
from conformance.subjects.nanochat_data import write_base_folder

PACKAGES = ("nanochat", "scripts")
REFERENCE_BATCH = 2**19  # tokens: rates are scaled by the square root of the batch over this one
INITIAL: dict[str, Constant | Normal | Uniform] = {  # by the end of a tensor's name, as init_weights has them
    "transformer.wte.weight": Normal(0.0, 0.8),
    "lm_head.weight": Normal(0.0, 0.001),
    "_gate.weight": Uniform(0.0, 0.02),
    "c_proj.weight": Constant(0.0),
    "resid_lambdas": Uniform(1.05, 1.15),  # from the last layer to the first, in equal steps
    "x0_lambdas": Uniform(0.05, 0.20),  # likewise
    "smear_lambda": Constant(0.0),
    "backout_lambda": Constant(0.2),
}


class NanochatPolicy:
    """What nanochat/gpt.py declares in init_weights and setup_optimizer, and base_train.py in get_lr_multiplier."""

    def initial(self, recipe: Recipe, tensor: TensorInfo) -> Constant | Normal | Uniform:
        written = [found for ending, found in INITIAL.items() if tensor.name.endswith(ending)]
        bound = (3 / recipe.n_embd) ** 0.5 * (0.4 if tensor.name.endswith("c_fc.weight") else 1.0)
        return written[0] if written else Uniform(-bound, bound)

    def decays(self, recipe: Recipe, tensor: TensorInfo) -> bool:
        return not tensor.name.startswith(("x0_lambdas", "smear_", "backout_"))

    def learning_rate(self, recipe: Recipe, update: int) -> float:  # of the matrices, which Muon has
        batch = recipe.update_size * recipe.block_size / REFERENCE_BATCH
        return recipe.optimizer.rate * batch**0.5 * multiplier(recipe, update)

    def rate(self, recipe: Recipe, update: int, tensor: TensorInfo) -> float:
        if tensor.name.startswith(("smear_", "backout_")):
            return 0.2 * multiplier(recipe, update)
        narrow = (recipe.n_embd / 768) ** -0.5
        factors = {"lm_head": narrow, "transformer.wte": narrow, "value_embeds": narrow / 2, "resid_lambdas": 0.01}
        factor = next((factor for name, factor in factors.items() if tensor.name.startswith(name)), 1.0)
        return factor * self.learning_rate(recipe, update)


def multiplier(recipe: Recipe, update: int) -> float:
    """Up in a line, constant, and down in a line over the last 65 % of the updates, if there is a minimum."""
    down = 0 if recipe.minimum_lr is None else round(0.65 * recipe.updates)
    if update < recipe.warmup or update <= recipe.updates - down:
        return min(1.0, (update + 1) / max(1, recipe.warmup))
    progress = (recipe.updates - update) / down
    return progress + (1 - progress) * (recipe.minimum_lr or 0.0) / recipe.optimizer.rate


class Nanochat:
    """scripts.base_train with its settings on the command line."""

    name, policy = "nanochat", NanochatPolicy()
    lacks = everything_but(
        *("llama-shape", "microbatches", "schedule", "resume", "evaluate", "evaluate-every", "final-evaluation"),
        "load",
        reason="base_train has no such setting",
    ) | {
        "any-optimizer": "setup_optimizer builds a MuonAdamW",
        "keywords": "setup_optimizer writes betas down",
        "seed": "compute_init seeds with 42",
        "compile": "base_train always compiles",
        "bf16-mixed": "under NANOCHAT_DTYPE=bfloat16 the embeddings are kept in bfloat16, the other weights in float32",
        "two-ranks": "compute_init starts a process group on CUDA only",
    }

    def __init__(self) -> None:
        self.root = checkout("NANOCHAT", "github.com/karpathy/nanochat", "scripts/base_train.py")
        self.version = commit(self.root)

    def train(self, recipe: Recipe) -> None:
        if recipe.n_embd < 24:
            raise NotApplicable("smear_gate in gpt.py reads 24 channels")
        write_base_folder(recipe)
        rate, low = recipe.optimizer.rate, recipe.minimum_lr
        for path in recipe.resume.places() if recipe.resume else ():
            shutil.copy(path, recipe.directory / "base_checkpoints/run")
        every = recipe.evaluate_every or (recipe.updates if recipe.evaluate else -1)
        settings = f"""base_train --device-type=cpu --run=dummy --model-tag=run --core-metric-every=-1 --sample-every=-1
            --depth={recipe.n_layer} --aspect-ratio={recipe.n_embd // recipe.n_layer}
            --head-dim={recipe.n_embd // recipe.n_head} --max-seq-len={recipe.block_size}
            --device-batch-size={recipe.microbatch_size} --total-batch-size={recipe.update_size * recipe.block_size}
            --num-iterations={recipe.updates} --warmup-steps={recipe.warmup}
            --warmdown-ratio={0 if low is None else 0.65} --final-lr-frac={(low or 0) / rate}
            --matrix-lr={rate} --embedding-lr={rate} --unembedding-lr={rate} --scalar-lr={rate}
            --eval-every={every} --eval-tokens={sum(map(len, recipe.validation_batches())) * recipe.block_size}
            --save-every={recipe.save_every or -1} --resume-from-step={recipe.resume.update if recipe.resume else -1}"""
        environment = patch.dict("os.environ", NANOCHAT_BASE_DIR=str(recipe.directory))
        command = patch.object(sys, "argv", settings.split())
        with own_modules(self.root, *PACKAGES), chdir(self.root), environment, command:
            runpy.run_module("scripts.base_train", run_name="__main__")

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        with own_modules(self.root, *PACKAGES):
            from nanochat.checkpoint_manager import GPT, GPTConfig, load_checkpoint

            folder, cpu = checkpoint.find("model_*.pt").parent, torch.device("cpu")
            weights, _, meta = load_checkpoint(folder, checkpoint.update, cpu)
            model: Any = GPT(GPTConfig(**meta["model_config"]))
            model.init_weights()
            model.load_state_dict(weights)
            return model.eval()
