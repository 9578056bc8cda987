"""What a data folder says of itself: SPLIT.json, checked when it is opened. tokenfile.py says what the folder holds."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from reference.config import check_types
from reference.errors import ConfigurationError, DataError
from reference.files import SUMS, read_file, read_json, read_sums

FORMAT = "reference tokens 2"
MASKED_FORMAT = "reference tokens 3"  # the same with SPLIT.mask, which earlier versions would pass over in silence
FIRST_FORMAT = "reference tokens 1"  # of 0.1.0: BLAKE2b of 128 bits for SHA-256, no SHA256SUMS
SLICE = 1 << 20  # tokens handled at a time, so that no document has to fit into memory
SAMPLED_BLOCKS, BLOCK = 64, 4096  # what opening reads of a file: 64 blocks of 4 KiB, evenly spaced, first and last too


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What SPLIT.json says about SPLIT.bin."""

    format: str
    """Name and version of this format."""
    dtype: str
    """``uint16`` or ``uint32``, little-endian."""
    tokens: int
    """Token ids in the file."""
    documents: int
    """Ends of documents in it: how often end_of_document stands there."""
    vocab_size: int
    """Every id is below it."""
    end_of_document: int
    """The id behind each document."""
    tokenizer: str
    """``bytes``, or ``tokenizer.json`` for the file of that name in the same folder."""
    tokenizer_checksum: str | None
    """SHA-256 of tokenizer.json, None where there is none."""
    checksum: str
    """SHA-256 of the whole token file: :meth:`TokenData.verify` compares it."""
    sampled_checksum: str
    """SHA-256 of 64 blocks of 4 KiB, evenly spaced (all of a file up to 256 KiB): compared at every opening."""
    targets: int | None = None
    """Ids that are targets, of a split with SPLIT.mask; None where all are and there is no such file, as below."""
    mask_checksum: str | None = None
    """SHA-256 of the whole mask."""
    mask_sampled_checksum: str | None = None
    """As ``sampled_checksum``, of the mask."""

    @property
    def size(self) -> int:
        """Bytes that the token file must have."""
        return self.tokens * np.dtype(self.dtype).itemsize

    def content(self) -> bytes:
        """Return what is written to SPLIT.json."""
        plain = {name: value for name, value in asdict(self).items() if value is not None or name not in MASK_FIELDS}
        return (json.dumps(plain, indent=2) + "\n").encode()

    def hash_of(self, parts: Iterable[bytes]) -> str:
        """Return the checksum of content that comes in parts, as this format has it."""
        return hash_of(parts, self.format)


MASK_FIELDS = {"targets", "mask_checksum", "mask_sampled_checksum"}


