"""Adapter of DeepSpeed's ZeRO-1 on the CPU: Recipe -> deepspeed.initialize. Installed by the extra ``deepspeed``.

DeepSpeed compiles a small extension on first use: a C++ compiler must be there.
"""

import importlib.metadata
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported

import deepspeed
import torch
from deepspeed import comm

from conformance import Checkpoint, Recipe
from conformance.recording.ranks import free_port
from conformance.subjects import user_code
from conformance.subjects.user_code import UserPolicy, cross_entropy


class DeepSpeed:
    """deepspeed.initialize: forward, backward, step, save_checkpoint and load_checkpoint of its engine."""

    name, version = "DeepSpeed ZeRO-1", importlib.metadata.version("deepspeed")
    policy = UserPolicy(window="carried")  # the engine counts microbatches, and knows of no epoch
    lacks = {
        "batch-total": "train_batch_size must be the product of microbatch, accumulation and ranks",
        "activation-checkpointing": "deepspeed.checkpointing is called by the user's module",
        "16-mixed": "the CPU accelerator refuses fp16",
        **dict.fromkeys(("meta-init", "sharded"), "zero.Init and split parameters belong to stage 3"),
    }
    lacks |= dict.fromkeys(("float32-logits", "logits-opt-out"), "the engine converts no output of a module")
    lacks |= dict.fromkeys(user_code.MODEL, "the model is the user's, and the engine swaps no module in it")
    lacks |= dict.fromkeys((*user_code.OPTIMIZER, *user_code.LOOP), "the user builds the optimizer and writes the loop")

    def train(self, recipe: Recipe) -> None:
        if recipe.world_size == 1:
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        deepspeed.init_distributed("gloo")
        try:
            self.run(recipe)
        finally:
            comm.destroy_process_group()

    def run(self, recipe: Recipe) -> None:
        shape = user_code.shape_of(recipe)
        model = user_code.build_model(**shape)
        engine, _, _, schedule = deepspeed.initialize(
            model=model,
            optimizer=user_code.build_optimizer(recipe, model),
            lr_scheduler=lambda optimizer: user_code.build_schedule(recipe, optimizer),
            config={
                "train_micro_batch_size_per_gpu": recipe.microbatch_size,
                "gradient_accumulation_steps": recipe.microbatches,
                "gradient_clipping": recipe.clip or 0.0,
                "zero_optimization": {"stage": 1},
                "zero_allow_untested_optimizer": True,
                "bf16": {"enabled": recipe.precision == "bf16-true"},
                "torch_autocast": {"enabled": recipe.precision == "bf16-mixed", "dtype": "bfloat16"},
            },
        )
        torch.manual_seed(recipe.seed + comm.get_rank())  # for dropout
        if recipe.compile:
            engine.compile()
        if recipe.resume is not None:
            folder = recipe.resume.find("*/mp_rank_00_model_states.pt").parent
            _, kept = engine.load_checkpoint(folder.parent, folder.name)
            torch.set_rng_state(kept["generators"][comm.get_rank()])
        total = torch.zeros(())
        for ids, labels in self.batches(recipe, engine):
            loss = cross_entropy(engine(ids[:, :-1]), labels)
            engine.backward(loss)
            total += loss.detach() / recipe.microbatches / recipe.world_size
            rate, done = schedule.get_last_lr()[0], engine.global_steps
            engine.step()
            if (update := engine.global_steps) == done:
                continue
            comm.all_reduce(total)
            print(f"step {update}: loss {total}, lr {rate}, grad_norm {engine.get_global_grad_norm()}")
            total.zero_()
            if user_code.evaluates(recipe, update):
                print(f"step {update}: val_loss {self.evaluate(recipe, engine)}")
            if user_code.saves(recipe, update):
                generators = [torch.empty(0)] * recipe.world_size
                comm.all_gather_object(generators, torch.get_rng_state())
                engine.save_checkpoint(recipe.directory, client_state={"shape": shape, "generators": generators})

    def batches(self, recipe: Recipe, engine: Any) -> Iterator[Any]:
        """Yield microbatches, epoch after epoch, from where the engine is."""
        loader = user_code.loader(recipe, comm.get_rank())
        epoch, skipped = divmod(engine.global_steps * recipe.microbatches, len(loader))
        while True:
            loader.sampler.set_epoch(epoch)
            for number, batch in enumerate(loader):
                if engine.global_steps >= recipe.updates:
                    return
                if number >= skipped:
                    yield batch
            epoch, skipped = epoch + 1, 0

    @torch.no_grad()
    def evaluate(self, recipe: Recipe, engine: Any) -> float:
        """Return the mean loss of all validation sequences."""
        engine.eval()
        sums = torch.zeros(2)
        for rows in recipe.validation_batches(comm.get_rank()):
            losses = cross_entropy(engine(rows[:, :-1]), rows, "none")
            sums += torch.stack((losses.sum(), torch.tensor(float(losses.numel()))))
        comm.all_reduce(sums)
        engine.train()
        return (sums[0] / sums[1]).item()

    def load(self, checkpoint: Checkpoint) -> torch.nn.Module:
        saved = torch.load(checkpoint.find("*/mp_rank_00_model_states.pt"), weights_only=False)
        model = user_code.build_model(**saved["shape"])
        model.load_state_dict(saved["module"])
        return model.eval()
