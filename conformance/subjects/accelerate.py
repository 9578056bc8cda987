"""Adapter of a loop with accelerate: Recipe -> accelerate.Accelerator. Installed by the extra ``accelerate``.

The loop is the user's, as accelerate's guide writes it for targets that differ in number:
https://huggingface.co/docs/accelerate/usage_guides/gradient_accumulation
"""

import importlib.metadata
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from operator import itemgetter
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from safetensors.torch import load_model
from torch.utils.data import DataLoader

from conformance import Checkpoint, Recipe
from conformance.errors import NotApplicable
from conformance.subjects import user_code
from conformance.subjects.user_code import UserPolicy, cross_entropy


class Accelerate:
    """accelerate.Accelerator: prepare, backward, clip_grad_norm_, gather_for_metrics, save_state, load_state."""

    name, version = "accelerate", importlib.metadata.version("accelerate")
    policy = UserPolicy(microbatch="weighed")  # the loop divides by the number of targets of the whole update
    lacks = {
        "batch-total": "the user's loop counts the microbatches",
        "bf16-true": "prepare() leaves the weights in the dtype that the user's model has",
        "16-mixed": "on the CPU accelerate leaves fp16 off, and does not say so",
        "logits-opt-out": "prepare() always converts what leaves autocast to float32",
        "meta-init": "init_empty_weights is for models whose weights are loaded afterwards",
    }
    lacks |= dict.fromkeys(("activation-checkpointing", "sharded"), "FullyShardedDataParallelPlugin wants a GPU")
    lacks |= dict.fromkeys(user_code.OPTIMIZER, "the user builds the optimizer")
    lacks |= dict.fromkeys(user_code.MODEL, "the model is the user's, and prepare() swaps no module in it")
    lacks |= dict.fromkeys(user_code.LOOP, "the loop is the user's")
    lacks["quantised"] = "load_and_quantize_model is for inference"

    def train(self, recipe: Recipe) -> None:
        if recipe.nan_gradient is not None:
            raise NotApplicable("clip_grad_norm_ returns NaN, and the user's loop decides what to do about it")
        AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier run in this process
        self.accelerator = accelerator = Accelerator(
            cpu=True,
            mixed_precision="bf16" if recipe.precision == "bf16-mixed" else "no",
            dynamo_backend="inductor" if recipe.compile else "no",
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=recipe.seed),
            step_scheduler_with_optimizer=False,
        )
        set_seed(recipe.seed, device_specific=True)
        shape, own = user_code.shape_of(recipe), torch.Generator()  # else loaders draw from the generator of dropout
        model: Any = user_code.build_model(**shape)
        optimizer: Any = user_code.build_optimizer(recipe, model)
        schedule: Any = user_code.build_schedule(recipe, optimizer)
        loader: Any = DataLoader(user_code.microbatches(recipe), collate_fn=itemgetter(0), generator=own)
        if recipe.samples is not None:
            loader = DataLoader(user_code.samples(recipe), recipe.microbatch_size, shuffle=True, generator=own)
        rows: Any = [row for ids, _ in user_code.microbatches(recipe, "validation") for row in ids]
        validation: Any = DataLoader(rows, recipe.microbatch_size, generator=own)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        loader, validation = accelerator.prepare(loader, validation)
        if recipe.resume is not None:
            accelerator.load_state(recipe.resume.find("model.safetensors").parent)
        done = schedule.scheduler.last_epoch
        for update, window in enumerate(self.windows(loader, recipe, done), start=done + 1):
            targets = accelerator.reduce(sum((labels[:, 1:] != -100).sum() for _, labels in window))
            total = torch.zeros(())
            for number, (ids, labels) in enumerate(window, start=1):
                with nullcontext() if number == len(window) else accelerator.no_sync(model):
                    loss = cross_entropy(model(ids[:, :-1]), labels, "sum") / targets
                    accelerator.backward(loss * accelerator.num_processes)  # DDP takes the mean over ranks
                total += loss.detach()
            norm = accelerator.clip_grad_norm_(model.parameters(), recipe.clip or torch.inf)
            told = f"loss {accelerator.reduce(total):.6f}, lr {schedule.get_last_lr()[0]:.6e}, grad_norm {norm:.6e}"
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            accelerator.print(f"step {update}: {told}")
            if user_code.evaluates(recipe, update):
                accelerator.print(f"step {update}: val_loss {self.evaluate(model, validation):.6f}")
            if user_code.saves(recipe, update):
                accelerator.save_state(recipe.directory / f"step-{update}")
                accelerator.save(shape, recipe.directory / f"step-{update}" / "shape.pt")

    def windows(self, loader: Any, recipe: Recipe, done: int) -> Iterator[list[Any]]:
        """Yield the microbatches of each update, epoch after epoch, from the one after ``done`` updates on."""
        size, per_epoch = recipe.microbatches, -(-len(loader) // recipe.microbatches)
        while done < recipe.updates:
            loader.set_epoch(done // per_epoch)
            batches = iter(self.accelerator.skip_first_batches(loader, done % per_epoch * size))
            while done < recipe.updates and (window := list(islice(batches, size))):
                done += 1
                yield window

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module, loader: Any) -> float:
        """Return the mean loss of all validation sequences."""
        gather: Any = self.accelerator.gather_for_metrics
        model.eval()
        losses = [gather(cross_entropy(model(rows[:, :-1]), rows, "none").view(len(rows), -1)) for rows in loader]
        model.train()
        return torch.cat(losses).mean().item()

    def load(self, checkpoint: Checkpoint) -> torch.nn.Module:
        folder = checkpoint.find("model.safetensors").parent
        model = user_code.build_model(**torch.load(folder / "shape.pt"))
        load_model(model, folder / "model.safetensors")
        return model.eval()
