"""Adapter of nanoGPT: Recipe -> its train.py, run whole from a checkout that the environment variable NANOGPT names.

train.py draws the windows that it trains on at random from data/*/train.bin. Here the draw is made, and its result then
replaced by the places of the recipe's sequences in that file; everything else is the script's own.
"""

import itertools
import math
import pickle
import runpy
import shutil
import sys
from collections.abc import Callable
from contextlib import chdir
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from conformance import Checkpoint, Constant, Normal, NotApplicable, Recipe, TensorInfo, everything_but
from conformance.subjects.checkout import checkout, commit


class NanoGPTPolicy:
    """What model.py declares (_init_weights, configure_optimizers), and get_lr of train.py."""

    def initial(self, recipe: Recipe, tensor: TensorInfo) -> Constant | Normal:
        if len(tensor.shape) < 2:
            return Constant(0.0 if tensor.name.endswith(".bias") else 1.0)
        return Normal(0.0, 0.02 / math.sqrt(2 * recipe.n_layer) if "c_proj" in tensor.name else 0.02)

    def decays(self, recipe: Recipe, tensor: TensorInfo) -> bool:
        return len(tensor.shape) >= 2

    def learning_rate(self, recipe: Recipe, update: int) -> float:
        peak = recipe.optimizer.rate
        low = peak if recipe.minimum_lr is None else recipe.minimum_lr
        if update < recipe.warmup:
            return peak * (update + 1) / (recipe.warmup + 1)
        progress = (update - recipe.warmup) / (recipe.updates - recipe.warmup)
        return low + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - low)


class InOrder(TorchFunctionMode):
    """Windows in order where get_batch draws them at random: in training of all rows, in evaluation of the first."""

    def __init__(self, recipe: Recipe, rows: int, eval_iters: int) -> None:
        super().__init__()
        self.row, self.rows = recipe.block_size + 1, rows
        self.eval_rows = eval_iters * recipe.microbatch_size
        self.training, self.evaluation = itertools.count(), itertools.count()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = func(*args, **(kwargs or {}))
        if func is not torch.randint:
            return drawn
        count, rows = (self.training, self.rows) if torch.is_grad_enabled() else (self.evaluation, self.eval_rows)
        return torch.tensor([next(count) % rows * self.row for _ in drawn])


class NanoGPT:
    """train.py with its settings on the command line."""

    name, policy = "nanoGPT", NanoGPTPolicy()
    lacks = everything_but(
        *("gpt-shape", "tied", "microbatches", "clip", "schedule", "dropout", "ndim-policy"),
        *("resume", "evaluate", "evaluate-every", "load", "compile"),
        reason="train.py has no such setting",
    ) | {
        "any-optimizer": "configure_optimizers in model.py builds an AdamW",
        "keywords": "train.py has beta1, beta2, learning_rate and weight_decay, but not eps",
        "untied": "model.py always gives the head the weight of wte",
        "seed": "train.py seeds with 1337",
        "float32-logits": "model.py returns the logits as lm_head gives them",
        "sampler": "get_batch draws windows with replacement, so there are no epochs",
        "ignored-targets": "get_batch takes ids and targets from the same tokens",
        "fused": "configure_optimizers asks for fused on CUDA only",
        **dict.fromkeys(("bf16-mixed", "16-mixed"), "train.py has no autocast on the CPU, whatever dtype says"),
        "two-ranks": "with several ranks, train.py sets the device to cuda",
    }

    def __init__(self) -> None:
        self.root = checkout("NANOGPT", "github.com/karpathy/nanoGPT", "train.py")
        self.version = commit(self.root)

    def train(self, recipe: Recipe) -> None:
        if recipe.vocab_size > 2**16:
            raise NotApplicable("get_batch reads token files of 16 bits, as data/*/prepare.py write them")
        folder, rows = recipe.directory, torch.cat(recipe.batches())
        for split, found in (("train", rows), ("val", torch.cat(recipe.validation_batches()))):
            found.numpy().astype("uint16").tofile(folder / f"{split}.bin")
        (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": recipe.vocab_size}))
        if recipe.resume is not None and recipe.resume.find("ckpt.pt").exists():  # if not, train.py says so
            shutil.copy(recipe.resume.find("ckpt.pt"), folder)
        peak, eval_iters = recipe.optimizer.rate, len(recipe.validation_batches())
        constant = recipe.minimum_lr is None  # after the warm-up, so the length of the decay is free
        settings = f"""--init_from={"resume" if recipe.resume else "scratch"} --device=cpu --dtype=float32
            --n_layer={recipe.n_layer} --n_head={recipe.n_head} --n_embd={recipe.n_embd} --bias=True
            --block_size={recipe.block_size} --dropout={float(recipe.dropout)} --compile={recipe.compile}
            --batch_size={recipe.microbatch_size} --gradient_accumulation_steps={recipe.microbatches}
            --learning_rate={peak} --weight_decay={dict(recipe.optimizer.arguments).get("weight_decay", 0.0)}
            --warmup_iters={recipe.warmup} --min_lr={peak if constant else recipe.minimum_lr}
            --lr_decay_iters={recipe.updates + constant} --max_iters={recipe.updates}
            --grad_clip={float(recipe.clip or 0)} --eval_iters={eval_iters}
            --eval_interval={recipe.evaluate_every or recipe.save_every or recipe.updates}""".split()
        command = ["train.py", *settings, f"--out_dir={folder}", f"--dataset={folder}"]
        modules = [str(self.root), *sys.path]  # of which train.py imports model
        started = patch.multiple(sys, argv=command, path=modules)
        with chdir(self.root), started, InOrder(recipe, len(rows), eval_iters):
            runpy.run_path("train.py", run_name="__main__")

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        saved = torch.load(checkpoint.find("ckpt.pt"), weights_only=True)
        with patch.object(sys, "path", [str(self.root), *sys.path]):
            from model import GPT, GPTConfig
        model = GPT(GPTConfig(**saved["model_args"]))
        model.load_state_dict(saved["model"])
        return model.eval()
