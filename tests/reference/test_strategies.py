"""Runs on two ranks whose loss is compiled, and sharded ones (FSDP): what one process does, and what DDP does."""

import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance.clause import catalogue
from conformance.session import Session
from reference.checkpoint.folder import load_weights, step_folder
from reference.config import GPTConfig, TrainConfig
from reference.errors import ConfigurationError
from reference.model.gpt import GPT
from reference.training.trainer import Trainer
from tests.mutants import HARMLESS, Edit, planted
from tests.reference.two_ranks import two_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the ranks are forked: hide the GPU")

SIZE: dict[str, Any] = {"vocab_size": 64, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16}
MODELS = {"gpt2-tied": GPTConfig.gpt2(**SIZE), "llama-untied": GPTConfig.llama(**SIZE)}
ALONE = TrainConfig(
    updates=4,
    microbatches=2,
    optimizer="torch.optim.SGD",  # AdamW would hide the scale of a gradient
    optimizer_args={"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1},
    accelerator="cpu",
    save_every=2,
    clip=0.5,
)
DDP = replace(ALONE, devices=2, strategy="ddp")
FLAT, FSDP = replace(DDP, compile=True), replace(DDP, strategy="fsdp")
WAYS = {"flat": FLAT, "fsdp": FSDP, "fsdp, compiled": replace(FSDP, compile=True)}
ADAM: dict[str, Any] = {"optimizer": "torch.optim.AdamW", "optimizer_args": {"lr": 1e-2}}


@pytest.fixture(scope="module")
def on_both() -> Iterator[Callable[..., list[Any]]]:
    for module in ("lightning.fabric", "torch.distributed.fsdp", "torch._dynamo"):
        importlib.import_module(module)  # before the fork, which spares the ranks the import
    with two_ranks() as on_both:
        yield on_both


def rows(rank: int | None) -> list[tuple[Tensor, Tensor]]:
    """Microbatches of ids and targets, with different numbers of targets. None: those of both ranks together."""
    drawn = torch.Generator().manual_seed(0)
    batches = []
    for number in range(8):
        tokens = torch.randint(64, (4, 9), generator=drawn)
        targets = tokens[:, 1:].clone()
        targets[0, : 1 + number % 5] = -100
        part = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
        batches.append((tokens[part, :-1], targets[part]))
    return batches


def train(name: str, config: TrainConfig, directory: Path, resume: Any = False) -> dict[str, Any]:
    """One run, on whatever ranks there are."""
    rank = torch.distributed.get_rank() if config.devices > 1 and torch.distributed.is_initialized() else None
    if config.devices > 1 and rank is None:
        import os

        rank = int(os.environ["RANK"])
    with torch.compiler.set_stance("force_eager"):  # inductor takes a minute
        result = Trainer(MODELS[name], config, directory).fit(rows(rank), resume=resume)
    return {
        "losses": [record.loss for record in result.records],
        "norms": [record.gradient_norm for record in result.records],
        "tokens": [record.tokens for record in result.records],
    }


def weights(directory: Path, update: int) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in load_weights(step_folder(directory, update)).values()])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_train_as_one_process_does(on_both: Any, way: str, name: str, tmp_path: Path) -> None:
    alone = train(name, ALONE, tmp_path / "one")
    first, second = on_both(train, name, WAYS[way], tmp_path / "two")
    assert first == second
    assert first["tokens"] == alone["tokens"]
    # Measured: 2e-7. A gradient that is half as large: 0.5 of the norms.
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert first["norms"] == pytest.approx(alone["norms"], rel=1e-5)
    moved = (weights(tmp_path / "one", 4) - weights(tmp_path / "one", 2)).norm()
    assert (weights(tmp_path / "two", 4) - weights(tmp_path / "one", 4)).norm() < 1e-4 * moved


@pytest.mark.parametrize("name", MODELS)
def test_replicas_take_the_steps_of_ddp_bit_for_bit(on_both: Any, name: str, tmp_path: Path) -> None:
    of_ddp = on_both(train, name, DDP, tmp_path / "ddp")
    assert on_both(train, name, FLAT, tmp_path / "flat") == of_ddp
    assert torch.equal(weights(tmp_path / "flat", 4), weights(tmp_path / "ddp", 4))


