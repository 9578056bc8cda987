"""Tokenizers: every text comes back, text is never a command, and what cannot work is said."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from reference.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer, train_tokenizer
from reference.errors import ConfigurationError
from tests.sentences import sentence_of

TEXTS = [
    "",
    "plain text",
    "  two spaces\n\n\tand a tab \r\n",
    "naïve Ελληνικά 日本語 🙂👩‍👩‍👧",
    "\ufeffmark",
    "a\ufffdb",
    "<|endoftext|> and </s> are text here",
    "bell \a and \x1b",
]


@pytest.fixture(scope="module")
def trained() -> FileTokenizer:
    return train_tokenizer(["the cat sat on the mat, and the dog sat on the cat. naïve 日本語\n" * 5] * 4, 280)


@pytest.fixture(params=["bytes", "trained"])
def tokenizer(request: pytest.FixtureRequest, trained: FileTokenizer) -> Tokenizer:
    return ByteTokenizer() if request.param == "bytes" else trained


def word_level(vocabulary: dict[str, int], special: str | None = "<|endoftext|>", **more: Any) -> bytes:
    """A tokenizer.json that knows whole words."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    built = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special is not None:
        built.add_special_tokens([special])
    content: dict[str, Any] = json.loads(built.to_str()) | more
    return json.dumps(content).encode()


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_comes_back_and_is_never_an_end(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_document not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert "".join(tokenizer.stream(ids)) == text


def test_several_texts_are_encoded_as_each_alone(tokenizer: Tokenizer) -> None:
    assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)] == [tokenizer.encode(text) for text in TEXTS]
    assert all(ids.dtype.kind in "iu" and ids.ndim == 1 for ids in tokenizer.encode_batch(TEXTS))


def test_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.end_of_document, tokenizer.name) == (257, 256, "bytes")
    assert tokenizer.encode("né") == [110, 195, 169]


def test_a_stream_gives_characters_as_soon_as_they_are_complete(tokenizer: Tokenizer) -> None:
    given: list[str] = []
    assert len(list(tokenizer.stream(tokenizer.encode("naïve 🙂 日")))) >= 4

    def fed() -> Any:
        yield from tokenizer.encode("ab")
        assert "".join(given) == "ab"  # before another id is asked for
        yield from tokenizer.encode("🙂")[:-1]
        assert "".join(given) == "ab"  # half a character is held back
        yield tokenizer.encode("🙂")[-1]

    given.extend(tokenizer.stream(fed()))
    assert "".join(given) == "ab🙂"


def test_an_end_of_document_is_no_text_and_bytes_that_are_none_are_replaced(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("one"), tokenizer.end_of_document, *tokenizer.encode("two")]
    assert tokenizer.decode(ids) == "".join(tokenizer.stream(ids)) == "onetwo"
    cut = [*tokenizer.encode("x"), *tokenizer.encode("🙂")[:1]]
    assert tokenizer.decode(cut) == "".join(tokenizer.stream(cut)) == "x\ufffd"
    assert tokenizer.decode([]) == "".join(tokenizer.stream([])) == ""


def test_words_that_are_joined_by_spaces_are_streamed_as_they_are_decoded() -> None:
    words = {"?": 0, "a": 1, "bb": 2, "ccc": 3}
    tokenizer = FileTokenizer(word_level(words), "it")
    ids = [1, 2, 3, 3, 1]
    assert list(tokenizer.stream(ids)) == ["a", " bb", " ccc", " ccc", " a"]
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids) == "a bb ccc ccc a"


