"""The learning rate as a pure function of the update number: nothing to save, nothing to lose on resume."""

import math


def learning_rate(
    update: int,
    *,
    peak: float,
    updates: int,
    schedule: str = "cosine",
    warmup: int = 0,
    minimum: float | None = None,
    cooldown: int | None = None,
) -> float:
    """Learning rate of update ``update``, counted from 0.

    Linear warm-up that reaches the peak at update ``warmup``, and then

    - ``cosine``: a half cosine that reaches ``minimum`` at the last update (https://arxiv.org/abs/1608.03983);
    - ``wsd``: the peak, and in the last ``cooldown`` updates a decay by 1 - sqrt, which also reaches ``minimum`` at the
      last update (warmup-stable-decay, https://arxiv.org/abs/2404.06395; the form: https://arxiv.org/abs/2405.18392);
    - ``constant``: the peak.

    The warm-up starts at peak / (warmup + 1), not at 0: a first update with a rate of 0 does nothing
    (transformers#34754, torchtune#2010).

    Args:
        update: from 0 to ``updates`` - 1.
        peak: the largest rate.
        updates: of the whole run.
        schedule: ``cosine``, ``wsd`` or ``constant``.
        warmup: updates before the peak.
        minimum: rate of the last update. None: a tenth of the peak.
        cooldown: updates that decay, under ``wsd``. None: a fifth of all updates.
    """
    if update < warmup:
        return peak * (update + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    lowest = peak / 10 if minimum is None else minimum
    if schedule == "wsd":
        length = min(max(1, updates // 5) if cooldown is None else cooldown, updates - warmup)
        passed = update - (updates - 1 - length)  # 0 at the last update with the peak, ``length`` at the last of all
        remaining = 1.0 - math.sqrt(min(1.0, max(0, passed) / length))
    else:
        span = updates - 1 - warmup
        progress = min(1.0, (update - warmup) / span) if span > 0 else 1.0
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    return lowest + (peak - lowest) * remaining
