"""Two optimizers by role: who trains which tensor, at which rate, with which decay, and what a checkpoint holds."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference import checkpoint
from reference.config import GPTConfig, TrainConfig
from reference.errors import CheckpointError, ConfigurationError
from reference.model.gpt import GPT
from reference.optimizers import load_optimizer_state, optimizer_state
from reference.optimizers.build import create_optimizer
from reference.optimizers.roles import Combined, block_matrices
from reference.training.trainer import FitResult, Trainer
from tests.reference.optimizers import CPU, gpt, take_steps
from tests.reference.test_resume import differences, end_of

MUON: dict[str, Any] = {
    "optimizer": "torch.optim.Muon",
    "optimizer_args": {"lr": 0.02, "weight_decay": 0.3},
    "optimizer_rest_args": {"lr": 0.004, "weight_decay": 0.1},
}
MATRICES = {f"blocks.0.{name}.weight" for name in ("attention.qkv", "attention.proj", "mlp.fc", "mlp.proj")}
MODEL = GPTConfig.gpt2(vocab_size=128, block_size=8, n_layer=1, n_head=2, n_embd=64)  # large enough for 8-bit state


class Blocks(nn.Module):  # of another library: tensors of every role, and a head that a block shares
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 16), "norm": nn.LayerNorm(8)})])
        self.layers.append(nn.ModuleDict({"table": nn.Embedding(16, 8), "out": nn.Linear(8, 16, bias=False)}))
        self.layers.append(nn.ModuleDict({"frozen": nn.Linear(8, 8).requires_grad_(False)}))
        self.experts = nn.ModuleList([nn.ParameterDict({"weight": torch.ones(2, 8, 8), "router": torch.ones(2, 8)})])
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.layers[1]["out"].weight  # type: ignore[index] # a ModuleDict


def names_of(model: nn.Module, tensors: Any) -> set[str]:
    chosen = {id(tensor) for tensor in tensors}
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


def build(model: nn.Module, **settings: Any) -> Any:
    return create_optimizer(TrainConfig(**(MUON | settings)), model, CPU)


def test_matrices_of_blocks() -> None:
    for model, expected in ((gpt(), MATRICES), (Blocks(), {"layers.0.up.weight", "experts.0.router"})):
        assert {name for name, p in model.named_parameters() if id(p) in block_matrices(model)} == expected


def test_each_tensor_has_one_optimizer_with_rate_and_decay_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model = gpt(tie_embeddings=False)
    optimizer = build(model)
    assert [type(member).__name__ for member in optimizer.members] == ["Muon", "AdamW"]
    muon, adamw = optimizer.members
    assert [(g["lr"], g["weight_decay"], names_of(model, g["params"])) for g in muon.param_groups] == [
        (0.02, 0.3, MATRICES)
    ]
    assert [(g["lr"], g["weight_decay"]) for g in adamw.param_groups] == [(0.004, 0.1), (0.004, 0.0)]
    assert names_of(model, adamw.param_groups[0]["params"]) == {"head.weight"}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert adamw.defaults["fused"]
    assert (
        "optimizer: torch.optim.Muon trains the 4 matrices of the blocks, torch.optim.AdamW the other 13 tensors"
        in (caplog.text)
    )


def test_any_two_classes_can_have_the_roles() -> None:
    pair = {"optimizer": "torch.optim.SGD", "optimizer_args": {"lr": 1.0}, "optimizer_rest": "torch.optim.Rprop"}
    optimizer = build(gpt(), **pair, optimizer_rest_args={"lr": 0.5})
    assert [type(member).__name__ for member in optimizer.members] == ["SGD", "Rprop"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"optimizer_rest": "torch.optim.Muon"},
            "optimizer_rest is torch.optim.Muon, which takes matrices only, but it",
        ),
        ({"optimizer_rest_args": {"beta": 1}}, "AdamW does not accept 'beta': did you mean 'betas'?"),
        ({"optimizer_args": {"betas": (0.9, 0.9)}}, "Muon does not accept 'betas'"),
        (
            {"optimizer": "torch.optim.SGD"},
            "optimizer_rest_args is given, but torch.optim.SGD trains every tensor: name",
        ),
        ({"optimizer_rest": "torch.optim.LBFGS", "optimizer_rest_args": {}}, "torch.optim.LBFGS computes the loss"),
    ],
)
def test_what_cannot_have_a_role_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        build(gpt(), **settings)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Linear has no trainable matrix in a block"):
        build(nn.Linear(2, 2))


def test_the_step_is_that_of_both() -> None:
    together, apart = gpt(), gpt()
    apart.load_state_dict(together.state_dict())
    named = dict(apart.named_parameters())
    muon = torch.optim.Muon([named[name] for name in named if name in MATRICES], lr=0.02, weight_decay=0.3)
    rest = [named[name] for name in named if name not in MATRICES]
    adamw = torch.optim.AdamW(rest, lr=0.004, weight_decay=0.0, fused=True)
    take_steps(together, build(together), 3)
    for step in range(3):
        for index, parameter in enumerate(apart.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * index + step))
            parameter.grad = noise
        muon.step()
        adamw.step()
    assert all(torch.equal(a, b) for a, b in zip(together.parameters(), apart.parameters(), strict=True))


def trained(**settings: Any) -> tuple[GPT, Combined]:
    model = gpt(vocab_size=128, n_embd=64)
    optimizer = build(model, **settings)
    take_steps(model, optimizer, 2)
    return model, optimizer


REST = [
    {},
    {"optimizer_rest": "bitsandbytes.optim.AdamW8bit", "optimizer_rest_args": {"lr": 0.01}},
    {"optimizer_rest": "reference.optimizers.grokadamw.GrokAdamW", "optimizer_rest_args": {"lr": 0.01}},
]


@pytest.mark.parametrize("settings", REST, ids=["AdamW", "AdamW8bit", "GrokAdamW"])
def test_state_of_both_survives(settings: dict[str, Any]) -> None:
    model, optimizer = trained(**settings)
    other, fresh = copy.deepcopy(model), copy.deepcopy(model)
    loaded = build(other, **settings)
    load_optimizer_state(loaded, copy.deepcopy(optimizer_state(optimizer)))
    for one, its in ((model, optimizer), (other, loaded), (fresh, build(fresh, **settings))):
        take_steps(one, its, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda state: state["param_groups"].pop(), "the groups of its tensors are 1, and those of the run 2"),
        (lambda state: state["state"][0].update(momentum_buffer=torch.ones(3, 64)), "momentum_buffer of tensor 0 has"),
        (lambda state: state["state"][5].update(exp_avg=torch.ones(3)), "exp_avg of tensor 1 has the shape (3,), but"),
        (lambda state: state.update(members=[1, 2]), "it is not that of so many optimizers"),
        (lambda state: state.update(members=7), "it is not that of so many"),
        (lambda state: state["members"][0].update(dtypes=[7]), "the dtypes of its tensors are not dtypes"),
        (lambda state: state["members"][1].update(trained=[]), "it has parameters of a schedule-free optimizer"),
        (lambda state: state["members"][1].update(state_in_groups=4), "its state_in_groups is no list"),
    ],
)
def test_damaged_state_is_refused_and_nothing_is_loaded(damage: Any, sentence: str) -> None:
    model, optimizer = trained(optimizer_rest_args={"lr": 0.01})
    state = copy.deepcopy(optimizer_state(optimizer))
    damage(state)
    fresh = build(model)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_optimizer_state(fresh, state)
    assert not fresh.state


def batches() -> list[Tensor]:
    return list(torch.randint(128, (4, 2, 9), generator=torch.Generator().manual_seed(1)))


def fit(folder: Path, resume: Any = False, **settings: Any) -> FitResult:
    common: dict[str, Any] = {"updates": 6, "save_every": 3, "warmup": 2, "accelerator": "cpu"}
    return Trainer(MODEL, TrainConfig(**(common | MUON | settings)), folder).fit(batches(), resume=resume)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("settings", REST[:2], ids=["AdamW", "AdamW8bit"])
def test_a_resumed_run_is_bit_equal(tmp_path: Path, precision: str, settings: dict[str, Any]) -> None:
    settings = {"precision": precision, "stable_embedding": "optimizer_rest" in settings, "microbatches": 2} | settings
    whole = fit(tmp_path / "whole", **settings)
    resumed = fit(tmp_path / "cut", tmp_path / "whole" / "step-00000003", **settings)
    assert differences(end_of(whole), end_of(resumed), "at the end") == []
    assert whole.records[3:] == resumed.records


def test_both_rates_follow_the_schedule_and_both_decays_what_is_configured_now(tmp_path: Path) -> None:
    seen: list[list[float]] = []
    config = TrainConfig(updates=4, warmup=1, save_every=2, accelerator="cpu", **MUON)
    trainer = Trainer(MODEL, config, tmp_path)
    result = trainer.fit(batches())
    run = trainer.setup()
    run.update_once(0, run.fetch(run.batches(batches(), 0)))
    seen.append([group["lr"] for group in run.bare.param_groups])
    assert seen == [[0.01, 0.002]]  # the tied table does not decay: AdamW has one group
    assert [group["lr"] for group in result.optimizer.param_groups] == pytest.approx([0.002, 0.0004])
    changed = {"optimizer_args": {"lr": 0.02, "weight_decay": 0.7}, "optimizer_rest_args": {"lr": 0.004, "eps": 1e-5}}
    resumed = fit(tmp_path, True, **changed)
    muon, adamw = resumed.optimizer.param_groups
    assert (muon["weight_decay"], adamw["weight_decay"], adamw["eps"]) == (0.7, 0.0, 1e-5)


def test_a_checkpoint_of_other_optimizers_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, updates=3)
    assert checkpoint.load_for_inference(tmp_path / "step-00000003").config == MODEL
    sentence = (
        "was trained with torch.optim.Muon and torch.optim.AdamW, not torch.optim.Muon and torch.optim.SGD: resume"
    )
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        fit(tmp_path, True, optimizer_rest="torch.optim.SGD", optimizer_rest_args={})
    with pytest.raises(CheckpointError, match=re.escape("not torch.optim.AdamW: resume with the same optimizer")):
        fit(tmp_path, True, optimizer="torch.optim.AdamW", optimizer_rest_args={})


def test_a_step_with_a_closure_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="optimizers that are combined take no closure"):
        build(gpt()).step(lambda: 0.0)