def test_foreign_ids_and_half_characters_are_one_sentence(tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size
    assert f"token id {size} is unknown to this tokenizer" in sentence_of(
        ConfigurationError, lambda: tokenizer.decode([size])
    )
    sentence_of(ConfigurationError, lambda: tokenizer.decode([-1]))
    sentence_of(ConfigurationError, lambda: list(tokenizer.stream([size])))
    assert "'\\ud83d' at position 2" in sentence_of(ConfigurationError, lambda: tokenizer.encode("ab\ud83d"))
    assert "surrogate" in sentence_of(ConfigurationError, lambda: tokenizer.encode_batch(["ab", "\ud83d"]))


def test_training_is_repeatable_and_sized(trained: FileTokenizer) -> None:
    texts = ["some text that is read again and again, with a few words in it"] * 3
    assert train_tokenizer(texts, 280).content == train_tokenizer(iter(texts), 280).content
    assert train_tokenizer(texts, 257).vocab_size == 257
    assert (trained.vocab_size, trained.end_of_document, trained.name) == (280, 0, "tokenizer.json")
    assert len(trained.encode("the cat sat on the mat")) < 22 / 2
    for size in (0, 256, 1 << 25):
        assert f"bpe:{size} cannot be trained" in sentence_of(ConfigurationError, partial(train_tokenizer, [], size))


def test_a_file_is_taken_as_it_is(tmp_path: Path, trained: FileTokenizer) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(trained.content)
    for source in (file, tmp_path, str(tmp_path)):
        loaded = load_tokenizer(source)
        assert isinstance(loaded, FileTokenizer)
        assert loaded.content == trained.content
        assert loaded.encode("the cat") == trained.encode("the cat")


def test_truncation_and_padding_of_the_day_it_was_saved_are_off() -> None:
    saved: dict[str, Any] = {
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 8},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "?",
        },
    }
    tokenizer = FileTokenizer(word_level({"?": 0, "a": 1, "bb": 2}, **saved), "it")
    assert tokenizer.encode("a bb a bb a") == [1, 2, 1, 2, 1]
    assert [ids.tolist() for ids in tokenizer.encode_batch(["a bb a", "bb"])] == [[1, 2, 1], [2]]


def test_what_the_file_would_add_around_a_text_is_left_out() -> None:
    import tokenizers
    from tokenizers import processors

    built = tokenizers.Tokenizer.from_str(word_level({"?": 0, "a": 1}).decode())
    end = built.token_to_id("<|endoftext|>")
    built.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", end)]
    )
    tokenizer = FileTokenizer(built.to_str().encode(), "it")
    assert tokenizer.encode("a a") == [1, 1]
    assert tokenizer.encode_batch(["a a"])[0].tolist() == [1, 1]


@pytest.mark.parametrize("marker", ["<|endoftext|>", "</s>", "<|end_of_text|>"])
def test_the_end_of_a_document_is_found_and_gaps_between_ids_are_counted(marker: str) -> None:
    tokenizer = FileTokenizer(word_level({"?": 0, "a": 7, marker: 5}, special=None), "it")
    assert tokenizer.end_of_document == 5
    assert tokenizer.vocab_size == 8


def test_a_file_without_an_end_of_document_is_refused() -> None:
    message = sentence_of(ConfigurationError, lambda: FileTokenizer(word_level({"?": 0}, special=None), "it.json"))
    assert "looked for <|endoftext|>, </s>, <|end_of_text|>" in message


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": null}'])
def test_files_that_are_none_are_refused(content: bytes) -> None:
    assert sentence_of(ConfigurationError, lambda: FileTokenizer(content, "it.json")).startswith(
        "it.json is not a tokenizer.json"
    )


def test_a_folder_that_states_its_tokenizer_is_believed(tmp_path: Path, trained: FileTokenizer) -> None:
    (tmp_path / "tokenizer.json").write_bytes(trained.content)
    assert load_tokenizer(tmp_path).name == "tokenizer.json"
    (tmp_path / "train.json").write_text('{"tokenizer": "bytes"}')
    assert load_tokenizer(tmp_path).name == "bytes"
    (tmp_path / "config.json").write_text('{"tokenizer": "tokenizer.json"}')
    assert load_tokenizer(tmp_path).name == "tokenizer.json"
    (tmp_path / "config.json").write_text('{"tokenizer": null}')
    assert load_tokenizer(tmp_path).name == "bytes"
    (tmp_path / "config.json").write_text("[]")
    assert load_tokenizer(tmp_path).name == "bytes"


def test_what_is_no_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    assert "is a tokenizer yet to be trained" in sentence_of(ConfigurationError, lambda: load_tokenizer("bpe:300"))
    assert "there is no tokenizer at" in sentence_of(ConfigurationError, lambda: load_tokenizer(tmp_path / "absent"))
    assert "there is no tokenizer at" in sentence_of(ConfigurationError, lambda: load_tokenizer(tmp_path))
