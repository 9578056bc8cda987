"""An update is all that optimizers do between one phase of backward passes and the next, however a loop does it."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import LBFGS, SGD, AdamW

from conformance.recipe import Recipe
from conformance.recording import record
from conformance.recording.trace import Trace

V, C = 11, 4
IDS = torch.arange(10).view(2, 5)
NAMES = ["table.weight", "hidden.weight", "head.weight"]


class Tiny(nn.Module):
    """An embedding, a matrix and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.hidden = nn.Embedding(V, C), nn.Linear(C, C, bias=False)
        self.head = nn.Linear(C, V, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(self.table(ids)))


def loss_of(model: Any, forward: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    logits = (forward or model)(IDS)
    return F.cross_entropy(logits.flatten(0, 1), IDS.flatten())


def test_several_optimizers_make_one_update() -> None:
    model = Tiny()
    first = SGD([model.hidden.weight], lr=0.1, momentum=0.9)
    second = AdamW([model.table.weight, model.head.weight], lr=0.01)
    with record() as trace:
        for _ in range(3):
            loss_of(model).backward()
            first.step()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)  # what the second optimizer finds is another gradient
            second.step()
            model.zero_grad()
    assert [len(update.steps) for update in trace.updates] == [2, 2, 2]
    assert [f.update for f in trace.forwards] == [0, 1, 2]
    update = trace.updates[1]
    assert sorted(name for group in update.groups for name in group.tensors) == sorted(NAMES)
    assert [step.optimizer[0].rpartition(".")[2] for step in update.steps] == ["SGD", "AdamW"]
    assert set(update.state_after) == set(NAMES)
    for one, other in zip(trace.updates, trace.updates[1:], strict=False):
        assert all(torch.equal(one.after[name], other.before[name]) for name in NAMES)
    gradient = update.gradients["hidden.weight"]
    assert gradient is not None
    assert gradient.norm() > 1e-3, "as its own optimizer found it"
    clipped = [update.gradients[name] for name in ("table.weight", "head.weight")]
    assert all(found is not None and found.norm() <= 1e-3 for found in clipped)


def test_a_rate_of_zero_is_a_rate() -> None:
    model = Tiny()
    both = AdamW([model.hidden.weight], lr=0.0), SGD([model.table.weight, model.head.weight], lr=0.0)
    with record() as trace:
        for optimizer in both:
            optimizer.step()  # before any forward: no update
        loss_of(model).backward()
        for optimizer in both:
            optimizer.step()
        both[0].step()  # without a backward: no update
    (update,) = trace.updates
    assert [sorted(step.tensors) for step in update.steps] == [["hidden.weight"], ["head.weight", "table.weight"]]


def test_microbatches_and_a_loop_of_optimizers_per_tensor() -> None:
    model = Tiny()
    optimizers = [SGD([tensor], lr=0.1) for tensor in model.parameters()]
    with record() as trace:
        for _ in range(2):
            for _ in range(3):
                loss_of(model).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert [len(update.steps) for update in trace.updates] == [3, 3]
    assert [loss.update for loss in trace.losses] == [0, 0, 0, 1, 1, 1]


def test_an_optimizer_in_backward() -> None:
    model = Tiny()
    optimizers = {tensor: SGD([tensor], lr=0.1) for tensor in model.parameters()}

    def step(tensor: Tensor) -> None:
        optimizers[tensor].step()  # type: ignore[index] # a parameter
        optimizers[tensor].zero_grad()  # type: ignore[index] # a parameter

    for tensor in model.parameters():
        # Types of a lambda with a default are not inferred.
        tensor.register_post_accumulate_grad_hook(step)
    with record() as trace:
        for _ in range(4):
            loss_of(model).backward()
    assert [len(update.steps) for update in trace.updates] == [3] * 4
    assert all(step.in_backward for update in trace.updates for step in update.steps)
    assert [forward.update for forward in trace.forwards] == [0, 1, 2, 3]
    assert sorted(name for step in trace.updates[0].steps for name in step.tensors) == sorted(NAMES)
    for update in trace.updates:
        for name, gradient in update.gradients.items():
            assert gradient is not None
            assert torch.equal(update.after[name], update.before[name].add(gradient, alpha=-0.1))


