"""conformance.checks as a library: each rule passes what is right (its doctest) and names what is wrong."""

import contextlib
import doctest
import importlib
import pkgutil
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from conformance import Constant, Normal, Uniform, chats, checks
from conformance.checks import clipping, data, decay, evaluation, initialization, precision, reports, schedule
from conformance.checks.accumulation import gradient_is_of
from conformance.checks.chats import answers_are_targets
from conformance.checks.optimizer import keywords_arrive
from conformance.clause import Violation
from conformance.errors import NotApplicable
from conformance.recording.trace import Group, Step
from reference.config import GPTConfig
from reference.model.gpt import GPT

MODULES = [f"conformance.checks.{entry.name}" for entry in pkgutil.iter_modules(checks.__path__)]


def test_every_public_rule_has_an_example() -> None:
    for name in checks.__all__:
        assert ">>> " in (getattr(checks, name).__doc__ or ""), name


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_initialised_names_the_tensor() -> None:
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(Violation, match=r"in 1 of 2 tensors: weight \(1 of 6\)"):
        checks.initialised(model)


def test_a_mask_of_minus_infinity_is_initialised() -> None:
    model, mask = nn.Linear(2, 3), torch.full((2, 2), -torch.inf).triu(1)
    checks.initialised(model, {"mask": mask})
    with pytest.raises(Violation, match=r"in 1 of 3 tensors: mask \(1 of 4\)"):
        checks.initialised(model, {"mask": mask - mask.nan_to_num(0.0, neginf=-torch.inf)})


def test_a_learning_rate_in_a_tensor_is_the_number() -> None:
    groups = [Group((), {"lr": torch.tensor(0.00123)})]
    keywords_arrive(groups, {"lr": 0.00123})
    with pytest.raises(Violation, match="lr is tensor"):
        keywords_arrive(groups, {"lr": 0.00124})


def test_decay_groups_cover_names_what_is_missing_and_what_is_foreign() -> None:
    model, other = nn.Linear(2, 2), nn.Parameter(torch.zeros(3))
    with pytest.raises(Violation, match="missing: bias"):
        checks.decay_groups_cover(model, torch.optim.SGD([model.weight]))
    with pytest.raises(Violation, match=r"also there: a tensor \(3,\)"):
        checks.decay_groups_cover(model, torch.optim.SGD([*model.parameters(), other]))
    model.bias.requires_grad_(False)
    with pytest.raises(Violation, match=r"also there: a tensor \(2,\)"):
        checks.decay_groups_cover(model, torch.optim.SGD(model.parameters()))


def build(kind: type[Optimizer], keywords: dict[str, Any]) -> Optimizer:
    return kind([nn.Parameter(torch.zeros(2))], **keywords)


@pytest.mark.parametrize(
    ("builder", "seen"),
    [
        (lambda kind, keywords: build(kind, keywords | {"fused": True}), "unexpected keyword argument 'fused'"),
        (lambda kind, keywords: build(kind, {"lr": keywords["lr"]}), "weight_decay is"),
        (lambda kind, keywords: build(kind, keywords | {"lr": 1.0}), "lr is 1.0"),
        (
            lambda kind, keywords: build(
                kind, {k: v for k, v in keywords.items() if k[0] in "lwe" and k != "wieght_decay"}
            ),
            "without it",
        ),
    ],
    ids=["injects fused", "drops weight_decay", "changes lr", "swallows a misspelt keyword"],
)
def test_builders_that_are_wrong(builder: Any, seen: str) -> None:
    with pytest.raises(Violation, match=seen):
        checks.accepts_only_supported_keywords(builder)


def test_embedding_swaps_that_lose_something() -> None:
    table = nn.Embedding(8, 4, padding_idx=1)
    weight = table.weight.detach()
    with pytest.raises(Violation, match="seen: the weight has changed"):
        checks.embedding_swap_lossless(table, nn.Embedding(8, 4, padding_idx=1, _weight=weight + 1))
    with pytest.raises(Violation, match="after the swap: padding_idx=None"):
        checks.embedding_swap_lossless(table, nn.Embedding(8, 4, _weight=weight.clone()))
    with pytest.raises(Violation, match="bfloat16"):
        checks.embedding_swap_lossless(table, nn.Embedding(8, 4, padding_idx=1, _weight=weight.bfloat16()))


