"""Differential privacy: noise, accounting, the budget, and what does not go together."""

from __future__ import annotations

import math
import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest
from coordinator_help import (
    Fleet,
    Served,
    check_in_until,
    free_port,
    header,
    in_parallel,
    make_manifest,
    serve_command,
)
from dp_accounting import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from masking_help import Masked, joined, step_of, vector

from coordinator.accounting import Ledger, Privacy, UnsoundError, check, epsilon
from coordinator.aggregation import Contribution, Noise, Recipe, aggregate
from coordinator.aggregation.private import PrivateMean
from coordinator.state import State
from coordinator.tables import MaskingStage, Settings
from edge_runtime import wire
from edge_runtime.cli import main
from edge_runtime.client import Client
from edge_runtime.connection import Unproven
from edge_runtime.quantization import grid_for, quantize_clipped
from protos import coordinator_pb2 as pb

PRIVATE = ("--dp-noise", "2", "--clip-norm", "0.5", "--devices-per-round", "3")


@settings(deadline=None, max_examples=20)
@given(st.dictionaries(st.floats(0.3, 20), st.integers(1, 200), max_size=3), st.floats(1e-9, 0.1))
def test_epsilon_is_what_dp_accounting_says(rounds: dict[float, int], delta: float) -> None:
    accountant = RdpAccountant()
    for noise_multiplier, count in rounds.items():
        for _ in range(count):
            accountant.compose(GaussianDpEvent(noise_multiplier))
    expected = accountant.get_epsilon(delta) if rounds else 0
    assert epsilon(rounds, delta) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("noise_multiplier", "count"), [(1.0, 1), (2.0, 10), (5.0, 100)])
def test_epsilon_is_no_less_than_the_tightest(noise_multiplier: float, count: int) -> None:
    """Renyi composition against privacy loss distributions, another method of the library."""
    tightest = PLDAccountant().compose(GaussianDpEvent(noise_multiplier), count)
    lower = tightest.get_epsilon(1e-5)
    assert lower <= epsilon({noise_multiplier: count}, 1e-5) <= 1.2 * lower


def contributions(folder: Path, steps: list[np.ndarray], start: np.ndarray) -> list[Contribution]:
    manifest, made = make_manifest(), []
    for index, step in enumerate(steps):
        path = folder / str(index)
        path.write_bytes(wire.encode(manifest, {"generalist": start + step}))
        made.append(Contribution(f"{index:03}", path, 1))
    return made


def test_noise_has_the_deviation_that_is_accounted_for(tmp_path: Path) -> None:
    """Of the sum: multiplier times norm, whoever drops out; it is divided by a fixed number."""
    manifest = make_manifest()
    size = next(role.size for role in manifest.roles if role.shared)
    start = np.linspace(-1, 1, size, dtype=np.float32)
    steps = [step_of_size(size, index) for index in range(3)]  # two of five dropped out
    recipe = Recipe(clip_norm=0.5, noise=Noise(multiplier=2.0, devices=5))
    clipped = [s.astype(float) * min(1, 0.5 / np.linalg.norm(s)) for s in steps]
    exact = start + sum(clipped) / 5
    noise = []
    for _ in range(200):
        outcome = aggregate(
            manifest,
            recipe,
            incoming={"generalist": start},
            contributions=contributions(tmp_path, steps, start),
        )
        noise.append((outcome.generalist["generalist"] - exact) * 5)
    deviation = np.std(noise)
    count = 200 * size
    assert deviation == pytest.approx(2.0 * 0.5, rel=5 / math.sqrt(2 * count))
    assert abs(np.mean(noise)) < 5 * 1.0 / math.sqrt(count)


def step_of_size(size: int, index: int) -> np.ndarray:
    generator = np.random.default_rng(index)
    return (generator.normal(size=size) * 10.0 ** (index - 2)).astype(np.float32)


