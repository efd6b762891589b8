"""`comigs device run` and `comigs doctor` with an invitation, as people run them."""

import datetime
import json
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from coordinator_help import TIMEOUT, Fleet, Served, aged, free_port, ids, invited

from coordinator.administrator import Administrator
from edge_runtime.bundle import Bundle
from edge_runtime.errors import RefusedError, TrustError, UnreachableError
from edge_runtime.identity import Identity
from edge_runtime.invitation import encode
from edge_runtime.store import Home

HOUR = datetime.timedelta(hours=1)


def comigs(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge_runtime", *map(str, arguments)]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=2 * TIMEOUT, check=False
    )


class Site:
    """A coordinator that one device satisfies, and what it takes to be that device."""

    def __init__(self, fleet: Fleet, bundle: Bundle, text: Path):
        self.fleet, self.bundle, self.text = fleet, bundle, text
        self.training = fleet.directory / "training.json"
        self.training.write_text('{"local_steps": 2, "batch_sequences": 2}')
        self.listen, self.enrolment_port = f"127.0.0.1:{free_port()}", free_port()
        self.served = self.serve(self.listen, "--enrolment-port", str(self.enrolment_port))

    def serve(self, listen: str, *options: object) -> Served:
        one_round = ("--rounds", "1", "--min-devices", "1", "--training", str(self.training))
        served = self.fleet.serve(self.bundle, *one_round, *options, listen=listen)
        served.ready()
        return served

    def run(
        self, home: Path, *options: object, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        return comigs(
            *("device", "run", "--home", home, "--data", self.text, "--bundle", self.bundle.path),
            *("--threads", 1, "--retry", 3, "--format", "json", *options),
            stdin=stdin,
        )

    def invitation(self, name: str) -> str:
        (invitation,) = invited(self.served, name)
        return encode(invitation)


@pytest.fixture
def site(fleet: Fleet, tiny_bundle: Bundle, text_dir: Path) -> Site:
    return Site(fleet, tiny_bundle, text_dir)


def events(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == TrustError.code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def identity(home: Path) -> Identity:
    found = Home(home).identity()
    assert found is not None
    return found


def test_a_device_enrols_once(site: Site, tmp_path: Path) -> None:
    home, invitation = tmp_path / "phone", site.invitation("ada")
    first = events(site.run(home, "--invitation", invitation))
    assert first[-1]["name"] == "ada", "the invitation's name, not the home's"
    assert "finished" in {event["event"] for event in first}
    enrolled = identity(home)
    assert stat.S_IMODE((home / "identity.json").stat().st_mode) == 0o600
    # The same command again, and one without the invitation: nothing is asked for twice.
    for options in (("--invitation", invitation), ()):
        events(site.run(home, *options))
        assert identity(home) == enrolled
    assert list(ids(site.fleet.state)) == ["ada"]
    # Elsewhere, the invitation is worth nothing.
    assert "already used" in refusal(site.run(tmp_path / "thief", "--invitation", invitation))
    assert "give --invitation" in " ".join(site.run(tmp_path / "thief").stderr.split())
    # A name comes with its invitation only.
    other = site.invitation("ben")
    events(site.run(tmp_path / "laptop", "--invitation", "-", stdin=f"{other}\n"))
    assert "already used" in refusal(site.run(home, "--invitation", other))
    assert events(site.run(home))[-1]["name"] == "ada"

    # A wrong address is not remembered.
    nobody = f"127.0.0.1:{free_port()}"
    assert site.run(home, "--coordinator", nobody, "--retry", "0.5").returncode == 14
    assert identity(home) == enrolled

    # The coordinator moves: its new address is needed once.
    site.served.stop()
    moved = f"127.0.0.1:{free_port()}"
    site.served = site.serve(moved)
    events(site.run(home, "--coordinator", moved))
    assert identity(home).coordinator == moved
    events(site.run(home))


def test_a_device_that_sends_only_masked_updates(site: Site, tmp_path: Path) -> None:
    home, only = tmp_path / "phone", "--require-secure-aggregation"
    done = site.run(home, "--invitation", site.invitation("ada"), only)
    assert done.returncode == RefusedError.code, done.stderr
    assert "wants updates as they are" in " ".join(done.stderr.split())
    assert not list((site.fleet.state / "updates").rglob("*.*"))
    assert "uploaded" in {event["event"] for event in events(site.run(home))}


def test_a_device_renews_its_certificate(site: Site, tmp_path: Path) -> None:
    home = tmp_path / "ada"
    events(site.run(home, "--invitation", site.invitation("ada")))
    old = aged(identity(home), site.fleet.state, left=HOUR)
    Home(home).save_identity(old)
    done = events(site.run(home))
    assert "renewed" in {event["event"] for event in done}
    new = identity(home)
    assert new.key != old.key
    days = (new.valid_until - datetime.datetime.now(datetime.UTC)).days
    assert days == 29
    assert "renewed" not in {event["event"] for event in events(site.run(home))}


def test_a_device_that_may_not_any_more(site: Site, tmp_path: Path) -> None:
    """Lapsed, revoked: it says so at once, and a new invitation mends it."""
    home = tmp_path / "ada"
    events(site.run(home, "--invitation", site.invitation("ada")))
    Home(home).save_identity(aged(identity(home), site.fleet.state, left=-HOUR))
    message = refusal(site.run(home))
    assert "lapsed" in message
    assert "comigs invite ada" in message
    events(site.run(home, "--invitation", site.invitation("ada")))

    with Administrator(site.served.administrator()) as administrator:
        administrator.revoke("ada")
    assert "was revoked" in refusal(site.run(home))
    events(site.run(home, "--invitation", site.invitation("ada")))
    events(site.run(home))

    (home / "identity.json").write_text("{}")
    assert "identity.json is damaged" in refusal(site.run(home))


def test_doctor_calls_the_coordinator(site: Site, tmp_path: Path) -> None:
    home, invitation = tmp_path / "ada", site.invitation("ada")
    before = comigs("doctor", "--home", home, "--invitation", invitation)
    assert before.returncode == 0, before.stdout
    assert f":{site.enrolment_port} answers in" in before.stdout
    assert "answers in" not in comigs("doctor", "--home", home).stdout
    events(site.run(home, "--invitation", invitation))
    assert f"{site.listen} answers in" in comigs("doctor", "--home", home).stdout
    with Administrator(site.served.administrator()) as administrator:
        administrator.revoke("ada")
    revoked = comigs("doctor", "--home", home)
    assert revoked.returncode == TrustError.code
    assert "this device was revoked" in revoked.stdout
    site.served.stop()
    after = comigs("doctor", "--home", home)
    assert after.returncode == UnreachableError.code
    assert "BAD  coordinator: no answer" in after.stdout
    plain = site.serve(site.listen, "--insecure")
    assert f"{plain.ready()} answers in" in comigs("doctor", "--insecure", plain.ready()).stdout
