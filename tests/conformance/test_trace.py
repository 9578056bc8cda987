"""The recorder sees what a run did, changes nothing in it, and leaves nothing behind."""

import contextlib
import importlib
import io
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import optimizer as step_hooks
from torch.utils.checkpoint import checkpoint

from conformance.recipe import OptimizerChoice
from conformance.recording import record
from conformance.recording.snapshot import equal_values

V, C, BF16, IDS = 11, 4, torch.bfloat16, torch.arange(10).view(2, 5)
NAMES = ["table.weight", "head.weight", "head.bias"]


class Tiny(nn.Module):
    """An embedding and a head; ``wrap`` decides what leaves the forward."""

    def __init__(self, max_norm: float | None = None, device: str = "cpu") -> None:
        super().__init__()
        self.table = nn.Embedding(V, C, max_norm=max_norm, device=device)
        self.head = nn.Linear(C, V, device=device)
        self.wrap: Callable[[Tensor], Any] = lambda logits: logits

    def forward(self, input_ids: Tensor) -> Any:
        return self.wrap(self.head(self.table(input_ids)))


@pytest.fixture
def model() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def backward(model: nn.Module) -> float:
    loss = F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
    loss.backward()
    return loss.item()


def update(model: nn.Module, optimizer: Optimizer) -> None:
    backward(model)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)  # in place: what was recorded must be a copy


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def process_state() -> tuple[list[Any], list[Any]]:
    """All that a recording touches: what is another inside, and what has a fixed value there."""
    root, at = logging.getLogger(), vars(torch.nn.modules.module) | vars(step_hooks)
    other: list[Any] = [at[f"_global_{k}_hooks"].copy() for k in ("forward", "forward_pre")]
    other += [at[f"_global_optimizer_{k}_hooks"].copy() for k in ("pre", "post")]
    other += [torch.autograd.backward, torch.get_rng_state().tolist(), root.handlers[:], warnings.filters[:]]
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined] # set by its module
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    return other, [torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), warn_only, fill, root.level]


@pytest.mark.parametrize("unusual", [False, True])
@pytest.mark.parametrize("error", [None, ValueError, SystemExit])
def test_everything_is_put_back(model: Tiny, error: Any, unusual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("torch._dynamo")  # what a recording imports adds a filter of warnings, once
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)
    torch.set_num_threads(3)
    torch.use_deterministic_algorithms(unusual)
    monkeypatch.setattr("torch.utils.deterministic.fill_uninitialized_memory", not unusual)
    before = process_state()
    with contextlib.suppress(ValueError, SystemExit), record() as trace:
        torch.manual_seed(123)
        update(model, SGD(model.parameters()))
        inside = process_state()
        assert torch.empty(8).isnan().all()
        logging.basicConfig(force=True)  # a stack that sets logging up for itself
        if error is not None:
            raise error
    after = process_state()
    torch.use_deterministic_algorithms(False)
    assert after == before
    assert [a != b for a, b in zip(inside[0], before[0], strict=True)] == [True] * 8
    assert inside[1] == [1, True, True, True, logging.INFO]
    update(model, SGD(model.parameters()))  # after the recording: not seen any more
    assert (len(trace.forwards), len(trace.losses), len(trace.updates)) == (1, 1, 1)


def test_repeated_recordings_are_equal_and_nested_ones_independent(model: Tiny) -> None:
    start, ends = {name: tensor.clone() for name, tensor in model.state_dict().items()}, []
    for _ in range(2):
        model.load_state_dict(start)
        optimizer = AdamW(model.parameters())
        with record() as outer:
            update(model, optimizer)
            with record(rank=7) as inner:
                update(model, optimizer)
            update(model, optimizer)
        for trace, count in ((outer, 3), (inner, 1)):
            assert (len(trace.forwards), len(trace.losses), len(trace.updates)) == (count, count, count)
        assert equal(inner.initial, outer.updates[0].after)
        assert equal(inner.updates[0].after, outer.updates[1].after)
        assert (outer.rank, inner.rank, equal(outer.initial, start)) == (0, 7, True)
        ends.append(outer.updates[2].after)
    assert equal(*ends)


