"""The model: GPT-2 and Llama shapes from one config, their initial weights, their loss, and text from them.

gpt.py              the transformer, in one file
initialization.py   initial weights: the table, and the ways to apply it
loss.py             cross entropy, beside the model or inside one graph with it
embedding.py        StableEmbedding for training, plain embeddings for inference
generation.py       text, one token after the other
modes.py            evaluation mode, and the way back

It imports reference.config and reference.errors, and no other wing.
"""

from reference.model.gpt import GPT as GPT
