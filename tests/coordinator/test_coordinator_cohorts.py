"""Several bundles at one coordinator: tiers, ranks, cohorts."""

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coordinator_help import (
    TIMEOUT,
    Fleet,
    Served,
    check_in_until,
    enrol_with,
    finish,
    header,
    in_parallel,
    invited,
    join_round,
    make_bundle,
    mean_of,
    misused,
    train,
)
from google.protobuf import json_format

from coordinator.administrator import Administrator
from coordinator.aggregation.ranks import fit_generalist
from coordinator.cohorts import Cohort, group
from coordinator.state import State
from coordinator.tables import Device, Settings
from edge_runtime import wire
from edge_runtime.adapters import load_fresh, views
from edge_runtime.bundle import MANIFEST, Bundle, contract_sha256, open_bundle
from edge_runtime.client import Client
from edge_runtime.connection import Unproven
from edge_runtime.errors import BundleError, RefusedError
from edge_runtime.invitation import decode
from protos import coordinator_pb2 as pb

ROUND = ("--min-devices", "2", "--rounds", "1")


def bundle_of(path: Path, base: str, *, rank: int = 2, alpha: float = 16, tier: str = "") -> Bundle:
    """A bundle of a base called `base`."""
    made = make_bundle(path, rank=rank).manifest
    made.base.name, made.base.sha256 = f"bases/{base}", base * 8
    made.mixture.alpha, made.tier.name = alpha, tier
    text = json_format.MessageToJson(made, preserving_proto_field_name=True)
    (path / MANIFEST).write_text(text)
    return open_bundle(path)


def serve(fleet: Fleet, bundles: list[Bundle], *options: str) -> Served:
    first, *others = bundles
    more = [word for bundle in others for word in ("--bundle", str(bundle.path))]
    return fleet.serve(first, *more, *options)


def enrolled(fleet: Fleet, served: Served, bundle: Bundle, name: str, cohort: str = "") -> Client:
    with Administrator(served.administrator()) as administrator:
        text = administrator.invite(name, 600, cohort).invitation
    return fleet.client(enrol_with(decode(text), bundle))


def report(bundle: Bundle, number: int, *clients: Client) -> list[bytes]:
    """All take part in a round; what they sent."""
    join_round(*clients)
    start = clients[0].download(number)
    updates = [train(bundle, start, index, number) for index in range(len(clients))]
    for client, update in zip(clients, updates, strict=True):
        assert client.upload(header(number), update).accepted
    return updates


def listed(command: str, *options: object) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "coordinator", command, *map(str, options), "--format", "json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)[command]


def test_tiers_share_a_generalist_and_bases_do_not(fleet: Fleet, tmp_path: Path) -> None:
    phone = bundle_of(tmp_path / "phone", "small", tier="phone-low")
    laptop = bundle_of(tmp_path / "laptop", "small", tier="laptop")
    other = bundle_of(tmp_path / "other", "large", rank=4, tier="laptop")
    served = serve(fleet, [phone, other, laptop], *ROUND, "--exit-when-done")
    assert served.listening["cohorts"] == ["small", "large"]
    ada = enrolled(fleet, served, phone, "ada")
    ben = enrolled(fleet, served, laptop, "ben")
    cy = enrolled(fleet, served, other, "cy")
    dan = enrolled(fleet, served, other, "dan")

    entries = listed("devices", "--admin", served.listening["admin"])
    assert [(e["name"], e["cohort"]) for e in entries] == [
        ("ada", "small"), ("ben", "small"), ("cy", "large"), ("dan", "large"),
    ]  # fmt: skip

    # The rounds of one cohort do not wait for the other's.
    small = report(phone, 1, ada, ben)
    assert served.wait_for("round_closed")["cohort"] == "small"
    assert cy.check_in(0).action == pb.CheckInReply.WAIT, "one device is too few"
    for client in (ada, ben):
        number = check_in_until(client, pb.CheckInReply.FINISH).round
        got = wire.decode(phone.manifest, finish(client, number))["generalist"]
        np.testing.assert_allclose(got, mean_of(phone, small), rtol=1e-6)
    large = report(other, 1, cy, dan)
    assert served.wait_for("round_closed")["cohort"] == "large"
    for client in (cy, dan):
        number = check_in_until(client, pb.CheckInReply.FINISH).round
        got = wire.decode(other.manifest, finish(client, number))["generalist"]
        np.testing.assert_allclose(got, mean_of(other, large), rtol=1e-6)

    assert {event["cohort"] for event in served.end() if "round" in event} == {"small", "large"}
    rows = listed("rounds", "--state", fleet.state)
    assert [(r["cohort"], r["round"], r["accepted"]) for r in rows] == [
        ("large", 1, 2), ("small", 1, 2),
    ]  # fmt: skip