def test_a_model_that_sees_later_tokens_is_found() -> None:
    ids = torch.randint(16, (2, 9), generator=torch.Generator().manual_seed(0))
    model = GPT(GPTConfig.tiny(vocab_size=16, block_size=16)).eval()
    checks.looks_back_only(model, ids)
    checks.looks_back_only(lambda tokens: SimpleNamespace(logits=model(tokens)), ids)

    def ahead(tokens: Tensor) -> Tensor:
        return model(tokens) + 1e-4 * model(tokens).roll(-1, dims=1)

    with pytest.raises(Violation, match=r"logits before token 4 stay the same(.|\n)*seen: they change at 3, by up to"):
        checks.looks_back_only(ahead, ids)
    checks.looks_back_only(ahead, ids, bound=1e-3)
    with pytest.raises(Violation, match="they change at 0, 1, 2, 3, by up to nan"):
        checks.looks_back_only(lambda tokens: model(tokens) * float("nan"), ids, bound=1e-3)
    for bad in (torch.tensor([1, 2]), torch.tensor([[1]]), torch.tensor([[2, 2, 2]])):
        with pytest.raises(ValueError, match=r"give \(B, T\) with T of at least 2, and different tokens"):
            checks.looks_back_only(model, bad)


def test_losses_in_bfloat16_are_seen_by_dtype_and_by_value() -> None:
    logits, targets = torch.randn(2, 8, 50, generator=torch.Generator().manual_seed(0)), torch.arange(16).view(2, 8)
    coarse = F.cross_entropy(logits.bfloat16().flatten(0, 1), targets.flatten())
    with pytest.raises(Violation, match=r"seen: torch.bfloat16"):
        checks.loss_in_float32(logits, targets, coarse)
    with pytest.raises(Violation, match="relative bound 1e-05"):
        checks.loss_in_float32(logits, targets, coarse.float())
    exact = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    checks.loss_in_float32(logits, targets, exact)
    with pytest.raises(Violation, match="the loss"):
        checks.loss_in_float32(logits, targets, exact * 16 / 17)


def test_a_factor_that_losses_share_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(4, 2, 8, 50, generator=generator), torch.arange(64).remainder(50).view(4, 2, 8)
    losses = [F.cross_entropy(x.flatten(0, 1), t.flatten()) for x, t in zip(logits, targets, strict=True)]
    for factor in (1.0, 16 / 17, 2.0**16):
        pairs = [(x, t, loss * factor) for x, t, loss in zip(logits, targets, losses, strict=True)]
        assert precision.shared_factor(pairs) == pytest.approx(factor, rel=1e-6)
    coarse = [(x, t, loss.bfloat16().float()) for x, t, loss in zip(logits, targets, losses, strict=True)]
    assert precision.shared_factor(coarse) == 1.0


