"""Text to token ids and back: plain bytes, or a tokenizer.json of the ``tokenizers`` library.

Text is data, never a command: the end of a document is an id that no text encodes to, whatever characters it holds.
"""

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from reference.errors import ConfigurationError
from reference.files import read_file, read_json

END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<|end_of_text|>")  # GPT-2 and NeoX; Llama 1 and 2, T5; Llama 3
FILE = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
"""The chat template beside it, as transformers writes it."""
MODEL_NAME = re.compile(r"(?!.*\.json$)\w[\w.-]*(/\w[\w.-]*)?")  # as the Hugging Face Hub names models


class Tokenizer(Protocol):
    """What the trainer's command line needs of a tokenizer."""

    name: str
    """``bytes`` or ``tokenizer.json``, as it is written into token files and checkpoints."""
    vocab_size: int
    """Every id is below it."""
    end_of_document: int
    """The id that follows each document; no text encodes to it."""
    unknown: int | None
    """The id of what the vocabulary lacks; None if it lacks nothing, or has no such id."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, with nothing added before or after.

        Raises:
            ConfigurationError: if the text holds lone surrogates, which are not characters.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Return the ids of several texts, as arrays of integers; in parallel where the tokenizer can."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of these ids. The end of a document has none; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ConfigurationError: if an id is not of this tokenizer.
        """

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Decode ids as they come; yield each piece as soon as its characters are complete. Joined: ``decode(ids)``."""


class ByteTokenizer:
    """The 256 bytes of UTF-8, and id 256 as the end of a document. See :class:`Tokenizer`."""

    name = "bytes"
    vocab_size = 257
    end_of_document = 256
    unknown: int | None = None

    def encode(self, text: str) -> list[int]:
        return list(utf8(text))

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        return [np.frombuffer(utf8(text), np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in ids:
            check_id(token, self.vocab_size)
            # The end of a document also ends a character that was cut short.
            text = decoder.decode(b"", True) if token == self.end_of_document else decoder.decode(bytes([token]))
            if text:
                yield text
        if text := decoder.decode(b"", True):
            yield text


class FileTokenizer:
    """A tokenizer.json of the ``tokenizers`` library, taken as it is. See :class:`Tokenizer`.

    Args:
        content: of the file. It is kept, so that a copy of it is the same to the byte.
        source: what messages call it.
        end: the token, or its id, that ends a document. None: the first of ``END_OF_DOCUMENT`` that the file has.

    Raises:
        ConfigurationError: if it is not a tokenizer.json, or has no token for the end of a document.
    """

    name = FILE

    def __init__(self, content: bytes, source: str, end: str | int | None = None) -> None:
        import tokenizers

        self.content = content
        try:
            self.tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # from_str raises plain Exception
            reason = str(error).splitlines()[0].rstrip(".")
            raise ConfigurationError(
                f"{source} is not a tokenizer.json of the tokenizers library ({reason})."
            ) from error
        # NOTE a footgun: a tokenizer.json carries the truncation and padding of the day it was saved, and a document
        # would silently end after 512 tokens.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # "<|endoftext|>" within a text is text, not the end of it
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        # Not the number of tokens: some files leave gaps between their ids.
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        names = END_OF_DOCUMENT if end is None else (str(end),)
        if isinstance(end, int) and (token := self.tokenizer.id_to_token(end)) is not None:
            names = (token,)
        found = [vocabulary[token] for token in names if token in vocabulary]
        if not found:
            raise ConfigurationError(
                f"{source} has no token for the end of a document (looked for {', '.join(names)}): name the "
                "one it has with --end-of-document TOKEN, such as <eos> or <|im_end|>, or add one as a special token."
            )
        self.end_of_document = found[0]
        self.unknown = unknown_id(self.tokenizer, content)

    def encode(self, text: str) -> list[int]:
        utf8(text)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        if self.end_of_document in encoding.ids:
            return [token for part in self.cut_ends(text, encoding) for token in self.encode(part)]
        return list(encoding.ids)

    def encode_with_special(self, text: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the ids of a text that a chat template wrote, and the place of each one's first character.

        Here the text of a special token is that token.
        """
        utf8(text)
        self.tokenizer.encode_special_tokens = False
        try:
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
        finally:
            self.tokenizer.encode_special_tokens = True
        starts = [start for start, _ in encoding.offsets]
        return np.array(encoding.ids, np.int64), np.array(starts, np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        for text in texts:
            utf8(text)
        # Fast: without the places of the tokens in the text, which take as long again.
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        found = [np.array(encoding.ids, np.int64) for encoding in encodings]
        # Some files find the end even so: as a word of the vocabulary, or as a token that is not marked as special.
        return [
            np.array(self.encode(text), np.int64) if (ids == self.end_of_document).any() else ids
            for text, ids in zip(texts, found, strict=True)
        ]

    def cut_ends(self, text: str, encoding: Any) -> list[str]:
        """Return a text in parts, cut within each place where the end of a document was found.

        Raises:
            ConfigurationError: if it is found in a single character, which cannot be cut.
        """
        ends = [place for token, place in zip(encoding.ids, encoding.offsets) if token == self.end_of_document]
        if any(stop - start < 2 for start, stop in ends):
            token = self.tokenizer.id_to_token(self.end_of_document)
            raise ConfigurationError(
                f"the text holds {text[slice(*ends[0])]!r}, which this tokenizer encodes as {token!r}, the end of a "
                "document: name another token with --end-of-document."
            )
        cuts = [0, *(start + 1 for start, _ in ends), len(text)]
        return [text[start:stop] for start, stop in itertools.pairwise(cuts)]

    def decode(self, ids: Sequence[int]) -> str:
        for token in ids:
            check_id(token, self.vocab_size)
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        # A decoder may look back (at the space before a word, at the first bytes of a character), so each piece is
        # what the text of the last ids gains by the newest, and waits while it ends within a character.
        held: list[int] = []
        given = ""
        for token in ids:
            held.append(token)
            text = self.decode(held)
            if text.endswith("\ufffd") or len(text) <= len(given):
                continue
            yield text[len(given) :]
            # All but the newest is settled; it stays as what the next is decoded beside.
            held = [token]
            given = self.decode(held)
        if rest := self.decode(held)[len(given) :]:
            yield rest


def unknown_id(tokenizer: Any, content: bytes) -> int | None:
    """Return the id by which a tokenizer of the ``tokenizers`` library encodes what its vocabulary lacks, if it has."""
    model = json.loads(content)["model"]
    found = model.get("unk_id") if model.get("type") == "Unigram" else model.get("unk_token")
    return tokenizer.token_to_id(found) if isinstance(found, str) else found


def train_tokenizer(texts: Iterable[str], size: int) -> FileTokenizer:
    """Train a byte-level byte-pair encoding (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; over bytes:
    Radford et al. 2019), with ``<|endoftext|>`` as id 0. Every text has an encoding, and decodes to itself.

    Args:
        texts: to count pairs in; of the training split only.
        size: ids in all: at least 257, the bytes and the end of a document. Fewer come out if the text is too small.

    Raises:
        ConfigurationError: if the size is too small.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    check_size(size)
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_DOCUMENT[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return FileTokenizer(model.to_str().encode(), "the trained tokenizer")


def check_size(size: int) -> None:
    """Raise ConfigurationError if a vocabulary of so many ids cannot hold the bytes and the end of a document."""
    if not 257 <= size <= 1 << 24:
        raise ConfigurationError(
            f"bpe:{size} cannot be trained: 256 bytes and the end of a document need 257, and 2**24 is the most."
        )


def load_tokenizer(source: str | Path, end: str | None = None) -> Tokenizer:
    """Return the tokenizer of this name or place.

    Args:
        source: ``bytes``; a tokenizer.json; or a folder: of data, a checkpoint, or any other that holds a
            tokenizer.json. Where a folder states its tokenizer (config.json, train.json), that is taken.
        end: the token that ends a document, for a tokenizer.json. None: what the folder states, or a usual one.

    Raises:
        ConfigurationError: if there is none.
    """
    if end == "":
        raise ConfigurationError("--end-of-document is empty: name a token, such as <eos>, or leave it out.")
    if end is not None and (str(source) == ByteTokenizer.name or str(source).startswith("bpe:")):
        raise ConfigurationError(
            f"--end-of-document is for a tokenizer.json only, and {source} has its own end of a document: leave it out."
        )
    if str(source) == ByteTokenizer.name:
        return ByteTokenizer()
    if str(source).startswith("bpe:"):
        raise ConfigurationError(
            f"{source} is a tokenizer yet to be trained: `python -m reference prepare --tokenizer {source}` trains one "
            "and writes its tokenizer.json, which is what to give here."
        )
    path, ending = Path(source), None
    if path.is_dir():
        if stated_tokenizer(path) == ByteTokenizer.name:
            return ByteTokenizer()
        ending = stated(path, "end_of_document")
        path = path / FILE
    try:
        return FileTokenizer(read_file(path), str(path), end or (ending if isinstance(ending, int) else None))
    except OSError as error:
        if MODEL_NAME.fullmatch(str(source)) and not Path(source).exists():
            raise ConfigurationError(
                f"there is no file or folder {source}. If it is a model of the Hugging Face Hub, get its tokenizer "
                f"with 'hf download {source} {FILE} --local-dir {path.name}' (from pip install huggingface-hub), and "
                f"give {path.name}/{FILE}."
            ) from error
        raise ConfigurationError(
            f"there is no tokenizer at {source} ({path}: {error.strerror}): give 'bytes', a tokenizer.json, or a "
            "folder of data or a checkpoint."
        ) from error


def stated_tokenizer(folder: Path) -> str | None:
    """Return what the files of a checkpoint or data folder say their tokenizer is, if they do."""
    found = stated(folder, "tokenizer")
    return None if found is None else str(found)


def stated(folder: Path, key: str) -> Any:
    """Return what the first of the files of a checkpoint or data folder that says something of a key says; or None."""
    for name in ("config.json", "train.json", "validation.json"):
        try:
            found = read_json(folder / name).get(key)
        except (OSError, ValueError):
            continue  # absent, or a foreign file of that name
        if found is not None:
            return found
    return None


def utf8(text: str) -> bytes:
    """Return the bytes of a text, or raise ConfigurationError."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"the text holds {text[error.start]!a} at position {error.start}, half of a surrogate pair and not a "
            "character: read it with the encoding that it was written in."
        ) from error


def check_id(token: int, vocab_size: int) -> None:
    """Raise ConfigurationError if the id is not below the vocabulary's size."""
    if not 0 <= token < vocab_size:
        raise ConfigurationError(
            f"token id {token} is unknown to this tokenizer, whose ids are below {vocab_size}: "
            "sample only from those logits, or give the tokenizer that the model was trained with."
        )
