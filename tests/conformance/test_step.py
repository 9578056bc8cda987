"""The rule of the step, on optimizers of torch and of others, healthy and not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, NAdam, Optimizer, RMSprop

from conformance.checks.step import Deviation, History, follows_closed_form
from conformance.errors import Violation
from conformance.recording.snapshot import class_path

Make = Callable[[list[nn.Parameter]], Optimizer]

HEALTHY: dict[str, Make] = {
    "adamw": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-amsgrad-fused": lambda p: AdamW(p, lr=1e-2, amsgrad=True, fused=True),
    "adamw-maximize": lambda p: AdamW(p, lr=1e-2, maximize=True),
    "adamw-rate-in-a-tensor": lambda p: AdamW(p, lr=torch.tensor(1e-2), foreach=False),
    "adam-coupled": lambda p: Adam(p, lr=1e-3, weight_decay=0.1),
    "adam-decoupled": lambda p: Adam(p, lr=1e-3, weight_decay=0.1, decoupled_weight_decay=True),
    "nadam": lambda p: NAdam(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: SGD(p, lr=0.1, weight_decay=0.1),
    "sgd-nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd-dampening": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.3, maximize=True),
    "rmsprop": lambda p: RMSprop(p, lr=1e-2),
    "rmsprop-centered": lambda p: RMSprop(p, lr=1e-2, centered=True, momentum=0.9, weight_decay=0.1),
    "muon": lambda p: Muon(p, lr=1e-2, weight_decay=0.1),
    "muon-plain": lambda p: Muon(p, lr=1e-2, nesterov=False, adjust_lr_fn="match_rms_adamw"),
}


class Lion(Optimizer):
    """Lion, as lion-pytorch 0.2 writes it."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.1, coupled: bool = False) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": weight_decay})
        self.coupled = coupled

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override] # torch's overloads say float
        for group in self.param_groups:
            for p in group["params"]:
                gradient, average = p.grad, self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                if self.coupled:
                    gradient = gradient + group["weight_decay"] * p
                else:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((0.9 * average + 0.1 * gradient).sign(), alpha=-group["lr"])
                average.lerp_(gradient, 0.01)


class OwnAdamW(Optimizer):
    """A class called AdamW outside torch: eps before the correction and decay at the end, or a fault."""

    def __init__(self, params: Any, eps: float = 1e-8, corrects: bool = True, clips: float = 0.0) -> None:
        super().__init__(params, {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1})
        self.eps, self.corrects, self.clips = eps, corrects, clips

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override] # torch's overloads say float
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            gradient = p.grad.clamp(-self.clips, self.clips) if self.clips else p.grad
            state["n"] = state.get("n", 0) + 1
            first = state.setdefault("m", torch.zeros_like(p)).lerp_(gradient, 0.1)
            second = state.setdefault("v", torch.zeros_like(p)).lerp_(gradient.square(), 0.001)
            one, two = (1 - 0.9 ** state["n"], 1 - 0.999 ** state["n"]) if self.corrects else (1.0, 1.0)
            p.addcdiv_(first, second.sqrt() + self.eps, value=-1e-2 * two**0.5 / one)
            p.mul_(1 - 1e-2 * 0.1)


def followed(
    make: Make,
    dtype: torch.dtype = torch.float32,
    samples: int | None = None,
    updates: int = 8,
    kinds: tuple[str, ...] | None = None,
    spoil: Callable[[int, Tensor, Tensor], None] | None = None,
) -> tuple[list[dict[str, Deviation]], History]:
    """Return what the rule says of each update of one matrix, and its history."""
    generator = torch.Generator().manual_seed(7)
    weight = nn.Parameter((torch.randn(32, 24, generator=generator) * 0.02).to(dtype))
    optimizer, history, found = make([weight]), History(), []
    kinds = kinds or tuple(map(class_path, type(optimizer).__mro__))
    places = slice(None) if samples is None else torch.randperm(weight.numel(), generator=generator)[:samples]
    for update in range(updates):
        weight.grad = (torch.randn(weight.shape, generator=generator) * 1e-2).to(dtype)
        taken = [weight.grad.clone(), weight.detach().clone()]
        state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state[weight].items()}
        settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        optimizer.step()
        if spoil is not None:
            spoil(update, taken[1], weight.data)
        taken.append(weight.detach().clone())
        if samples is not None:
            taken = [tensor.flatten()[places] for tensor in taken]
        one = history.follow("w", kinds, settings, taken[0], taken[1], taken[2], state if samples is None else None)
        found.append({} if one is None else {"w": one})
    return found, history


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_in_float32(name: str) -> None:
    found, history = followed(HEALTHY[name])
    assert history.looked == {"w"}
    assert not history.reasons
    assert all(one["w"].error <= 1e-4 * one["w"].expected for one in found if "muon" not in name)
    assert not any(one["w"].wrong for one in found)


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_in_bfloat16(name: str) -> None:
    found, _ = followed(HEALTHY[name], torch.bfloat16)
    assert not any(deviation.wrong for one in found for deviation in one.values())


