"""Every strategy beside its paper's equations in plain Python floats, and what it promises."""

import functools
import itertools
import math
import random
import resource
import statistics
import tempfile
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from coordinator_help import make_manifest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save

from coordinator.aggregation import (
    AggregationError,
    Contribution,
    Outcome,
    Recipe,
    aggregate,
    choose,
    means,
    robust,
    updates,
)
from coordinator.aggregation.clipping import Clipped
from coordinator.aggregation.means import Mean
from coordinator.aggregation.optimizers import Adam, Momentum, ServerOptimizer, Yogi
from coordinator.aggregation.updates import Layout, StoredUpdate
from edge_runtime import wire
from edge_runtime.errors import AdapterError, StorageError
from protos import manifest_pb2 as pb

MANIFEST = make_manifest(width=3)
SIZE = next(role.size for role in MANIFEST.roles if role.name == "generalist")
ZERO = np.zeros(SIZE, np.float32)
ANY = arrays(np.float32, SIZE, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
# Steps between such are exact in float64, so equal distances are equal and ties are ties.
WHOLE = arrays(np.float32, SIZE, elements=st.integers(-3, 3).map(float))
NORMAL = arrays(np.float32, SIZE, elements=st.floats(-10, 10, width=32, allow_subnormal=False))
RECIPES = [
    Recipe("mean"),
    Recipe("token-mean"),
    Recipe("median"),
    Recipe("trimmed-mean", malicious=1),
    Recipe("krum", malicious=1),
    Recipe("multi-krum", malicious=1),
    Recipe("mean", clip_norm=2.5),
    Recipe("mean", optimizer=Momentum()),
    Recipe("median", clip_norm=2.5, optimizer=Adam()),
    Recipe("token-mean", optimizer=Yogi()),
]
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=str)
slowly = settings(suppress_health_check=[HealthCheck.too_slow], max_examples=50)


def close(
    recipe: Recipe,
    vectors: Sequence[np.ndarray],
    *,
    incoming: np.ndarray = ZERO,
    tokens: Sequence[int] | None = None,
    order: Sequence[int] | None = None,
    memory: bytes | None = None,
) -> Outcome:
    """A round closed over files on disk, listed in `order`."""
    with tempfile.TemporaryDirectory() as folder:
        contributions = []
        for index, vector in enumerate(vectors):
            path = Path(folder, str(index))
            path.write_bytes(wire.encode(MANIFEST, {"generalist": vector}))
            weight = tokens[index] if tokens else 1
            contributions.append(Contribution(f"{index:03}", path, weight))
        return aggregate(
            MANIFEST,
            recipe,
            incoming={"generalist": incoming},
            contributions=[contributions[index] for index in order or range(len(vectors))],
            memory=memory,
        )


def generalist(recipe: Recipe, vectors: Sequence[np.ndarray], **more: object) -> np.ndarray:
    return close(recipe, vectors, **more).generalist["generalist"]


def rows(vectors: Sequence[np.ndarray]) -> list[list[float]]:
    return [[float(value) for value in vector] for vector in vectors]


# References: lists of Python floats, one coordinate after the other, from the papers


def reference_mean(updates: list[list[float]], weights: Sequence[float]) -> list[float]:
    total = math.fsum(weights)
    return [
        math.fsum(w * value for w, value in zip(weights, column, strict=True)) / total
        for column in zip(*updates, strict=True)
    ]


