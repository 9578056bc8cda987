"""Model FLOPs utilisation: what a token costs, and what a card can do at most.

MFU in the form of PaLM (https://arxiv.org/abs/2204.02311, appendix B): FLOPs that the model needs per token, times
tokens per second, over the dense peak of the card. What is computed again (activation checkpointing) does not count.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from reference.config import GPTConfig


@dataclass(frozen=True)
class Card:
    """Peak rates of one card in 1e12 FLOP/s, **dense**, accumulating in float32."""

    name: str
    """Regular expression for the whole device name, as CUDA and ROCm give it, without the vendor."""
    source: str
    """Where the vendor says so."""
    rates: Mapping[str, float]
    """By ``bfloat16``, ``float16``, ``tfloat32``, ``float32`` (outside the tensor cores); absent where it has none."""


def rates(sixteen: float, tf32: float | None = None, fp32: float | None = None) -> dict[str, float]:
    """Return the rates of a card that is equally fast in bfloat16 and float16."""
    known = {"bfloat16": sixteen, "float16": sixteen, "tfloat32": tf32, "float32": fp32}
    return {name: rate for name, rate in known.items() if rate is not None}


# NOTE a footgun: data sheets since Ampere print the rate with 2:4 sparsity, double the dense one, sometimes without a
# footnote. Lightning 2.6's table has it for some cards and not for others (lightning#21677). Names are matched whole:
# "H20" begins "H200", a laptop's 4090 is another chip, a MIG slice is a part of a card, and a bare "NVIDIA H100" may
# be any of three. Below, a figure that was halved is written as a quotient.
CARDS = (
    Card("GB200", "NVIDIA GB200 NVL72 data sheet", rates(5000 / 2, 2500 / 2)),
    Card("B200", "NVIDIA HGX B200 data sheet, an eighth of it", rates(36_000 / 8 / 2, 18_000 / 8 / 2)),
    Card("GH200 (480GB|96GB HBM3|144G HBM3e)", "NVIDIA GH200 data sheet", rates(1979 / 2, 989 / 2, 67)),
    Card("H200", "NVIDIA H200 data sheet, SXM", rates(989.4, 494.7, 66.9)),
    Card("H200 NVL", "NVIDIA H200 data sheet, NVL", rates(1671 / 2, 835 / 2, 60)),
    Card("H100 80GB HBM3", "NVIDIA H100 architecture white paper, SXM5", rates(989.4, 494.7, 66.9)),
    Card("H100 PCIe", "NVIDIA H100 architecture white paper, PCIe", rates(756, 378, 51.2)),
    Card("H100 NVL", "NVIDIA H100 data sheet, NVL", rates(1671 / 2, 835 / 2, 60)),
    Card("A100-SXM4-(40|80)GB|A100-PCIE-40GB|A100 80GB PCIe", "NVIDIA A100 data sheet", rates(312, 156, 19.5)),
    Card("A30", "NVIDIA A30 data sheet", rates(165, 82, 10.3)),
    Card("A40", "NVIDIA A40 data sheet", rates(149.7, 74.8, 37.4)),
    Card("A10", "NVIDIA A10 data sheet", rates(125, 62.5, 31.2)),
    Card("RTX A6000", "NVIDIA GA102 architecture white paper", rates(154.8, 77.4, 38.7)),
    Card("GeForce RTX 3090", "NVIDIA GA102 architecture white paper", rates(71, 35.6, 35.6)),
    Card("L40S", "NVIDIA L40S data sheet", rates(362.05, 183, 91.6)),
    Card("L40", "NVIDIA L40 data sheet", rates(181.05, 90.5, 90.5)),
    Card("L4", "NVIDIA L4 data sheet", rates(242 / 2, 120 / 2, 30.3)),
    Card("GeForce RTX 4090", "NVIDIA Ada architecture white paper", rates(165.2, 82.6, 82.6)),
    Card("GeForce RTX 5090", "NVIDIA RTX Blackwell architecture white paper", rates(209.5, 104.8, 104.8)),
    # Neither has bfloat16 in its tensor cores; torch emulates it.
    Card("V100-SXM2-(16|32)GB", "NVIDIA V100 data sheet, SXM2", {"float16": 125, "float32": 15.7}),
    Card("V100-PCIE-(16|32)GB", "NVIDIA V100 data sheet, PCIe", {"float16": 112, "float32": 14}),
    Card("T4", "NVIDIA T4 data sheet", {"float16": 65, "float32": 8.1}),
    Card("Instinct MI300X", "AMD Instinct MI300X data sheet", rates(1307.4, 653.7, 163.4)),
    # One MI250X is two devices: the data sheet's 383 are of both.
    Card("Instinct MI250X", "AMD Instinct MI250X data sheet", rates(383 / 2)),
)


def dense_peak(device_name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """Return the most FLOP/s that a card can do in matrix products, without sparsity.

    Args:
        device_name: as ``torch.cuda.get_device_name()`` gives it.
        dtype: of the factors.
        tf32: whether float32 products are computed in TensorFloat-32.

    Returns:
        FLOP/s. None for a card that is not in the table, or a dtype that it does not compute: never a guess.
    """
    name = re.sub("^(NVIDIA|Tesla|AMD) ", "", device_name.strip())
    kind = "tfloat32" if dtype == torch.float32 and tf32 else str(dtype).removeprefix("torch.")
    for card in CARDS:
        if re.fullmatch(card.name, name):
            rate = card.rates.get(kind)
            return None if rate is None else rate * 1e12
    return None


def device_peak(device: torch.device, precision: str) -> float | None:
    """Return the dense peak of the device in the dtype of Fabric's ``precision``; None where it is not known."""
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return dense_peak(torch.cuda.get_device_name(device), computing_dtype(precision), tf32)


def computing_dtype(precision: str) -> torch.dtype:
    """Return the dtype of the matrix products under one of Fabric's precisions, e.g. ``bf16-mixed``."""
    return {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32}[precision.partition("-")[0]]


def flops_per_token(config: GPTConfig, length: int, causal: bool = False) -> float:
    """Return the FLOPs of one training step, forward and backward, per token: 6 N + 12 L d T.

    N is :func:`matrix_parameters`; L, d and T are layers, width and sequence length.

    Args:
        config: the shape.
        length: tokens per sequence.
        causal: count the half of the attention that the mask leaves. PaLM counts all of it, and so do most figures
            that are published: leave it at False to compare with them.
    """
    attention = 12 * config.n_layer * config.n_embd * length
    return 6.0 * matrix_parameters(config) + (attention / 2 if causal else attention)


def matrix_parameters(config: GPTConfig) -> int:
    """Return how many parameters multiply activations: the weights of all linear layers, with the head, tied or not.

    A lookup multiplies nothing, so the embedding counts only as the head that it is tied to, and positions not at
    all. Norms and biases, under 0.1 % of the parameters, are left out.
    """
    width, head = config.n_embd, config.head_size
    attention = width * (config.n_head + 2 * config.kv_heads) * head + width * width
    mlp = (2 if config.mlp == "gelu" else 3) * width * config.hidden_size
    return config.n_layer * (attention + mlp) + config.vocab_size * width
