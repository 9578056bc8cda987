"""The model, the tokenizer and the data of a recipe, registered with torchtitan.

As its documentation has it: docs/extension.md there for a train spec, docs/datasets.md for a data set.
"""

from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, build_text_dataloader
from torchtitan.models.llama3 import TransformerModelArgs, get_train_spec
from torchtitan.protocols.train_spec import register_train_spec

from conformance import Recipe


def register(recipe: Recipe) -> tuple[str, str]:
    """Register what a run needs; return the name of its train spec, and the folder of its tokenizer.

    The spec is torchtitan's Llama 3 with one flavor, "recipe". The data sets are "train" and "validation".
    """
    shape = {"dim": recipe.n_embd, "n_layers": recipe.n_layer, "n_heads": recipe.n_head}
    model = TransformerModelArgs(vocab_size=recipe.vocab_size, multiple_of=32, **shape)
    # The targets of a text are its own tokens, and its batches are full: anything else needs a loader of one's own.
    loader = partial(build_loader, recipe) if recipe.ignored_targets or recipe.uneven else build_text_dataloader
    spec = replace(get_train_spec(), model_args={"recipe": model}, build_dataloader_fn=loader)
    register_train_spec(recipe.directory.name, spec)
    for name, batches in ("train", recipe.batches()), ("validation", recipe.validation_batches()):
        DATASETS[name] = DatasetConfig("", partial(texts, torch.cat(batches)), itemgetter("text"))
    return recipe.directory.name, write_tokenizer(recipe)


def texts(rows: torch.Tensor, path: str) -> Any:
    """Return a text for each row of token ids, streamed as torchtitan streams C4."""
    return Dataset.from_dict({"text": [" ".join(map(str, row)) for row in rows.tolist()]}).to_iterable_dataset()


def write_tokenizer(recipe: Recipe) -> str:
    """Write a tokenizer whose words are numbers, one more than the vocabulary has, and return its folder."""
    folder = recipe.directory.with_name(f"{recipe.directory.name}-assets")
    folder.mkdir()
    tokenizer = Tokenizer(WordLevel({str(number): number for number in range(recipe.vocab_size + 1)}))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def build_loader(recipe: Recipe, dp_world_size: int, dp_rank: int, **settings: Any) -> ParallelAwareDataloader:
    """Return a loader of the microbatches as they are, with their labels."""
    pairs = zip(recipe.batches(), recipe.labels(), strict=True)
    batches: Any = [({"input": ids[:, :-1]}, labels[:, 1:]) for ids, labels in pairs]
    return ParallelAwareDataloader(batches, dp_rank, dp_world_size, batch_size=None)
