"""A person's text: three splits, tokenized, cut into batches that depend only on seed and count."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge_runtime.bundle import Bundle
from edge_runtime.errors import BundleError, DataError

Tokens = NDArray[np.int64]
SPLITS = ("train", "valid", "test")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        DataError: it cannot be read, or is not UTF-8 (with the offset of the first bad byte).
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, for example with iconv"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def split_text(text: str, shares: tuple[float, float, float] = (0.8, 0.1, 0.1)) -> list[str]:
    """Train, held-out and test by position: no overlap, joined they are `text` again.

    Cuts after an empty line if there is one near, otherwise after a line.

    Raises:
        DataError: there is no line to cut at.
    """
    cuts = []
    for wanted in (shares[0], shares[0] + shares[1]):
        start = int(len(text) * wanted)
        near = text[start : start + len(text) // 20]
        for mark in ("\n\n", "\n"):
            if mark in near:
                cuts.append(start + near.index(mark) + len(mark))
                break
        else:
            raise DataError(
                "the text has too few lines to split into train, held-out and test; add text, or "
                "give train.txt, valid.txt and test.txt"
            )
    return [text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]]


def read_splits(directory: Path) -> dict[str, str]:
    """The splits in `directory`: its train.txt, valid.txt and (if there) test.txt, or else all its
    text files in order of name, joined and split by position.

    Raises:
        DataError: no directory, no text, not UTF-8, or nothing to split.
    """
    if not directory.is_dir():
        raise DataError(f"{directory} is not a directory; give one with train.txt and valid.txt")
    named = {s: directory / f"{s}.txt" for s in SPLITS if (directory / f"{s}.txt").is_file()}
    if named:
        for needed in ("train", "valid"):
            if needed not in named:
                raise DataError(f"{directory} has no {needed}.txt; add it, or remove the others")
        splits = {name: read_text(path) for name, path in named.items()}
    else:
        files = sorted(p for p in directory.iterdir() if p.is_file() and p.name[0] != ".")
        text = "\n\n".join(read_text(path) for path in files)
        if not text.strip():
            raise DataError(f"{directory} holds no text; put text files into it")
        try:
            splits = dict(zip(SPLITS, split_text(text), strict=True))
        except DataError as error:
            raise DataError(f"{directory}: {error}") from None
    for name in ("train", "valid"):
        if not splits[name].strip():
            raise DataError(f"{directory}: the {name} split is empty; add text to it")
    return splits


def load_tokenizer(bundle: Bundle) -> Tokenizer:
    """The bundle's tokenizer.

    Raises:
        BundleError: missing or damaged.
    """
    path = bundle.file(bundle.manifest.tokenizer.file)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise BundleError(f"{path} is not a tokenizer: {error}; export the bundle again") from error


def tokenize(tokenizer: Tokenizer, text: str) -> Tokens:
    return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)


@dataclass(frozen=True)
class Batches:
    """Windows of one split, in an order that depends only on `seed` and on how many were taken.

    Each epoch shifts the windows' grid and shuffles them, so `at` needs no state but a count.
    """

    tokens: Tokens
    length: int
    seed: int

    @property
    def windows(self) -> int:
        """Windows per epoch: one is lost to the shift of the grid."""
        return max(0, (len(self.tokens) - 1) // self.length - 1)

    def require(self, batch: int, name: str) -> None:
        """Raises DataError if the split has not enough windows for one batch."""
        if self.windows < batch:
            needed = (batch + 1) * self.length + 1
            raise DataError(
                f"the {name} split has {len(self.tokens)} tokens; a batch of {batch} sequences of "
                f"{self.length} needs at least {needed}; add text, or use a smaller batch"
            )

    def at(self, taken: int, count: int) -> tuple[Tokens, Tokens]:
        """`count` windows after `taken` ones: tokens and targets, each (count, length)."""
        rows = [self._window(index) for index in range(taken, taken + count)]
        ids = np.stack(rows)
        return ids[:, :-1], ids[:, 1:]

    def _window(self, index: int) -> Tokens:
        epoch, within = divmod(index, self.windows)
        rng = np.random.default_rng((self.seed, epoch))
        shift = int(rng.integers(self.length))
        start = shift + int(rng.permutation(self.windows)[within]) * self.length
        return self.tokens[start : start + self.length + 1]