@pytest.mark.parametrize("seed", range(20))
def test_healthy_draws_are_rarely_suspects(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(4096, generator=generator) * 0.02
    uniform = torch.rand(4096, generator=generator) * 2 - 1
    # Three standard errors, three statistics: one draw in a hundred may be a suspect. None of these twenty is.
    assert not initialization.deviation(normal, Normal(0.0, 0.02))
    assert not initialization.deviation(uniform, Uniform(-1.0, 1.0))
    assert initialization.deviation(normal, Normal(0.0, 0.022)).startswith("std")
    assert initialization.deviation(normal + 0.004, Normal(0.0, 0.02)).startswith("mean")
    assert initialization.deviation(uniform / 3**0.5, Normal(0.0, 1 / 3)).startswith(("kurtosis", "std"))
    assert initialization.deviation(normal, Constant(0.0)) == "4096 of 4096 elements are not 0"


def test_gradients_that_differ_are_named() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    for module in (model, other):
        module(torch.ones(1, 2)).sum().backward()
    checks.gradients_agree(model, other)
    bias = other.bias.grad
    assert bias is not None
    bias *= 2
    with pytest.raises(Violation, match=r"off by 0.58 of its length, and 1.414 times as long; most of it in bias"):
        checks.gradients_agree(model, other)
    other.bias.grad = None
    with pytest.raises(Violation, match="only one of them has bias"):
        checks.gradients_agree(model, other)


@pytest.mark.parametrize("factor", [1.0, 16 / 17])
def test_the_scale_of_a_gradient_shows_in_the_fall_of_the_loss(factor: float) -> None:
    start = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    end = start - 0.01 * start.sin()
    losses = (-start.cos()).sum().item(), (-end.cos()).sum().item()
    gradients = {"w": factor * start.sin()}, {"w": factor * end.sin()}
    if factor == 1.0:
        gradient_is_of(losses, {"w": end - start}, gradients)
    else:
        with pytest.raises(Violation, match=r"0.9412 times as large"):
            gradient_is_of(losses, {"w": end - start}, gradients)


def test_clipping_by_tensor_has_another_direction() -> None:
    free: dict[str, Any] = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0]), "c": None}
    clipping.clipped_as_one(free, {"a": torch.tensor([0.6, 0.0]), "b": torch.tensor([0.8]), "c": None}, 1.0)
    with pytest.raises(Violation, match=r"off by 0\.45"):
        clipping.clipped_as_one(free, {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([1.0]), "c": None}, 1.0)


A, B = torch.tensor([3.0, 0.0]), torch.tensor([4.0])


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        (A, B, "not clipped when the optimizer steps"),
        (A / 3, B / 4, "each tensor was clipped by itself"),
        (A / 3, B / 8, "clipped apart, by norms of their own: a, and others"),
        (A / 7, B / 7, r"as if the norm was 7, the sum of the norms"),
        (A / 34**0.5, B / 34**0.5, r"as if the norm was 5\.831: the tied tensor a was counted twice"),
        (A / 50, B / 50, "as if the norm was 50; it is 5"),
        (torch.tensor([0.0, 3.0]), B, "before the last backward"),
        (torch.tensor([0.0, 0.6]), B / 5, "after each microbatch"),
        (A / 0, B, "zero or not finite"),
    ],
)
def test_kinds_of_clipping_are_told_apart(first: Tensor, second: Tensor, kind: str) -> None:
    with pytest.raises(Violation, match=kind):
        clipping.clipped_as_one({"a": A, "b": B}, {"a": first, "b": second}, 1.0, shared=["a"])


def test_elements_clipped_by_themselves_are_told() -> None:
    with pytest.raises(Violation, match="each element was clipped by itself"):
        clipping.clipped_as_one({"a": torch.tensor([3.0, 0.5])}, {"a": torch.tensor([1.0, 0.5])}, 1.0)


def test_the_update_with_another_rate_is_named() -> None:
    updates = [[Group(("w",), {"lr": rate})] for rate in (0.5, 1.0, 0.8)]

    def declared(*rates: float) -> list[dict[str, float]]:
        return [{"w": rate} for rate in rates]

    schedule.rates_are(updates, declared(0.5, 1.0, 0.8))
    with pytest.raises(Violation, match=r"0.5, 1, 0.7 for w\nseen: 0.5, 1, 0.8, which differ from update 3 on"):
        schedule.rates_are(updates, declared(0.5, 1.0, 0.7))
    with pytest.raises(Violation, match="seen: 3"):
        schedule.rates_are(updates, declared(0.5, 1.0))


SAMPLES = torch.arange(8).view(2, 4)


