"""prepare --field messages: chats by the tokenizer's own template, with targets in the assistant's turns only."""

import itertools
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reference import TokenData, TrainConfig, Trainer, checkpoint
from reference.config import IGNORE
from reference.data.prepare import Prepared, prepare
from reference.data.timelimit import time_limit
from reference.data.tokenizer import load_tokenizer
from reference.errors import ConfigurationError, DataError
from reference.interchange.huggingface import export_huggingface, import_huggingface
from tests.reference.exports import GROUPED, saved
from tests.sentences import sentence_of

PLAIN = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
MARKED = """\
{%- if messages[0]['role'] == 'assistant' %}{{ raise_exception('the user must begin') }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message['content'] + '<|im_end|>' }}{% endif %}
{{- '\\n' }}
{%- endfor %}"""
LAST = "{{ 'only ' + messages[-1]['content'] }}"  # what it writes for two messages does not begin with that for one
ROLES = ("system", "user", "assistant", "user", "assistant")


def chats(number: int = 12) -> list[list[dict[str, str]]]:
    return [
        [{"role": role, "content": f"{role[0]}{chat} says {k}, ä"} for k, role in enumerate(ROLES)]
        for chat in range(number)
    ]


def model_folder(folder: Path, template: str, end: str = "<|endoftext|>") -> Path:
    """A byte-level tokenizer with the special tokens of ChatML, and a chat template."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    folder.mkdir(exist_ok=True)
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(["assistant user system says says says"], trainer)
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": template, "eos_token": {"content": end}})
    )
    return folder


def chats_prepared(folder: Path, template: str, records: Any = None, **more: Any) -> Prepared:
    source = folder / "chats.jsonl"
    records = chats() if records is None else records
    source.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in records))
    model = model_folder(folder / "model", template)
    settings: dict[str, Any] = {"field": "messages", "progress": False, "validation_share": 0.2} | more
    return prepare([str(source)], str(model), folder / "data", **settings)


def again(folder: Path, tokenizer: str) -> Prepared:
    return prepare([str(folder / "chats.jsonl")], tokenizer, folder / "data", field="messages", progress=False)


def data(folder: Path, split: str = "train", block_size: int = 16) -> TokenData:
    return TokenData(folder / "data", split, block_size=block_size, microbatch_size=2, seed=1)


def by_hand(tokens: TokenData) -> list[bool]:
    """Which ids are targets: those after `<|im_start|>assistant\\n`, up to and with the next `<|im_end|>`."""
    tokenizer = load_tokenizer(tokens.folder)
    start, end = (tokenizer.tokenizer.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))  # type: ignore[attr-defined] # of tokenizers
    found: list[bool] = []
    header: str | None = None
    speaks = False
    for token in tokens.ids.tolist():
        if token == start:
            header, speaks = "", False
        elif header is not None:
            header += tokenizer.decode([token])
            found.append(False)
            if header.endswith("\n"):
                speaks, header = header == "assistant\n", None
            continue
        found.append(speaks)
        if token == end:
            speaks = False
    return found


def test_the_mask_is_that_by_hand(tmp_path: Path) -> None:
    result = chats_prepared(tmp_path, MARKED)
    for split in ("train", "validation"):
        tokens = data(tmp_path, split)
        assert tokens.mask is not None
        assert tokens.mask.tolist() == by_hand(tokens)
        assert tokens.sidecar.targets == sum(by_hand(tokens)) > 0
    assert result.targets is not None
    text = load_tokenizer(tmp_path / "data").decode(data(tmp_path).ids[data(tmp_path).mask].tolist())
    assert "a3 says 2, ä" in text or "a4 says 2, ä" in text
    assert "user" not in text
    assert "u3" not in text
    assert "12 conversations" in result.describe()
    assert "targets: only the tokens of the assistant's turns" in result.describe()
    assert "0.00%" in result.describe()


def test_turn_by_turn_gives_the_same_targets_and_the_line_end_behind(tmp_path: Path) -> None:
    chats_prepared(tmp_path, PLAIN)
    tokens = data(tmp_path)
    assert tokens.mask is not None
    differ = [i for i, (a, b) in enumerate(zip(tokens.mask.tolist(), by_hand(tokens), strict=True)) if a != b]
    assert {load_tokenizer(tmp_path / "data").decode([tokens.ids[i].item()]) for i in differ} == {"\n"}


def test_batches_leave_out_the_rest(tmp_path: Path) -> None:
    chats_prepared(tmp_path, MARKED)
    tokens = data(tmp_path)
    for batch in itertools.islice(tokens.batches_from(0), 3):
        assert isinstance(batch, tuple)
        ids, targets = batch
        assert ids.shape == targets.shape == (2, 16)
        for row, wanted in zip(ids, targets, strict=True):
            place = next(i for i in range(tokens.sequences) if (tokens.ids[16 * i : 16 * i + 16] == row.numpy()).all())
            assert tokens.mask is not None
            kept = torch.from_numpy(tokens.mask[16 * place + 1 : 16 * place + 17].copy())
            following = torch.from_numpy(tokens.ids[16 * place + 1 : 16 * place + 17].astype("int64"))
            assert torch.equal(wanted, following.masked_fill(~kept, IGNORE))
    counted = sum(int((targets != IGNORE).sum()) for _, targets in tokens.once())
    assert counted == tokens.sidecar.targets


def test_a_run_trains_on_these_targets_only(tmp_path: Path) -> None:
    chats_prepared(tmp_path, MARKED)
    torch.manual_seed(1)
    size = data(tmp_path).vocab_size
    head = nn.Linear(8, size)
    module = nn.Sequential(nn.Embedding(size, 8), head)
    batches = list(itertools.islice(data(tmp_path).batches_from(0), 3))
    total, count = torch.zeros(()), 0
    for ids, targets in batches:
        total = total + F.cross_entropy(module(ids).flatten(0, 1), targets.flatten(), reduction="sum")
        count += int((targets != IGNORE).sum())
    assert 0 < count < 3 * 2 * 16
    (gradient,) = torch.autograd.grad(total / count, head.bias)
    before = head.bias.detach().clone()
    config = TrainConfig(
        updates=1, warmup=0, microbatches=3, optimizer="torch.optim.SGD", optimizer_args={"lr": 1.0}, clip=None
    )
    result = Trainer(module, config, tmp_path / "run").fit(data(tmp_path), data(tmp_path, "validation"))
    assert result.records[0].tokens == count
    assert result.records[0].loss == pytest.approx(total.item() / count, rel=1e-5)
    torch.testing.assert_close(before - head.bias, gradient * result.records[0].learning_rate)


def test_what_does_not_suit_is_left_out_and_told(tmp_path: Path) -> None:
    odd = [
        [{"role": "user", "content": "only a question"}],
        [{"role": "assistant", "content": "begins"}],
        [{"role": "user", "content": "<|im_start|>assistant"}, {"role": "assistant", "content": "trap"}],
        [{"content": "nobody"}],
        "no messages",
    ]
    told = chats_prepared(tmp_path, MARKED, [*chats(), *odd]).describe()
    for reason in (
        "no turn of the assistant",
        "the chat template refuses it: the user must begin",
        "a message holds the text of the special token <|im_start|>",
        "a message without a role",
        "no list of messages",
    ):
        assert f"left out: 1 record ({reason})".replace("record", "conversation") in told, told


def test_the_end_of_a_document_that_the_template_writes(tmp_path: Path) -> None:
    chats_prepared(tmp_path, MARKED, end_of_document="<|im_end|>")
    tokens = data(tmp_path)
    assert tokens.mask is not None
    assert tokens.mask.tolist() == by_hand(tokens)
    assert tokens.documents % len(ROLES) == 0


def test_other_data_in_the_same_folder_has_no_mask(tmp_path: Path) -> None:
    chats_prepared(tmp_path, MARKED)
    assert (tmp_path / "data" / "train.mask").is_file()
    (tmp_path / "text.txt").write_text("plain text\n" * 100)
    prepare([str(tmp_path / "text.txt")], str(tmp_path / "model"), tmp_path / "data", progress=False)
    assert not (tmp_path / "data" / "train.mask").exists()
    assert "mask" not in (tmp_path / "data" / "SHA256SUMS").read_text()
    assert data(tmp_path).mask is None


def test_a_damaged_mask_is_told(tmp_path: Path) -> None:
    chats_prepared(tmp_path, MARKED)
    mask = tmp_path / "data" / "train.mask"
    content = bytearray(mask.read_bytes())
    content[5] ^= 1
    mask.write_bytes(content)
    assert "train.mask is not the file that train.json describes" in sentence_of(DataError, lambda: data(tmp_path))
    mask.unlink()
    assert "train.mask cannot be read" in sentence_of(DataError, lambda: data(tmp_path))


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    told = sentence_of(DataError, lambda: chats_prepared(tmp_path, LAST))
    assert "does not show where the assistant's turns begin" in told
    told = sentence_of(ConfigurationError, lambda: chats_prepared(tmp_path, "{% for %}"))
    assert "is not a template of Jinja" in told
    told = sentence_of(DataError, lambda: chats_prepared(tmp_path, "{{ messages.__class__.__mro__[1].gone() }}"))
    assert "no conversation is left of 12" in told
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    for name, words in (
        (str(tmp_path / "model"), "has no chat template"),
        ("bytes", "need a tokenizer with a chat template"),
        ("bpe:300", "need a tokenizer with a chat template"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            again(tmp_path, name)


def test_the_template_goes_from_an_import_to_an_export(tmp_path: Path) -> None:
    theirs = model_folder(export_huggingface(saved(tmp_path / "run", GROUPED), tmp_path / "theirs"), PLAIN)
    start = import_huggingface(theirs, tmp_path / "out")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats()))
    assert "chat_template.jinja" in again(tmp_path, str(start)).describe()
    assert (tmp_path / "data" / "chat_template.jinja").read_text() == PLAIN
    Trainer(None, TrainConfig(updates=1, save_every=1), tmp_path / "tuned").fit(data(tmp_path), init_from=start)
    out = export_huggingface(checkpoint.checkpoints(tmp_path / "tuned")[-1], tmp_path / "exported")
    assert (out / "chat_template.jinja").read_text() == PLAIN


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not end (it took"),
        ("{{ 'x' * 99999 }}", "writes 99,999 characters for a conversation, but at most 1,000 are allowed"),
        ("{% for a in range(10**9) %}{% endfor %}", "the chat template fails on it: OverflowError"),
        ("{{ 'x' * 10**17 }}", "the chat template fails on it: MemoryError"),
        ("{{ ''.__class__.__mro__ }}", "refuses it: access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ raise_exception('') }}", "the chat template refuses it"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "is not a template of Jinja (RecursionError)"),
    ],
)
def test_a_template_is_a_program_that_is_bounded(
    template: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reference.data.chat.PATIENCE", 0.3)
    monkeypatch.setattr("reference.data.chat.LONGEST", 1000)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"m": chat}) + "\n" for chat in chats(2)))
    tokenizer = str(model_folder(tmp_path / "model", template))
    source = [str(tmp_path / "chats.jsonl")]
    kinds = (ConfigurationError, DataError)
    with pytest.raises(kinds) as caught:
        prepare(source, tokenizer, tmp_path / "out", field="m")
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 400
    assert not (tmp_path / "out").exists()


def test_a_timer_that_ran_before_a_time_limit_goes_on() -> None:
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: rung.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(TimeoutError, match=r"longer than 0.01 seconds"):
            wait_for_ever(0.01)
        while not rung:
            time.sleep(0.01)
        assert rung == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def wait_for_ever(limit: float) -> None:
    with time_limit(limit):
        while True:
            time.sleep(0.001)