@settings(max_examples=50)
@given(st.integers(1, 40), st.floats(1e-3, 1e3), st.floats(0.1, 10))
def test_one_device_changes_the_sum_by_the_norm_at_most(
    devices: int, norm: float, multiplier: float
) -> None:
    grid = grid_for(norm, devices, multiplier)
    step = np.random.default_rng(devices).normal(size=500) * norm
    integers, _ = quantize_clipped(step, grid)
    assert sum(x * x for x in integers.tolist()) <= grid.levels**2


def test_more_updates_than_the_noise_is_for_are_no_mean() -> None:
    class Still:
        tokens = 1

        def read(self, start: int, stop: int) -> np.ndarray:
            return np.zeros(stop - start)

    mean = PrivateMean(norm=1.0, noise_multiplier=1.0, devices=1)
    mean.configure_round(np.zeros(4))
    mean.accept(Still())
    mean.accept(Still())
    with pytest.raises(ValueError, match="noise for 1"):
        mean.aggregate()


def train_round(fleet: Fleet, bundle: object, clients: list[Client]) -> int:
    """One plain round of all clients."""
    replies = in_parallel(*(lambda c=c: check_in_until(c, pb.CheckInReply.TRAIN) for c in clients))
    number = replies[0].round
    for index, client in enumerate(clients):
        start = vector(bundle, client.download(number))
        update = {"generalist": start + step_of(bundle, index, number)}
        assert client.upload(header(number), wire.encode(bundle.manifest, update)).accepted
    return number


