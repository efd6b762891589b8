"""Text becomes the same tokens in pieces as at once, within little memory."""

from __future__ import annotations

import subprocess
import sys
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
from edge_runtime.data import tokenize
from edge_runtime.errors import DataError

GPT2_MINI = Path(export.__file__).parent / "gpt2_mini" / "tokenizer.json"
PROSE = "a It is a It's 1 of a few lines, isn't it?\nNo  line\n\n is like another one;\tfew are.\n"
# Of Llama 3: punctuation takes newlines with it, digits come in threes.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS_AND_SPACES = [
    *("a", "It", "is", "é", "²", "1", "'s", "?", "a It", " is", "<|endoftext|>"),
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
    # Of these, some pieces would not be what they are within the text.
    "metaspace": trained(pre_tokenizers.Metaspace()),
    "metaspace, first": trained(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "a space before the text": trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "not cut": trained(BYTES),
    "an added token of two words": trained(WORDS, AddedToken("a It")),
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
    assert got.dtype == np.int64
    assert got.tolist() == tokenizer.encode(text, add_special_tokens=False).ids


MEASURE = """
import sys
from tokenizers import Tokenizer
from edge_runtime.data import tokenize
from edge_runtime.memory import peak_bytes

tokenizer = Tokenizer.from_file(sys.argv[1])
words = [f"word{n % 977} and line {n}.\\n" for n in range(200_000)]
text = "".join(words)
del words
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
    # Pieces and their concatenation are there at once.
    assert grown < 2 * 8 * tokens + 24 * 2**20


def test_text_that_is_not_utf8_is_refused() -> None:
    said = b"un caf\xe9 au lait".decode("utf-8", "surrogateescape")  # as Python reads arguments
    with pytest.raises(DataError, match=r"not UTF-8 at 'un caf\\udce9 au lait'"):
        tokenize(TOKENIZERS["gpt2-mini"], said)
