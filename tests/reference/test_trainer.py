"""The loop: what it learns, accumulates, clips, evaluates, saves and resumes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from reference.checkpoint import load_config, load_for_inference, save
from reference.config import TrainConfig, as_plain
from reference.data import TokenData, write_tokens
from reference.errors import ConfigurationError
from reference.model import loss
from reference.model.gpt import GPT
from reference.model.loss import token_loss
from reference.training.evaluation import evaluate
from reference.training.launch import launch
from reference.training.trainer import Record
from tests.reference.trainers import DROPPING, GPT2, SGD, Bigram, fit, flat


def ragged() -> tuple[Tensor, Tensor]:
    """Ids and targets (8, 8) whose rows have 8, 1, 5, 0, 3, 8, 2 and 7 targets."""
    ids = torch.randint(16, (8, 9), generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([8, 1, 5, 0, 3, 8, 2, 7]).view(-1, 1)
    return ids[:, :-1], ids[:, 1:].where(torch.arange(8) < lengths, -100)


def token_mean(model: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Cross entropy over all tokens at once."""
    with torch.no_grad():
        logits = torch.cat([model(ids).flatten(0, 1) for ids, _ in pairs])
        return F.cross_entropy(logits.double(), torch.cat([t.flatten() for _, t in pairs])).item()


def test_loss_falls_to_nothing_on_one_batch() -> None:
    batch = (torch.arange(9) * 5 % 16).expand(2, 9)  # every token has one successor
    records = fit(GPT2, [batch], updates=60, optimizer_args={"lr": 0.03}, warmup=5).records
    assert records[0].loss == pytest.approx(2.77, abs=0.05)  # ln 16
    assert records[-1].loss < 0.02


@pytest.mark.parametrize("rows", [[4, 4], [1, 2, 1, 4], [1] * 8], ids=str)
def test_microbatches_give_the_gradient_of_one_batch(rows: list[int]) -> None:
    (ids, targets), start = ragged(), GPT(GPT2)
    whole = fit(GPT2, [(ids, targets)], clip=None, **SGD)
    parts = fit(GPT2, zip(ids.split(rows), targets.split(rows)), clip=None, microbatches=len(rows), **SGD)
    assert (flat(parts.model) - flat(whole.model)).norm() <= 1e-6 * flat(whole.model).norm()
    # And that is the gradient of the mean over all tokens that have a target.
    loss = F.cross_entropy(start(ids).flatten(0, 1), targets.flatten())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(start.parameters()))])
    assert gradient.norm() > 0.1 * flat(start).norm(), "the step is too small to tell"
    torch.testing.assert_close(flat(whole.model), flat(start) - gradient, rtol=0, atol=1e-6)
    for record in whole.records + parts.records:
        assert record.tokens == 34
        assert record.loss == pytest.approx(loss.item(), rel=1e-6)


def test_clipping_limits_the_step_and_reports_the_norm_before_it(batches: list[Tensor]) -> None:
    steps = {clip: fit(GPT2, batches, clip=clip, **SGD) for clip in (None, 0.125, 1e6)}
    lengths = {clip: (flat(result.model) - flat(GPT(GPT2))).norm().item() for clip, result in steps.items()}
    assert lengths[0.125] == pytest.approx(0.125, rel=1e-4)
    assert lengths[1e6] == lengths[None]
    for result in steps.values():
        assert result.records[0].gradient_norm == pytest.approx(lengths[None], rel=1e-4)


