"""What a tokenizer loses: a sample of what is written is decoded again and compared with the text."""

import logging
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reference.data.tokenizer import Tokenizer

logger = logging.getLogger("reference")

SAMPLE = 1 << 20  # characters that are decoded again, of each split; the first piece in any case
PIECE = 1 << 16  # characters of a piece up to which it is decoded


@dataclass
class Readback:
    """What came back of the text of a split."""

    tokenizer: Tokenizer
    characters: int = 0
    """Compared, without white space."""
    lost: int = 0
    """Of them, those that did not come back."""
    unknown: int = 0
    """Tokens that stand for what the vocabulary lacks, among all that were written."""
    examples: Counter[str] = field(default_factory=Counter)
    """The characters that were lost."""
    path: Path | None = None
    """The first file that lost something."""

    def count(self, ids: npt.NDArray[Any]) -> None:
        """Count the unknown tokens of a piece."""
        if self.tokenizer.unknown is not None:
            self.unknown += int(np.count_nonzero(ids == self.tokenizer.unknown))

    def compare(self, text: str, ids: npt.NDArray[Any], path: Path) -> None:
        """Decode a piece and note the characters of its text that are missing, wherever in it they stood."""
        if self.characters >= SAMPLE or (self.characters and len(text) > PIECE):
            return
        before = plain(text)
        known = ids[ids != self.tokenizer.unknown] if self.tokenizer.unknown is not None else ids
        missing = before - plain(self.tokenizer.decode(known.tolist()))
        self.characters += before.total()
        self.lost += missing.total()
        self.examples += missing
        if missing and self.path is None:
            self.path = path

    def describe(self) -> str:
        """Return what was lost, as a part of a line of text."""
        share = self.lost / max(1, self.characters)
        return f"{share:.2%} of {self.characters:,} characters lost, {self.unknown:,} tokens unknown"

    def warn(self, split: str) -> None:
        """Log a warning if anything was lost."""
        if self.lost or self.unknown:
            most = ", ".join(repr(character) for character, _ in self.examples.most_common(5))
            where = f": {most}, first in {self.path}" if self.lost else ""
            logger.warning(
                "the tokenizer does not keep all of the %s text (%s%s): the model will never see what is lost. "
                "Choose a tokenizer that falls back on bytes, such as bpe:8192",
                *(split, self.describe(), where),
            )


def plain(text: str) -> Counter[str]:
    """Count the characters of a text, but for what tokenizers may change: NFKC, the case of letters, white space."""
    same = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return Counter("".join(same.split()))