def open_sidecar(folder: Path, split: str) -> Sidecar:
    """Read SPLIT.json, and check SPLIT.bin and tokenizer.json against it, as far as that costs no time.

    Raises:
        DataError: if a file is missing, damaged, or does not belong to the others.
    """
    path, tokens = folder / f"{split}.json", folder / f"{split}.bin"
    again = f"write it again with `python -m reference prepare --out {folder}`"
    if not path.is_file():
        if tokens.is_file():
            raise DataError(
                f"{tokens} has no {path.name} beside it (writing was interrupted, or it is from elsewhere): {again}."
            )
        there = ", ".join(sorted(found.stem for found in folder.glob("*.bin"))) or "no token file"
        write = f"write one with `python -m reference prepare --text YOUR-TEXT --out {folder}`"
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder} with a {split} split: {write}, or correct the path.")
        raise DataError(f"{folder} has no {split} split (there is: {there}): {write}.")
    try:
        content, plain = read_file(path), read_json(path)
        written = plain["format"]
        if written == FIRST_FORMAT:
            stated, seen = plain.pop("sidecar_checksum"), hash_of([json.dumps(plain).encode()], written)
        else:
            stated, seen = (read_sums(folder) or {}).get(path.name), hash_of([content], FORMAT)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} does not describe a token file ({type(error).__name__}): {again}.") from error
    if written not in (FORMAT, MASKED_FORMAT, FIRST_FORMAT):
        raise DataError(f"{path} has the format {written!r}, but this version reads {MASKED_FORMAT!r}: {again}.")
    if stated is None:
        raise DataError(f"{folder / SUMS} is missing, or has no checksum of {path.name}: {again}.")
    wanted = {entry.name for entry in fields(Sidecar)} - (set() if written == MASKED_FORMAT else MASK_FIELDS)
    if stated != seen or set(plain) != wanted:
        raise DataError(f"{path} was changed since it was written, or is damaged: {again}.")
    sidecar = Sidecar(**plain)
    if not is_possible(sidecar):
        raise DataError(f"{path} describes a token file that cannot exist ({SIDECAR_RULE}): {again}.")
    try:
        size = tokens.stat().st_size
        if size != sidecar.size:
            raise DataError(
                f"{tokens} has {size:,} bytes, but {path.name} says {sidecar.size:,} ({sidecar.tokens:,} tokens, "
                f"{sidecar.dtype}): it is truncated or from elsewhere; copy it again, or {again}."
            )
        if sampled_checksum(tokens, sidecar.format) != sidecar.sampled_checksum:
            raise DataError(f"{tokens} is not the file that {path.name} describes (its content differs): {again}.")
        if sidecar.format == MASKED_FORMAT:
            mask = folder / f"{split}.mask"
            if mask.stat().st_size != sidecar.tokens or (
                sampled_checksum(mask, sidecar.format) != sidecar.mask_sampled_checksum
            ):
                raise DataError(f"{mask} is not the file that {path.name} describes (its content differs): {again}.")
        if sidecar.tokenizer_checksum is not None:
            tokenizer = folder / sidecar.tokenizer
            if sidecar.hash_of([read_file(tokenizer)]) != sidecar.tokenizer_checksum:
                raise DataError(f"{tokenizer} is not the tokenizer that {tokens.name} was written with: {again}.")
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}), but {path} needs it: {again}.") from error
    return sidecar


SIDECAR_RULE = "types, numbers or names are out of range"


def is_possible(sidecar: Sidecar) -> bool:
    """Return whether a description, which may be forged, can be one of a token file."""
    try:
        check_types(sidecar)
    except ConfigurationError:
        return False
    vocabulary = 0 <= sidecar.end_of_document < sidecar.vocab_size <= 1 << 32
    named = sidecar.tokenizer_checksum is None or sidecar.tokenizer == "tokenizer.json"  # not a path elsewhere
    given = [getattr(sidecar, name) is not None for name in MASK_FIELDS]
    masked = sidecar.targets is None or 0 <= sidecar.targets <= sidecar.tokens
    if not masked or given != [sidecar.format == MASKED_FORMAT] * len(given):
        return False
    return vocabulary and named and sidecar.dtype in ("uint16", "uint32") and sidecar.tokens > 0 <= sidecar.documents


def sampled_checksum(path: Path, written: str) -> str:
    """Return the checksum of 64 evenly spaced blocks of 4 KiB, the first and the last included; of all of a small file.

    Args:
        path: of the token file.
        written: its format, which decides on the kind of checksum.
    """
    with open(path, "rb") as file:
        last = file.seek(0, os.SEEK_END) - BLOCK
        if last <= SAMPLED_BLOCKS * BLOCK - BLOCK:
            file.seek(0)
            return hash_of([file.read()], written)
        starts = (last * number // (SAMPLED_BLOCKS - 1) for number in range(SAMPLED_BLOCKS))
        return hash_of((file.read(BLOCK) for start in starts if file.seek(start) >= 0), written)


def hash_of(parts: Iterable[bytes], written: str) -> str:
    """Return the checksum, in hexadecimal digits, of content that comes in parts, as a format has it."""
    digest = hashlib.blake2b(digest_size=16) if written == FIRST_FORMAT else hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