def test_logits_and_ids_are_found(model: Tiny) -> None:
    expected = model(IDS)
    outputs: list[Any] = [lambda x: (x.mean(), x), lambda x: {"scores": x}, lambda x: list(x.split(2, dim=1))]
    outputs.append(lambda x: {"loss": x.mean(), "hidden": x * 0, "logits": x})
    with record() as trace:
        for model.wrap in outputs:
            model(IDS)
            model(input_ids=IDS)
    assert [torch.equal(f.scores, expected) and torch.equal(f.ids, IDS) for f in trace.forwards] == [True] * 8


def test_mode_of_each_forward_loss_and_step(model: Tiny) -> None:
    optimizer, weight = SGD(model.parameters(), lr=0.1), model.head.weight
    with record() as trace:
        first = backward(model)
        with torch.autocast("cpu", BF16):
            torch.autograd.backward([weight[0, 0], weight[0]], [None, torch.ones(C)])
        update(model, optimizer)
        with torch.no_grad(), torch.autocast("cpu", BF16):
            model.eval()(IDS)
            optimizer.step()
        last = backward(model)
    modes = [(forward.update, forward.training, forward.grad_enabled, forward.autocast) for forward in trace.forwards]
    assert modes == [(0, True, True, None), (0, True, True, None), (1, False, False, BF16), (2, False, True, None)]
    assert [(loss.update, loss.autocast) for loss in trace.losses] == [(0, False), (0, True), (0, False), (2, False)]
    assert [trace.losses[i].value.item() for i in (0, 1, 3)] == [first, trace.initial["head.weight"][0, 0], last]
    assert [seen.autocast for seen in trace.updates] == [False, True]


def test_autocast_is_seen_in_a_module_without_children() -> None:
    with record() as trace, torch.autocast("cpu", BF16):
        nn.Embedding(V, C)(IDS)
    assert [forward.autocast for forward in trace.forwards] == [BF16]


def test_other_calls_are_ignored(model: Tiny) -> None:
    with record() as trace:
        counted = Tiny(device="meta")
        counted(IDS.to("meta")).sum().backward()
        counted(IDS)  # some stacks give real ids to a model without memory
        nn.Linear(3, 3)(torch.zeros(2, 5, 3))  # no ids
        nn.Flatten()(IDS.view(2, 5, 1))  # no logits
        model(IDS)
    assert (len(trace.forwards), len(trace.losses), list(trace.tensors)) == (1, 0, NAMES)


def test_a_forward_that_raises_unwinds(model: Tiny) -> None:
    model.wrap = lambda logits: logits @ logits
    with record() as trace:
        with pytest.raises(RuntimeError, match="Expected size"):
            model(IDS)
        model.wrap = lambda logits: logits
        update(model, SGD(model.parameters()))
    assert (len(trace.forwards), list(trace.updates[0].gradients)) == (1, NAMES)


class WithLoss(nn.Module):
    """Computes the loss around a model that is called under any name, from rows of T + 1 tokens or from pairs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.criterion, self.net = nn.CrossEntropyLoss(), model

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            ids, targets = ids[:, :-1], ids[:, 1:]
        return self.criterion(self.net(ids).transpose(1, 2), targets)


@pytest.mark.parametrize("rows", [True, False])
def test_a_model_inside_a_module_that_gives_the_loss(model: Tiny, rows: bool) -> None:
    inputs = (IDS,) if rows else (IDS, IDS)
    ids = IDS[:, :-1] if rows else IDS
    expected = model(ids)
    start = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    wrapped = wrapper("_FabricModule", "_forward_module", torch.compile(WithLoss(torch.compile(model))))
    with record() as trace:
        for _ in range(2):
            wrapped(*inputs).backward()
            SGD(model.parameters(), lr=0.1).step()
        model(IDS)  # evaluated without the wrapper
    first = trace.forwards[0]
    assert [(f.update, f.inside) for f in trace.forwards] == [(0, True), (1, True), (2, False)]
    assert torch.equal(first.ids, ids)
    assert torch.equal(first.scores, expected)
    assert (list(trace.tensors), list(trace.updates[0].after)) == (NAMES, NAMES)
    assert equal(trace.initial, start)


class Tied(nn.Module):
    """A body that holds every parameter, and a loss from a head that is the table."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(V, C), nn.Linear(C, C))

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.body(ids) @ self.body[0].weight.T
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_hidden_states_of_a_body_under_a_tied_head_are_no_logits() -> None:
    model = Tied()
    with record() as trace:
        model(IDS).backward()
        SGD(model.parameters(), lr=0.1).step()
    assert [forward.logits for forward in trace.forwards] == [None]
    assert list(trace.tensors) == ["body.0.weight", "body.1.weight", "body.1.bias"]


