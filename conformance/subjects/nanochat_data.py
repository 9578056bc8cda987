"""What nanochat's base_train finds in its base folder: a tokenizer, and Parquet files with documents."""

import pickle

import pyarrow
import torch
from pyarrow import parquet
from torch import Tensor

from conformance import Recipe


class Document(list[int]):
    """Token ids that stay as they are: nanochat would put <|bos|> before each document."""

    def insert(self, index: object, token: int) -> None:
        """Leave the document as it is."""


class Words:
    """A tokenizer in place of tiktoken's Encoding: each word of a text is a token id."""

    def __init__(self, n_vocab: int) -> None:
        self.n_vocab = n_vocab

    def encode_single_token(self, text: str) -> int:
        """Return the id of a special token."""
        return 0

    def encode_ordinary_batch(self, texts: list[str], num_threads: int) -> list[Document]:
        """Return the ids of texts."""
        return [Document(map(int, text.split())) for text in texts]


def write_base_folder(recipe: Recipe) -> None:
    """Write the recipe's sequences as documents, each as long as a row of a batch, and the tokenizer of their words."""
    base = recipe.directory
    for folder in ("tokenizer", "base_data_climbmix", "base_checkpoints/run"):
        (base / folder).mkdir(parents=True)
    (base / "tokenizer/tokenizer.pkl").write_bytes(pickle.dumps(Words(recipe.vocab_size)))
    torch.save(torch.ones(recipe.vocab_size, dtype=torch.int64), base / "tokenizer/token_bytes.pt")
    write_documents(recipe, "shard_0", torch.cat(recipe.batches()))
    write_documents(recipe, "shard_1", torch.cat(recipe.validation_batches()))  # the last file is for validation


def write_documents(recipe: Recipe, name: str, rows: Tensor) -> None:
    """Write a Parquet file with one document for each row (N, T + 1)."""
    texts = [" ".join(map(str, row)) for row in rows.tolist()]
    path = recipe.directory / f"base_data_climbmix/{name}.parquet"
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=1)