def test_a_round_beyond_the_budget_is_not_opened_nor_after_a_restart(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    two, three = (epsilon({2.0: count}, 1e-5) for count in (2, 3))
    budget = round((two + three) / 2, 6)
    address = f"127.0.0.1:{free_port()}"
    options = (*PRIVATE, "--rounds", "9", "--min-devices", "3", "--over-selection", "1")

    def serve(budget: float) -> Served:
        more = ("--insecure", "--dp-budget", str(budget))
        return fleet.serve(bundle, *options, *more, listen=address)

    served = serve(budget)
    clients = [fleet.client(Unproven(address, f"device {i}")) for i in range(3)]
    assert served.wait_for("privacy")["rounds_left"] == 2
    for number in (1, 2):
        assert train_round(fleet, bundle, clients) == number
        spent = served.wait_for("privacy_spent", round=number)
        assert spent["epsilon"] == pytest.approx(epsilon({2.0: number}, 1e-5), abs=1e-4)
        if number == 1:  # a round is paid for once, though the coordinator is killed
            served.kill()
            served = serve(budget)
            assert served.wait_for("privacy")["rounds_left"] == 1
    refused = served.wait_for("budget_spent")
    assert (refused["round"], refused["budget"]) == (3, budget)
    assert {c.check_in(1).action for c in clients} == {pb.CheckInReply.FINISH}
    served.kill()
    served = serve(budget)
    assert served.wait_for("privacy")["rounds_left"] == 0
    served.wait_for("budget_spent", round=3)
    reply = clients[0].check_in(1)
    assert (reply.action, reply.round) == (pb.CheckInReply.FINISH, 3)


def test_devices_noise_their_masked_steps(fleet: Fleet) -> None:
    """Secure aggregation and differential privacy together: nobody sees a sum without noise. The
    round ends as it began, though the coordinator is killed and wants other rounds then."""
    bundle = fleet.bundle(width=500)
    listen = f"127.0.0.1:{free_port()}"
    options = (*PRIVATE, "--secure-aggregation", "--min-devices", "3", "--rounds", "1")
    options = (*options, "--over-selection", "1", "--enrolment-port", "0")
    served = fleet.serve(bundle, *options, listen=listen)
    clients = fleet.enrolled(served, bundle, *(f"device {i}" for i in range(3)))
    number = in_parallel(*(lambda c=c: joined([c]) for c in clients))[0]
    start = vector(bundle, clients[0].download(number))
    maskers = [Masked(client, number) for client in clients]
    steps = [step_of(bundle, index, number) for index in range(3)]
    reached = threading.Event()
    maskers[0].reached = "unmask", reached

    def killed() -> Served:
        assert reached.wait(30)
        served.kill()
        return fleet.serve(bundle, *options, "--devices-per-round", "4", listen=listen)

    *_, served = in_parallel(
        *(lambda m=m, s=s: m.run(s) for m, s in zip(maskers, steps, strict=True)), killed
    )
    closed = served.wait_for("round_closed", round=number)
    assert closed["clipped"] == 0, "a count without noise"
    quantization = maskers[0].group.quantization
    assert (quantization.noise_multiplier, quantization.clip_norm) == (2.0, True)
    assert len(maskers[0].payload) == 4 * start.size, "no counts either"
    clipped = [s.astype(float) * min(1, 0.5 / np.linalg.norm(s)) for s in steps]
    got = vector(bundle, clients[0].download(number + 1)).astype(float)
    noise = (got - start - sum(clipped) / 3) * 3
    deviation = 2.0 * 0.5 * math.sqrt(3 / (maskers[0].group.least_devices - 1))
    assert np.std(noise) == pytest.approx(deviation, rel=5 / math.sqrt(2 * start.size))
    assert served.wait_for("privacy_spent", round=number)["epsilon"] == pytest.approx(
        epsilon({2.0: 1}, 1e-5), abs=1e-4
    )


def test_a_masked_round_costs_from_when_shares_are_asked_for(fleet: Fleet) -> None:
    """Not while devices agree on who is summed up, though then too few stay; and not twice."""
    bundle = fleet.bundle()
    options = (*PRIVATE, "--secure-aggregation", "--min-devices", "3", "--rounds", "9")
    options = (*options, "--over-selection", "1", "--stage-seconds", "2")
    served = fleet.serve(bundle, *options)
    clients = fleet.enrolled(served, bundle, *(f"device {i}" for i in range(3)))
    costs = []
    for until in ("agree", "unmask"):
        number = in_parallel(*(lambda c=c: joined([c]) for c in clients))[0]
        maskers = [Masked(client, number) for client in clients]
        step = step_of(bundle, 0, number)
        in_parallel(*(lambda m=m, s=step, u=until: m.run(s, until=u) for m in maskers))
        served.wait_for("round_abandoned", round=number)
        costs.append(spent(fleet.state))
    assert costs == [[], [(2, 2.0)]]
    # Whoever goes on with a backup must know of it.
    assert served.wait_for("privacy_spent")["round"] == 2
    assert [e["round"] for e in served.events if e["event"] == "privacy_spent"] == [2]


def spent(state: Path) -> list[tuple[int, float]]:
    """Round and noise multiplier of what was charged."""
    with sqlite3.connect(state / "coordinator.sqlite3") as connection:
        return connection.execute("select round, noise_multiplier from privacy_spends").fetchall()


def cohort_after_a_round(path: Path, noise: float | None, *, kept: bool = True) -> State:
    """The state of a cohort of which one round is over."""
    state = State(path).of("base")
    options = {"recipe": "mean", "selection": None, "training": "{}", "contract_sha256": "c"}
    state.begin(Settings(rounds=9, min_devices=1, deadline_seconds=1, **options), b"generalist")
    state.open(1, deadline=0, recipe="mean", participants=[])
    if kept:
        state.aggregate(1, b"next", None, noise=noise)
    else:
        state.abandon(1, "worse than before", noise=noise)
    return state


def test_rounds_with_and_without_noise_do_not_mix(tmp_path: Path) -> None:
    noisy = cohort_after_a_round(tmp_path / "noisy", 2.0)
    plain = cohort_after_a_round(tmp_path / "plain", None)
    privacy = Privacy(noise_multiplier=1.0, delta=1e-5, budget=None)
    check(noisy, privacy)
    check(plain, None)
    with pytest.raises(UnsoundError, match="give --dp-noise"):
        check(noisy, None)
    with pytest.raises(UnsoundError, match="no later noise hides"):
        check(plain, privacy)
    assert Ledger(noisy, privacy).spent() == epsilon({2.0: 1}, 1e-5), "at the noise that it had"


def test_a_state_with_noise_is_not_served_without(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    common = ("--insecure", "--min-devices", "3", "--rounds", "9")
    served = fleet.serve(bundle, *PRIVATE, *common, "--over-selection", "1")
    clients = [fleet.client(Unproven(served.ready(), f"device {i}")) for i in range(3)]
    train_round(fleet, bundle, clients)
    served.wait_for("privacy_spent")
    served.kill()
    again = fleet.serve(bundle, *common)
    assert again.process.wait(timeout=60) == 2
    assert "--dp-noise" in again.stderr()


def test_a_round_whose_quality_was_told_is_paid_for(tmp_path: Path) -> None:
    """The gate looked at what would have come of it, and said so."""
    state = cohort_after_a_round(tmp_path, 2.0, kept=False)
    assert state.privacy_spent() == {2.0: 1}


def test_a_sum_that_could_be_known_is_not_hidden_by_later_noise(tmp_path: Path) -> None:
    """It was aborted after devices had been asked for shares of the masks."""
    state = cohort_after_a_round(tmp_path, None, kept=False)
    check(state, Privacy(noise_multiplier=1.0, delta=1e-5, budget=None))
    state.open(2, deadline=0, recipe="mean", participants=[])
    state.settle(2, {}, degree=4, terms=b"")
    state.set_masking_stage(2, MaskingStage.UNMASK, noise=0.0)
    state.abandon(2, "aborted")
    check(state, None)
    with pytest.raises(UnsoundError, match="no later noise hides"):
        check(state, Privacy(noise_multiplier=1.0, delta=1e-5, budget=None))


SECURE = ("--secure-aggregation", "--min-devices", "3")
DP = ("--dp-noise", "1")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((*SECURE, "--aggregation", "median"), "has to compare"),
        ((*SECURE, "--aggregation", "krum", "--min-devices", "5"), "has to compare"),
        ((*SECURE, "--aggregation", "token-mean"), "choose its weight"),
        ((*SECURE, "--insecure"), "prove who they are"),
        (("--secure-aggregation",), "3 devices or more"),
        ((*SECURE, "--secure-threshold", "0.5"), "above 0.5"),
        ((*SECURE, "--secure-threshold", "0.55", "--devices-per-round", "5000"), "300 neighbours"),
        (("--secure-threshold", "0.8"), "means nothing"),
        (("--stage-seconds", "8"), "means nothing"),
        (("--dp-delta", "1e-6"), "means nothing"),
        (("--dp-budget", "1"), "means nothing"),
        (DP, "--clip-norm"),
        ((*DP, "--clip-norm", "1"), "--devices-per-round"),
        ((*DP, "--clip-norm", "1", "--aggregation", "token-mean"), "choose its weight"),
        ((*DP, "--clip-norm", "1", "--aggregation", "median"), "no such bound"),
        ((*PRIVATE, "--dp-budget", "0.5"), "what one round costs"),
        ((*PRIVATE, "--dp-delta", "1"), "between 0 and 1"),
        (("--dp-noise", "0", "--clip-norm", "1"), "above 0"),
        ((*PRIVATE, "--dp-noise", "1e300"), "--dp-noise 1e+300 is not a number above 0, up to"),
        ((*PRIVATE, "--over-selection", "1e308"), "'--over-selection': Input should be less"),
        (("--devices-per-round", str(10**22)), "'--devices-per-round': Input"),
    ],
)
def test_what_does_not_go_together_is_refused(
    options: tuple[str, ...],
    reason: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = serve_command(Path("bundle"), Path("state"), "--listen", "127.0.0.1:0", *options)
    monkeypatch.setattr("sys.argv", command[2:])
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert reason in " ".join(capsys.readouterr().err.split())
