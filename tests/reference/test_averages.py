"""Schedule-free optimizers: the model is used at its average, and no bit of a run depends on how often it is used."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from reference import checkpoint
from reference.config import TrainConfig
from reference.errors import CheckpointError
from reference.model.loss import batch_loss
from reference.training.trainer import FitResult, Trainer
from tests.reference.test_resume import differences, end_of
from tests.reference.trainers import GPT2, flat

BETA = 0.9


class ScheduleFreeSGD(Optimizer):
    """SGD by https://arxiv.org/abs/2405.15682: gradients at y, steps of z, and x, the mean of all z."""

    def __init__(self, params: Any, lr: float = 0.5, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "k": 0, "training": False})

    @torch.no_grad()
    def move(self, training: bool) -> None:
        for group in self.param_groups:
            if group["training"] != training:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], 1 - BETA if training else 1 - 1 / BETA)
                group["training"] = training

    def train(self) -> None:
        self.move(True)

    def eval(self) -> None:
        self.move(False)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # torch's overloads
        for group in self.param_groups:
            assert group["training"], "a step in eval mode"
            group["k"] += 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["z"] = p.clone()
                x = p.lerp(state["z"], 1 - 1 / BETA)
                state["z"].sub_(p.grad, alpha=group["lr"])
                p.copy_(x.lerp_(state["z"], 1 / group["k"]).lerp_(state["z"], 1 - BETA))


FREE: dict[str, Any] = {"optimizer": f"{__name__}.ScheduleFreeSGD", "optimizer_args": {"lr": 0.5}}
BESIDE_MUON = {"optimizer": "torch.optim.Muon", "optimizer_args": {"lr": 0.02}, "optimizer_rest": FREE["optimizer"]}
BOTH = [FREE, BESIDE_MUON]


def batches() -> list[Tensor]:
    return list(torch.randint(16, (3, 2, 9), generator=torch.Generator().manual_seed(1)))


def fit(folder: Path, resume: Any = False, sample: Any = None, **settings: Any) -> FitResult:
    common: dict[str, Any] = {
        "updates": 6,
        "save_every": 3,
        "evaluate_every": 2,
        "schedule": "constant",
        "accelerator": "cpu",
    }
    trainer = Trainer(GPT2, TrainConfig(**(common | FREE | settings)), folder, sample=sample)
    return trainer.fit(batches(), batches(), resume=resume)


def loss_of(model: nn.Module) -> float:
    with torch.no_grad():
        return sum(float(batch_loss(model, b[:, :-1], b[:, 1:])) for b in batches()) / (3 * 2 * 8)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("settings", BOTH, ids=["alone", "beside Muon"])
def test_a_resumed_run_is_bit_equal(tmp_path: Path, precision: str, settings: dict[str, Any]) -> None:
    whole = fit(tmp_path / "whole", precision=precision, **settings)
    resumed = fit(tmp_path / "cut", tmp_path / "whole" / "step-00000003", precision=precision, **settings)
    assert differences(end_of(whole), end_of(resumed), "at the end") == []
    assert whole.records[3:] == resumed.records


@pytest.mark.parametrize("settings", BOTH, ids=["alone", "beside Muon"])
def test_saving_evaluating_and_sampling_change_no_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    seen: list[Tensor] = []
    often = {"save_every": 1, "evaluate_every": 1, "sample_every": 1}
    busy = fit(tmp_path / "a", sample=lambda model, _: seen.append(flat(model)), **settings, **often)
    quiet = fit(tmp_path / "b", save_every=None, evaluate_every=None, **settings)
    assert torch.equal(flat(busy.model), flat(quiet.model))
    assert [record.loss for record in busy.records] == [record.loss for record in quiet.records]
    assert torch.equal(seen[-1], flat(busy.model))


def test_the_model_is_saved_evaluated_and_returned_at_its_average(tmp_path: Path) -> None:
    trained: list[float] = []
    result = fit(tmp_path)
    end = checkpoint.load_for_inference(tmp_path / "step-00000006")
    assert torch.equal(flat(end), flat(result.model))
    assert result.records[-1].validation_loss == pytest.approx(loss_of(end), rel=1e-6)
    assert not any(group["training"] for group in result.optimizer.param_groups)
    result.optimizer.train()  # type: ignore[attr-defined] # schedule-free
    trained.append(loss_of(result.model))
    assert trained[0] != pytest.approx(loss_of(end), rel=1e-4)


def test_a_state_without_what_was_trained_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, updates=3)
    folder = tmp_path / "step-00000003"
    state = checkpoint.load_state(folder)
    del state["optimizer"]["trained"]
    torch.save(state, folder / "state.pt")
    (folder / "SHA256SUMS").unlink()
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"format": 1,', ""))
    with pytest.raises(CheckpointError, match="it lacks parameters of a schedule-free optimizer"):
        fit(tmp_path, True)
