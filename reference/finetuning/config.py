"""What fine-tuning freezes, quantises and adds: a frozen dataclass, a docstring under each field."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from reference.config import check_types, shown
from reference.errors import ConfigurationError

Quantization = Literal["none", "nf4", "nf4-dq", "fp4", "fp4-dq", "int8"]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How to fine-tune. The defaults train every weight.

    Raises:
        ConfigurationError: if the settings do not fit each other.
    """

    lora_rank: int | None = None
    """Freeze the weights, and train LoRA adapters of this rank (https://arxiv.org/abs/2106.09685) on each linear layer
    of the blocks; needs peft. None: every weight is trained."""
    lora_alpha: int | None = None
    """What the adapters add is multiplied by lora_alpha / lora_rank. None: twice the rank."""
    lora_dropout: float = 0.0
    """Probability of dropping an input of the adapters."""
    quantize: Quantization = "none"
    """Keep the frozen linear layers of the blocks in 4 bits (nf4 or fp4, https://arxiv.org/abs/2305.14314; -dq
    quantises their scales too) or in 8 bits (int8); needs bitsandbytes and lora_rank."""
    embeddings: bool = False
    """Train the embeddings beside the adapters. Always so with train.stable_embedding."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ConfigurationError(f"lora_rank is {self.lora_rank}: give at least 1, or None to train every weight.")
        if self.lora_rank is None and self.quantize != "none":
            raise ConfigurationError(
                f"quantize is {self.quantize!r}, but quantised weights cannot be trained: set lora_rank too, such as "
                "8, to train adapters beside them."
            )
        for name in ("lora_alpha", "lora_dropout", "embeddings"):
            if self.lora_rank is None and getattr(self, name):
                raise ConfigurationError(
                    f"{name} is {getattr(self, name)}, but it belongs to LoRA, and lora_rank is None: set lora_rank "
                    f"too, or leave {name} out."
                )
        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise ConfigurationError(f"lora_alpha is {self.lora_alpha}: give at least 1, or None for twice the rank.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigurationError(f"lora_dropout is {self.lora_dropout}, but must be in [0, 1).")

    @property
    def alpha(self) -> int:
        """lora_alpha, resolved; 0 without adapters."""
        return 2 * (self.lora_rank or 0) if self.lora_alpha is None else self.lora_alpha

    @property
    def scale(self) -> float:
        """What the product of the adapters' matrices is multiplied by."""
        return self.alpha / (self.lora_rank or 1)


def saved_finetuning(config: Mapping[str, Any]) -> FinetuneConfig:
    """Return how the run of a config.json fine-tuned; the defaults where it did not.

    Raises:
        ConfigurationError: if the file, which may be forged, says something that cannot be.
    """
    given = config.get("finetune") or {}
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"finetune is {shown(given)}, but must be a mapping")
    try:
        return FinetuneConfig(**given)
    except TypeError as error:
        raise ConfigurationError(f"finetune has a field that is unknown here ({error})") from error