def test_a_nan_reaches_an_optimizer_in_backward_in_its_own_update_only() -> None:
    model = Tiny()
    optimizers = {tensor: SGD([tensor], lr=0.1) for tensor in model.parameters()}
    for tensor, optimizer in optimizers.items():
        tensor.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())  # type: ignore[misc] # a default
    with record(nan_gradient=1) as trace:
        for _ in range(2):
            loss_of(model).backward()
            model.zero_grad()
    spoilt = [sum(bool(tensor.isnan().any()) for tensor in update.after.values()) for update in trace.updates]
    assert spoilt == [0, 1]


def test_a_closure_that_is_called_several_times_is_one_update() -> None:
    model = Tiny()
    optimizer = LBFGS(model.parameters(), max_iter=3)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with record() as trace:
        for _ in range(2):
            optimizer.step(closure)
    assert len(trace.updates) == 2
    evaluations = [update.steps[0].evaluations for update in trace.updates]
    assert all(count > 1 for count in evaluations)
    assert [sum(f.update == u for f in trace.forwards) for u in (0, 1)] == evaluations
    assert [f.evaluation for f in trace.all_training_forwards(1)] == list(range(evaluations[1]))
    assert [len(trace.training_forwards(u)) for u in (0, 1)] == [1, 1], "the later ones are on other weights"
    assert not any(update.unfounded for update in trace.updates)


def test_two_steps_with_no_backward_between_are_told() -> None:
    model = Tiny()
    optimizer = SGD(model.parameters(), lr=0.1)
    with record() as trace:
        loss_of(model).backward()
        optimizer.step()
        optimizer.step()
    assert [update.unfounded for update in trace.updates] == [False, True]
    assert trace.notes == ["SGD stepped again after update 1 with no backward in between."]


def test_a_step_that_a_scaler_leaves_out() -> None:
    model = Tiny()
    optimizer = SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        with record() as trace:
            for factor in (1.0, float("inf"), 1.0):
                scaler.scale(loss_of(model) * factor).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    assert [update.skipped for update in trace.updates] == [False, True, False]
    skipped = trace.updates[1]
    assert all(torch.equal(skipped.before[name], skipped.after[name]) for name in NAMES)


class Plain:
    """An optimizer of somebody else's that does not derive from torch's."""

    def __init__(self, tensors: Any, lr: float) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(tensors), "lr": lr}]

    def step(self) -> None:
        for group in self.param_groups:
            for tensor in group["params"]:
                tensor.data.add_(tensor.grad, alpha=-group["lr"])


def train_with(step: Callable[[], None], model: nn.Module, keep: Any = None) -> Trace:
    with record() as trace:
        for _ in range(3):
            loss_of(model).backward()
            step()
            model.zero_grad()
    return trace


def test_an_optimizer_of_another_family_is_found_by_its_effect() -> None:
    model = Tiny()
    optimizer = Plain(model.parameters(), lr=0.1)
    trace = train_with(lambda: optimizer.step(), model)  # the method is replaced after the first step
    assert [update.optimizer[0].rpartition(".")[2] for update in trace.updates] == ["Plain"] * 3
    for update in trace.updates:
        assert [group.tensors for group in update.groups] == [tuple(NAMES)]
        for name, gradient in update.gradients.items():
            assert gradient is not None
            torch.testing.assert_close(update.after[name], update.before[name].add(gradient, alpha=-0.1))
    assert trace.notes == []
    assert "step" not in vars(optimizer), "put back"


@pytest.mark.parametrize("other", [False, True])
def test_what_an_optimizer_of_another_family_starts_from(other: bool) -> None:
    model = Tiny()
    with record() as trace:
        if other:  # so that the first step is seen by its effect only
            SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        optimizer = Plain(model.parameters(), lr=0.1)
        for number in range(3):
            optimizer.param_groups[0]["lr"] = 0.1 * (number + 1)
            loss_of(model).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            model.zero_grad()
    rates = [update.groups[0].settings["lr"] for update in trace.updates]
    assert rates[other:] == pytest.approx([0.1, 0.2, 0.3][other:])
    for update in trace.updates[other:]:
        assert sum(g.square().sum() for g in update.gradients.values() if g is not None) <= 1.001e-6, "clipped"


def test_an_optimizer_that_cannot_be_found_is_told() -> None:
    model = Tiny()
    parameters = list(model.parameters())

    @torch.no_grad()
    def descend() -> None:
        for tensor in parameters:
            assert tensor.grad is not None
            tensor.sub_(tensor.grad, alpha=0.1)

    trace = train_with(descend, model)
    assert [(len(update.steps), update.optimizer) for update in trace.updates] == [(1, ())] * 3
    assert "derive from torch.optim.Optimizer" in trace.notes[0]
    assert [forward.update for forward in trace.forwards] == [0, 1, 2]


