"""Updates of different LoRA ranks beside references on whole products in float64."""

import functools
import math
import random
import tempfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from coordinator_help import make_manifest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coordinator.aggregation import Contribution, Outcome, Recipe, aggregate, choose
from coordinator.aggregation.optimizers import Momentum
from coordinator.aggregation.ranks import fit_generalist, ordered
from coordinator.aggregation.updates import Layout
from edge_runtime import wire
from edge_runtime.adapters import views
from edge_runtime.bundle import family_sha256
from edge_runtime.errors import BundleError
from protos import manifest_pb2 as pb

ZERO_PAD, HETLORA, FLEXLORA = (Recipe(ranks=name) for name in ("zero-pad", "hetlora", "flexlora"))
RECIPES = [ZERO_PAD, HETLORA, FLEXLORA, Recipe("token-mean", ranks="flexlora")]
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=str)
slowly = settings(suppress_health_check=[HealthCheck.too_slow], max_examples=50, deadline=None)
# Float32 numbers of a size for which rounding to float32 is the largest error.
NUMBERS = st.floats(-4, 4, width=32).map(lambda x: 0.0 if abs(x) < 1e-3 else x)
# (outputs, inputs) of the targets: one tall, one wide.
SHAPES = [(5, 3), (4, 6)]

Factors = list[tuple[np.ndarray, np.ndarray]]
"""A (rank, inputs) and B (outputs, rank) of each target."""


@functools.cache
def manifest(rank: int, alpha: float = 16) -> pb.Manifest:
    made = pb.Manifest(base=pb.Base(sha256="a base"), mixture=pb.Mixture(rank=rank, alpha=alpha))
    role = made.roles.add(name="generalist", shared=True, path="adapters/generalist")
    for layer, (outputs, inputs) in enumerate(SHAPES):
        for half, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            name = f"generalist/h.{layer}.lora_{half}.weight"
            made.tensors.add(
                name=name, role=role.name, shape=shape, dtype="float32", offset=role.size
            )
            role.size += math.prod(shape)
    return made


def vector(factors: Factors) -> np.ndarray:
    return np.concatenate([half.ravel() for pair in factors for half in pair]).astype(np.float32)


def factors_of(made: pb.Manifest, flat: np.ndarray) -> Factors:
    halves = list(views(made, {"generalist": flat.astype(np.float32)}).values())
    pairs = zip(halves[::2], halves[1::2], strict=True)
    return [(a.astype(np.float64), b.astype(np.float64)) for a, b in pairs]


def scale(made: pb.Manifest) -> float:
    return made.mixture.alpha / math.sqrt(made.mixture.rank)


def products(made: pb.Manifest, flat: np.ndarray) -> list[np.ndarray]:
    """What the vector stands for: s B A of each target, in float64."""
    return [scale(made) * b @ a for a, b in factors_of(made, flat)]


