"""A person's text: what is held out stays so; tokens are the same in pieces as at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from device_help import TIMEOUT
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

import export
from edge_runtime.data import SPLITS, encoding_bytes, read_splits, split_text, tokenize
from edge_runtime.errors import DataError

# --- splits ------------------------------------------------------------------------------------


def file_of(number: int, lines: int) -> str:
    """Of 64 characters a line: 80 lines are enough to be split alone. All lines differ."""
    return "".join(f"{f'Line {n} of file {number}':63}\n" for n in range(lines))


def splits_of(files: dict[str, str]) -> dict[str, set[str]]:
    """The lines of each split of a directory with such files."""
    with tempfile.TemporaryDirectory() as directory:
        for name, text in files.items():
            (Path(directory) / name).write_text(text)
        read = read_splits(Path(directory))
    assert tuple(read) == SPLITS
    return {name: set(filter(None, text.split("\n"))) for name, text in read.items()}


@given(lines=st.lists(st.integers(1, 200), min_size=1, max_size=5), more=st.integers(80, 300))
def test_another_long_file_moves_nothing_between_splits(lines: list[int], more: int) -> None:
    files = {f"m{i}": file_of(i, count) for i, count in enumerate(lines)}
    if max(lines) < 80:  # else the short ones might be too short to be split
        files["m"] = file_of(99, 80)
    before = splits_of(files)
    every = {line for text in files.values() for line in text.splitlines()}
    assert set.union(*before.values()) == every
    assert sum(map(len, before.values())) == len(every)
    for name in ("a", "m1b", "z"):
        new = file_of(100, more)
        after = splits_of(files | {name: new})
        assert {split: after[split] - set(new.splitlines()) for split in after} == before


def test_files_that_are_too_short_alone_are_split_together(tmp_path: Path) -> None:
    long, short = file_of(0, 100), file_of(1, 10)
    (tmp_path / "long").write_text(long)
    assert tuple(read_splits(tmp_path).values()) == split_text(long)
    (tmp_path / "short").write_text(short)
    train, valid, test = split_text(long)
    # Too few to hold anything out of.
    assert tuple(read_splits(tmp_path).values()) == (f"{train}\n\n{short}", valid, test)
    (tmp_path / "another").write_text(file_of(2, 79))
    together = split_text(f"{file_of(2, 79)}\n\n{short}")
    want = tuple(map("\n\n".join, zip(split_text(long), together, strict=True)))
    assert tuple(read_splits(tmp_path).values()) == want
    (tmp_path / "long").unlink()
    assert tuple(read_splits(tmp_path).values()) == together


def test_what_is_not_a_person_s_text_is_passed_over(tmp_path: Path) -> None:
    """A device's key must never be trained on, wherever its home is."""
    (tmp_path / "long").write_text(file_of(0, 100))
    want = read_splits(tmp_path)
    kinds = {
        "home": ("lock", "device.json", "identity.json"),
        "enrolling": ("lock", "enrolment.json"),
        "bundle": ("manifest.json", "tokenizer.json", "adapters/notes.txt"),
        "state": ("ca.pem", "ca-key.pem"),
    }
    for kind, names in kinds.items():
        for name in names:
            path = tmp_path / "deeper" / kind / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("a secret\n" * 1000)
    key = "-----BEGIN EC PRIVATE KEY-----\na secret\n-----END EC PRIVATE KEY-----\n"
    (tmp_path / "ca-key.pem").write_text(key)
    (tmp_path / "admin.json").write_text(json.dumps({"coordinator": "localhost:1", "key": key}))
    assert read_splits(tmp_path) == want
    for kind in kinds:
        with pytest.raises(DataError, match="not text; give a folder"):
            read_splits(tmp_path / "deeper" / kind)


# --- tokens ------------------------------------------------------------------------------------

