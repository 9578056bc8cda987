"""What a user brings to a stack that has no model of its own: a GPT, its loss, its groups, its schedule, its data.

The adapters of Lightning's Trainer, accelerate and DeepSpeed share it, so that each shows what is the stack's.
"""

import pydoc
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler

import reference
from conformance import Recipe, TensorInfo
from conformance.subject import Leftovers, Place, Setting, Winner
from conformance.subjects.reference import ReferencePolicy

Part = Literal["train", "validation"]
# Capabilities that are up to the user, where the stack has no part in it.
OPTIMIZER = ("builds-optimizer", "fused", "ndim-policy", "decay-all", "second-optimizer")
TUNING = ("stable-embedding", "finetune", "quantised", "lora-dropout", "lora-everywhere", "tuned-embedding")
SETTINGS = ("grouped-query", "initial-std", "rotary-base", "norm-eps", "residual-opt-out")
MODEL = (*SETTINGS, "module-factory", *TUNING)
EVALUATION = ("evaluate-batches", "final-evaluation", "ignored-validation", "validation-document")
LOOP = (*EVALUATION, "keep-last", "finds-newest", "loader", "chats")
LEFTOVERS: dict[Place, Leftovers] = {"epoch": "short", "window": "short", "ranks": "repeated", "validation": "weighed"}


class UserPolicy(ReferencePolicy):
    """The weights and the function of reference.GPT; the groups and the schedule below; torch's own loaders."""

    def __init__(self, **otherwise: Leftovers) -> None:
        """Begin, with what the stack does otherwise than torch's loaders with what is left over, by place."""
        self.left: dict[str, Leftovers] = dict(LEFTOVERS) | otherwise

    def decays(self, recipe: Recipe, tensor: TensorInfo) -> bool:
        return len(tensor.shape) >= 2

    def leftovers(self, recipe: Recipe, place: Place) -> Leftovers | None:
        return self.left.get(place)

    def wins_on_resume(self, recipe: Recipe, setting: Setting) -> Winner:
        return "checkpoint"  # as Optimizer.load_state_dict has it


def shape_of(recipe: Recipe) -> dict[str, Any]:
    """Return what decides the model and its weights, as plain data that a checkpoint can keep."""
    names = "shape module n_layer n_head n_embd vocab_size block_size dropout seed activation_checkpointing tied"
    return {name: getattr(recipe, name) for name in names.split()}


def build_model(
    shape: str, module: str | None, tied: bool, seed: int, activation_checkpointing: bool, **sizes: Any
) -> nn.Module:
    """Return the module to train: a GPT with the weights of the seed, or a module of somebody else's."""
    if module is not None:
        found: Any = pydoc.locate(module.replace(":", "."))
        return found()
    config = reference.GPTConfig.gpt2 if shape == "gpt" else reference.GPTConfig.llama
    model = reference.GPT(config(**sizes, tie_embeddings=tied), seed=seed)
    model.checkpoint_blocks = activation_checkpointing
    return model


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross entropy of logits (B, T, V) and the labels (B, T + 1) of their sequences; -100 is left out."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction=reduction)


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Return the recipe's optimizer. Matrices decay; vectors do not."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = recipe.optimizer.config()
    kind: Any = pydoc.locate(optimizer["class_path"])
    return kind([group for group in groups if group["params"]], **optimizer["init_args"])


def build_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Return the learning rate of each update: up in a line, then constant or down along a cosine."""
    peak = recipe.optimizer.rate or 1.0
    return LambdaLR(optimizer, lambda update: UserPolicy().learning_rate(recipe, update) / peak)


def microbatches(recipe: Recipe, part: Part = "train") -> Any:
    """Return the microbatches of all ranks, in order, as a list of (ids, labels), each (B, T + 1).

    A sampler that deals them out in turn gives each rank those that the recipe means it to have.
    """
    sources: Any = (recipe.batches, recipe.labels)
    if part == "validation":
        sources = recipe.validation_batches, recipe.validation_labels
    ids, labels = ([source(rank) for rank in range(recipe.world_size)] for source in sources)
    steps = zip(zip(*ids), zip(*labels))  # in each, the microbatches of all ranks
    return [pair for ids_of_ranks, labels_of_ranks in steps for pair in zip(ids_of_ranks, labels_of_ranks)]


def samples(recipe: Recipe) -> Any:
    """Return the data set that the stack shuffles by itself, as a list of (ids, labels), each (T + 1)."""
    return list(zip(recipe.dataset(), recipe.dataset_labels()))


def loader(recipe: Recipe, rank: int) -> Any:
    """Return a DataLoader of the share of one rank, with torch's DistributedSampler; samples are shuffled by epoch."""
    shuffle = recipe.samples is not None
    data: Any = samples(recipe) if shuffle else microbatches(recipe)
    order: Any = DistributedSampler(data, recipe.world_size, rank, shuffle=shuffle, seed=recipe.seed)
    form: Any = {"batch_size": recipe.microbatch_size} if shuffle else {"collate_fn": itemgetter(0)}
    return DataLoader(data, sampler=order, generator=torch.Generator(), **form)


def evaluates(recipe: Recipe, update: int) -> bool:
    """Return True if the run evaluates after this update, counted from 1."""
    every = recipe.evaluate_every
    last = update == recipe.updates and (recipe.evaluate or every is not None)
    return last or (every is not None and update % every == 0)


def saves(recipe: Recipe, update: int) -> bool:
    """Return True if the run saves a checkpoint after this update, counted from 1."""
    return update == recipe.updates or (recipe.save_every is not None and update % recipe.save_every == 0)