def test_an_evaluation_that_returns_nothing(model: Tiny) -> None:
    """Lightning's validation_step, which under DDP is a forward of the wrapper."""
    expected = model(IDS)
    wrapped = wrapper(*DDP, model)
    # A method is assigned, as wrappers do on an instance.
    wrapped.forward = lambda ids: None if model(ids) is not None else ids  # type: ignore[method-assign] # as a stack may
    with record() as trace:
        wrapped(IDS)
    assert [torch.equal(f.scores, expected) for f in trace.forwards] == [True]


def test_a_model_that_gives_only_its_loss_is_the_model_and_its_embedding_is_not() -> None:
    class LossInside(Tiny):
        def forward(self, input_ids: Tensor) -> Any:
            return F.cross_entropy(self.head(self.table(input_ids)).flatten(0, 1), input_ids.flatten())

    model = LossInside()
    for stepped in (False, True):
        with record() as trace:
            loss = model(IDS)
            loss.backward()
            if stepped:
                SGD(model.parameters(), lr=0.1).step()
        (forward,) = trace.forwards
        assert (forward.logits, forward.training, list(trace.tensors), len(trace.losses)) == (None, True, NAMES, 1)
        assert torch.equal(forward.ids, IDS)
        (entropy,) = trace.entropies
        assert (entropy.counted, entropy.reduction, entropy.value.item()) == (IDS.numel(), "mean", loss.item())


@pytest.mark.parametrize("reentrant", [True, False])
def test_blocks_recomputed_in_the_backward_pass_are_no_forwards(model: Tiny, reentrant: bool) -> None:
    class Block(nn.Module):  # told positions beside its input, as the blocks of Hugging Face are
        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            return (x * positions.unsqueeze(-1)).tanh()

    model.add_module("block", block := Block())
    how: Any = {"use_reentrant": reentrant}
    model.wrap = lambda x: checkpoint(block, checkpoint(block, x, IDS, **how), IDS, **how)
    with record() as trace:
        for _ in range(2):
            update(model, SGD(model.parameters()))
    assert [forward.update for forward in trace.forwards] == [0, 1]


def wrapper(kind: str, attribute: str, inner: Any) -> nn.Module:
    outer: nn.Module = type(kind, (nn.Module,), {"forward": lambda self, *args: getattr(self, attribute)(*args)})()
    outer.add_module(attribute, inner)
    return outer


FABRIC, DDP = ("_FabricModule", "_forward_module"), ("DistributedDataParallel", "module")
WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "compile": torch.compile,
    "Fabric": lambda inner: wrapper(*FABRIC, inner),
    "DDP in DataParallel": lambda inner: wrapper("DataParallel", "module", wrapper(*DDP, inner)),
    "everything": lambda inner: wrapper(*FABRIC, wrapper(*DDP, torch.compile(inner))),
    "a part called module": lambda inner: wrapper(*DDP, wrapper("Assistant", "module", inner)),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_names_are_those_of_the_bare_module(model: Tiny, kind: str) -> None:
    with record() as trace:
        wrapped = WRAPPED[kind](model)
        update(wrapped, SGD(wrapped.parameters()))
    expected = [f"module.{name}" for name in NAMES] if kind == "a part called module" else NAMES
    assert (list(trace.tensors), list(trace.initial), list(trace.updates[0].after)) == (expected, expected, expected)
    assert trace.updates[0].groups[0].tensors == tuple(expected)
    assert [f"{info.name}.weight" for info in trace.embeddings] == expected[:1]


