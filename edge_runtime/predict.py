"""Next-token suggestions with personal adapters, and where each token was routed."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge_runtime.adapters import Layout, Stacks, Vector
from edge_runtime.bundle import Bundle
from edge_runtime.data import load_tokenizer, tokenize
from edge_runtime.engines import Array, Engine, allocate, allocate_outputs, shortened
from edge_runtime.errors import DivergedError, ParityError
from edge_runtime.planner import engine_cost
from protos import manifest_pb2 as pb

MANY = 8
"""Tokens from which on a program that is made for many is faster, where there is one."""
FEW = 64  # tokens that are sorted first for suggestions
# Libraries for text and the tokenizer: measured, rounded up.
REST_BYTES = 36 * 2**20


@dataclass(frozen=True)
class Suggestion:
    """A next token as text, and its probability."""

    text: str
    probability: float


@dataclass(frozen=True)
class _Step:
    """A program bound to arrays."""

    inputs: dict[str, Array]
    outputs: dict[str, Array]
    run: Callable[[], None]


class Predictor:
    """Keeps a KV cache: text that continues the last one costs only what is new."""

    def __init__(self, bundle: Bundle, engine: Engine, vectors: Mapping[str, Vector]) -> None:
        manifest = bundle.manifest
        self.bundle = bundle
        self.experts = bundle.experts()
        self.context = manifest.tier.context
        self._engine = engine
        self._entries = {n: bundle.program(n, engine.name) for n in ("decode", "prefill")}
        decode = self._entries["decode"]
        self._any_length = takes_any_length(decode)
        self._longest = {n: entry.inputs[0].shape[0] for n, entry in self._entries.items()}
        self._prefill_pays, _ = memory_plan(bundle, engine.name)
        with ThreadPoolExecutor(max_workers=1) as thread:  # each takes a core for a while
            reading = thread.submit(load_tokenizer, bundle)
            self._programs = {"decode": engine.load(bundle, "decode")}
            self.tokenizer: Tokenizer = reading.result()
        # The cache is one set of arrays for both programs, and so are the adapters.
        self._caches = allocate(p for p in decode.inputs if p.name.startswith("cache."))
        self._layout, self._stacks = Layout(manifest), Stacks(manifest)
        ports = [p for p in decode.inputs if "/" in p.name]
        stacks = self._stacks.arrays
        self._adapters = allocate(ports, besides=stacks)
        self._adapters |= {p.name: stacks[p.name] for p in ports if p.name in stacks}
        self._steps: dict[str, _Step] = {}
        self._held: list[int] = []  # tokens whose keys and values are in the cache
        self._routing: list[NDArray[np.float32]] = []  # per held token, (L, n)
        self._long_texts = 0
        self.use(vectors)
        self._check_that_adapters_count(vectors)

    def use(self, vectors: Mapping[str, Vector]) -> None:
        """Switches to other adapters of the same bundle, for the roles in `vectors`.

        Raises:
            AdapterError: a vector is not of this bundle; nothing has changed.
        """
        named = self._layout.views(vectors)
        self._held, self._routing = [], []
        for name in named.keys() & self._adapters.keys():
            self._adapters[name][...] = named[name]
        if self._adapters.keys() & self._stacks.arrays.keys():
            self._stacks.fill(named)

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """Logits (V,) of the token after `tokens`; of a long text only its end counts (`_in_view`).

        Raises:
            ValueError: `tokens` is empty.
            DivergedError: the adapters are beyond what float32 holds.
        """
        if not tokens:
            raise ValueError("there must be at least one token")
        tokens = self._in_view(tokens)
        same = 0
        for old, new in zip(self._held, tokens[:-1], strict=False):
            if old != new:
                break
            same += 1
        del self._held[same:], self._routing[same:]
        while True:  # at least the last token is not held
            left = tokens[len(self._held) :]
            name = self._program_for(len(left))
            output = self._extend(name, left[: self._longest[name]])
            if len(self._held) == len(tokens):
                break
        logits = output["logits"]
        if not np.isfinite(logits).all():
            # What is no number in the cache would spoil even what does not look at it.
            for cache in self._caches.values():
                cache[...] = 0.0
            self._held, self._routing = [], []
            raise DivergedError(
                "with these adapters no prediction is a finite number; train from fresh ones in "
                "another --home, at a lower learning rate"
            )
        return logits

    def suggest(self, text: str, top: int = 5) -> list[Suggestion]:
        """At most `top` of the most probable next tokens after `text`, the best first.

        Most tokenizers keep the space before a word in the word's token, so a token for a space
        alone is hardly ever followed by a word. If `text` ends in one space, these are therefore
        the tokens after the text without it that begin with one, shown without it; probabilities
        are among those. Tokens that are part of a character, or no text at all such as the one at
        the end of a text, are left out; the probabilities of the rest stay what they are.

        Raises:
            DataError: `text` holds bytes that are not UTF-8.
        """
        space = " " if re.search(r"\S \Z", text) and self._begin_words.any() else ""
        ids = tokenize(self.tokenizer, text.removesuffix(space)).tolist() or [
            max(0, self.bundle.manifest.tokenizer.start_id)
        ]
        logits = self.logits(ids).astype(np.float64)
        if space:
            logits[~self._begin_words] = -np.inf
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        suggestions: list[Suggestion] = []
        for token in _best_first(probabilities):
            if len(suggestions) == top or not np.isfinite(logits[token]):
                break
            said = self._text(ids[-1], token).removeprefix(space)
            if said and "\ufffd" not in said:
                suggestions.append(Suggestion(said, float(probabilities[token])))
        return suggestions

    @functools.cached_property
    def _begin_words(self) -> NDArray[np.bool_]:
        """Which tokens are a space with something after it, (V,); none if words hold no space."""
        last = self.tokenizer.encode("a b", add_special_tokens=False).tokens[-1]
        begin = np.zeros(self.bundle.manifest.base.vocabulary, np.bool_)
        if len(last) == 2 and last.endswith("b"):
            mark = last[0]  # which stands for the space
            for token, index in self.tokenizer.get_vocab().items():
                if index < begin.size:  # the base may not know what was added to the tokenizer
                    begin[index] = token.startswith(mark) and token.strip(mark) != ""
        return begin

    def explain(self, text: str) -> list[tuple[str, dict[str, float]]]:
        """For each token of `text` that is still in view: its share of each expert, over blocks."""
        ids = self._in_view(tokenize(self.tokenizer, text).tolist())
        if not ids:
            return []
        self.logits(ids)
        shares = (
            np.stack(self._routing).mean(1) if self._routing else np.ones((len(ids), 1), np.float32)
        )
        return [
            (
                self.tokenizer.decode([token]),
                {expert: float(p) for expert, p in zip(self.experts, row, strict=True)},
            )
            for token, row in zip(ids, shares, strict=True)
        ]

    def _in_view(self, tokens: list[int]) -> list[int]:
        """The end of `tokens` that fits into the context, and at least three quarters of that.

        Where it begins moves on by a quarter at a time: if it did with each token, nothing in the
        cache would be of use any more to a text that grows."""
        stride = max(1, self.context // 4)
        beyond = max(0, len(tokens) - self.context)
        return tokens[-(-beyond // stride) * stride :]

    def _check_that_adapters_count(self, vectors: Mapping[str, Vector]) -> None:
        """Runs `decode` twice, the second time with other adapters.

        Raises:
            ParityError: the result is the same, so a person's adapters would mean nothing.
        """
        before = self._of_two_tokens()
        self.use({role: vector + np.float32(0.1) for role, vector in vectors.items()})
        after = self._of_two_tokens()
        self.use(vectors)
        if np.array_equal(before, after):
            raise ParityError(
                "the bundle's decode program gives the same with any adapters; export it again, "
                "and report this if it happens twice"
            )

    def _of_two_tokens(self) -> NDArray[np.float32]:
        """Logits (V,) after any two: after one alone queries and keys have no say."""
        for tokens in [[0, 1]] if self._any_length else [[0], [1]]:
            output = self._extend("decode", tokens)
        return output["logits"].copy()

    def _program_for(self, tokens: int) -> str:
        """The fastest of the two for so many tokens, loaded."""
        if tokens < (MANY if self._any_length else 2) or not self._prefill_pays:
            return "decode"
        self._long_texts += 1
        if self._any_length and self._long_texts == 1:
            return "decode"  # a first suggestion comes sooner than another program is loaded
        if "prefill" not in self._programs:
            self._programs["prefill"] = self._engine.load(self.bundle, "prefill")
        return "prefill"

    def _text(self, before: int, token: int) -> str:
        """How `token` reads after another: some tokenizers leave out the space of a first one."""
        first, both = self.tokenizer.decode([before]), self.tokenizer.decode([before, token])
        return (
            both.removeprefix(first) if both.startswith(first) else self.tokenizer.decode([token])
        )

    def _bind(self, name: str, length: int) -> _Step:
        """`name` bound to arrays of its own, for `length` tokens if it takes any number."""
        entry = shortened(self._entries[name], length)
        shared = self._caches | self._adapters
        inputs = shared | allocate(entry.inputs, besides=shared)
        outputs = allocate_outputs(entry, inputs)
        return _Step(inputs, outputs, self._programs[name].bind(inputs, outputs))

    def _extend(self, name: str, tokens: list[int]) -> dict[str, Array]:
        position, count = len(self._held), len(tokens)
        step = self._steps.get(name)
        any_length = self._entries[name].inputs[0].HasField("tokens_axis")
        if step is None or (any_length and step.inputs["tokens"].size != count):
            step = self._steps[name] = self._bind(name, count)
        step.inputs["tokens"][...] = 0
        step.inputs["tokens"][:count] = tokens
        step.inputs["position"][0] = position
        if "last" in step.inputs:
            step.inputs["last"][0] = count - 1
        step.run()
        for key, cache in self._caches.items():
            fresh = step.outputs.get(key.replace("cache.", "new.", 1))
            if fresh is not None:  # else the program has stored it there itself
                cache[:, position : position + count] = fresh[:, :count]
        if "routing" in step.outputs:
            self._routing.extend(step.outputs["routing"][:, i].copy() for i in range(count))
        self._held.extend(tokens)
        return step.outputs


def _best_first(values: NDArray[np.float64]) -> Iterator[int]:
    """The indices of `values`, of the largest first; of equal ones the lower first.

    To sort a whole vocabulary takes half as long as a token does, and the first few will do."""
    few = min(FEW, values.size)
    bound = np.partition(values, -few)[-few]
    for chosen in (values >= bound, values < bound):
        indices = np.flatnonzero(chosen)
        yield from indices[np.argsort(-values[indices], kind="stable")].tolist()


def memory_plan(bundle: Bundle, engine: str) -> tuple[bool, int]:
    """Whether a second program is worth its memory: `prefill`, for many tokens at a time.

    Returns:
        That, and the bytes that suggesting needs then, the engine and all else included.

    Raises:
        BundleError: the bundle has no programs to suggest with.
    """
    manifest = bundle.manifest
    decode, prefill = (bundle.program(name, engine) for name in ("decode", "prefill"))
    # Of the adapters, what was read and what the self-test puts in their place.
    adapters = 2 * 4 * sum(role.size for role in manifest.roles)
    runtime = engine_cost(bundle, engine).runtime_bytes
    alone = runtime + decode.memory_bytes + adapters + REST_BYTES
    both = alone + prefill.memory_bytes
    if not takes_any_length(decode):
        return True, both
    fits = both <= manifest.tier.memory_mib * 2**20
    return (True, both) if prefill.file != decode.file and fits else (False, alone)


def takes_any_length(program: pb.Program) -> bool:
    return program.inputs[0].HasField("tokens_axis")
