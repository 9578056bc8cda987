"""What optimizers, precision and StableEmbedding cost on a GPU: ``python -m conformance.bench``."""