@pytest.mark.parametrize("mode", ["direct", "called", "training_step"])
def test_a_forward_that_is_called_directly_is_seen(mode: str) -> None:
    class Module(Tiny):
        def training_step(self, ids: Tensor) -> Tensor:
            return self.head(self.hidden(self.table(ids)))

    model = Module()
    expected = model(IDS)
    forward: Any = {"direct": model.forward, "called": model, "training_step": model.training_step}[mode]
    optimizer = AdamW(model.parameters())
    start = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    with record() as trace:
        for _ in range(2):
            loss_of(model, forward).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert list(trace.tensors) == NAMES
    assert [update.groups[0].tensors for update in trace.updates] == [tuple(NAMES)] * 2
    assert all(torch.equal(trace.initial[name], start[name]) for name in NAMES)
    assert [f.update for f in trace.forwards] == [0, 1]
    logits = trace.forwards[0].logits
    if mode == "training_step":  # no forward of the module, so its logits are not known
        assert logits is None
    else:
        assert logits is not None
        assert torch.equal(logits, expected)


def test_a_loss_by_autograd_grad_is_seen() -> None:
    model = Tiny()
    optimizer = SGD(model.parameters(), lr=0.1)
    with record() as trace:
        loss = loss_of(model)
        for tensor, gradient in zip(
            model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            tensor.grad = gradient
        optimizer.step()
    assert [found.value.item() for found in trace.losses] == [loss.item()]
    assert len(trace.updates) == 1


def test_cross_entropies_are_seen_with_their_targets() -> None:
    model = Tiny()
    targets = IDS.clone()
    targets[0, :2] = -100
    with record() as trace:
        logits = model(IDS)
        loss = nn.CrossEntropyLoss(reduction="sum")(logits.bfloat16().flatten(0, 1), targets.flatten())
        loss.backward()
        SGD(model.parameters(), lr=0.1).step()
        with torch.no_grad():
            F.cross_entropy(model(IDS).transpose(1, 2), targets)
    first, second = trace.entropies
    assert (first.update, first.counted, first.reduction, first.dtype) == (0, 8, "sum", torch.bfloat16)
    assert (second.update, second.counted, second.reduction, second.grad_enabled) == (1, 8, "mean", False)


def test_linears_whose_input_was_rounded_are_told() -> None:
    model = Tiny()
    for rounded in (False, True):
        if rounded:
            model.table.register_forward_hook(lambda _, __, output: output.bfloat16().float())
        with record() as trace:
            model(torch.arange(V).repeat(8, 1))
            model(torch.zeros(8, V, dtype=torch.int64))  # a few values only
            SGD(model.parameters(), lr=0.1).step()
        assert [forward.rounded for forward in trace.forwards] == [("hidden",) if rounded else (), ()]


def test_modes_of_submodules_and_dtypes_of_linears_are_kept() -> None:
    model = Tiny()
    model.hidden.eval()
    with record() as trace, torch.autocast("cpu", torch.bfloat16):
        model(IDS)
    assert trace.forwards[0].other_mode == ("hidden",)
    assert trace.forwards[0].linears == {"hidden": torch.bfloat16, "head": torch.bfloat16}


def test_a_checkpoint_that_is_written_over_is_kept(tmp_path: Path) -> None:
    model, run, keep = Tiny(), tmp_path / "run", tmp_path / "kept"
    optimizer = SGD(model.parameters(), lr=0.1)
    run.mkdir()
    with record(run, keep=keep) as trace:
        for number in range(1, 4):
            loss_of(model).backward()
            optimizer.step()
            torch.save({"step": number}, run / "ckpt.pt")
            (run / "log.csv").write_text(f"step,loss\n{number},2.5\n")
    assert [checkpoint.update for checkpoint in trace.checkpoints] == [1, 2, 3]
    found = [checkpoint.find("*.pt") for checkpoint in trace.checkpoints]
    assert [torch.load(path)["step"] for path in found] == [1, 2, 3]
    assert found[-1] == run / "ckpt.pt", "the last one lies where it was written"
    assert [path.name for path in trace.checkpoints[0].files] == ["ckpt.pt"], "a log is not a checkpoint"
    assert trace.messages[-1] == "step 3: loss 2.5"


def test_an_adapter_hands_over_what_its_logger_got() -> None:
    with record() as trace:
        Recipe().report({"train/loss": 2.125, "note": float("nan")}, step=2)
    assert trace.messages == ["step 2: train loss 2.125"]