def test_samples_are_recognised_with_and_without_their_last_token() -> None:
    assert data.sample_numbers(SAMPLES[[1, 0]], SAMPLES) == [1, 0]
    assert data.sample_numbers(SAMPLES[:, :3], SAMPLES) == [0, 1]
    assert data.sample_numbers(SAMPLES[:, :3] + 1, SAMPLES) == [None, None]
    assert data.sample_numbers(SAMPLES[:, :2], SAMPLES) == [None, None]
    with pytest.raises(Violation, match=r"not seen: 1; more than once: 0 \(2 times\); .* not a sample: 1"):
        data.once_each([0, 0, None], 2, "epoch 1")


@pytest.mark.parametrize(("shift", "name"), [(0, "the token itself"), (2, "the token after the next")])
def test_targets_at_another_distance_are_named(shift: int, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = list(torch.randint(20, (4, 2, 9), generator=generator))
    logits = list(torch.randn(4, 2, 8, 20, generator=generator))

    def losses(distance: int) -> list[float]:
        length = 9 - max(1, distance)
        pairs = zip(logits, rows, strict=True)
        return [0.9 * data.mean_entropy(x[:, :length], t[:, distance : distance + length]) for x, t in pairs]

    data.predicts_next(logits, rows, losses(1))
    with pytest.raises(Violation, match=f"that of {name}"):
        data.predicts_next(logits, rows, losses(shift))


def test_a_loss_divided_by_a_target_too_many_is_still_that_of_the_next_tokens() -> None:
    """As transformers' Trainer divides that of a GPT-2."""
    torch.manual_seed(0)
    logits = [torch.randn(2, 8, 32) for _ in range(4)]
    rows = [torch.randint(32, (2, 9)) for _ in range(4)]
    for number, tokens in enumerate(rows):
        tokens[0, 2 : 4 + number] = data.IGNORED
    counts = [int((tokens[:, 1:] != data.IGNORED).sum()) for tokens in rows]
    sums = [data.mean_entropy(x, t[:, 1:]) * n for x, t, n in zip(logits, rows, counts, strict=True)]
    assert data.divided_by_counts(logits, rows, [total / (n + 2) for total, n in zip(sums, counts, strict=True)])
    later = [data.mean_entropy(x[:, :7], t[:, 2:]) for x, t in zip(logits, rows, strict=True)]
    assert not data.divided_by_counts(logits, rows, later)
    assert not data.divided_by_counts(logits, rows, [0.0, *later[1:]])


@pytest.mark.parametrize(
    ("counted", "seen"),
    [
        ("marked", ""),
        ("sums", ""),
        ("all", "all tokens"),
        ("behind", "the token behind"),
        ("half", "the factor varies"),
    ],
)
def test_targets_that_are_counted_by_another_mask_are_named(counted: str, seen: str) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(2, 8, 12, generator=generator) for _ in range(3)]
    rows = [torch.randint(12, (2, 9), generator=generator) for _ in range(3)]
    marked = [torch.rand(2, 9, generator=generator) < 0.5 for _ in range(3)]
    masks = {"all": [torch.ones(2, 8, dtype=torch.bool)] * 3, "half": [mask[:, 1:].logical_not() for mask in marked]}
    masks |= {"marked": [mask[:, 1:] for mask in marked], "behind": [mask[:, :-1] for mask in marked]}
    masks["sums"] = masks["marked"]
    targets = [tokens[:, 1:].masked_fill(~mask, -100) for tokens, mask in zip(rows, masks[counted], strict=True)]
    losses = [data.mean_entropy(*pair) for pair in zip(logits, targets, strict=True)]
    if counted == "sums":
        losses = [loss * int(mask.sum()) for loss, mask in zip(losses, masks["sums"], strict=True)]
    labels = [tokens.masked_fill(~mask, -100) for tokens, mask in zip(rows, marked, strict=True)]
    with pytest.raises(Violation, match=seen) if seen else contextlib.nullcontext():
        data.counts_declared_targets(logits, rows, labels, losses)