GPT2_MINI = Path(export.__file__).parent / "gpt2_mini" / "tokenizer.json"
PROSE = "a It is a It's 1 of a few lines, isn't it?\nNo  line\n\n is like another one;\tfew are.\n"
# Of Llama 3: punctuation takes newlines with it, digits come in threes.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Of GPT-4o: words take an apostrophe's with them, punctuation slashes.
MARKS = r"\p{Lm}\p{Lo}\p{M}"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{MARKS}]*[\p{{Ll}}{MARKS}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{MARKS}]+[\p{{Ll}}{MARKS}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS_AND_SPACES = [
    *(
        "a",
        "It",
        "is",
        "é",
        "²",
        "1",
        "'s",
        "?",
        "a It",
        " is",
        "<|endoftext|>",
        "\u2019s",
        "\u0301",
    ),
    *(",", ".", "/", "(", "<", "a.It", "[", "]", "_", "日", "。", "「"),
    *(" ", "\n", "\t", "\r", "\x1c", "\u3000"),
]


def trained(splitter: pre_tokenizers.PreTokenizer, *added: AddedToken) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = splitter
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([PROSE] * 10, trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
TOKENIZERS = {
    "gpt2-mini": Tokenizer.from_file(str(GPT2_MINI)),
    "digits apart": trained(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS])
    ),
    "llama3": trained(
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES])
    ),
    "gpt-4o": trained(
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(O200K), "isolated"), BYTES])
    ),
    # Of these, some pieces would not be what they are within the text.
    "metaspace": trained(pre_tokenizers.Metaspace()),
    "metaspace, first": trained(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "a space before the text": trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "not cut": trained(BYTES),
    "an added token of two words": trained(WORDS, AddedToken("a It")),
    "an added token with punctuation": trained(WORDS, AddedToken("a.It")),
    "an added token with its space": trained(WORDS, AddedToken("is", rstrip=True)),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    text=st.lists(st.sampled_from(WORDS_AND_SPACES), max_size=12).map("".join) | st.text(),
    most=st.integers(1, 3),
)
def test_pieces_are_the_whole(name: str, text: str, most: int) -> None:
    tokenizer = TOKENIZERS[name]
    got = tokenize(tokenizer, text, most)
    assert got.dtype == np.int32
    assert got.tolist() == tokenizer.encode(text, add_special_tokens=False).ids


READ = """
import sys
from pathlib import Path
from edge_runtime.data import read_splits

read_splits(Path(sys.argv[1]))
"""
MEASURE = """
import sys
from tokenizers import Tokenizer
from edge_runtime.data import SPLITS, encoding_bytes, read_splits, split_text, tokenize
from edge_runtime.memory import peak_bytes

tokenizer = Tokenizer.from_file(sys.argv[1])
if sys.argv[2:]:
    text = sys.stdin.read()
else:
    text = "".join(f"word{n % 977} and line {n}.\\n" for n in range(200_000))
tokenize(tokenizer, text[:100_000])
before = peak_bytes()
tokens = tokenize(tokenizer, text)
print(len(text), len(tokens), peak_bytes() - before)
"""


def test_megabytes_of_text_take_little_more_than_their_tokens() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(GPT2_MINI)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    characters, tokens, grown = map(int, done.stdout.split())
    assert characters > 4_000_000
    assert grown < 1.25 * 4 * tokens + 24 * 2**20


@pytest.mark.parametrize(
    "text",
    [
        "他说这是一个很长的故事\uff0c没有人知道它从哪里来。她不相信。\n\n" * 8_000,
        json.dumps([{"n": n, "words": [n * 7, n * 13]} for n in range(15_000)], indent=1),
        "QmFzZSA2NCBpcyBvbmUgbG9uZyB3b3Jk" * 20_000,
    ],
    ids=["Chinese", "JSON", "base 64"],
)
def test_what_encoding_takes_is_known(text: str) -> None:
    """Also of text without spaces between words, and of one word."""
    tokenizer = TOKENIZERS["gpt2-mini"]
    known = encoding_bytes(tokenizer, text)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(GPT2_MINI), "-"],
        input=text,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    _, tokens, grown = map(int, done.stdout.split())
    assert grown < 4 * 1.25 * tokens + known + 24 * 2**20
    assert known < 2**20 or text.isalnum()


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE * 100)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text(PROSE * 100)
    (tmp_path / "b").chmod(0)
    command = [sys.executable, "-c", READ, str(tmp_path)]
    # Root may read everything, but for the want of a capability.
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("nobody here may be kept from reading")
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "DataError" in done.stderr
    assert "b cannot be read: Permission denied" in done.stderr


def test_text_that_is_not_utf8_is_refused() -> None:
    said = b"un caf\xe9 au lait".decode("utf-8", "surrogateescape")  # as Python reads arguments
    with pytest.raises(DataError, match=r"not UTF-8 at 'un caf\\udce9 au lait'"):
        tokenize(TOKENIZERS["gpt2-mini"], said)
