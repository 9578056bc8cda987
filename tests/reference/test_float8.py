"""float8: refused in a sentence where it cannot work, and with torchao, emulated, all else of a run stays."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance.clause import catalogue
from conformance.recipe import Recipe
from conformance.session import Session
from conformance.subjects.reference import Reference
from reference.checkpoint import load_for_inference
from reference.config import GPTConfig, TrainConfig
from reference.errors import ConfigurationError
from reference.model.gpt import GPT
from reference.model.initialization import materialize
from reference.training import float8, setup
from tests.reference.trainers import Bigram, fit

SIZE: dict[str, Any] = {"vocab_size": 64, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
MODELS = {"gpt2": GPTConfig.gpt2(**SIZE), "llama": GPTConfig.llama(**SIZE)}
RECIPES = ("tensorwise", "rowwise")
TRUE: dict[str, Any] = {"precision": "bf16-true", "float8": "tensorwise"}


ON_CARD = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
WHERE = "cuda" if ON_CARD else "cpu"


HERE = TRUE | {"accelerator": WHERE}


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round to float8 and multiply in float32, unless there is a card that multiplies in float8."""
    pytest.importorskip("torchao.float8", exc_type=ImportError)
    if not ON_CARD:
        monkeypatch.setattr(setup, "use_float8", partial(float8.use_float8, emulated=True))


def rows(count: int = 4) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return [torch.randint(64, (2, 17), generator=drawn) for _ in range(count)]


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        call()
    return str(caught.value)


def test_a_device_without_float8_is_told_in_a_sentence() -> None:
    assert refusal(lambda: fit(MODELS["gpt2"], rows(), **TRUE)) == (
        "float8='tensorwise' needs an NVIDIA GPU of compute capability 8.9 or higher, but this run is on the device "
        "cpu: leave float8 out."
    )


@pytest.mark.parametrize(("recipe", "capability", "refused"), [
    ("tensorwise", (8, 9), False), ("tensorwise", (8, 0), True), ("rowwise", (8, 9), True), ("rowwise", (9, 0), False),
])  # fmt: skip
def test_cards_by_their_capability(
    recipe: str, capability: tuple[int, int], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    call = partial(float8.require_card, recipe, torch.device("cuda"))
    if refused:
        assert "but this run is on NVIDIA A100-SXM4-80GB: leave float8 out." in refusal(call)
    else:
        call()


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao.float8", None)
    message = refusal(lambda: float8.use_float8(GPT(MODELS["gpt2"]), "rowwise", torch.device("cpu"), 1, emulated=True))
    assert message.startswith("float8='rowwise' needs torchao, which cannot be imported")
    assert "pip install 'gpt-conformance[torchao]'" in message


def test_other_modules_and_precisions_are_refused(emulated: None) -> None:
    assert "works on reference.GPT, not on Bigram" in refusal(lambda: fit(Bigram, rows(), **HERE))
    assert "float8 goes with 'bf16-mixed' or 'bf16-true'" in refusal(
        lambda: fit(MODELS["gpt2"], rows(), float8="rowwise", precision="32-true")
    )


def test_sizes_that_no_card_multiplies_are_refused(emulated: None) -> None:
    narrow = GPTConfig.gpt2(**(SIZE | {"n_embd": 24}))
    assert "multiples of 16, but one is 24 x 72" in refusal(lambda: fit(narrow, rows(), **HERE))
    assert "a microbatch has 30 tokens" in refusal(lambda: fit(MODELS["gpt2"], [rows()[0][:, :16]], **HERE))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_the_blocks_multiply_in_float8_and_the_head_does_not(name: str, recipe: str, emulated: None) -> None:
    model, plain = GPT(MODELS[name]), GPT(MODELS[name])
    float8.use_float8(model, recipe, torch.device("cpu"), 1337, emulated=True)
    of_float8 = {name for name, part in model.named_modules() if float8.is_float8(part)}
    assert of_float8 == {n for n, part in plain.named_modules() if isinstance(part, nn.Linear) and n != "head"}
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    ids = rows()[0][:, :-1]
    error = (model(ids) - plain(ids)).norm() / plain(ids).norm()
    assert 1e-4 < error < 0.1  # measured: 1e-2; e4m3 has a mantissa of three bits
    float8.plain_linears(model)
    assert torch.equal(model(ids), plain(ids))


@pytest.mark.parametrize("name", MODELS)
def test_a_start_on_the_meta_device_is_bit_equal(name: str, emulated: None) -> None:
    with torch.device("meta"):
        model = GPT(MODELS[name], 5)
    float8.use_float8(model, "tensorwise", torch.device("cpu"), 5, emulated=True)
    materialize(model, torch.device("cpu"))
    for (key, seen), expected in zip(model.named_parameters(), GPT(MODELS[name], 5).parameters(), strict=True):
        assert torch.equal(seen, expected), key


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_resumed_run_is_bit_equal(recipe: str, precision: str, emulated: None, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"precision": precision, "float8": recipe, "updates": 4, "save_every": 2}
    settings |= {"optimizer_args": {"lr": 1e-2}, "accelerator": WHERE}
    whole = fit(MODELS["gpt2"], rows(), directory=tmp_path / "whole", **settings)
    resumed = fit(
        MODELS["gpt2"], rows(), resume=tmp_path / "whole" / "step-00000002", directory=tmp_path / "again", **settings
    )
    assert [r.loss for r in resumed.records] == [r.loss for r in whole.records][2:]
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    for seen, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert seen.dtype == dtype
        assert torch.equal(seen, expected)
    # A checkpoint and a copy for inference know nothing of float8.
    loaded, copy = load_for_inference(tmp_path / "whole" / "step-00000004"), whole.for_inference()
    assert not any(float8.is_float8(part) for part in (*loaded.modules(), *copy.modules()))
    ids = rows()[0][:, :-1]
    assert torch.equal(loaded(ids), copy.cpu().eval()(ids))


class Float8(Reference):
    """The reference with float8 wherever the recipe computes in bfloat16."""

    def train_config(self, recipe: Recipe) -> TrainConfig:
        config = super().train_config(recipe)
        narrow = config.precision.startswith("bf16")
        return replace(config, float8="tensorwise", accelerator=WHERE) if narrow else config


def chapter() -> dict[str, str]:
    with Session(Float8()) as session:
        clauses = [clause for name, clause in catalogue().items() if name.startswith("PREC-")]
        return {clause.id: session.judge(clause).outcome for clause in clauses}


def test_the_chapter_on_precision_passes(emulated: None) -> None:
    assert set(chapter().values()) <= {"pass", "n/a"}, chapter()
    assert chapter()["PREC-3"] == "pass"


def test_it_learns_as_without(emulated: None) -> None:
    batch = rows(1) * 30
    settings: dict[str, Any] = {"updates": 30, "precision": "bf16-mixed", "optimizer_args": {"lr": 1e-2}}
    settings["accelerator"] = WHERE
    plain, narrow = (
        [r.loss for r in fit(MODELS["llama"], batch, float8=kind, **settings).records]
        for kind in ("none", *RECIPES[:1])
    )
    assert narrow != plain
    assert narrow[-1] < plain[0] / 2
    assert max(abs(a - b) for a, b in zip(narrow, plain, strict=True)) < 0.2
