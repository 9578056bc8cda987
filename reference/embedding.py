"""Where 0.1.0 had these two functions: adapters and scripts written for it import them from here."""

from reference.model.embedding import restore_embeddings as restore_embeddings
from reference.model.embedding import swap_embeddings as swap_embeddings