def test_tensors_are_described_as_before_the_first_lookup() -> None:
    model = Tiny(max_norm=0.1)  # a lookup shortens rows of the table
    model.head.weight = model.table.weight
    model.head.bias.requires_grad_(False)
    model.register_buffer("mask", torch.ones(3))
    start = model.table.weight.detach().clone()
    with record() as trace:
        model(IDS)
    tied, bias = trace.tensors.values()
    assert (tied.names, tied.trainable, tied.owner) == (("table.weight", "head.weight"), True, "Embedding")
    assert (bias.names, bias.trainable, bias.owner) == (("head.bias",), False, "Linear")
    assert (list(trace.buffers), dict(trace.embeddings[0].options)["max_norm"]) == (["mask"], 0.1)
    assert torch.equal(trace.initial["table.weight"], start)
    assert not torch.equal(model.table.weight, start)


@pytest.mark.parametrize("zero", [False, True])
def test_gradients_and_parameters_are_those_around_the_step(model: Tiny, zero: bool) -> None:
    model.head.bias.requires_grad_(False)
    stranger, expected = nn.Parameter(torch.ones(3)), []
    tensors: dict[str, nn.Parameter] = {**dict(model.named_parameters()), "foreign-1": stranger}
    groups: list[dict[str, Any]] = [{"params": model.parameters()}, {"params": [stranger], "lr": 0.5}]
    optimizer = SGD(groups, lr=0.1)
    with record(zero_gradients=zero) as trace:
        for microbatches in (1, 2):
            for _ in range(microbatches):
                backward(model)
                stranger.sum().backward()
            expected.append({name: p.grad * (not zero) for name, p in tensors.items() if p.grad is not None})
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    first, second = trace.updates
    for seen, gradients in zip(trace.updates, expected, strict=True):
        rates = {name: -group.settings["lr"] for group in seen.groups for name in group.tensors}
        assert rates == dict.fromkeys(NAMES, -0.1) | {"foreign-1": -0.5}
        assert seen.gradients.pop("head.bias") is None
        assert equal(seen.gradients, gradients)
        moved = {name: seen.before[name].add(gradients[name], alpha=rates[name]) for name in gradients}
        assert equal(seen.after, {**moved, "head.bias": model.head.bias})
    assert equal(second.before, first.after)
    assert equal(trace.initial | second.after, tensors)
    assert equal(first.before, trace.initial | {"foreign-1": torch.ones(3)})


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("keyword", [False, True])
def test_gradients_of_a_closure_are_those_of_its_step(model: Tiny, zero: bool, keyword: bool) -> None:
    """Lightning's way: forward, backward and clipping inside what is handed to step."""
    optimizer, expected = SGD(model.parameters(), lr=0.1), []

    def closure() -> float:
        optimizer.zero_grad()
        loss = backward(model)
        expected.append({name: p.grad * (not zero) for name, p in model.named_parameters() if p.grad is not None})
        return loss

    with record(zero_gradients=zero) as trace:
        for _ in range(2):
            step: Any = optimizer.step
            assert (step(closure=closure) if keyword else step(closure)) > 1.0
    assert [(f.update, loss.update) for f, loss in zip(trace.forwards, trace.losses, strict=True)] == [(0, 0), (1, 1)]
    assert [list(seen.groups[0].tensors) for seen in trace.updates] == [NAMES, NAMES]
    for seen, gradients in zip(trace.updates, expected, strict=True):
        assert equal(seen.gradients, gradients)
        moved = {name: seen.before[name].add(gradients[name], alpha=-0.1) for name in NAMES}
        assert equal(seen.after, moved)


