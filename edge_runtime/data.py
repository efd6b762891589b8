"""A person's text: three splits, tokenized, cut into batches that depend only on seed and count."""

from __future__ import annotations

import array
import contextlib
import functools
import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge_runtime.bundle import Bundle
from edge_runtime.errors import BundleError, DataError

Tokens = NDArray[np.int32]
SPLITS = ("train", "valid", "test")
SHARES = (0.8, 0.1, 0.1)

# Text is encoded in pieces of about so many bytes of UTF-8, for each of which the tokenizer takes
# ENCODING_BYTES at most: 195 for English prose, 230 for Chinese, 270 for digits were measured.
PIECE_BYTES = 2**15
ENCODING_BYTES = 280
# Where a tokenizer that works on words begins a new one, whatever stands around. After a word there
# may be what is no part of any, but no apostrophe, which some take into it.
_BETWEEN_WORDS = re.compile(
    r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=[^\W_])"
    r"|(?<=[^\W_])(?=[,.;:!?\"(\[{<=+/\u3001\u3002\uff0c\uff0e\uff01\uff1f\uff1a\uff1b\u300c-\u300f\uff08\uff09])"
)

# Folders with all of these are a device's home, a bundle and a coordinator's state: no text, and
# what must not be trained on, such as private keys.
OURS = (
    {"lock", "device.json"},
    {"lock", "identity.json"},
    {"lock", "enrolment.json"},
    {"manifest.json", "adapters"},
    {"ca.pem", "ca-key.pem"},
)

# A small file with a private key in it is passed over wherever it lies; in a large one somebody
# writes about them.
_PRIVATE_KEY = re.compile("-----BEGIN [A-Z ]*PRIVATE KEY-----")
KEY_FILE_CHARACTERS = 2**14

# The fewest characters that make a split: about one sequence of 64 tokens.
SHORTEST_PART = 256


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with newlines as `\\n` and without a byte order mark.

    Raises:
        DataError: it cannot be read, or is not UTF-8 (with the offset of the first bad byte).
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start:,}); convert it or take it away"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def split_text(
    text: str, shares: tuple[float, float, float] = SHARES, shortest: int = SHORTEST_PART
) -> tuple[str, str, str]:
    """Cuts a text by position into three parts whose concatenation is the text.

    A cut falls after a blank line where one is near, else after a line, else after a word. Every
    part has at least half of its share.

    Args:
        text: what to cut.
        shares: positive, summing to one.
        shortest: the fewest characters that a part may have.

    Raises:
        DataError: the text is too short for that; the message says how much is needed.
        ValueError: `shares` is not a partition.
    """
    if min(shares) <= 0 or not math.isclose(sum(shares), 1):
        raise ValueError(f"shares must be positive and sum to one, not {shares}")
    needed = _fewest(shares, shortest)
    if len(text) < needed:
        raise DataError(
            f"{len(text):,} characters are too few to split; at least {needed:,} are needed"
        )
    # The cuts on both sides of a part may each take this much: half of it remains, even rounded.
    slack = max(0, int(len(text) * min(shares) / 4) - 1)
    first = _cut(text, round(len(text) * shares[0]), slack)
    second = _cut(text, round(len(text) * (shares[0] + shares[1])), slack)
    return text[:first], text[first:second], text[second:]


def _fewest(shares: tuple[float, float, float] = SHARES, shortest: int = SHORTEST_PART) -> int:
    """Characters that a text needs to be split."""
    return math.ceil(2 * max(shortest, 1) / min(shares))


def _cut(text: str, target: int, slack: int) -> int:
    """The boundary nearest to `target`, at most `slack` away; `target` where there is none."""
    start = target - slack
    window = text[start : target + slack]
    for boundary in (r"\n[ \t]*\n+", r"\n", r"\s"):
        ends = [start + match.end() for match in re.finditer(boundary, window)]
        if ends:
            return min(ends, key=lambda end: abs(end - target))
    return target


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error


@_readable()
def stored_bytes(directory: Path) -> int:
    """Size of the files that `read_splits` would read: at least so much memory their text takes.

    Raises:
        DataError: they cannot be looked at.
    """
    if not directory.is_dir():
        return 0
    return sum(
        path.stat().st_size for path in (_named(directory).values() or _text_files(directory))
    )


@_readable()
def read_splits(directory: Path, needed: Sequence[str] = ("train", "valid")) -> dict[str, str]:
    """The splits of one person's text.

    `directory` holds either train.txt, valid.txt and test.txt (of which `needed` must be there),
    taken as they are, or any UTF-8 text files, also in folders. Of these each is split by position
    on its own, so that another one moves nothing from a split into another: what was trained on
    must not be held out later. That holds for files of 5,120 characters and more. Shorter ones are
    joined in sorted order and split as one text or, while that is too short and there are longer
    files, are for training. Names that start with a dot are passed over, as are a device's home, a
    bundle and a coordinator's state in there, and a file that repeats an earlier one.

    Raises:
        DataError: no directory, no text, not UTF-8, or too short to split.
    """
    if not directory.is_dir():
        raise DataError(f"{directory} is not a directory; give one with text files in it")
    named = _named(directory)
    if not named:
        return dict(zip(SPLITS, _split_files(directory), strict=True))
    missing = [f"{name}.txt" for name in needed if name not in named]
    if missing:
        raise DataError(
            f"{directory} has no {' and no '.join(missing)} beside {next(iter(named))}.txt; add "
            "it, or give text files under other names, which are then split"
        )
    splits = {name: read_text(path) for name, path in named.items()}
    for name in needed:
        if not splits[name].strip():
            raise DataError(f"{named[name]} is empty; put text into it")
    return splits