def best(product: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of that rank (Eckart-Young)."""
    u, sigma, v = np.linalg.svd(product)
    count = min(rank, len(sigma))
    return (u[:, :count] * sigma[:count]) @ v[:count]


Update = tuple[pb.Manifest, np.ndarray]


def close(
    recipe: Recipe,
    updates: Sequence[Update],
    *,
    rank: int = 4,
    incoming: np.ndarray | None = None,
    tokens: Sequence[int] | None = None,
    order: Sequence[int] | None = None,
    memory: bytes | None = None,
) -> Outcome:
    """A round of a generalist of `rank`, closed over files as the devices sent them."""
    made = manifest(rank)
    start = np.zeros(made.roles[0].size, np.float32) if incoming is None else incoming
    with tempfile.TemporaryDirectory() as folder:
        contributions = []
        for index, (own, flat) in enumerate(updates):
            path = Path(folder, str(index))
            path.write_bytes(wire.encode(own, {"generalist": flat}))
            weight = tokens[index] if tokens else 1
            contributions.append(Contribution(f"{index:03}", path, weight, own))
        return aggregate(
            made,
            recipe,
            incoming={"generalist": start},
            contributions=[contributions[index] for index in order or range(len(updates))],
            memory=memory,
        )


def result(recipe: Recipe, updates: Sequence[Update], **more: object) -> np.ndarray:
    return close(recipe, updates, **more).generalist["generalist"]


@st.composite
def drawn_updates(draw: st.DrawFn, ranks: Sequence[int] = (1, 2, 3, 4), least: int = 1) -> list:
    """Updates of devices of some ranks and alphas."""
    updates = []
    for _ in range(draw(st.integers(least, 5))):
        own = manifest(draw(st.sampled_from(ranks)), draw(st.sampled_from([8.0, 16.0])))
        flat = draw(arrays(np.float32, int(own.roles[0].size), elements=NUMBERS))
        updates.append((own, flat))
    return updates


def assert_same(got: list[np.ndarray], expected: list[np.ndarray], bound: float = 1e-5) -> None:
    """Up to rounding to float32 of what they are made of."""
    for one, other in zip(got, expected, strict=True):
        largest = max(1.0, float(np.abs(other).max()))
        np.testing.assert_allclose(one, other, atol=bound * largest, rtol=0)


# References: factors and products written out, target after target


def padded(own: pb.Manifest, flat: np.ndarray, rank: int) -> Factors:
    """The same products as factors of `rank`, with zeros."""
    pairs = []
    for a, b in factors_of(own, flat):
        missing = rank - len(a)
        larger_a = np.concatenate([a, np.zeros((missing, a.shape[1]))])
        larger_b = np.concatenate([b, np.zeros((len(b), missing))], axis=1)
        pairs.append((larger_a, larger_b * (scale(own) / scale(manifest(rank)))))
    return pairs


def reference_mean(fleet: list[Factors], weights: list[list[float]]) -> Factors:
    """Weights: of each target, one per device."""
    means = []
    for target, shares in enumerate(weights):
        total = math.fsum(shares)
        a = sum(w / total * device[target][0] for w, device in zip(shares, fleet, strict=True))
        b = sum(w / total * device[target][1] for w, device in zip(shares, fleet, strict=True))
        means.append((a, b))
    return means


@slowly
@given(drawn_updates())
def test_zero_padding_is_the_reference(updates: list[Update]) -> None:
    fleet = [padded(own, flat, 4) for own, flat in updates]
    for (own, flat), pairs in zip(updates, fleet, strict=True):
        same = [scale(manifest(4)) * b @ a for a, b in pairs]
        assert_same(same, products(own, flat), 1e-12)
    expected = reference_mean(fleet, [[1.0] * len(updates)] * len(SHAPES))
    np.testing.assert_allclose(result(ZERO_PAD, updates), vector(expected), rtol=1e-6, atol=1e-6)


@slowly
@given(drawn_updates(), st.data())
def test_zero_padding_by_tokens_is_the_reference(
    updates: list[Update], data: st.DataObject
) -> None:
    count = len(updates)
    tokens = data.draw(st.lists(st.integers(1, 10**6), min_size=count, max_size=count))
    fleet = [padded(own, flat, 4) for own, flat in updates]
    expected = reference_mean(fleet, [[float(t) for t in tokens]] * len(SHAPES))
    got = result(Recipe("token-mean", ranks="zero-pad"), updates, tokens=tokens)
    np.testing.assert_allclose(got, vector(expected), rtol=1e-6, atol=1e-6)


@slowly
@given(drawn_updates())
def test_hetlora_is_the_reference(updates: list[Update]) -> None:
    norms = [[float(np.linalg.norm(p)) for p in products(own, flat)] for own, flat in updates]
    weights = [list(column) for column in zip(*norms, strict=True)]
    weights = [column if sum(column) else [1.0] * len(column) for column in weights]
    expected = reference_mean([padded(own, flat, 4) for own, flat in updates], weights)
    np.testing.assert_allclose(result(HETLORA, updates), vector(expected), rtol=1e-5, atol=1e-5)


@slowly
@given(drawn_updates(ranks=(1, 2, 3)), st.data())
def test_flexlora_is_the_best_approximation_of_the_mean_product(
    updates: list[Update], data: st.DataObject
) -> None:
    count = len(updates)
    tokens = data.draw(st.lists(st.integers(1, 10**6), min_size=count, max_size=count))
    sums = [products(own, flat) for own, flat in updates]
    for recipe, weights in ((FLEXLORA, [1] * count), (RECIPES[3], tokens)):
        shares = [weight / sum(weights) for weight in weights]
        means = [
            sum(share * device[target] for share, device in zip(shares, sums, strict=True))
            for target in range(len(SHAPES))
        ]
        got = result(recipe, updates, tokens=tokens, rank=3)
        errors = [
            np.linalg.norm(p - m) for p, m in zip(products(manifest(3), got), means, strict=True)
        ]
        for error, mean in zip(errors, means, strict=True):
            tail = np.linalg.svd(mean, compute_uv=False)[3:]
            assert abs(error - np.linalg.norm(tail)) <= 1e-5 * max(1.0, np.abs(mean).max())
        # What a device of a smaller rank downloads is as good as its rank allows.
        for rank in (1, 2):
            small = manifest(rank, 8)
            fitted = fit_generalist({"generalist": got}, Layout(manifest(3)), Layout(small))
            for part, mean in zip(products(small, fitted["generalist"]), means, strict=True):
                lost = np.linalg.norm(part - mean)
                tail = np.linalg.svd(mean, compute_uv=False)[rank:]
                assert abs(lost - np.linalg.norm(tail)) <= 1e-5 * max(1.0, np.abs(mean).max())


def test_flexlora_adds_many_products_in_parts() -> None:
    """More factors than a product has rows, so that not all are kept."""
    generator = np.random.default_rng(4)
    updates = []
    for index in range(11):
        own = manifest(1 + index % 4)
        updates.append((own, generator.normal(size=own.roles[0].size).astype(np.float32)))
    sums = [products(own, flat) for own, flat in updates]
    means = [sum(device[target] for device in sums) / 11 for target in range(len(SHAPES))]
    got = products(manifest(4), result(FLEXLORA, updates))
    assert_same(got, [best(mean, 4) for mean in means])


# What they promise


@given(drawn_updates(ranks=(4,)))
@slowly
def test_equal_ranks_are_the_plain_mean(updates: list[Update]) -> None:
    updates = [(manifest(4), flat) for _, flat in updates]
    plain = result(Recipe(), updates)
    assert result(ZERO_PAD, updates).tobytes() == plain.tobytes()
    same = [updates[0]] * len(updates)
    np.testing.assert_allclose(result(HETLORA, same), updates[0][1], rtol=1e-6)
    sums = [products(own, flat) for own, flat in updates]
    means = [sum(device[t] for device in sums) / len(sums) for t in range(len(SHAPES))]
    got = products(manifest(4), result(FLEXLORA, updates))
    assert_same(got, [best(mean, 4) for mean in means])


@each_recipe
@slowly
@given(drawn_updates(ranks=(1, 2)), st.lists(st.sampled_from([2, 3, 4]), min_size=1, max_size=4))
def test_who_all_send_the_same_get_it_back(
    recipe: Recipe, updates: list[Update], ranks: list[int]
) -> None:
    """The same products at different ranks and alphas."""
    own, flat = updates[0]
    fleet = [updates[0]]
    for rank in ranks:
        more = manifest(rank, 32)
        change = scale(own) / scale(more)
        pairs = [(a, b * change) for a, b in factors_at(own, flat, rank)]
        fleet.append((more, vector(pairs)))
    assert_same(products(manifest(4), result(recipe, fleet)), products(own, flat))


def factors_at(own: pb.Manifest, flat: np.ndarray, rank: int) -> Factors:
    """Factors of `rank` with zeros, at the scale of `own`."""
    back = scale(manifest(rank)) / scale(own)
    return [(a, b * back) for a, b in padded(own, flat, rank)]


@slowly
@given(drawn_updates(ranks=(2,)), st.floats(0, 2 * math.pi), st.floats(0.25, 4))
def test_flexlora_sees_products_and_not_factors(
    updates: list[Update], angle: float, stretch: float
) -> None:
    """A turned and stretched pair of factors is the same product, and counts the same."""
    own, flat = updates[0]
    turn = stretch * np.array(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    )
    turned = [(turn @ a, b @ np.linalg.inv(turn)) for a, b in factors_of(own, flat)]
    got = result(FLEXLORA, [updates[0], (own, vector(turned))])
    assert_same(products(manifest(4), got), products(own, flat))


@each_recipe
@slowly
@given(drawn_updates(least=2), st.randoms())
def test_the_order_of_devices_does_not_matter(
    recipe: Recipe, updates: list[Update], shuffle: random.Random
) -> None:
    order = list(range(len(updates)))
    first = result(recipe, updates, order=order)
    shuffle.shuffle(order)
    assert result(recipe, updates, order=order).tobytes() == first.tobytes()
    # Nor which of them has which id, but for rounding.
    renamed = result(recipe, [updates[index] for index in order])
    if recipe.ranks == "flexlora":
        assert_same(products(manifest(4), renamed), products(manifest(4), first), 1e-4)
    elif recipe.aggregation == "mean":
        np.testing.assert_allclose(renamed, first, rtol=1e-5, atol=1e-5)


@slowly
@given(drawn_updates(ranks=(4,)), st.integers(1, 4))
def test_a_download_at_another_rank_and_back(updates: list[Update], rank: int) -> None:
    """A generalist at a larger rank stands for the same; at a smaller one, for its first rows."""
    flat, layout = updates[0][1], Layout(manifest(4))
    small = fit_generalist({"generalist": flat}, layout, Layout(manifest(rank, 8)))["generalist"]
    expected = [
        scale(manifest(4)) * b[:, :rank] @ a[:rank] for a, b in factors_of(manifest(4), flat)
    ]
    assert_same(products(manifest(rank, 8), small), expected)
    large = fit_generalist({"generalist": small}, Layout(manifest(rank, 8)), layout)["generalist"]
    assert_same(products(manifest(4), large), expected)
    same = fit_generalist({"generalist": flat}, layout, layout)["generalist"]
    assert same.tobytes() == flat.tobytes()


def test_flexlora_leaves_no_dead_factors() -> None:
    """Where the mean product has no more singular values, A stays, and can go on to learn."""
    generator = np.random.default_rng(5)
    fresh = [(generator.normal(size=(4, i)), np.zeros((o, 4))) for o, i in SHAPES]
    start = vector(fresh)
    untouched = result(FLEXLORA, [(manifest(4), start)] * 3, incoming=start)
    assert untouched.tobytes() == start.tobytes(), "nobody has learnt anything"
    assert (
        ordered(Layout(manifest(4)), {"generalist": start})["generalist"].tobytes()
        == start.tobytes()
    )

    own = manifest(1)
    learnt = vector([(generator.normal(size=(1, i)), np.ones((o, 1))) for o, i in SHAPES])
    got = result(FLEXLORA, [(own, learnt)], incoming=start)
    for (a, b), (before, _) in zip(
        factors_of(manifest(4), got), factors_of(manifest(4), start), strict=True
    ):
        np.testing.assert_array_equal(a[1:], before[1:])
        assert not b[:, 1:].any()
        np.testing.assert_allclose(np.linalg.norm(a[0]), 1, rtol=1e-6)


def test_a_generalist_is_ordered_for_smaller_ranks() -> None:
    generator = np.random.default_rng(6)
    flat = generator.normal(size=manifest(4).roles[0].size).astype(np.float32)
    got = ordered(Layout(manifest(4)), {"generalist": flat})
    assert_same(products(manifest(4), got["generalist"]), products(manifest(4), flat))
    one = fit_generalist(got, Layout(manifest(4)), Layout(manifest(1)))["generalist"]
    expected = [best(product, 1) for product in products(manifest(4), flat)]
    assert_same(products(manifest(1), one), expected)


@pytest.mark.parametrize(
    "recipe", [Recipe(ranks=r, clip_norm=0.5) for r in ("zero-pad", "hetlora", "flexlora")], ids=str
)
def test_clipping_measures_a_step_from_what_the_device_got(recipe: Recipe) -> None:
    """One of a smaller rank that did not move is not clipped; one that did, by its own step."""
    generator = np.random.default_rng(7)
    start = generator.normal(size=manifest(4).roles[0].size).astype(np.float32)
    small, large = Layout(manifest(2)), Layout(manifest(4))
    got = fit_generalist({"generalist": start}, large, small)["generalist"]
    assert close(recipe, [(manifest(2), got)] * 2, incoming=start).clipped == 0

    step = generator.normal(size=got.size).astype(np.float32)
    lengths = np.linalg.norm(vector(padded(manifest(2), step, 4)).astype(np.float64))
    shortened = (got + step * (0.5 / lengths)).astype(np.float32)
    outcome = close(recipe, [(manifest(2), got + step)], incoming=start)
    assert outcome.clipped == 1
    plain = Recipe(ranks=recipe.ranks)
    expected = result(plain, [(manifest(2), shortened)], incoming=start)
    assert_same(
        products(manifest(4), outcome.generalist["generalist"]), products(manifest(4), expected)
    )


def test_a_server_optimizer_takes_the_padded_mean_as_it_is() -> None:
    generator = np.random.default_rng(8)
    updates = []
    for own in (manifest(2), manifest(4), manifest(1, 8)):
        updates.append((own, generator.normal(size=own.roles[0].size).astype(np.float32)))
    start = generator.normal(size=manifest(4).roles[0].size).astype(np.float32)
    mean = result(ZERO_PAD, updates, incoming=start)
    recipe = Recipe(ranks="zero-pad", optimizer=Momentum(rate=0.5, beta1=0.9))
    first = close(recipe, updates, incoming=start)
    np.testing.assert_allclose(
        first.generalist["generalist"], start + 0.5 * (mean - start), rtol=1e-5, atol=1e-6
    )


def test_memory_does_not_grow_with_the_number_of_devices(tmp_path: Path) -> None:
    made = pb.Manifest(base=pb.Base(sha256="a base"), mixture=pb.Mixture(rank=8, alpha=16))
    role = made.roles.add(name="generalist", shared=True)
    for layer in range(40):
        for half, shape in (("A", (8, 1024)), ("B", (128, 8))):
            name = f"generalist/h.{layer}.lora_{half}.weight"
            made.tensors.add(
                name=name, role="generalist", shape=shape, dtype="float32", offset=role.size
            )
            role.size += math.prod(shape)
    size = role.size
    generator = np.random.default_rng(0)
    flat = generator.normal(size=size).astype(np.float32)
    same = pb.Manifest()
    same.CopyFrom(made)
    (tmp_path / "one").write_bytes(wire.encode(made, {"generalist": flat}))
    for recipe in (HETLORA, FLEXLORA, Recipe(ranks="flexlora", clip_norm=1.0)):
        peaks = []
        for count in (20, 40):
            contributions = [
                Contribution(f"{i:03}", tmp_path / "one", 1, same) for i in range(count)
            ]
            tracemalloc.start()
            aggregate(made, recipe, incoming={"generalist": flat / 2}, contributions=contributions)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[1] < peaks[0] + 2**20, "20 more updates of 1.5 MB have 29 MB"


# Bundles and options


def test_a_family_is_one_of_any_rank_and_alpha() -> None:
    assert family_sha256(manifest(2)) == family_sha256(manifest(4, 8))
    other = make_manifest(width=3)
    other.mixture.alpha = 16
    assert family_sha256(other) != family_sha256(manifest(2))
    for spoil in ("mixture.rank", "mixture.alpha"):
        wrong = pb.Manifest()
        wrong.CopyFrom(manifest(2))
        setattr(wrong.mixture, spoil.split(".")[1], 0)
        with pytest.raises(BundleError, match="serve this bundle without --mixed-ranks"):
            family_sha256(wrong)
    router = make_manifest()
    router.mixture.alpha = 16
    next(role for role in router.roles if role.name == "router").shared = True
    with pytest.raises(BundleError, match=r"router\.weight is not half of a LoRA pair"):
        family_sha256(router)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ranks": "pad"}, "--mixed-ranks pad is not one of zero-pad, hetlora, flexlora"),
        ({"ranks": "zero-pad", "aggregation": "median"}, "--aggregation median compares updates"),
        ({"ranks": "flexlora", "aggregation": "krum"}, "--aggregation krum compares updates"),
        ({"ranks": "hetlora", "aggregation": "token-mean"}, "hetlora weighs devices by"),
        ({"ranks": "flexlora", "optimizer": "adam"}, "moments of --server-optimizer adam"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_sound_is_refused_with_the_reason(wrong: dict, message: str) -> None:
    constants = dict.fromkeys(("rate", "beta1", "beta2", "tau"))
    with pytest.raises(ValueError, match=message):
        choose(**{"aggregation": "mean", "min_devices": 5, "constants": constants} | wrong)


def test_what_is_sound_is_taken() -> None:
    constants = dict.fromkeys(("rate", "beta1", "beta2", "tau"))
    chosen = choose(
        aggregation="token-mean",
        min_devices=2,
        clip_norm=1,
        optimizer="yogi",
        ranks="zero-pad",
        constants=constants,
    )
    assert str(chosen) == "token-mean, zero-pad, clipped to 1, yogi at 0.01"
