"""What a tokenizer loses of a text, and which token ends a document."""

from pathlib import Path

import pytest

from reference.__main__ import main
from reference.data.documents import SPLITS
from reference.data.readback import plain
from reference.data.tokenizer import load_tokenizer
from reference.errors import DataError
from tests.reference.test_prepare import opened, prepared, read_back, texts
from tests.sentences import sentence_of

# What a tokenizer loses


def words_file(path: Path, vocabulary: dict[str, int], unknown: str | None = None, **special: bool) -> str:
    """A tokenizer of whole words, with one that ends a document called <eos>."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    kind = models.WordLevel(vocabulary, unk_token=unknown) if unknown else models.BPE(vocab=vocabulary, merges=[])
    built = tokenizers.Tokenizer(kind)
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.add_tokens([tokenizers.AddedToken("<eos>", **special)])
    built.save(str(path))
    return str(path)


def test_what_a_tokenizer_loses_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = texts(tmp_path / "texts")
    spec = words_file(tmp_path / "letters.json", {"a": 0, "e": 1, "s": 2})  # without unk: other letters vanish
    result = prepared(source, tmp_path / "letters", spec, end_of_document="<eos>")
    letters = "".join(f"file{index}saysnaïvethings" * 3 for index in range(200))
    kept = sum(letters.count(letter) for letter in "aes")
    found = result.readback
    lost = sum(part.lost for part in found.values()), sum(part.characters for part in found.values())
    assert lost == (len(letters) - kept, len(letters))
    (warning, _) = caplog.messages
    assert warning.startswith("the tokenizer does not keep all of the train text (")
    assert f"{found['train'].lost / found['train'].characters:.2%} of" in warning
    assert "'i', " in warning
    assert f"{found['train'].describe()}" in result.describe()


def test_unknown_tokens_are_counted(tmp_path: Path) -> None:
    source = texts(tmp_path / "texts", 20)
    spec = words_file(tmp_path / "words.json", {"?": 0, "file": 1, "says": 2, "things": 3}, "?")
    result = prepared(source, tmp_path / "out", spec, end_of_document="<eos>", validation_share=0.3)
    assert sum(part.unknown for part in result.readback.values()) == 20 * 3 * 2  # the number and "naïve"
    assert load_tokenizer(tmp_path / "out").unknown == 0


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_nothing_is_lost_by_bytes(tmp_path: Path, tokenizer: str, caplog: pytest.LogCaptureFixture) -> None:
    result = prepared(texts(tmp_path / "texts"), tmp_path / "out", tokenizer)
    assert [(part.lost, part.unknown) for part in result.readback.values()] == [(0, 0)] * 2
    assert result.readback["train"].characters > 1000
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_case_compatible_forms_and_white_space_are_no_loss() -> None:
    assert plain("\uff21\u00a0 Straße \ufb01n\n") == plain("a strasse FIN")
    assert plain("naïve") - plain("naive") == {"ï": 1}


# The end of a document


def test_the_end_of_a_document_may_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts(tmp_path / "texts", 20)
    spec = words_file(tmp_path / "words.json", {"?": 0, "file": 1}, "?")
    command = ["prepare", "--text", str(tmp_path / "texts"), "--tokenizer", spec, "--out", str(tmp_path / "out")]
    command += ["--validation-share", "0.3"]
    assert main(command) == 2
    assert "--end-of-document TOKEN, such as <eos>" in capsys.readouterr().err
    assert main([*command, "--end-of-document", "<end>"]) == 2
    assert "(looked for <end>)" in capsys.readouterr().err
    assert main([*command, "--end-of-document", "<eos>"]) == 0
    assert load_tokenizer(tmp_path / "out").end_of_document == 2  # found again without being named
    assert opened(tmp_path / "out", "train").end_of_document == 2
    assert main([*command[:4], "bytes", *command[5:], "--end-of-document", "<eos>", "--overwrite"]) == 2
    assert "bytes has its own end of a document: leave it out." in capsys.readouterr().err


@pytest.mark.parametrize("special", [False, True])
def test_a_text_that_holds_the_end_is_kept(tmp_path: Path, special: bool) -> None:
    """A token that is not marked as special is found in text too; it is cut there, into what it consists of."""
    vocabulary = {character: number for number, character in enumerate("?<>eosabc")}
    spec = words_file(tmp_path / "words.json", vocabulary, special=special)
    source = tmp_path / "texts"
    source.mkdir()
    for number in range(40):
        (source / f"{number}.txt").write_text("abc " * number + "a<eos>b<eos>")
    result = prepared(source, tmp_path / "out", spec, end_of_document="<eos>", validation_share=0.3)
    contents = sorted(path.read_bytes().replace(b" ", b"") for path in source.iterdir())
    found = sorted(text.replace(b" ", b"") for split in SPLITS for text in read_back(tmp_path / "out", split))
    assert found == contents
    assert sum(result.documents.values()) == 40
    assert sum(part.lost for part in result.readback.values()) == 0


def test_an_end_that_cannot_be_cut_names_file_and_remedy(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import models

    built = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    built.add_tokens(["§"])
    built.save(str(tmp_path / "it.json"))
    source = tmp_path / "texts"
    source.mkdir()
    for number in range(30):
        (source / f"{number}.txt").write_text("ab" * (number + 1))
    (source / "law.txt").write_text("a§b")
    message = sentence_of(
        DataError, lambda: prepared(source, tmp_path / "out", str(tmp_path / "it.json"), end_of_document="§")
    )
    assert message.startswith(f"{source / 'law.txt'} cannot be encoded: the text holds '§'")
    assert message.endswith("name another token with --end-of-document.")
