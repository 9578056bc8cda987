"""Two processes train as one would: equal ranks, the same gradients and losses, disjoint data, one checkpoint."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reference.checkpoint import load_for_inference
from reference.config import GPTConfig, TrainConfig
from reference.data import TokenData, write_tokens
from reference.errors import TrainingError
from reference.training.trainer import Trainer
from tests.reference.two_ranks import two_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the ranks are forked: hide the GPU")

MODEL = GPTConfig.gpt2(vocab_size=512, block_size=8, n_layer=2, n_head=2, n_embd=16, tie_embeddings=True)
ALONE = TrainConfig(
    updates=5,
    microbatches=4,
    optimizer="torch.optim.SGD",  # AdamW would hide the scale of a gradient
    optimizer_args={"lr": 0.5, "momentum": 0.9},
    accelerator="cpu",
    evaluate_every=2,
    clip=0.5,
)
PAIR = replace(ALONE, microbatches=2, devices=2, strategy="ddp")
ADAM = replace(PAIR, optimizer="torch.optim.AdamW", optimizer_args={"lr": 1e-2}, save_every=3)


@pytest.fixture(scope="module")
def on_both() -> Iterator[Callable[..., list[Any]]]:
    with two_ranks() as on_both:
        yield on_both


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 + 61 tokens: 18 sequences, so that an epoch ends within an update."""
    path = tmp_path_factory.mktemp("tokens")
    ids = torch.randint(511, (211,), generator=torch.Generator().manual_seed(0)).tolist()
    settings: dict[str, Any] = {"vocab_size": 512, "tokenizer": "bytes", "end_of_document": 511}
    write_tokens(path, "train", [ids[:100], ids[100:148]], **settings)
    write_tokens(path, "validation", [ids[148:]], **settings)
    return path


def data(folder: Path, split: str) -> TokenData:
    return TokenData(folder, split, block_size=8, microbatch_size=2, seed=5)


class Watched:
    """Notes the parameters after every update, and the gradients that the step used."""

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        if not self.parameters:
            self.parameters.append(flat(tensors))
        self.gradients.append(flat([tensor.grad for tensor in tensors]))

    def after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.parameters.append(flat([tensor for group in optimizer.param_groups for tensor in group["params"]]))