@pytest.mark.parametrize("name", [name for name in HEALTHY if "muon" not in name])
def test_samples_suffice(name: str) -> None:
    found, history = followed(HEALTHY[name], samples=64)
    assert history.looked == {"w"}
    assert not any(one["w"].wrong for one in found)


def test_muon_needs_the_matrix() -> None:
    found, history = followed(HEALTHY["muon"], samples=64)
    assert not any(found)
    assert history.reasons == {"w": "Muon's movement shows only in whole matrices"}


def test_others_of_known_name_are_healthy() -> None:
    for make in (Lion, OwnAdamW):
        name = "AdamW" if make is OwnAdamW else "Lion"
        found, history = followed(make, kinds=(f"elsewhere.{name}",))
        assert history.looked == {"w"}
        assert not any(one["w"].wrong for one in found)


def without_decoupling(parameters: list[nn.Parameter]) -> Optimizer:
    optimizer = AdamW(parameters, lr=1e-2, weight_decay=0.1)
    optimizer.param_groups[0]["decoupled_weight_decay"] = False
    return optimizer


def stuck(update: int, before: Tensor, after: Tensor) -> None:
    if update >= 2:
        after.copy_(before)


def shorter(update: int, before: Tensor, after: Tensor) -> None:
    after.copy_(before + (after - before) / 2)


FAULTS: dict[str, tuple[Make, tuple[str, ...] | None, Callable[..., None] | None, str]] = {
    "coupled": (without_decoupling, None, None, "weight decay were coupled"),
    "lion-coupled": (lambda p: Lion(p, coupled=True), ("x.Lion",), None, "off by"),
    "eps": (lambda p: OwnAdamW(p, eps=1e-5), ("x.AdamW",), None, "off by"),
    "uncorrected": (lambda p: OwnAdamW(p, corrects=False), ("x.AdamW",), None, "not corrected"),
    "clips": (lambda p: OwnAdamW(p, clips=1e-3), ("x.AdamW",), None, "off by"),
    "stuck": (HEALTHY["adamw"], None, stuck, "it did not move"),
    "half": (HEALTHY["sgd-nesterov"], None, shorter, "0.5 times as long"),
    "not-orthogonal": (HEALTHY["sgd"], ("torch.optim.Muon",), None, "not orthogonal"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_show(name: str) -> None:
    make, kinds, spoil, words = FAULTS[name]
    found, _ = followed(make, kinds=kinds, spoil=spoil)
    wrong = next(one for one in found if one["w"].wrong)
    with pytest.raises(Violation, match=words):
        follows_closed_form(wrong, "AdamW", 1)


def test_what_is_not_looked_at() -> None:
    class Cautious(AdamW):
        pass

    _, history = followed(HEALTHY["adamw"], kinds=("x.Adan", "torch.optim.optimizer.Optimizer"))
    assert "no closed form is known of Adan" in history.reasons["w"]
    _, history = followed(HEALTHY["adamw"], kinds=("bitsandbytes.optim.adamw.AdamW",))
    assert "8 bits" in history.reasons["w"]
    _, history = followed(
        lambda p: Cautious([{"params": p, "caution": 0.5}]), kinds=("x.Cautious", "torch.optim.AdamW")
    )
    assert history.reasons["w"].endswith("does not know: caution")
    found, history = followed(lambda p: SGD(p, lr=1e-9), torch.bfloat16)
    assert "rounding" in history.reasons["w"]
    assert not any(found)
    _, history = followed(HEALTHY["adamw"], torch.float16)
    assert "float16" in history.reasons["w"]


def test_no_gradient_no_movement() -> None:
    kinds, still = ("torch.optim.AdamW",), torch.ones(4)
    assert History().follow("w", kinds, {"lr": 1.0}, None, still, still) == Deviation(0.0, 0.0, 0.0, 0.0, False)
    moved = History().follow("w", kinds, {"lr": 1.0}, None, still, still + 1)
    with pytest.raises(Violation, match="moved without a gradient"):
        follows_closed_form({"w": moved} if moved else {}, "AdamW", 1)