def _named(directory: Path) -> dict[str, Path]:
    """The splits that are there as files of their own."""
    return {s: directory / f"{s}.txt" for s in SPLITS if (directory / f"{s}.txt").is_file()}


@_readable()
def read_all(path: Path) -> str:
    """The text of a file, or of all text files in a directory, joined in sorted order.

    Raises:
        DataError: nothing there, no text, or not UTF-8.
    """
    return "\n\n".join(_read_files(path)) if path.is_dir() else read_text(path)


def _read_files(directory: Path) -> Iterator[str]:
    """The texts of all files in a directory, in sorted order of their names, each once."""
    seen = set()
    for path in _text_files(directory):
        text = read_text(path)
        if len(text) <= KEY_FILE_CHARACTERS and _PRIVATE_KEY.search(text):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield text
    if not seen:
        raise DataError(f"{directory} holds no text; put UTF-8 text files into it")


def _split_files(directory: Path) -> tuple[str, str, str]:
    parts, short = [], []
    for text in _read_files(directory):  # one at a time: all of them may be much
        if len(text) >= _fewest():
            parts.append(split_text(text))
        else:
            short.append(text)
    rest = "\n\n".join(short)
    if parts and len(rest) < _fewest():
        parts.append((rest, "", ""))
    elif rest:
        try:
            parts.append(split_text(rest))
        except DataError as error:
            raise DataError(f"{directory}: {error}") from None
    train, valid, test = ("\n\n".join(filter(None, split)) for split in zip(*parts, strict=True))
    return train, valid, test


def _text_files(directory: Path) -> list[Path]:
    """Files in a directory and its folders, but those whose names start with a dot, and folders
    that are OURS."""
    found = []

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}")

    for folder, folders, names in os.walk(directory, onerror=refuse):
        if any(kind <= {*folders, *names} for kind in OURS):
            if folder == str(directory):
                raise DataError(
                    f"{directory} is a home, a bundle or a coordinator's state, not text; give a "
                    "folder with text files in it"
                )
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


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


def tokenize(tokenizer: Tokenizer, text: str, most: int = PIECE_BYTES) -> Tokens:
    """The tokens of `text`, (T,), exactly those of encoding it at once.

    Args:
        most: bytes after which the text is cut at the next place that allows it; memory grows with
            this, and with 4 bytes per token, and as `encoding_bytes` says.

    Raises:
        DataError: `text` holds bytes that are not UTF-8, as Python reads them from a command line.
    """
    tokens = array.array("i")  # which grows in place
    for piece in _pieces(tokenizer, text, most):
        tokens.extend(_encode(tokenizer, piece))
    return np.asarray(tokens, np.int32)


def encoding_bytes(tokenizer: Tokenizer, text: str) -> int:
    """What `tokenize` takes beside the tokens, and beside what it takes for a usual piece: where no
    place allows a cut, or the tokenizer none at all, a piece is longer."""
    pieces = _pieces(tokenizer, text, PIECE_BYTES)
    longest = max(len(piece.encode(errors="replace")) for piece in pieces)
    return ENCODING_BYTES * max(0, longest - PIECE_BYTES)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate
        around = text[max(0, error.start - 20) : error.start + 20]
        raise DataError(f"the text is not UTF-8 at {around!r}; convert it") from None
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _pieces(tokenizer: Tokenizer, text: str, most: int) -> Iterator[str]:
    """Parts of `text`, together the whole; at least one, and no empty one beside others."""
    start = 0
    characters = most if text.isascii() else max(1, most // 3)  # of most scripts beside Latin
    if len(text) > characters and _cuts_into_words(tokenizer):
        while cut := _BETWEEN_WORDS.search(text, start + characters):
            yield text[start : cut.start()]
            start = cut.start()
    yield text[start:]


def _cuts_into_words(tokenizer: Tokenizer) -> bool:
    """Whether what stands on one side of `_BETWEEN_WORDS` has no say in the tokens of the other."""
    if tokenizer.normalizer is not None or tokenizer.pre_tokenizer is None:
        return False
    words = tokenizer.pre_tokenizer.pre_tokenize_str("a b\nc")
    # Some put a mark before whatever comes first, and would do so for every piece.
    if words[0][0] != "a" or [span for _, span in words] != [(0, 1), (1, 3), (3, 4), (4, 5)]:
        return False
    for text in ("a,b", "1.5", "あ。"):
        if (0, 1) not in [span for _, span in tokenizer.pre_tokenizer.pre_tokenize_str(text)]:
            return False
    # Added tokens are found before words are.
    added = tokenizer.get_added_tokens_decoder().values()
    inside = re.compile(rf"\s|{_BETWEEN_WORDS.pattern}")
    return not any(t.lstrip or t.rstrip or inside.search(t.content) for t in added)


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
        shift, order = _order(self.seed, epoch, self.length, self.windows)
        start = shift + int(order[within]) * self.length
        return self.tokens[start : start + self.length + 1]


@functools.lru_cache(maxsize=4)  # of two splits, each perhaps between two epochs
def _order(seed: int, epoch: int, length: int, windows: int) -> tuple[int, NDArray[np.int64]]:
    """Of an epoch: how far the grid is shifted, and the order of its windows."""
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(length)), rng.permutation(windows)