@pytest.mark.parametrize(
    ("shift", "name"), [(0, "the token itself"), (2, "the token after the next"), (3, "some other token")]
)
def test_targets_of_a_cross_entropy_at_another_distance_are_named(shift: int, name: str) -> None:
    rows = list(torch.arange(36).view(2, 2, 9))
    data.targets_are_next([tokens[:, 1:].flatten() for tokens in rows], rows)
    shifted_inside = [F.pad(tokens[:, 1:], (0, 1), value=-100) for tokens in rows]
    data.targets_are_next([targets.flatten() for targets in shifted_inside], rows)
    with pytest.raises(Violation, match=f"it is {name}"):
        data.targets_are_next([tokens[:, shift:].flatten() for tokens in rows], rows)


@pytest.mark.parametrize(
    ("declared", "fits"),
    [("torch.optim.AdamW", True), ("torch.optim.adamw.AdamW", True), ("torch.optim.Adam", False), ("tor.AdamW", False)],
)
def test_the_owner_of_a_tensor_is_named_as_its_users_import_it(declared: str, fits: bool) -> None:
    step = Step(("torch.optim.adamw.AdamW",), (Group(("w",), {}),), autocast=False)
    with contextlib.nullcontext() if fits else pytest.raises(Violation, match="w by AdamW"):
        decay.owned_as_declared([step], {"w": declared})


SAID = [
    ("update 6/6: loss 4.8, validation 4.8520, lr 0.1", ["4.8520"]),
    ("Final evaluation | val loss: 4.852 | val ppl: 128.0", ["4.852"]),
    ("{'eval_loss': '4.852', 'eval_runtime': '0.0131', 'eval_steps_per_second': '145.5'}", ["4.852"]),
    ("Epoch 1 | iter 4 | loss train: 4.812, val: n/a | iter time: 2.31 ms", []),
    ("interval 3.5, value 2.5, evaluated 4.5", []),
    ("Validation: 50.0%| 1/2 [00:00<00:00], eval 12.31it/s, eval (0.53 s), validation 104.25 %", []),
    ("Validation: 100%| 2/2 [00:00<00:00, 97.5it/s, val_loss=4.852]", ["4.852"]),
    ("validate step:  2  loss:  4.8520  memory:  0.03GiB(0.02%)  tps: 5,120", ["4.8520"]),
    ("step 2: validation_metrics loss 4.852013", ["4.852013"]),
    ("step 2: validation_metrics memory max_active(GiB) 0.512", []),
]


@pytest.mark.parametrize(("line", "numbers"), SAID)
def test_reported_losses_are_found(line: str, numbers: list[str]) -> None:
    assert evaluation.reported_losses([line]) == numbers


def test_a_reported_loss_may_be_rounded_but_not_off() -> None:
    evaluation.reports(["val loss 4.81", "val loss: 4.852"], 4.8523)
    assert reports.is_rounded("4.9e0", 4.86)
    with pytest.raises(Violation, match=r"reported: 4\.81, 4\.852"):
        evaluation.reports(["val loss 4.81", "val loss: 4.852"], 4.8529)


TOLD = [
    ("update 6/6: loss 4.8348, validation 4.8340, lr 0.02, gradient norm 0.940", "4.8348", "0.02", "0.940"),
    ("{'loss': '4.568', 'grad_norm': '1.527', 'learning_rate': '1e-04', 'epoch': '1'}", "4.568", "1e-04", "1.527"),
    ("{'train_runtime': '0.1479', 'train_loss': '4.568', 'epoch': '1'}", "4.568", None, None),
    ("Epoch 1 | iter 4 step 1 | loss train: 4.812, val: n/a | iter time: 2.31 ms", "4.812", None, None),
    ("Training: 50%| 1/2 [00:00<00:00, 97.5it/s, loss=4.85, lr=1.0e-4]", "4.85", "1.0e-4", None),
    ("step   0: loss 5.663", "5.663", None, None),
    ("Final evaluation | val loss: 4.852", None, None, None),
    (" 'optimizer': {'init_args': {'lr': 0.1}}, 'max_grad_norm': 1.0, 'epochs': 3", None, None, None),
    ("iter 4: lr 0.1, gradient norm 1.5", None, "0.1", "1.5"),
    ("{'eval_loss': '4.573'}; aux loss 0.01; loss scale 65536.0; loss (0.53 s)", None, None, None),
    ("step 0: lr-AdamW pg1 0.0987, momentum 0.9", None, "0.0987", None),
    ("step 0: lr-SGD 0.05, grad_2 0_norm model head weight 0.9, grad_2 0_norm_total 1.25", None, "0.05", "1.25"),
    ("step 3, loss: 12, lr: 0, gradient norm of 3 tensors 4.5", None, None, None),
]