def test_a_nan_is_put_into_the_gradients_of_one_update(model: Tiny) -> None:
    with record(nan_gradient=1) as trace:
        for _ in range(3):
            update(model, SGD(model.parameters(), lr=0.0))
    counts = [sum(int(g.isnan().sum()) for g in u.gradients.values() if g is not None) for u in trace.updates]
    assert counts[:2] == [0, 1]
    assert counts[2] > 1, "and plain gradient descent carries it into the weights"


@pytest.mark.parametrize(("name", "moment", "factor"), [("AdamW", "exp_avg", 0.1), ("GrokAdamW", "grok_ema", 0.02)])
def test_state_is_found_where_the_class_keeps_it(model: Tiny, name: str, moment: str, factor: float) -> None:
    with record() as trace:
        package = importlib.import_module("torch.optim" if name == "AdamW" else "grokadamw")
        optimizer = getattr(package, name)(model.parameters())
        update(model, optimizer)
        update(model, optimizer)
    first, second = trace.updates
    assert (first.state_before, list(first.state_after), list(second.state_after)) == ({}, NAMES, NAMES)
    for tensor, state in first.state_after.items():
        # A gradient may be None by its type; here each tensor has one.
        torch.testing.assert_close(state[moment], first.gradients[tensor] * factor)  # type: ignore[operator] # a tensor
        assert equal_values(tuple(state.items()), tuple(second.state_before[tensor].items()))
        assert (state["step"], second.state_after[tensor]["step"]) == (1, 2)
    assert "state" not in second.groups[0].settings


def test_files_are_credited_to_the_update_before_them(model: Tiny, tmp_path: Path) -> None:
    old, best, last = (tmp_path / name for name in ("old.pt", "best.pt", "steps/2/last.pt"))
    old.write_text("here before")
    with record(tmp_path) as trace:
        best.write_text("start")
        for _ in range(2):
            update(model, SGD(model.parameters()))
        best.write_text("rewritten")
        last.parent.mkdir(parents=True)
        last.write_text("end")
    assert [(c.update, c.files) for c in trace.checkpoints] == [(0, (best,)), (2, (best, last))]
    assert (trace.checkpoint(1), trace.checkpoints[1].find("last.pt")) == (None, last)
    assert [trace.checkpoints[1].find(name) for name in ("2", "step*")] == [last.parent, last.parent.parent]


def test_messages_and_changed_configurations_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    choice = OptimizerChoice.of("torch.optim.AdamW", lr=0.1, betas=(0.8, 0.9))
    with record() as trace:
        warnings.warn("slow", DeprecationWarning, stacklevel=1)
        logging.getLogger("a.stack").info("step %d", 7)
        print("loss 2.1\n\ndone")
        print("bar 1/2\rbar 2/2", file=sys.stderr)
        choice.config()
        changed = choice.config()
        changed["init_args"].pop("lr")
    assert sorted(trace.messages) == ["bar 1/2", "bar 2/2", "done", "loss 2.1", "slow", "step 7"]
    assert capsys.readouterr() == ("", "")
    assert trace.changed_configs == [(choice.config(), changed)]


def test_a_stack_may_set_its_streams_up(capfd: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with record() as trace:
        for stream in (sys.stdout, sys.stderr):
            assert isinstance(stream, io.TextIOWrapper)
            stream.reconfigure(line_buffering=True)
            assert stream.fileno() == 2  # for faulthandler.enable(), and processes that are started
            stream.buffer.write("ünïcode\n".encode())
    assert trace.messages == ["ünïcode", "ünïcode"]
    assert (sys.stdout, sys.stderr) == before
    assert capfd.readouterr() == ("", "")


def test_nothing_is_left_of_the_hooks() -> None:
    model = Tiny()
    with record():
        model(torch.zeros(1, 2, dtype=torch.long))
    assert not torch.nn.modules.module._has_any_global_hook()  # torch.compile would warn of them
