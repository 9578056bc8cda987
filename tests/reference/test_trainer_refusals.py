"""What the trainer refuses, in one sentence: batches, modules, settings, losses that are not finite."""

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference.config import GPTConfig, TrainConfig
from reference.data import TokenData, write_tokens
from reference.errors import CheckpointError, ConfigurationError, TrainingError
from reference.training.trainer import Record, Trainer
from tests.reference.trainers import GPT2, SGD, Bigram, fit


@pytest.mark.parametrize("clip", [1.0, None], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_the_step(batches: list[Tensor], clip: float | None, what: str) -> None:
    model, poisoned = Bigram(), dict[str, Tensor]()

    def poison(record: Record) -> None:
        if what == "loss":
            model.head.bias.data[0] = torch.inf
        else:
            model.head.bias.register_hook(lambda gradient: gradient * torch.nan)
        poisoned.update(copy.deepcopy(model.state_dict()))

    with pytest.raises(TrainingError, match=rf"the {what}.* at update 2 on rank 0; the parameters are those of the"):
        fit(model, batches, updates=2, clip=clip, callbacks=[poison], **SGD)
    assert poisoned
    assert all(torch.equal(tensor, poisoned[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("count", [0, 1], ids=["empty", "read-once"])
def test_batches_that_end_are_an_error(batches: list[Tensor], count: int) -> None:
    with pytest.raises(TrainingError, match="the training batches ended: give a list, a DataLoader or another iter"):
        fit(GPT2, iter(batches[:count]), updates=2)


class Ending:
    """A token source that breaks its word: it ends after ``count`` batches."""

    def __init__(self, batches: list[Tensor], count: int) -> None:
        self.given = batches[:count]

    def batches_from(self, start: int, rank: int = 0, world_size: int = 1) -> Iterator[Tensor]:
        return iter(self.given[start:])

    def once(self, rank: int = 0, world_size: int = 1) -> Iterator[Tensor]:
        return iter(self.given)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_token_source_that_ends_is_an_error(batches: list[Tensor], count: int) -> None:
    with pytest.raises(TrainingError, match=r"the training batches ended: batches_from\(\) of a token source"):
        fit(GPT2, Ending(batches, count), updates=3, microbatches=2)


def test_no_validation_batches_are_an_error(batches: list[Tensor]) -> None:
    with pytest.raises(TrainingError, match=r"there are no validation batches .an iterator gives them only once"):
        fit(GPT2, batches, [], evaluate_every=1)


ROW = torch.ones(8, dtype=torch.long)
FORMS = {
    "dict": ({"ids": ROW}, "dict"),
    "1-d": (ROW, "(8,)"),
    "no-row": (torch.ones(0, 8, dtype=torch.long), "(0, 8)"),
    "one-token": (ROW[None, :1], "(1, 1)"),
    "shapes": ((ROW.view(1, 8), ROW.view(2, 4)), "tuple"),
    "single": ([ROW.view(1, 8)], "list"),
    "1-d-pair": ((ROW, ROW), "tuple"),
    "lists": ([[1, 2, 3], [4, 5, 6]], "list"),
}


@pytest.mark.parametrize(("batch", "form"), FORMS.values(), ids=FORMS)
def test_a_batch_of_another_form_is_refused(batch: Any, form: str) -> None:
    sentence = f"a batch has the form {form}: expected integer token ids (B, T + 1), or a pair of ids and targets."
    with pytest.raises(TrainingError, match=re.escape(sentence)):
        fit(GPT2, [batch])


class Gives(nn.Module):
    """A module that gives what a function makes of the logits (B, T, V)."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.bigram, self.change = Bigram(), change

    def forward(self, ids: Tensor) -> Any:
        return self.change(self.bigram(ids))


@pytest.mark.parametrize(
    ("change", "form"),
    [
        (lambda logits: (logits,), "tuple"),
        (lambda logits: logits[:, :-1], r"\(2, 7, 16\)"),
        (lambda logits: logits.mean(-1), r"\(2, 8\)"),
    ],
    ids=["tuple", "shorter", "no-vocabulary"],
)
def test_a_module_that_gives_no_logits_is_refused(
    batches: list[Tensor], change: Callable[[Tensor], Any], form: str
) -> None:
    with pytest.raises(TrainingError, match=f"the model gave {form} for targets .*: it must map token ids"):
        fit(Gives(change), batches)


# Fabric warns that it will compute in another precision, before we refuse it.
@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU:UserWarning")
def test_16_mixed_is_refused_on_the_cpu(batches: list[Tensor]) -> None:
    with pytest.raises(ConfigurationError, match="precision='16-mixed' needs a GPU: on the CPU choose 'bf16-mixed' or"):
        fit(GPT2, batches, precision="16-mixed")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "nonsense"}, "Fabric refuses .*strategy='nonsense'.*: "),
        ({"accelerator": "cuda"}, "Fabric refuses accelerator='cuda'.*: "),
    ],
)
def test_what_cannot_be_launched_is_refused_in_one_sentence(
    batches: list[Tensor], changes: dict[str, Any], message: str
) -> None:
    if changes.get("accelerator") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigurationError, match=message) as caught:
        fit(GPT2, batches, **changes)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"vocab_size": 257, "tokenizer": "bytes", "end_of_document": 256}
    write_tokens(tmp_path, "train", [list(range(200))], **settings)
    data = TokenData(tmp_path, "train", block_size=8, microbatch_size=2, seed=0)
    with pytest.raises(ConfigurationError, match="vocabulary of 257 tokens, but the model one of 16: set vocab_size"):
        fit(GPT2, data)


@pytest.mark.parametrize(
    ("ids", "targets", "named"),
    [
        ([[1, 64, 2]], None, 64),
        ([[1, -1, 2]], None, -1),
        ([[1, 2, 3]], [[2, 65, 3]], 65),
        ([[1, 2, 3]], [[-100, -7, 3]], -7),
    ],
)
def test_ids_that_the_model_has_no_row_for_are_told(ids: Any, targets: Any, named: int) -> None:
    bad = torch.tensor(ids) if targets is None else (torch.tensor(ids), torch.tensor(targets))
    good = torch.tensor([[1, 2, 3]]), torch.tensor([[2, -100, 63]])
    model = GPTConfig.tiny(vocab_size=64, block_size=4)
    expected = f"holds the token id {named}, but the model knows 0 to 63: tokenize the text with"
    trainer = Trainer(model, TrainConfig(updates=2, evaluate_every=1, accelerator="cpu"))
    with pytest.raises(TrainingError, match=expected):
        trainer.fit([bad])
    with pytest.raises(TrainingError, match=expected):
        trainer.fit([good], [bad])
    ignored = torch.tensor([[1, 2, 3]]), torch.tensor([[-100, -100, -100]])
    assert len(trainer.fit([good, ignored], [good]).records) == 2


def test_a_least_rate_above_the_peak_is_refused(batches: list[Tensor]) -> None:
    with pytest.raises(ConfigurationError, match=r"min_lr is 0\.1, above the optimizer's lr of 0\.01: the rate would"):
        fit(GPT2, batches, optimizer_args={"lr": 0.01}, min_lr=0.1, schedule="cosine")


def test_resume_from_nothing_known_is_told(batches: list[Tensor]) -> None:
    with pytest.raises(CheckpointError, match=r"resume is None: give False, True, 'auto' or the folder"):
        fit(GPT2, batches, resume=None)