@pytest.mark.parametrize(("line", "loss", "rate", "norm"), TOLD)
def test_what_a_run_reports_is_found(line: str, loss: str | None, rate: str | None, norm: str | None) -> None:
    found = reports.training_losses([line]), reports.learning_rates([line]), reports.gradient_norms([line])
    assert found == tuple([] if number is None else [number] for number in (loss, rate, norm))


def test_a_long_word_before_a_loss_is_no_other_loss() -> None:
    assert reports.training_losses(["w" * 5000 + " loss: 1.25", "val_loss=2.5", "my validation loss 3.5"]) == ["1.25"]


def cost_of_reading(text: str) -> float:
    """Return the seconds of the processor that it takes to look for all numbers in a message, at best."""

    def once() -> float:
        began = time.process_time()
        for read in (
            reports.training_losses,
            reports.learning_rates,
            reports.gradient_norms,
            evaluation.reported_losses,
            reports.numbers_of_targets,
            reports.last_numbers,
        ):
            read([text])
        return time.process_time() - began

    return min(once() for _ in range(5))


@pytest.mark.parametrize("word", ["w", "loss ", "lr-", "val ", "step ", "eval_loss ", " ", "target tokens", "1."])
def test_a_message_eight_times_as_long_takes_no_square_of_the_time(word: str) -> None:
    short, long = ((word * length)[:length] for length in (4000, 32000))
    assert cost_of_reading(long) < 24 * cost_of_reading(short)  # linear: 8; quadratic: 64


def test_losses_that_lie_close_are_matched_by_chance() -> None:
    means = [2.0 + 0.02 * number for number in range(10)]
    assert reports.matches_by_chance(["2.0312"], means) < 0.1
    assert reports.matches_by_chance(["2.03"], means) > 0.5
    assert reports.matches_by_chance(["2.000031"] * 9, [2.0 + 0.00001 * number for number in range(10)]) > 1
    assert reports.matches_by_chance(["1.87"] * 9, means) == 0, "they lie elsewhere"
    assert reports.matches_by_chance(["2.0"], [2.0]) == 1


def test_numbers_of_targets_are_found_and_those_of_plain_tokens_are_not() -> None:
    lines = [
        "step 1: loss 4.85, target_tokens 17.0",
        "trainable tokens: 18; 19 targets",
        "tokens 32.0, total_tokens 64.0, 12,345 tokens/s, tokens 4096",
        "targets=20, num_label_tokens 21",
    ]
    assert reports.numbers_of_targets(lines) == ["17.0", "18", "20", "21"]


def test_last_numbers_are_those_of_lines_about_an_update() -> None:
    lines = [
        "resuming from step 2",
        "Epoch 1 | iter 11 step 5 | loss train: 4.812, val: 4.9 |",
        "step 6: learning_rate 1e-04",
        "step 99: the checkpoint is written",
        "update 4/6: loss 4.8348, validation 4.8340",
    ]
    assert reports.last_numbers(lines) == {"iter": 11, "step": 6, "update": 4}