def test_an_update_of_another_cohorts_bundle_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    small, large = (bundle_of(tmp_path / name, name) for name in ("small", "large"))
    wide = bundle_of(tmp_path / "wide", "wide", rank=4)
    served = serve(fleet, [small, large], *ROUND)
    pair = [enrolled(fleet, served, small, name) for name in ("ada", "ben")]
    join_round(*pair)
    start = pair[0].download(1)
    larger = wire.encode(wide.manifest, {"generalist": np.zeros(4 * 24, np.float32)})
    reply = pair[0].upload(header(1), larger)
    assert not reply.accepted
    (invitation,) = invited(served, "eve")
    with pytest.raises(RefusedError, match="another base, mixing or other shared"):
        enrol_with(invitation, wide)
    assert pair[1].upload(header(1), start).accepted


def test_a_state_keeps_its_cohorts(fleet: Fleet, tmp_path: Path) -> None:
    """Started again with the bundles in another order, and one more; not without one."""
    first, second, third = (bundle_of(tmp_path / n, n) for n in ("one", "two", "three"))
    namesake = bundle_of(tmp_path / "namesake", "one", rank=4)
    served = serve(fleet, [first, second], *ROUND)
    client = enrolled(fleet, served, second, "ada")
    served.stop()

    missing = serve(fleet, [second], *ROUND)
    assert missing.process.wait(TIMEOUT) == BundleError.code
    assert "cohort one of the state began with a bundle of another base" in missing.stderr()
    assert "Traceback" not in missing.stderr()

    address = served.listening["address"]
    more = ("--enrolment-port", served.listening["enrolment"].rpartition(":")[2])
    bundles = [third, namesake, second, first]
    again = fleet.serve(
        bundles[0], *(w for b in bundles[1:] for w in ("--bundle", str(b.path))), *ROUND, *more,
        listen=address,
    )  # fmt: skip
    assert again.listening["cohorts"] == ["three", "one-2", "two", "one"]
    assert client.check_in(0).action == pb.CheckInReply.WAIT
    (entry,) = listed("devices", "--admin", again.listening["admin"])
    assert entry["cohort"] == "two"


