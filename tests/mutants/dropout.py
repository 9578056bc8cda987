"""Faults of dropout."""

from tests.mutants.planting import BUILD_MODULE, UPDATE, mutant

SEED = "seed_dropout(derive_seed(config.seed, update, fabric.global_rank), device)"
FORWARD, BLOCK, ATTENTION = (
    "reference.model.gpt:GPT.forward",
    "reference.model.gpt:Block.forward",
    "reference.model.gpt:Attention.forward",
)
EMBEDDED, MLP = "x = self.dropout(x)", "self.dropout(self.mlp(self.norm_mlp(x)))"
DROPPED = "self.dropout(self.attention(self.norm_attention(x), rotary, cache))"
FACTORY = "partial(GPT, model, config.seed)"


def shared(given: str) -> str:
    """Drop the same units of all sequences."""
    return f"(lambda y: y * self.dropout(torch.ones_like(y[:1])))({given})"


MUTANTS = [
    mutant(
        "dropout-mask-of-the-run",
        "DROP-1",
        "torch.manual_seed inside the loop",
        (UPDATE, SEED, SEED.replace("update", "0")),
    ),
    mutant(
        "dropout-not-plumbed",
        "DROP-1",
        "a probability that is read by nobody",
        (BUILD_MODULE, FACTORY, "partial(GPT, __import__('dataclasses').replace(model, dropout=0.0), config.seed)"),
    ),
    mutant(
        "dropout-mask-of-the-update",
        "DROP-2",
        "OLMo-core#828 (random state put back after each microbatch)",
        (UPDATE, "share += loss.detach()", f"share += loss.detach(); {SEED}"),
    ),
    mutant(
        "dropout-seeded-by-the-seed",
        "DROP-1 DROP-2",
        "a generator of its own, made in forward",
        (FORWARD, EMBEDDED, f"torch.manual_seed(7) if self.training else 0; {EMBEDDED}"),
    ),
    mutant(
        "dropout-mask-of-the-batch",
        "DROP-3",
        "nn.Dropout2d and expand() where the batch comes first",
        (FORWARD, EMBEDDED, f"x = {shared('x')}"),
        (BLOCK, DROPPED, shared(DROPPED[len("self.dropout(") : -1])),
        (BLOCK, MLP, shared(MLP[len("self.dropout(") : -1])),
        (ATTENTION, "self.dropout if self.training else 0.0", "0.0"),
    ),
    mutant(
        "dropout-of-its-own",
        "DROP-4",
        "transformers GPT2Config (resid_pdrop is 0.1 by default)",
        (BLOCK, MLP, "F.dropout(self.mlp(self.norm_mlp(x)), 0.1, self.training)"),
    ),
    mutant(
        "dropout-of-attention-of-its-own",
        "DROP-4",
        "transformers GPT2Config (attn_pdrop is 0.1 by default)",
        (ATTENTION, "self.dropout if self.training else 0.0", "0.1 if self.training else 0.0"),
    ),
    mutant(
        "dropout-none-in-attention",
        "DROP-5",
        "jadore801120/attention-is-all-you-need-pytorch#40: the setting is not handed over",
        ("reference.model.gpt:Attention.forward", "dropout_p=self.dropout if self.training else 0.0", "dropout_p=0.0"),
    ),
    mutant(
        "dropout-none-after-mlp",
        "DROP-5",
        "lucidrains/reformer-pytorch#55",
        ("reference.model.gpt:Block.forward", "self.dropout(self.mlp(self.norm_mlp(x)))", "self.mlp(self.norm_mlp(x))"),
    ),
    mutant(
        "dropout-not-rescaled",
        "DROP-5",
        "salesforce/awd-lstm-lm#124: dropout of the input, by hand",
        (
            "reference.model.gpt:GPT.forward",
            "x = self.dropout(x)",
            "x = self.dropout(x) * (1 - self.config.dropout if self.training else 1)",
        ),
    ),
    mutant(
        "dropout-of-the-embedding-is-shared",
        "DROP-3",
        "joaopauloschuler/neural-api#6: one mask for the batch, not for each sample",
        ("reference.model.gpt:GPT.forward", "x = self.dropout(x)", "x = x * self.dropout(torch.ones_like(x[:1]))"),
    ),
]
