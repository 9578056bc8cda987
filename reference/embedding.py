"""Where 0.1.0 had these two functions: adapters and scripts written for it import them from here."""

from reference.model.embedding import restore_embeddings, swap_embeddings

__all__ = ["restore_embeddings", "swap_embeddings"]
