"""The learning rate as a pure function of the update number: nothing to save, nothing to lose on resume."""

import math


def learning_rate(update: int, *, peak: float, updates: int, warmup: int = 0, minimum: float | None = None) -> float:
    """Learning rate of update ``update``, counted from 0.

    Linear warm-up that reaches the peak at update ``warmup``, then a cosine that reaches ``minimum`` at the last
    update (https://arxiv.org/abs/1608.03983), or the peak throughout where ``minimum`` is None.

    The warm-up starts at peak / (warmup + 1), not at 0: a first update with a rate of 0 does nothing
    (transformers#34754, torchtune#2010).
    """
    if update < warmup:
        return peak * (update + 1) / (warmup + 1)
    if minimum is None:
        return peak
    span = updates - 1 - warmup
    progress = min(1.0, (update - warmup) / span) if span > 0 else 1.0
    return minimum + 0.5 * (peak - minimum) * (1.0 + math.cos(math.pi * progress))