def test_cohorts_that_the_operator_names(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = serve(fleet, [bundle], *ROUND, "--cohort", "beta")
    assert served.listening["cohorts"] == ["default", "beta"]
    admin = ("--admin", served.listening["admin"])
    plain = [enrolled(fleet, served, bundle, name) for name in ("ada", "ben")]
    beta = [enrolled(fleet, served, bundle, name, "beta") for name in ("cy", "dan")]
    with pytest.raises(RefusedError, match="there is no cohort gamma; choose from default, beta"):
        enrolled(fleet, served, bundle, "eve", "gamma")

    # Commands are about one of them.
    with Administrator(served.administrator()) as administrator:
        with pytest.raises(RefusedError, match="several cohorts; give --cohort and one of default"):
            administrator.pause()
        administrator.pause("beta")
        updates = report(bundle, 1, *plain)
        assert served.wait_for("round_closed")["cohort"] == "default"
        assert all(client.check_in(0).action == pb.CheckInReply.WAIT for client in beta)
        administrator.resume("beta")
    others = report(bundle, 1, *beta)
    assert served.wait_for("round_closed")["cohort"] == "beta"
    for clients, sent in ((plain, updates), (beta, others)):
        got = wire.decode(bundle.manifest, clients[0].download(2))["generalist"]
        np.testing.assert_allclose(got, mean_of(bundle, sent), rtol=1e-6)

    # A device that enrols again in another cohort leaves its own, which does not wait for it.
    moved = enrolled(fleet, served, bundle, "ada", "beta")
    assert moved.check_in(0).action == pb.CheckInReply.FINISH
    entries = listed("devices", *admin)
    assert {e["name"]: e["cohort"] for e in entries}["ada"] == "beta"
    served.stop()
    # Named once, they stay.
    again = serve(fleet, [bundle], *ROUND)
    assert again.listening["cohorts"] == ["default", "beta"]


def test_cohorts_without_tls(fleet: Fleet, tmp_path: Path) -> None:
    small, large = (bundle_of(tmp_path / name, name) for name in ("small", "large"))
    served = serve(fleet, [small, large], *ROUND, "--insecure")
    for bundle, name in ((small, "small"), (large, "large")):
        contract = contract_sha256(bundle.manifest)
        clients = [
            fleet.client(Unproven(served.ready(), f"{name}-{index}", contract)) for index in (0, 1)
        ]
        report(bundle, 1, *clients)
        assert served.wait_for("round_closed")["cohort"] == name
    with pytest.raises(RefusedError, match="another base, mixing or other shared"):
        fleet.client(Unproven(served.ready(), "eve", "0" * 64)).check_in(0)


def test_starts_that_are_refused(fleet: Fleet, tmp_path: Path) -> None:
    small, large = (bundle_of(tmp_path / name, name) for name in ("small", "large"))
    none = make_bundle(tmp_path / "none")
    none.manifest.mixture.alpha = 0
    text = json_format.MessageToJson(none.manifest, preserving_proto_field_name=True)
    (none.path / MANIFEST).write_text(text)
    mixed = ("--mixed-ranks", "flexlora")
    wrong: list[tuple[Served, int, str]] = []
    for bundles, options, code, message in (
        ([small, large], ("--cohort", "beta"), 2, "these bundles have 2"),
        ([small], ("--cohort", "a/b"), 2, "is no name of a cohort"),
        ([none], mixed, BundleError.code, "serve this bundle without --mixed-ranks"),
    ):
        state = tmp_path / f"state-{message[:9]}"
        paths = [word for bundle in bundles[1:] for word in ("--bundle", str(bundle.path))]
        wrong.append((fleet.serve(bundles[0], *paths, *options, state=state), code, message))
    for options, message in (
        (("--mixed-ranks", "best"), "not one of zero-pad, hetlora, flexlora"),
        ((*mixed, "--aggregation", "median"), "the zeros that a smaller device never"),
        ((*mixed, "--server-optimizer", "adam"), "new factors in every round"),
    ):
        assert message in misused(small, *options)
    for started, code, message in wrong:
        assert started.process.wait(TIMEOUT) == code, started.stderr()
        told = " ".join(started.stderr().replace("│", " ").split())
        assert message in told
        assert "Traceback" not in told


# Ranks


def test_bundles_of_one_rank_may_come_in_another_order(tmp_path: Path) -> None:
    """They differ in alpha; the generalist stays that of the one that it began with."""
    first, second = (bundle_of(tmp_path / str(alpha), "base", alpha=alpha) for alpha in (16, 32))
    small = bundle_of(tmp_path / "small", "base", rank=1)
    begun = contract_sha256(first.manifest)
    assert begun != contract_sha256(second.manifest)
    for order, known in (
        ((first, second, small), {}),
        ((second, small, first), {"base": begun}),
        ((small, second, first), {"base": begun, "beta": begun}),
    ):
        groups = group(order, mixed=True, known=known, names=[])
        assert [each.name for each in groups] == list(known or ["base"])
        assert [each.bundles for each in groups] == [(first, second, small)] * len(groups)
    with pytest.raises(BundleError, match="largest rank"):
        group([second, small], mixed=True, known={"base": begun}, names=[])


def test_a_generalist_is_fitted_once_however_many_ask(
    ranks: list[Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = []

    def counted(*arguments: Any) -> Any:
        fits.append(arguments)
        time.sleep(0.05)
        return fit_generalist(*arguments)

    monkeypatch.setattr("coordinator.cohorts.fit_generalist", counted)
    (shared,) = group(ranks, mixed=True, known={}, names=[])
    small, large = shared.bundles[1].manifest, shared.bundles[0].manifest
    settings = Settings(rounds=9, min_devices=1, deadline_seconds=1, recipe="mean", training="{}")
    settings.contract_sha256 = shared.contract_sha256
    with closing(State(tmp_path)) as whole:
        state = whole.of(shared.name)
        state.begin(settings, wire.encode(large, load_fresh(shared.bundles[0])))
        cohort = Cohort(shared, state=state, counting=None)
        device = Device(contract_sha256=contract_sha256(small))
        got = in_parallel(*[lambda: cohort.fitted(device, state.current())] * 4)
        assert len({*got}) == 1
        assert len(fits) == 1


def scaled_products(bundle: Bundle, payload: bytes) -> list[np.ndarray]:
    """s B A of each target in float64."""
    mixture = bundle.manifest.mixture
    named = views(bundle.manifest, wire.decode(bundle.manifest, payload))
    halves = [half.astype(np.float64) for half in named.values()]
    scale = mixture.alpha / math.sqrt(mixture.rank)
    return [scale * b @ a for a, b in zip(halves[::2], halves[1::2], strict=True)]


def best(product: np.ndarray, rank: int) -> np.ndarray:
    u, sigma, v = np.linalg.svd(product, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ v[:rank]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Bundle]]:
    path = tmp_path_factory.mktemp("ranks")
    yield [
        bundle_of(path / "two", "base", rank=2, alpha=8, tier="phone-low"),
        bundle_of(path / "four", "base", rank=4, tier="laptop"),
    ]
    shutil.rmtree(path)


def test_devices_of_two_ranks_share_rounds_and_a_kill(fleet: Fleet, ranks: list[Bundle]) -> None:
    """With FlexLoRA: each gets the best approximation at its rank, and what it sent counts."""
    options = ("--mixed-ranks", "flexlora", "--rounds", "2", "--min-devices", "2")
    served = serve(fleet, ranks, *options)
    assert served.listening["cohorts"] == ["base"]
    clients = [enrolled(fleet, served, b, n) for b, n in zip(ranks, ("ada", "ben"), strict=True)]
    fresh = [client.download(1) for client in clients]
    wholes = scaled_products(ranks[1], fresh[1])
    for small, whole in zip(scaled_products(ranks[0], fresh[0]), wholes, strict=True):
        np.testing.assert_allclose(small, best(whole, 2), atol=1e-4)

    join_round(*clients)
    updates = [train(b, start, 0, 1) for b, start in zip(ranks, fresh, strict=True)]
    # Neither may send what has the other's rank.
    wrong = clients[0].upload(header(1), updates[1])
    assert not wrong.accepted
    # So it is out of this round; the next one begins with both.
    assert clients[1].upload(header(1), updates[1]).accepted
    served.kill()
    more = ("--bundle", str(ranks[1].path), "--deadline", "1")
    port = served.listening["enrolment"].rpartition(":")[2]
    address = served.listening["address"]
    served = fleet.serve(ranks[0], *more, *options, "--enrolment-port", port, listen=address)
    served.wait_for("round_abandoned")
    for client, generalist in zip(clients, fresh, strict=True):
        assert client.download(2) == generalist
    served.kill()

    more = ("--bundle", str(ranks[1].path))
    served = fleet.serve(ranks[0], *more, *options, "--enrolment-port", port, listen=address)
    join_round(*clients)
    assert clients[0].upload(header(2), updates[0]).accepted
    served.kill()
    served = fleet.serve(ranks[0], *more, *options, "--enrolment-port", port, listen=address)
    assert served.wait_for("round_resumed")["updates"] == 1
    assert clients[1].upload(header(2), updates[1]).accepted
    served.wait_for("round_closed")
    sent = [scaled_products(b, update) for b, update in zip(ranks, updates, strict=True)]
    for bundle, client in zip(ranks, clients, strict=True):
        got = scaled_products(bundle, client.download(3))
        for one, ada, ben in zip(got, *sent, strict=True):
            expected = best((ada + ben) / 2, bundle.manifest.mixture.rank)
            np.testing.assert_allclose(one, expected, atol=1e-4 * np.abs(expected).max())
    served.kill()
    fitted = fleet.state / "fitted"
    assert list(fitted.iterdir())
    (fitted / ".torn.x.comigs-tmp").touch()
    served = fleet.serve(ranks[1], *options, "--enrolment-port", port, listen=address)
    served.ready()
    assert not list(fitted.iterdir()), "what only a bundle needs that is not served any more"
    with pytest.raises(RefusedError, match="does not serve this device's bundle any more"):
        clients[0].check_in(0)
    assert clients[1].check_in(0).round == 3
