"""The learning rate as a pure function of the update number: nothing to save, nothing to lose on resume."""

import math

from reference.config import TrainConfig


def learning_rate(config: TrainConfig, update: int, peak: float) -> float:
    """Return the learning rate of update ``update``, counted from 0.

    Linear warm-up that reaches the peak at update ``warmup``, and then

    - ``cosine``: a half cosine that reaches ``min_lr`` at the last update (https://arxiv.org/abs/1608.03983);
    - ``wsd``: the peak, and in the last ``cooldown`` updates a decay by 1 - sqrt, which also reaches ``min_lr`` at the
      last update (warmup-stable-decay, https://arxiv.org/abs/2404.06395; the form: https://arxiv.org/abs/2405.18392);
    - ``constant``: the peak.

    The warm-up starts at peak / (warmup + 1), not at 0: a first update with a rate of 0 does nothing
    (transformers#34754, torchtune#2010).
    """
    warmup, updates = config.warmup, config.updates
    if update < warmup:
        return peak * (update + 1) / (warmup + 1)
    if config.schedule == "constant":
        return peak
    lowest = peak / 10 if config.min_lr is None else config.min_lr
    if config.schedule == "wsd":
        length = min(max(1, updates // 5) if config.cooldown is None else config.cooldown, updates - warmup)
        passed = update - (updates - 1 - length)  # 0 at the last update with the peak, ``length`` at the last of all
        remaining = 1.0 - math.sqrt(min(1.0, max(0, passed) / length))
    else:
        span = updates - 1 - warmup
        progress = min(1.0, (update - warmup) / span) if span > 0 else 1.0
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    return lowest + (peak - lowest) * remaining