def test_validation_losses_are_those_that_loggers_got() -> None:
    lines = [
        "step 2: val_loss 4.9",
        "iter 3: val loss 4.8",
        "step 4: loss 4.7",
        "step 4: loss 4.7, validation_loss 4.6",
    ]
    assert evaluation.validation_losses_by_step(lines) == {2: "4.9", 4: "4.6"}


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ([5, 6, 7, 8], (2, 4)),
        ([7, 8, 9, 0, 0], (4, 3)),  # filled up behind the end
        ([3, 4, 1, 1], (0, 0)),  # two tokens are no window
        ([1, 1, 1], (0, 0)),
    ],
)
def test_a_window_is_found_in_its_document(ids: list[int], found: tuple[int, int]) -> None:
    assert data.places_in_document(torch.tensor(ids), torch.arange(3, 10)) == found


def test_what_is_reported_beside_a_number_is_found() -> None:
    lines = [
        "Epoch 1 | iter 8 step 2 | loss train: 4.812, val: 4.9 |",
        "update 3/6: loss 4.8348",
        "step 99: the checkpoint is written",
    ]
    assert reports.by_number(lines, reports.training_losses) == {"step": [(2, ["4.812"])], "update": [(3, ["4.8348"])]}


def test_rows_of_a_logger_that_count_iterations_say_so() -> None:
    rows = ["step 7: iter 8.0, loss 4.812", "step 7: loss 4.9", "iter 8 step 2 | loss 4.812"]
    assert reports.by_number(rows, reports.training_losses) == {"step": [(2, ["4.812"])]}
    assert reports.by_number(rows[1:], reports.training_losses) == {"step": [(7, ["4.9"]), (2, ["4.812"])]}


@pytest.mark.parametrize("first", [0, 1])
def test_numbers_of_updates_may_begin_at_0_or_1(first: int) -> None:
    values = {1: [4.8], 2: [4.7, 4.75], 3: [4.6]}
    reports.numbered_alike([(first, ["4.8"]), (first + 1, ["9.9", "4.75"])], values, "losses")
    with pytest.raises(Violation, match=r"4\.7 with number 3") as raised:
        reports.numbered_alike([(1, ["4.8"]), (3, ["4.7"])], values, "losses")
    assert (
        raised.value.expected
        == "losses with the numbers of their own updates, which are 1, 2, 3, counted from 1 or from 0"
    )


def test_one_number_for_each_update_is_in_their_order() -> None:
    reports.in_order(["0.51", "0.5104", "0.62"], [0.5104, 0.62], "the norms")
    reports.in_order(["0.62"], [0.5104, 0.62], "the norms")  # not one for each
    with pytest.raises(Violation, match=r"reported: 0\.62, 0\.51"):
        reports.in_order(["0.62", "0.51"], [0.51, 0.62], "the norms")


CHAT = [chats.USER_ID, 5, chats.END_ID, chats.ASSISTANT_ID, 70, 71, chats.END_ID, chats.USER_ID, 6, chats.END_ID]


@pytest.mark.parametrize(
    ("places", "seen"),
    [
        ((4, 5, 6), None),
        ((4, 5), "not targets: 1 ends of turns and 0 of the assistant's words; 0 other targets"),
        ((5, 6), "not targets: 0 ends of turns and 1 of the assistant's words; 0 other targets"),
        ((2, 4, 5, 6), "not targets: 0 ends of turns and 0 of the assistant's words; 1 other targets"),
    ],
)
def test_targets_of_a_chat_are_what_the_assistant_says(places: tuple[int, ...], seen: str | None) -> None:
    """Targets stand at the position before their own place, where they are predicted."""
    ids = torch.tensor([CHAT])
    targets = torch.tensor([[CHAT[n] if n in places else -100 for n in range(1, len(CHAT))] + [-100]])
    if seen is None:
        answers_are_targets([(ids, targets)])
        return
    with pytest.raises(Violation) as raised:
        answers_are_targets([(ids, targets)])
    assert raised.value.seen == seen


def test_a_chat_in_which_no_turn_ends_is_not_judged() -> None:
    ids = torch.tensor([CHAT[:6]])
    with pytest.raises(NotApplicable):
        answers_are_targets([(ids, torch.full_like(ids, -100))])
