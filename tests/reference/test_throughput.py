"""Dense peaks by device name, and FLOPs per token by hand."""

import re

import pytest
import torch

from reference.config import GPTConfig
from reference.model.gpt import GPT
from reference.training.throughput import (
    CARDS,
    computing_dtype,
    dense_peak,
    device_peak,
    flops_per_token,
    matrix_parameters,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),  # Lightning 2.6 has 1978.8e12 (lightning#21677)
        ("NVIDIA H200", 989.4e12),  # and 2.0e15 here
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("A100-SXM4-40GB", 312e12),  # older drivers leave the vendor out
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA GH200 480GB", 989.5e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("AMD Instinct MI250X", 191.5e12),  # a device is half a card
    ],
)
def test_bfloat16_is_dense(name: str, peak: float) -> None:
    assert dense_peak(name, BF16) == peak


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100",  # which of three?
        "NVIDIA H20",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM-64GB",  # another number of multiprocessors
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "Quadro RTX 6000",
        "",
    ],
)
def test_an_unknown_or_ambiguous_card_has_no_peak(name: str) -> None:
    assert [dense_peak(name, dtype) for dtype in (BF16, FP16, FP32)] == [None] * 3


@pytest.mark.parametrize("name", ["Tesla V100-SXM2-32GB", "Tesla V100-PCIE-16GB", "Tesla T4"])
def test_cards_before_ampere_have_no_bfloat16_and_no_tfloat32(name: str) -> None:
    assert dense_peak(name, BF16) is None
    assert dense_peak(name, FP32, tf32=True) is None
    assert dense_peak(name, FP16) in (125e12, 112e12, 65e12)


def test_float32_is_tensorfloat32_only_where_it_is_on() -> None:
    assert dense_peak("NVIDIA A100-SXM4-80GB", FP32) == 19.5e12
    assert dense_peak("NVIDIA A100-SXM4-80GB", FP32, tf32=True) == 156e12


def test_no_rate_with_sparsity_is_in_the_table() -> None:
    """Tensor cores are twice as fast in bfloat16 as in tfloat32: a row halved in one column only would show."""
    for card in CARDS:
        half, single = card.rates.get("bfloat16"), card.rates.get("tfloat32")
        assert card.source
        assert max(card.rates.values()) <= 2500
        if half is not None and single is not None:
            assert half / single == pytest.approx(2.0, rel=0.02), card.name


def test_each_name_matches_one_card() -> None:
    for card in CARDS:
        name = card.name.split("|")[0]
        if not re.search(r"[(\\]", name):
            assert [other for other in CARDS if re.fullmatch(other.name, name)] == [card]


def test_the_cpu_has_no_peak() -> None:
    assert device_peak(torch.device("cpu"), "bf16-mixed") is None


def test_device_peak_asks_for_the_dtype_that_is_computed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    cuda = torch.device("cuda", 0)
    assert [device_peak(cuda, p) for p in ("bf16-true", "16-mixed", "32-true")] == [312e12, 312e12, 19.5e12]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert device_peak(cuda, "32-true") == 156e12


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", FP32), ("bf16-mixed", BF16), ("bf16-true", BF16), ("16-mixed", FP16)]
)
def test_computing_dtype(precision: str, dtype: torch.dtype) -> None:
    assert computing_dtype(precision) == dtype


def test_gpt2_124m_by_hand() -> None:
    """12 layers of 768 x 2304 + 768 x 768 + 2 x 768 x 3072, and a head of 50304 x 768, which is the embedding too."""
    config = GPTConfig.gpt2()
    assert matrix_parameters(config) == 12 * 7_077_888 + 38_633_472 == 123_568_128
    assert flops_per_token(config, 1024) == 741_408_768 + 113_246_208
    assert flops_per_token(config, 1024, causal=True) == 741_408_768 + 56_623_104


def test_an_embedding_of_its_own_multiplies_nothing() -> None:
    assert matrix_parameters(GPTConfig.gpt2(tie_embeddings=False)) == matrix_parameters(GPTConfig.gpt2())


@pytest.mark.parametrize(
    "config",
    [
        GPTConfig.tiny(),
        GPTConfig.tiny(tie_embeddings=False, mlp="swiglu", position="rotary", norm="rmsnorm", bias=False),
        GPTConfig.tiny(n_head=4, n_kv_head=2),
    ],
)
def test_counted_are_the_linear_layers_of_the_model(config: GPTConfig) -> None:
    linear = [m.weight.numel() for m in GPT(config).modules() if isinstance(m, torch.nn.Linear)]
    assert matrix_parameters(config) == sum(linear)


def test_against_the_products_that_torch_counts() -> None:
    """A forward is a third of it: 2 N + 4 L d T, which torch's own counter sees operation by operation."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = GPTConfig.tiny()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        GPT(config)(torch.zeros(2, 48, dtype=torch.long))
    assert counter.get_total_flops() == 2 * 48 * flops_per_token(config, 48) / 3
