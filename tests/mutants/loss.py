"""Faults of what is minimised."""

from tests.mutants.planting import UPDATE, mutant

TOKENS, ENTROPY = "reference.model.loss:token_loss", "return F.cross_entropy("
LOSS = "loss = batch_loss(self.wrapped, ids, targets) * scale"

MUTANTS = [
    mutant(
        "z-loss-though-switched-off",
        "LOSS-1",
        "allenai/OLMo-core#702",
        (
            TOKENS,
            ENTROPY,
            f"{ENTROPY.replace('return', 'return 1e-4 * logits.float().logsumexp(-1).square().sum() +')}",
        ),
    ),
    mutant(
        "small-z-loss",
        "LOSS-1",
        "PaLM, https://arxiv.org/abs/2204.02311 (a z-loss by design, where none was declared)",
        (
            TOKENS,
            ENTROPY,
            f"{ENTROPY.replace('return', 'return 1e-5 * logits.float().logsumexp(-1).square().sum() +')}",
        ),
    ),
    mutant(
        "label-smoothing-by-default",
        "LOSS-1",
        "huggingface/transformers label_smoothing_factor; fairseq's default criterion",
        (TOKENS, 'reduction="sum")', 'reduction="sum", label_smoothing=0.1)'),
    ),
    mutant(
        "penalty-on-weights",
        "LOSS-1",
        "L2 in the loss beside the optimizer's weight decay",
        (UPDATE, LOSS, f"{LOSS} + 1e-3 * sum(p.square().sum() for p in self.module.parameters())"),
    ),
    mutant(
        "loss-of-capped-logits",
        "LOSS-2",
        "tdrussell/qlora-pipe#18, the other way round: Gemma's cap of the logits for every model",
        (
            "reference.model.loss:token_loss",
            "logits.float().flatten(0, 1)",
            "(30 * (logits.float() / 30).tanh()).flatten(0, 1)",
        ),
    ),
]