@pytest.mark.parametrize("modes", [(True, True), (False, False), (True, False)], ids=str)
def test_evaluation_weighs_tokens_and_restores_the_mode_of_every_module(modes: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    ids, targets = ragged()
    pairs: Any = [(ids[:1], targets[:1]), (ids[1:4], targets[1:4]), (ids[4:], targets[4:])]
    model = Bigram()
    model.training, model.dropout.training = modes
    seen = evaluate(launch(TrainConfig(accelerator="cpu")), model, pairs)
    assert (model.training, model.dropout.training) == modes
    assert seen == pytest.approx(token_mean(model.eval(), pairs), rel=1e-6)
    assert seen != pytest.approx(sum(token_mean(model, [pair]) for pair in pairs) / 3, rel=1e-3)


def test_a_module_that_comes_in_eval_mode_is_trained_in_train_mode(batches: list[Tensor]) -> None:
    model = Bigram().eval()
    fit(model, batches, batches[:1], updates=2, evaluate_every=1)
    assert model.modes == [(True, True), (False, False)] * 2


def test_validation_loss_is_recorded_where_it_is_due(batches: list[Tensor]) -> None:
    result = fit(DROPPING, batches, batches[:2], updates=5, evaluate_every=2)
    assert [r.update for r in result.records if r.validation_loss is not None] == [2, 4, 5]
    expected = token_mean(result.model.eval(), [(b[:, :-1], b[:, 1:]) for b in batches[:2]])
    assert result.records[-1].validation_loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("optimizer", ["torch.optim.AdamW", "grokadamw.GrokAdamW", "bitsandbytes.optim.AdamW8bit"])
# grokadamw 0.1.2 opens torch.cuda.amp.autocast at every step: deprecated, and off without a GPU.
@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast:FutureWarning", "ignore:CUDA is not available")
def test_resume_is_bit_equal(tmp_path: Path, batches: list[Tensor], optimizer: str) -> None:
    def power_cut(record: Record) -> None:
        if record.update == 4:  # before its checkpoint
            raise InterruptedError

    settings: dict[str, Any] = {
        "updates": 5,
        "microbatches": 2,
        "warmup": 1,
        "schedule": "cosine",
        "min_lr": 1e-5,
        "save_every": 2,
    }
    settings |= {"optimizer": optimizer, "optimizer_args": {"lr": 0.01}}
    whole = fit(DROPPING, batches, directory=tmp_path / "whole", **settings)
    with pytest.raises(InterruptedError):
        fit(DROPPING, batches, directory=tmp_path / "cut", callbacks=[power_cut], **settings)
    resumed = fit(DROPPING, batches, directory=tmp_path / "cut", resume=True, **settings)
    assert resumed.records == whole.records[2:]
    assert torch.equal(flat(resumed.model), flat(whole.model))


def test_every_update_drops_other_activations(batches: list[Tensor]) -> None:
    records = fit(DROPPING, batches[:1], updates=4, optimizer_args={"lr": 0.0}).records
    assert len({record.loss for record in records}) == 4


@pytest.mark.parametrize("shuffle", [False, True], ids=["in-order", "shuffled"])
def test_resume_with_a_data_loader(tmp_path: Path, batches: list[Tensor], shuffle: bool) -> None:
    rows: Any = torch.cat(batches)
    first, second = (DataLoader(rows, batch_size=2, shuffle=shuffle) for _ in range(2))
    whole = fit(DROPPING, first, directory=tmp_path, updates=5, save_every=2)
    resumed = fit(DROPPING, second, updates=5, resume=tmp_path / "step-00000002")
    assert resumed.records == whole.records[2:]


def test_a_foreign_module_is_trained_as_it_is_and_a_factory_from_the_seed(batches: list[Tensor]) -> None:
    before = flat(model := Bigram())
    assert fit(model, batches).model is model
    assert not torch.equal(flat(model), before)
    same, again, other = (fit(Bigram, batches, updates=2, seed=seed).model for seed in (1, 1, 2))
    assert torch.equal(flat(same), flat(again))
    assert not torch.equal(flat(same), flat(other))


def test_callbacks_get_every_record(batches: list[Tensor]) -> None:
    seen: list[Record] = []
    result = fit(GPT2, batches, updates=3, callbacks=[seen.append], warmup=1, optimizer_args={"lr": 0.5})
    assert seen == result.records
    assert [(r.update, r.learning_rate, r.tokens) for r in seen] == [(1, 0.25, 16), (2, 0.5, 16), (3, 0.5, 16)]


@pytest.mark.parametrize(("logits", "dtype"), [("compute", torch.bfloat16), ("float32", torch.float32)])
def test_logits(batches: list[Tensor], monkeypatch: pytest.MonkeyPatch, logits: str, dtype: torch.dtype) -> None:
    seen = []

    def spy(output: Tensor, targets: Tensor) -> Tensor:
        value = token_loss(output, targets)
        seen.append((output.dtype, value.dtype))
        return value

    monkeypatch.setattr(loss, "token_loss", spy)
    fit(GPT2, batches, batches[:1], precision="bf16-mixed", logits=logits, evaluate_every=1)
    assert seen == [(dtype, torch.float32)] * 2


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("stable", [False, True], ids=["plain", "stable"])
def test_load_for_inference(tmp_path: Path, batches: list[Tensor], precision: str, stable: bool) -> None:
    changes: dict[str, Any] = {"optimizer": "bitsandbytes.optim.AdamW8bit", "stable_embedding": stable}
    result = fit(GPT2, batches, updates=2, directory=tmp_path, save_every=2, precision=precision, **changes)
    loaded = load_for_inference(tmp_path / "step-00000002")
    ids = batches[0][:, :-1]
    assert not loaded.training
    assert torch.equal(loaded(ids), result.for_inference()(ids))
    if precision != "bf16-true":  # StableEmbedding computes in the default dtype
        assert torch.equal(loaded(ids), result.model.eval()(ids))
    assert type(loaded.get_submodule("embedding")) is nn.Embedding


def test_a_record_tells_time_and_memory(batches: list[Tensor]) -> None:
    records = fit(GPT2, batches, updates=3).records
    assert all(0 < record.seconds < 10 for record in records)
    assert [record.memory for record in records] == [0, 0, 0]  # there is no GPU memory on the CPU


def test_the_loss_may_be_inside_the_model(batches: list[Tensor]) -> None:
    with torch.compiler.set_stance("force_eager"):
        compiled = fit(GPT2, batches, batches, updates=3, compile=True, evaluate_every=1)
    eager = fit(GPT2, batches, batches, updates=3, evaluate_every=1)
    assert compiled.records == eager.records
    assert list(compiled.model.state_dict()) == list(eager.model.state_dict())


def test_only_the_first_validation_batches_are_evaluated(batches: list[Tensor]) -> None:
    first = fit(GPT2, batches, batches[:2], evaluate_every=1).records[-1].validation_loss
    assert fit(GPT2, batches, batches, evaluate_every=1, evaluate_batches=2).records[-1].validation_loss == first
    assert fit(GPT2, batches, batches, evaluate_every=1).records[-1].validation_loss != first


def test_activation_checkpointing_changes_nothing(batches: list[Tensor]) -> None:
    kept, again = (fit(DROPPING, batches, updates=3, activation_checkpointing=on) for on in (False, True))
    assert torch.equal(flat(kept.model), flat(again.model))
    with pytest.raises(ConfigurationError, match=r"works on reference\.GPT, not on Bigram"):
        fit(Bigram, batches, activation_checkpointing=True)


def test_older_checkpoints_go_when_a_newer_one_is_complete(batches: list[Tensor], tmp_path: Path) -> None:
    fit(GPT2, batches, updates=5, save_every=1, keep_last=2, directory=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_a_checkpoint_keeps_the_tokenizer(batches: list[Tensor], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"vocab_size": 16, "end_of_document": 15}
    for kind in ("bytes", "tokenizer.json"):
        folder = tmp_path / kind
        write_tokens(folder, "train", [list(range(15)) * 4], tokenizer=kind, **settings)
        (folder / "tokenizer.json").write_text("{}")
        data = TokenData(folder, "train", block_size=8, microbatch_size=2, seed=0)
        fit(GPT2, data, updates=1, save_every=1, directory=tmp_path / "out")
        step = tmp_path / "out" / "step-00000001"
        assert load_config(step)["tokenizer"] == kind
        assert (step / "tokenizer.json").exists() == (kind == "tokenizer.json")


def test_weights_without_optimizer_state_are_trained_on(batches: list[Tensor], tmp_path: Path) -> None:
    start = GPT(GPT2, seed=5)
    state: dict[str, Any] = {
        "update": 0,
        "optimizer": None,
        "optimizer_class": None,
        "precision": {},
        "stable_embedding": False,
    }
    save(tmp_path / "step-00000000", start, state, {"train": as_plain(TrainConfig()), "model": as_plain(GPT2)})
    resumed = fit(GPT2, batches, updates=2, resume=tmp_path / "step-00000000")
    assert [record.update for record in resumed.records] == [1, 2]
    assert torch.equal(flat(resumed.model), flat(fit(start, batches, updates=2).model))


def test_going_back_behind_newer_checkpoints_is_said(
    batches: list[Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(GPT2, batches, updates=3, save_every=1, directory=tmp_path)
    fit(GPT2, batches, updates=3, resume=tmp_path / "step-00000002", directory=tmp_path)
    assert "holds newer checkpoints than step-00000002, up to step-00000003" in caplog.text


def test_a_run_that_is_complete_is_said(
    batches: list[Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = fit(GPT2, batches, updates=2, save_every=1, directory=tmp_path)
    again = fit(GPT2, batches, updates=2, save_every=1, directory=tmp_path, resume=True)
    assert again.records == []
    assert torch.equal(flat(again.model), flat(done.model))
    assert "step-00000002 has done 2 updates, and updates=2: nothing is left to train" in caplog.text