@pytest.mark.parametrize(("name", "optimizer"), [("llama-untied", {}), ("gpt2-tied", ADAM)], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_are_read_both_ways(
    on_both: Any, way: str, name: str, optimizer: dict[str, Any], tmp_path: Path
) -> None:
    alone, two = replace(ALONE, **optimizer), replace(WAYS[way], **optimizer)
    whole = on_both(train, name, two, tmp_path / "two")[0]["losses"]
    of_one = train(name, alone, tmp_path / "one")["losses"]
    half = step_folder(tmp_path / "two", 2)
    again = on_both(train, name, two, tmp_path / "again", half)[0]["losses"]
    assert again == whole[2:]  # bit-equal
    assert torch.equal(weights(tmp_path / "again", 4), weights(tmp_path / "two", 4))
    assert train(name, alone, tmp_path / "resumed", half)["losses"] == pytest.approx(whole[2:], rel=1e-5)
    back = on_both(train, name, two, tmp_path / "back", step_folder(tmp_path / "one", 2))[0]["losses"]
    assert back == pytest.approx(of_one[2:], rel=1e-5)


MUON: dict[str, Any] = {"optimizer": "torch.optim.Muon", "optimizer_args": {"lr": 0.02}}
FREE: dict[str, Any] = {"optimizer": "tests.reference.test_averages.ScheduleFreeSGD", "optimizer_args": {"lr": 0.5}}


@pytest.mark.parametrize(
    ("way", "optimizer"),
    [(DDP, MUON), (FLAT, MUON), (FSDP, MUON), (DDP, FREE), (FLAT, FREE)],
    ids=["ddp-Muon", "flat-Muon", "fsdp-Muon", "ddp-schedule-free", "flat-schedule-free"],
)
def test_two_optimizers_and_averages_on_two_ranks(
    on_both: Any, way: TrainConfig, optimizer: dict[str, Any], tmp_path: Path
) -> None:
    config = replace(way, **optimizer)
    first, second = on_both(train, "llama-untied", config, tmp_path / "two")
    assert first == second
    alone = train("llama-untied", replace(ALONE, **optimizer), tmp_path / "one")
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4)  # Muon multiplies matrices in bfloat16
    again = on_both(train, "llama-untied", config, tmp_path / "again", step_folder(tmp_path / "two", 2))[0]
    assert again["losses"] == first["losses"][2:]
    assert torch.equal(weights(tmp_path / "again", 4), weights(tmp_path / "two", 4))


def start(name: str, initialization: Any, precision: Any, directory: Path) -> None:
    from reference.training.saving import save

    config = replace(FSDP, initialization=initialization, precision=precision)
    save(Trainer(MODELS[name], config, directory).setup(), 0, None)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("initialization", ["eager", "meta"])
@pytest.mark.parametrize("name", MODELS)
def test_a_sharded_start_is_bit_equal(
    on_both: Any, name: str, initialization: str, precision: str, tmp_path: Path
) -> None:
    on_both(start, name, initialization, precision, tmp_path)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    expected = GPT(MODELS[name], FSDP.seed).to(dtype).state_dict()
    seen = load_weights(step_folder(tmp_path, 0))
    assert seen.keys() == expected.keys()
    assert not [key for key, tensor in expected.items() if not torch.equal(tensor, seen[key])]


def shards() -> dict[str, tuple[int, ...]]:
    run = Trainer(MODELS["gpt2-tied"], FSDP, "unused").setup()
    assert isinstance(run.module, GPT)
    assert run.module.head.weight is run.module.embedding.weight
    return {name: tuple(tensor.to_local().shape) for name, tensor in run.module.named_parameters()}  # type: ignore[attr-defined] # DTensors


def test_each_rank_holds_half_of_each_tensor(on_both: Any) -> None:
    first, second = on_both(shards)
    for name, tensor in GPT(MODELS["gpt2-tied"]).named_parameters():
        assert first[name] == second[name] == (tensor.shape[0] // 2, *tensor.shape[1:]), name


PER_ELEMENT = ("AdamW", "Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop", "SGD")
NOT_SPLIT = {
    "torch.optim.Adafactor": "Adafactor cannot train tensors that are split over ranks (RuntimeError: ",
    "bitsandbytes.optim.AdamW8bit": "AdamW8bit cannot train tensors that are split over ranks (RuntimeError: ",
    "grokadamw.GrokAdamW": "(its state is not split like the parameter): under FSDP use an optimizer that treats",
    "reference.optimizers.adamw8bit.AdamW8bit": "(its state is not split like the parameter): under FSDP use an",
    "tests.reference.test_averages.ScheduleFreeSGD": "ScheduleFreeSGD is schedule-free, and its average",
    "tests.reference.test_strategies.Scaled": "(it takes other steps than on whole tensors): under FSDP use an",
}


class Scaled(torch.optim.SGD):
    """Divides by the norm of what this rank holds: no step of one tensor."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            local = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
            local.div_(local.norm())
        return super().step()


def trained_by(optimizer: str, directory: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of grokadamw
        try:
            config = replace(FSDP, optimizer=optimizer, optimizer_args={"lr": 1e-3}, updates=2)
            Trainer(MODELS["gpt2-tied"], config, directory).fit(rows(0))
        except ConfigurationError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("name", PER_ELEMENT)
def test_optimizers_of_single_elements_train_sharded(on_both: Any, name: str, tmp_path: Path) -> None:
    assert on_both(trained_by, f"torch.optim.{name}", tmp_path) == ["", ""]


@pytest.mark.parametrize("path", NOT_SPLIT)
def test_other_optimizers_are_refused_in_a_sentence(on_both: Any, path: str, tmp_path: Path) -> None:
    first, second = on_both(trained_by, path, tmp_path)
    assert first == second
    assert NOT_SPLIT[path] in first


class Partly(nn.Module):
    """One parameter for each case: used by both ranks, by one, by none, frozen, and of another dtype."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        names = ("both", "one", "none", "frozen")
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.ones(3)) for name in names})
        self.weights["frozen"].requires_grad_(False)
        self.weights["narrow"] = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("moving", torch.full((2,), float(rank)))
        self.register_buffer("table", torch.full((2,), float(rank)), persistent=False)

    def forward(self) -> Tensor:
        w = self.weights
        loss = ((self.rank + 1) * w["both"] * w["frozen"]).sum() + (2 * w["narrow"]).sum()
        return loss + w["one"].sum() if self.rank == 1 else loss