def flat(tensors: list[Any]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def train(config: TrainConfig, folder: Path, directory: str, resume: Any = False) -> dict[str, Any]:
    """One run, on whatever ranks there are: what it did, as plain values."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    watched = Watched()
    hooks = [
        register_optimizer_step_pre_hook(watched.before_step),
        register_optimizer_step_post_hook(watched.after_step),
    ]
    try:
        result = Trainer(MODEL, config, directory).fit(data(folder, "train"), data(folder, "validation"), resume)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        "parameters": [p.numpy() for p in watched.parameters],
        "gradients": [g.numpy() for g in watched.gradients],
        "losses": [r.loss for r in result.records],
        "norms": [r.gradient_norm for r in result.records],
        "tokens": [r.tokens for r in result.records],
        "rates": [r.learning_rate for r in result.records],
        "validation": [r.validation_loss for r in result.records if r.validation_loss is not None],
    }


def distance(seen: Any, expected: Any) -> float:
    """The largest relative error over pairs of vectors."""
    pairs = [(torch.as_tensor(s), torch.as_tensor(e)) for s, e in zip(seen, expected, strict=True)]
    return max(((s - e).norm() / e.norm()).item() for s, e in pairs)


def test_two_ranks_train_as_one_process_does(on_both: Any, folder: Path) -> None:
    alone = train(ALONE, folder, "unused")
    first, second = on_both(train, PAIR, folder, "unused")
    for kind in ("parameters", "gradients"):
        assert all((a == b).all() for a, b in zip(first[kind], second[kind], strict=True)), f"{kind} of ranks differ"
    assert len(first["parameters"]) == 6  # before the first update and after each
    assert (first["parameters"][0] == alone["parameters"][0]).all()
    # Measured: 1.7e-7. Gradients averaged once too often: 0.50; the same data on both ranks: 1.05.
    assert distance(first["gradients"], alone["gradients"]) < 1e-5
    for kind in ("losses", "norms", "validation"):
        assert first[kind] == second[kind]
        assert first[kind] == pytest.approx(alone[kind], rel=1e-5), kind
    assert first["tokens"] == alone["tokens"] == [4 * 2 * 8] * 5
    assert first["rates"] == second["rates"] == alone["rates"]


def test_ranks_see_disjoint_sequences_that_are_together_the_epoch(folder: Path) -> None:
    streams = [data(folder, "train").batches_from(0, rank, 2) for rank in range(2)]
    taken = [[tuple(row.tolist()) for batch in itertools.islice(s, 4) for row in batch] for s in streams]
    assert len(set(taken[0] + taken[1])) == 16  # of 18: none twice


def nan_on_rank_1(directory: str) -> str:
    """Train on batches of which rank 1's third is poisoned, through an embedding that gives NaN for token 0."""
    rank = torch.distributed.get_rank()
    batches = [torch.full((2, 9), 1 + rank) for _ in range(4)]
    batches[2 if rank == 1 else 3][0, 0] = 0
    with pytest.raises(TrainingError) as caught:
        Trainer(poisoned, replace(ADAM, microbatches=1, save_every=1, evaluate_every=None), directory).fit(batches)
    return str(caught.value)


def poisoned() -> torch.nn.Module:
    from reference.model.gpt import GPT

    model = GPT(replace(MODEL, tie_embeddings=False))  # or the head would give NaN for all
    with torch.no_grad():
        model.embedding.weight[0] = torch.nan
    return model


def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_the_one(on_both: Any, tmp_path: Path) -> None:
    messages = on_both(nan_on_rank_1, str(tmp_path))
    assert messages[0] == messages[1]
    assert messages[0].startswith("the loss is nan at update 3 on rank 1; the parameters are those of the update")
    assert f"the newest checkpoint is {tmp_path / 'step-00000002'}" in messages[0]


def test_a_checkpoint_is_readable_on_another_number_of_ranks(on_both: Any, folder: Path, tmp_path: Path) -> None:
    # From two ranks to one. Without interruption on two ranks is what must come out.
    whole = on_both(train, ADAM, folder, str(tmp_path / "pair"))[0]
    alone = replace(ADAM, microbatches=4, devices=1, strategy="auto")
    resumed = train(alone, folder, str(tmp_path / "resumed"), resume=tmp_path / "pair" / "step-00000003")
    assert len(resumed["losses"]) == 2
    assert resumed["losses"] == pytest.approx(whole["losses"][3:], rel=1e-5)
    assert distance(resumed["parameters"][-1:], whole["parameters"][-1:]) < 1e-4
    # From one to two.
    train(alone, folder, str(tmp_path / "alone"))
    resumed = on_both(train, ADAM, folder, str(tmp_path / "again"), tmp_path / "alone" / "step-00000003")[0]
    assert resumed["losses"] == pytest.approx(whole["losses"][3:], rel=1e-5)
    assert load_for_inference(tmp_path / "again" / "step-00000005").training is False


def test_a_resume_on_two_ranks_is_bit_equal(on_both: Any, folder: Path, tmp_path: Path) -> None:
    whole = on_both(train, ADAM, folder, str(tmp_path / "whole"))
    resumed = on_both(train, ADAM, folder, str(tmp_path / "resumed"), tmp_path / "whole" / "step-00000003")
    for rank in range(2):
        assert (resumed[rank]["parameters"][-1] == whole[rank]["parameters"][-1]).all()
        assert resumed[rank]["losses"] == whole[rank]["losses"][3:]


def stopped_by_rank_1(folder: Path, directory: str) -> tuple[int, str | None]:
    """Rank 1 gets SIGTERM during its second update."""
    import signal

    def callback(record: Any) -> None:
        if torch.distributed.get_rank() == 1 and record.update == 2:
            signal.raise_signal(signal.SIGTERM)

    result = Trainer(MODEL, replace(ADAM, save_every=None), directory, [callback]).fit(data(folder, "train"))
    return len(result.records), None if result.stopped is None else result.stopped.name


def test_a_signal_to_one_rank_stops_all_after_the_same_update(on_both: Any, folder: Path, tmp_path: Path) -> None:
    seen = on_both(stopped_by_rank_1, folder, str(tmp_path))
    assert seen == [(3, "SIGTERM"), (3, "SIGTERM")]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def message_of(directory: str) -> str:
    from reference.errors import CheckpointError

    batches = [torch.ones(2, 9, dtype=torch.long)] * 2
    with pytest.raises(CheckpointError) as caught:
        Trainer(MODEL, replace(ADAM, evaluate_every=None), directory).fit(batches)
    return str(caught.value)


def test_a_directory_that_cannot_be_written_ends_all_ranks(on_both: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    first, second = on_both(message_of, str(tmp_path / "file"))
    assert first.startswith(f"checkpoints cannot be written to {tmp_path / 'file'}: ")
    assert second == "rank 0 could not write checkpoints; its message says why."
