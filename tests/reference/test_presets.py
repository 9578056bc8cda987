"""The presets are what their names say, and add up."""

import pytest
import torch

from reference.cli.presets import PRESETS, find_preset
from reference.errors import ConfigurationError
from reference.model.gpt import GPT
from reference.optimizers.build import build_optimizer

LARGE = [name for name in PRESETS if name != "tiny"]


def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(PRESETS[name].model).parameters())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("tiny", 836_864),
        ("gpt2-124m", 124_475_904),  # 124,439,808 (GPT-2 small) and 47 rows of padding
        ("gpt2-350m", 354_871_296),  # 354,823,168 (GPT-2 medium) and the padding
        ("gpt2-1.5b", 1_557_686_400),  # 1,557,611,200 (GPT-2 XL) and the padding
        ("llama-1.2b", 1_340_704_768),  # 1,275,168,768 without the embedding
    ],
)
def test_number_of_parameters(name: str, count: int) -> None:
    assert parameters(name) == count


@pytest.mark.parametrize(
    ("name", "rate", "tokens"),
    # GPT-3 Small, Medium and, for the last two, XL: https://arxiv.org/abs/2005.14165, table 2.1
    [("gpt2-124m", 6e-4, 0.5), ("gpt2-350m", 3e-4, 0.5), ("gpt2-1.5b", 2e-4, 1.0), ("llama-1.2b", 2e-4, 1.0)],
)
def test_rate_and_tokens_per_update_are_of_gpt3(name: str, rate: float, tokens: float) -> None:
    preset = PRESETS[name]
    per_update = preset.model.block_size * preset.data.microbatch_size * preset.train.microbatches
    assert preset.train.optimizer_args["lr"] == rate
    assert per_update == tokens * 2**20
    assert per_update * preset.train.warmup == pytest.approx(375e6, rel=0.002)
    assert 19.5 < per_update * preset.train.updates / parameters(name) < 20.5


@pytest.mark.parametrize("name", LARGE)
def test_large_presets_are_for_a_gpu(name: str) -> None:
    train = PRESETS[name].train
    assert (train.precision, train.compile, train.clip) == ("bf16-mixed", True, 1.0)
    assert PRESETS[name].model.fp32_residual is False


@pytest.mark.parametrize("name", PRESETS)
def test_the_optimizer_takes_its_arguments(name: str) -> None:
    train = PRESETS[name].train
    optimizer = build_optimizer(train.optimizer, train.optimizer_args, torch.nn.Linear(2, 2), torch.device("cpu"))
    seen = {key: optimizer.defaults[key] for key in train.optimizer_args}
    assert seen | {"betas": list(seen["betas"])} == train.optimizer_args  # some versions of torch make it a tuple


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=r"^there is no preset 'lama-1\.2b': did you mean llama-1\.2b\?$"):
        find_preset("lama-1.2b")
    with pytest.raises(ConfigurationError, match="choose one of tiny, gpt2-124m"):
        find_preset("bert")