def partly(piece: int) -> tuple[dict[str, list[float] | None], list[list[float]], list[int]]:
    """Two microbatches, of which the first is not exchanged: gradients, buffers, and what was sent."""
    from unittest import mock

    from reference.training import replication

    module = Partly(torch.distributed.get_rank())
    control = replication.AverageAtTheEnd(module)
    sent: list[int] = []
    exchange = torch.distributed.all_reduce

    def counted(tensor: Tensor, **settings: Any) -> Any:
        sent.append(tensor.numel())
        return exchange(tensor, **settings)

    with mock.patch.object(torch.distributed, "all_reduce", counted), mock.patch.object(replication, "PIECE", piece):
        for enabled in (True, False):
            with control.no_backward_sync(module, enabled):
                module().backward()
    gradients = {n: None if p.grad is None else p.grad.tolist() for n, p in module.weights.items()}
    return gradients, [buffer.tolist() for buffer in module.buffers()], sent


@pytest.mark.parametrize("piece", [1, 5, 1000])
def test_averages_whatever_each_rank_used(on_both: Any, piece: int) -> None:
    first, second = on_both(partly, piece)
    expected = {"both": [3.0] * 3, "one": [1.0] * 3, "none": None, "frozen": None, "narrow": [4.0] * 2}
    assert first[0] == second[0] == expected
    assert first[1] == [[0.0, 0.0], [0.0, 0.0]]
    assert second[1] == [[0.0, 0.0], [1.0, 1.0]]  # a buffer that is saved is rank 0's, a table is each rank's own
    # Who used what, and the gradients: those of the second microbatch alone would be sent twice.
    assert first[2] == {1: [4, 3, 3, 3, 2], 5: [4, 6, 3, 2], 1000: [4, 9, 2]}[piece]


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 64, sparse=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


def sparse() -> str:
    with pytest.raises(ConfigurationError) as caught:
        Trainer(Sparse, FLAT, "unused").setup()
    return str(caught.value)


def test_sparse_gradients_are_refused_in_a_sentence(on_both: Any) -> None:
    assert on_both(sparse)[0].startswith("model.table has sparse gradients, which several ranks cannot average")


def from_ranks(directory: Path) -> list[float]:
    """What rank 0 knows after setup of a model that is built differently on each rank."""
    seed = torch.distributed.get_rank()
    run = Trainer(GPT(MODELS["gpt2-tied"], seed), FLAT, directory).setup()
    return [parameter.detach().sum().item() for parameter in run.module.parameters()]


def test_every_rank_starts_from_the_weights_of_rank_0(on_both: Any, tmp_path: Path) -> None:
    first, second = on_both(from_ranks, tmp_path)
    assert first == second
    assert first == [parameter.detach().sum().item() for parameter in GPT(MODELS["gpt2-tied"], 0).parameters()]


def barriers(directory: Path) -> int:
    from unittest import mock

    with mock.patch.object(torch.distributed, "barrier") as barrier:
        train("gpt2-tied", replace(FLAT, save_every=None), directory)
    return barrier.call_count


def test_the_host_waits_at_no_barrier(on_both: Any, tmp_path: Path) -> None:
    assert on_both(barriers, tmp_path) == [0, 0]


FAULTS = {
    "summed": Edit("reference.training.replication:Travelling.__init__", ".div_(distributed.get_world_size())", ""),
    "not sent": Edit("reference.training.replication:AverageAtTheEnd.no_backward_sync", "not enabled", "False"),
}


def verdicts() -> dict[str, str]:
    variant = next(variant for variant in HARMLESS if variant.name == "compiled")
    with Session(variant.subject()) as session:
        return {name: session.judge(catalogue()[name]).outcome for name in ("ACC-3", "ACC-4", "CLIP-4")}


def test_the_clauses_of_two_ranks_pass_compiled_runs() -> None:
    assert verdicts() == dict.fromkeys(("ACC-3", "ACC-4", "CLIP-4"), "pass")


@pytest.mark.parametrize("fault", FAULTS)
def test_and_fail_on_faults_of_the_exchange(fault: str) -> None:
    with planted((FAULTS[fault],)):
        assert "fail" in verdicts().values()