def reference_median(updates: list[list[float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*updates, strict=True)]


def reference_trimmed(updates: list[list[float]], f: int) -> list[float]:
    n = len(updates)
    return [
        math.fsum(sorted(column)[f : n - f]) / (n - 2 * f) for column in zip(*updates, strict=True)
    ]


def reference_krum_order(updates: list[list[float]], f: int) -> list[int]:
    """Indices by score: the sum of squared distances to the n - f - 2 closest others."""
    n = len(updates)
    scores = []
    for i in range(n):
        distances = sorted(
            math.fsum((a - b) ** 2 for a, b in zip(updates[i], updates[j], strict=True))
            for j in range(n)
            if j != i
        )
        scores.append((math.fsum(distances[: n - f - 2]), i))
    return [i for _, i in sorted(scores)]


def reference_optimizer(
    optimizer: ServerOptimizer, start: list[float], proposals: list[list[float]]
) -> list[float]:
    """x after one round per proposal (a step per coordinate); Reddi et al., algorithm 2."""
    o = optimizer
    result = list(start)
    for place, steps in enumerate(zip(*proposals, strict=True)):
        m, v = 0.0, 0.0 if isinstance(o, Momentum) else o.tau**2
        for d in steps:
            if isinstance(o, Momentum):
                m = o.beta1 * m + d
                result[place] += o.rate * m
                continue
            m = o.beta1 * m + (1 - o.beta1) * d
            if isinstance(o, Yogi):
                v -= (1 - o.beta2) * d * d * ((v > d * d) - (v < d * d))
            else:
                v = o.beta2 * v + (1 - o.beta2) * d * d
            result[place] += o.rate * m / (math.sqrt(v) + o.tau)
    return result


# Beside the references


@given(st.lists(ANY, min_size=1, max_size=7))
def test_median_is_the_reference(vectors: list[np.ndarray]) -> None:
    expected = np.array(reference_median(rows(vectors))).astype(np.float32)
    np.testing.assert_array_equal(generalist(Recipe("median"), vectors), expected)


@given(st.integers(0, 2).flatmap(lambda f: st.tuples(st.just(f), st.lists(
    NORMAL, min_size=2 * f + 1, max_size=7))))  # fmt: skip
def test_trimmed_mean_is_the_reference(drawn: tuple[int, list[np.ndarray]]) -> None:
    f, vectors = drawn
    got = generalist(Recipe("trimmed-mean", malicious=f), vectors)
    np.testing.assert_allclose(got, reference_trimmed(rows(vectors), f), rtol=1e-6, atol=1e-12)


@given(st.integers(0, 2).flatmap(lambda f: st.tuples(st.just(f), st.lists(
    WHOLE, min_size=2 * f + 3, max_size=9))))  # fmt: skip
def test_krum_and_multi_krum_are_the_reference_in_ties_too(
    drawn: tuple[int, list[np.ndarray]],
) -> None:
    f, vectors = drawn
    best = reference_krum_order(rows(vectors), f)
    got = generalist(Recipe("krum", malicious=f), vectors)
    np.testing.assert_array_equal(got, vectors[best[0]])
    chosen = [rows(vectors)[index] for index in best[: len(vectors) - f - 2]]
    several = generalist(Recipe("multi-krum", malicious=f), vectors)
    np.testing.assert_allclose(several, reference_mean(chosen, [1] * len(chosen)), atol=1e-6)


def test_krum_finds_the_reference_among_realistic_updates() -> None:
    """Small steps from a generalist that is much larger, where precision could be lost."""
    generator = np.random.default_rng(3)
    incoming = generator.normal(size=SIZE).astype(np.float32) * 100
    for _ in range(20):
        vectors = [
            incoming + generator.normal(size=SIZE).astype(np.float32) * 1e-2 for _ in range(11)
        ]
        best = reference_krum_order(rows(vectors), 3)
        got = generalist(Recipe("krum", malicious=3), vectors, incoming=incoming)
        np.testing.assert_array_equal(got, vectors[best[0]])


@slowly
@given(
    st.lists(st.tuples(NORMAL, st.integers(1, 10**6)), min_size=1, max_size=5),
    NORMAL,
    st.floats(0.01, 30),
)
def test_clipping_is_the_reference_and_bounds_every_step(
    updates: list[tuple[np.ndarray, int]], incoming: np.ndarray, norm: float
) -> None:
    vectors, tokens = [vector for vector, _ in updates], [weight for _, weight in updates]
    start, clipped, lengths = rows([incoming])[0], [], []
    for vector in rows(vectors):
        step = [x - begin for x, begin in zip(vector, start, strict=True)]
        length = math.sqrt(math.fsum(d * d for d in step))
        lengths.append(length)
        factor = 1 if length == 0 else min(1, norm / length)
        clipped.append([begin + d * factor for begin, d in zip(start, step, strict=True)])
    outcome = close(Recipe("token-mean", clip_norm=norm), vectors, incoming=incoming, tokens=tokens)
    np.testing.assert_allclose(
        outcome.generalist["generalist"], reference_mean(clipped, tokens), rtol=1e-6, atol=1e-6
    )
    assert sum(length > norm * (1 + 1e-9) for length in lengths) <= outcome.clipped
    assert outcome.clipped <= sum(length > norm * (1 - 1e-9) for length in lengths)
    moved = outcome.generalist["generalist"].astype(np.float64) - incoming
    rounded = 1e-6 * (norm + np.linalg.norm(incoming))  # to float32
    assert np.linalg.norm(moved) <= norm + rounded


def test_what_a_clipped_strategy_sees_is_within_the_norm(tmp_path: Path) -> None:
    """Also of numbers at the end of float32, and in pieces as well as whole."""
    seen = []

    class Witness:
        least_updates = 1

        def configure_round(self, incoming: np.ndarray) -> None:
            self.incoming = incoming

        def accept(self, update: StoredUpdate) -> None:
            whole = update.read(0, SIZE)
            seen.append(np.linalg.norm(whole - self.incoming))
            pieces = [update.read(start, min(start + 5, SIZE)) for start in range(0, SIZE, 5)]
            assert np.concatenate(pieces).tobytes() == whole.tobytes()

        def aggregate(self) -> np.ndarray:
            return self.incoming

    witness = Clipped(Witness(), 0.5)
    witness.configure_round(np.ones(SIZE))
    for index, value in enumerate((1.0, 1.01, 7.0, 3.4e38)):
        path = tmp_path / str(index)
        vector = np.full(SIZE, value, np.float32)
        path.write_bytes(wire.encode(MANIFEST, {"generalist": vector}))
        witness.accept(StoredUpdate(Layout(MANIFEST), Contribution(str(index), path, 1)))
    assert seen[0] == 0
    assert 0 < seen[1] < 0.1
    np.testing.assert_allclose(seen[2:], 0.5, rtol=1e-12)
    assert witness.clipped == 2


@pytest.mark.parametrize(
    "optimizer",
    [Momentum(), Momentum(rate=0.3, beta1=0.5), Adam(), Yogi(), Adam(0.1, 0.5, 0.9, 0.01),
     Yogi(0.1, 0.0, 0.5, 1.0)],
    ids=str,
)  # fmt: skip
@given(st.lists(st.lists(NORMAL, min_size=1, max_size=3), min_size=1, max_size=4), NORMAL)
@slowly
def test_server_optimizers_are_the_reference_over_rounds(
    optimizer: ServerOptimizer, rounds: list[list[np.ndarray]], start: np.ndarray
) -> None:
    """Each round's devices take the same steps from wherever the generalist is."""
    recipe = Recipe(optimizer=optimizer)
    incoming, memory, proposals = start, None, []
    for steps in rounds:
        vectors = [incoming + step for step in steps]
        mean = reference_mean(rows(vectors), [1] * len(vectors))
        proposals.append([x - begin for x, begin in zip(mean, rows([incoming])[0], strict=True)])
        outcome = close(recipe, vectors, incoming=incoming, memory=memory)
        assert close(recipe, vectors, incoming=incoming, memory=memory).memory == outcome.memory
        incoming, memory = outcome.generalist["generalist"], outcome.memory
    expected = reference_optimizer(optimizer, rows([start])[0], proposals)
    scale = max(10.0, float(np.abs(incoming).max()))
    np.testing.assert_allclose(incoming, expected, rtol=1e-6, atol=1e-6 * scale)


def test_momentum_without_memory_is_the_mean() -> None:
    vectors = [np.arange(SIZE, dtype=np.float32) * scale for scale in (1, 2, 6)]
    plain = generalist(Recipe(), vectors, incoming=vectors[1])
    with_none = Recipe(optimizer=Momentum(rate=1, beta1=0))
    np.testing.assert_allclose(generalist(with_none, vectors, incoming=vectors[1]), plain)


def test_another_optimizer_begins_without_memory() -> None:
    vectors = [np.full(SIZE, value, np.float32) for value in (1, 3)]
    memory = close(Recipe(optimizer=Momentum()), vectors).memory
    for recipe in (Recipe(optimizer=Adam()), Recipe(optimizer=Yogi())):
        fresh = close(recipe, vectors)
        assert close(recipe, vectors, memory=memory).memory == fresh.memory
        again = close(recipe, vectors, memory=fresh.memory)
        assert again.memory != fresh.memory
    assert close(Recipe(), vectors, memory=memory).memory is None


# What all of them promise


@each_recipe
@slowly
@given(st.lists(st.tuples(NORMAL, st.integers(1, 10**9)), min_size=5, max_size=7), st.randoms())
def test_the_order_of_devices_does_not_matter(
    recipe: Recipe, updates: list[tuple[np.ndarray, int]], shuffle: random.Random
) -> None:
    vectors, tokens = [vector for vector, _ in updates], [weight for _, weight in updates]
    order = list(range(len(updates)))
    first = close(recipe, vectors, tokens=tokens, order=order)
    shuffle.shuffle(order)
    second = close(recipe, vectors, tokens=tokens, order=order)
    assert first.generalist["generalist"].tobytes() == second.generalist["generalist"].tobytes()
    assert first.memory == second.memory


@given(st.lists(st.tuples(NORMAL, st.integers(1, 10**6)), min_size=1, max_size=6),
       st.integers(1, 1000))  # fmt: skip
def test_the_scale_of_weights_does_not_matter(
    updates: list[tuple[np.ndarray, int]], scale: int
) -> None:
    vectors, tokens = [vector for vector, _ in updates], [weight for _, weight in updates]
    plain = generalist(Recipe("token-mean"), vectors, tokens=tokens)
    doubled = generalist(Recipe("token-mean"), vectors, tokens=[1024 * w for w in tokens])
    assert doubled.tobytes() == plain.tobytes()
    scaled = generalist(Recipe("token-mean"), vectors, tokens=[scale * w for w in tokens])
    np.testing.assert_allclose(scaled, plain, rtol=2e-7, atol=1e-12)


@given(ANY, st.integers(1, 2**53))
def test_one_contribution_gives_itself(vector: np.ndarray, tokens: int) -> None:
    for recipe in (Recipe("mean"), Recipe("token-mean"), Recipe("median")):
        got = generalist(recipe, [vector], tokens=[tokens], incoming=np.ones_like(vector))
        np.testing.assert_array_equal(got, vector)


@st.composite
def attacked(draw: st.DrawFn, honest: Callable[[int], int]) -> tuple[int, list[int], list]:
    """f, the places of the f attackers, and n updates of which at least honest(f) are honest."""
    f = draw(st.integers(0, 3))
    vectors = draw(st.lists(NORMAL, min_size=honest(f), max_size=honest(f) + 3))
    places = []
    for attack in draw(st.lists(ANY, min_size=f, max_size=f)):
        places.append(draw(st.integers(0, len(vectors))))
        vectors.insert(places[-1], attack)
        places = [p + (p >= places[-1]) for p in places[:-1]] + [places[-1]]
    return f, places, vectors


@pytest.mark.parametrize("name", ["median", "trimmed-mean"])
@slowly
@given(attacked(lambda f: f + 1))
def test_median_and_trimmed_mean_stay_within_the_honest_range(
    name: str, drawn: tuple[int, list[int], list[np.ndarray]]
) -> None:
    f, places, vectors = drawn
    honest = np.stack([v for index, v in enumerate(vectors) if index not in places])
    got = generalist(Recipe(name, malicious=f), vectors)
    assert (honest.min(axis=0) <= got).all()
    assert (got <= honest.max(axis=0)).all()


@pytest.mark.parametrize("name", ["krum", "multi-krum"])
@slowly
@given(attacked(lambda f: f + 3))
def test_krum_stays_near_the_honest(
    name: str, drawn: tuple[int, list[int], list[np.ndarray]]
) -> None:
    """An honest score is at most (n-f-2) D^2, with D the largest distance of two honest updates; a
    chosen attacker counts at least n-2f-1 honest ones among its closest, so the nearest of those is
    at most D sqrt((n-f-2) / (n-2f-1)) away. A mean of such is no further from the honest ones' mean
    than that and D."""
    f, places, vectors = drawn
    honest = [v.astype(float) for index, v in enumerate(vectors) if index not in places]
    n, got = len(vectors), generalist(Recipe(name, malicious=f), vectors).astype(float)
    widest = max((np.linalg.norm(a - b) for a, b in itertools.combinations(honest, 2)), default=0)
    bound = widest * math.sqrt((n - f - 2) / (n - 2 * f - 1))
    if name == "krum":
        assert min(np.linalg.norm(got - v) for v in honest) <= bound * (1 + 1e-6) + 1e-5
    else:
        off = np.linalg.norm(got - np.mean(honest, axis=0))
        assert off <= (bound + widest) * (1 + 1e-6) + 1e-5


@each_recipe
def test_blocks_change_nothing(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(5)
    vectors = [generator.integers(-9, 9, SIZE).astype(np.float32) for _ in range(6)]
    whole = generalist(recipe, vectors)
    monkeypatch.setattr(robust, "BLOCK_BYTES", 8 * 6 * 5)
    assert generalist(recipe, vectors).tobytes() == whole.tobytes()


# Memory


@functools.cache
def large(folder: Path) -> tuple[pb.Manifest, int, list[Path]]:
    """A manifest of a million numbers, and some updates of it on disk."""
    manifest = make_manifest(width=500_000)
    size = next(role.size for role in manifest.roles if role.name == "generalist")
    paths = []
    for index in range(4):
        vector = np.random.default_rng(index).normal(size=size).astype(np.float32)
        paths.append(folder / f"large {index}")
        paths[-1].write_bytes(wire.encode(manifest, {"generalist": vector}))
    return manifest, size, paths


@each_recipe
def test_memory_does_not_grow_with_the_number_of_devices(
    recipe: Recipe, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robust, "BLOCK_BYTES", 16 * 2**20)
    manifest, size, paths = large(tmp_path_factory.getbasetemp())
    incoming = {"generalist": np.zeros(size, np.float32)}
    peaks = []
    for count in (5, 40):
        contributions = [Contribution(f"{i:03}", paths[i % 4], 7 + i) for i in range(count)]
        tracemalloc.start()
        aggregate(manifest, recipe, incoming=incoming, contributions=contributions)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    few, many = peaks
    assert many < few + 2 * 2**20, "40 updates of 4 MB have 160 MB"
    assert many < 24 * 4 * size + robust.BLOCK_BYTES


# Files and options


def test_tensors_may_be_in_any_order_and_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `wire.decode` accepts is read as it reads it, at any alignment, in any pieces."""
    monkeypatch.setattr(updates, "READ_NUMBERS", 5)
    vector = np.random.default_rng(1).normal(size=SIZE).astype(np.float32)
    named = wire.encode(MANIFEST, {"generalist": vector})
    length = int.from_bytes(named[:8], "little")
    header = named[8 : 8 + length].rstrip() + b" " * 3
    a, b = (tensor for tensor in MANIFEST.tensors if tensor.role == "generalist")
    arrays_of = {t.name: vector[t.offset : t.offset + math.prod(t.shape)] for t in (a, b)}
    swapped = (
        f'{{"{a.name}":{{"dtype":"F32","shape":{list(a.shape)},"data_offsets":[{arrays_of[b.name].nbytes},'
        f'{vector.nbytes}]}},"{b.name}":{{"dtype":"F32","shape":{list(b.shape)},"data_offsets":[0,'
        f"{arrays_of[b.name].nbytes}]}}}}"
    ).encode()
    for payload in (
        len(header).to_bytes(8, "little") + header + named[8 + length :],
        len(swapped).to_bytes(8, "little")
        + swapped
        + arrays_of[b.name].tobytes()
        + arrays_of[a.name].tobytes(),
        save({name: arrays_of[name].reshape(t.shape) for name, t in ((a.name, a), (b.name, b))},
             metadata={"made by": "another writer"}),
    ):  # fmt: skip
        assert wire.decode(MANIFEST, payload)["generalist"].tobytes() == vector.tobytes()
        path = tmp_path / "payload"
        path.write_bytes(payload)
        update = StoredUpdate(Layout(MANIFEST), Contribution("a", path, 1))
        for start, stop in itertools.combinations(range(SIZE + 1), 2):
            np.testing.assert_array_equal(update.read(start, stop), vector[start:stop])
            given = np.full(stop - start, np.nan)
            assert update.read(start, stop, given) is given
            np.testing.assert_array_equal(given, vector[start:stop])


def test_what_no_tensor_has_is_zero(tmp_path: Path) -> None:
    manifest = pb.Manifest()
    manifest.CopyFrom(MANIFEST)
    role = next(role for role in manifest.roles if role.name == "generalist")
    role.size += 9
    for tensor in manifest.tensors:
        tensor.offset += 4 * (tensor.role == "generalist")
    vector = np.arange(1, role.size + 1, dtype=np.float32)
    path = tmp_path / "payload"
    path.write_bytes(wire.encode(manifest, {"generalist": vector}))
    vector[:4] = vector[-5:] = 0
    update = StoredUpdate(Layout(manifest), Contribution("a", path, 1))
    for start, stop in itertools.combinations(range(role.size + 1), 2):
        given = np.full(stop - start, np.nan)
        np.testing.assert_array_equal(update.read(start, stop, given), vector[start:stop])


@pytest.mark.parametrize("by_tokens", [False, True])
def test_a_mean_in_blocks_is_the_mean(
    by_tokens: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(means, "BLOCK_BYTES", 8 * 5)
    vectors = np.random.default_rng(2).normal(size=(3, SIZE)).astype(np.float32)
    mean = Mean(by_tokens=by_tokens)
    mean.configure_round(np.zeros(SIZE))
    for index, vector in enumerate(vectors):
        path = tmp_path / str(index)
        path.write_bytes(wire.encode(MANIFEST, {"generalist": vector}))
        mean.accept(StoredUpdate(Layout(MANIFEST), Contribution(str(index), path, index + 1)))
    weights = [1, 2, 3] if by_tokens else None
    np.testing.assert_allclose(
        mean.aggregate(), np.average(vectors.astype(float), axis=0, weights=weights), rtol=1e-12
    )


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "update"
    good = wire.encode(MANIFEST, {"generalist": ZERO})
    for content in (good[:-1], good[:40], b"", b"\xff" * 100, good[:8] + b"x" * 300):
        path.write_bytes(content)
        with pytest.raises(AdapterError, match="update is missing or damaged"):
            StoredUpdate(Layout(MANIFEST), Contribution("a", path, 1)).read(0, SIZE)
    path.unlink()
    with pytest.raises(AdapterError, match="missing or damaged"):
        StoredUpdate(Layout(MANIFEST), Contribution("a", path, 1))
    with pytest.raises(AdapterError, match="memory is damaged"):
        close(Recipe(optimizer=Adam()), [ZERO], memory=b"junk")


@each_recipe
def test_too_few_updates_are_refused(recipe: Recipe) -> None:
    least = recipe.least_updates
    with pytest.raises(AggregationError, match=f"needs {least} updates or more, and there are"):
        close(recipe, [ZERO] * (least - 1))
    close(recipe, [ZERO] * least)


def test_numbers_beyond_float32_are_refused() -> None:
    huge = np.full(SIZE, 3e38, np.float32)
    assert np.isfinite(generalist(Recipe(), [huge] * 3, incoming=-huge)).all()
    with pytest.raises(AggregationError, match="beyond float32"):
        close(Recipe(optimizer=Momentum(rate=2)), [huge] * 3)


def options(**given_ones: object) -> Recipe:
    constants = {name: given_ones.pop(name, None) for name in ("rate", "beta1", "beta2", "tau")}
    return choose(**{"aggregation": "mean", "min_devices": 2, "constants": constants} | given_ones)


def test_choices() -> None:
    assert options() == Recipe()
    assert (
        str(options(clip_norm=0.5, optimizer="momentum")) == "mean, clipped to 0.5, momentum at 1"
    )
    krum = options(aggregation="krum", min_devices=7, malicious=2, optimizer="yogi", tau=0.1)
    assert krum == Recipe("krum", malicious=2, optimizer=Yogi(tau=0.1))
    assert str(krum) == "krum against 2, yogi at 0.01"
    assert options(optimizer="adam", rate=0.1, beta1=0, beta2=0.5).optimizer == Adam(0.1, 0, 0.5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"aggregation": "best"}, "--aggregation best is not one of mean, "),
        ({"aggregation": "krum"}, "--malicious 1 needs 5 updates or more .* --min-devices 5"),
        ({"aggregation": "krum", "malicious": 3, "min_devices": 8}, "needs 9 updates"),
        ({"aggregation": "multi-krum", "min_devices": 4}, "needs 5 updates"),
        ({"aggregation": "trimmed-mean"}, "--malicious 1 needs 3 updates"),
        ({"malicious": 1}, "--malicious means nothing to mean"),
        ({"aggregation": "median", "malicious": 0}, "--malicious means nothing to median"),
        ({"clip_norm": 0.0}, "--clip-norm 0 is not a number above 0"),
        ({"clip_norm": math.nan}, "--clip-norm nan"),
        ({"clip_norm": math.inf}, "--clip-norm inf"),
        ({"optimizer": "sgd"}, "--server-optimizer sgd is not one of momentum, adam, yogi"),
        ({"rate": 1.0}, "--server-rate means nothing without --server-optimizer"),
        ({"optimizer": "momentum", "beta2": 0.9}, "--server-beta2 means nothing to momentum"),
        ({"optimizer": "adam", "beta1": 1.0}, "--server-beta1 1 is not at least 0 and less"),
        ({"optimizer": "adam", "rate": math.nan}, "--server-rate nan is not a number above 0"),
        ({"optimizer": "yogi", "tau": 0.0}, "--server-tau 0 is not a number above 0"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_choices_are_told_in_one_line(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        options(**wrong)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("opened", [False, True])
def test_an_update_that_cannot_be_read_for_now_is_not_given_up(
    tmp_path: Path, opened: bool
) -> None:
    """Too many files are open, as under a flood."""
    path = tmp_path / "update"
    path.write_bytes(wire.encode(MANIFEST, {"generalist": np.ones(SIZE, np.float32)}))
    given = Contribution("a", path, 1)
    update = StoredUpdate(Layout(MANIFEST), given) if opened else None
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(StorageError, match="Too many open files"):
            (update or StoredUpdate(Layout(MANIFEST), given)).read(0, SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert StoredUpdate(Layout(MANIFEST), given).read(0, SIZE).tolist() == [1.0] * SIZE
