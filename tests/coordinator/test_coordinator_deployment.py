"""What docs/deploy/ starts, without systemd or a container engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from coordinator_help import TIMEOUT, Fleet, enrol_with, invited, make_bundle
from test_coordinator_quality import refusal

from coordinator.audit import LOG
from coordinator.database import DamagedDatabaseError
from coordinator.state import DATABASE
from coordinator.tls import CA_KEY_FILE
from edge_runtime.bundle import Bundle
from edge_runtime.errors import (
    AddressError,
    AuditError,
    BundleError,
    DataError,
    TrustError,
    VersionError,
)

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "docs" / "deploy" / "comigs-coordinator.service"
CONTAINERFILE = (ROOT / "docs" / "deploy" / "Containerfile").read_text(encoding="utf-8")
# What a test may not use as it stands there, and uses instead.
HERE = {"--listen": "127.0.0.1:0", "--monitor": "127.0.0.1:0"}


def setting(name: str) -> str:
    """The value of one line of the unit."""
    text = UNIT.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(rf"^{name}=(.*)$", text, re.MULTILINE)
    assert len(found) == 1
    return str(found[0])


def of_the_container() -> list[str]:
    (entry,) = re.findall(r"^ENTRYPOINT (\[.*\])$", CONTAINERFILE, re.MULTILINE)
    words: list[str] = json.loads(entry)
    return words


@pytest.mark.parametrize(
    "words",
    [setting("ExecStart").removesuffix("$OPTIONS").split(), of_the_container()],
    ids=["unit", "container"],
)
def test_it_starts_with_these_options_and_tells_systemd_when_it_listens(
    words: list[str], fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [Path(words[0]).name, words[1]] == ["comigs", "serve"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    del options["--bundle"], options["--state"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(TIMEOUT)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        bundle = make_bundle(tmp_path / "bundle")
        here = [word for option in options for word in (option, HERE[option])]
        served = fleet.serve(bundle, *here)
        assert manager.recv(100) == b"READY=1"
    # What an administrator does next finds all that it needs.
    enrol_with(invited(served, "ada")[0], bundle)


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("there is no systemd-analyze here: apt-get install systemd")
    program = setting("ExecStart").split()[0]
    unit = tmp_path / UNIT.name
    there = str(shutil.which("true"))  # it looks whether the program is there
    unit.write_text(UNIT.read_text(encoding="utf-8").replace(program, there), encoding="utf-8")
    done = subprocess.run(
        [analyze, "verify", str(unit)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, UNIT.name in done.stderr) == (0, False), done.stderr


def test_what_starting_again_cannot_mend_is_not_started_again(
    fleet: Fleet, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    fleet.serve(tiny_bundle).ready()
    fleet.close()

    def ended(*options: str, bundle: Path = tiny_bundle.path) -> int:
        return refusal(bundle, fleet.state, *options)[0]

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        codes = [
            ended("--aggregation", "none"),
            ended(bundle=tmp_path),
            ended("--quality-gate", "nowhere"),
            ended("--enrolment-port", port),
        ]
    # Each is looked at before the one that is damaged already.
    (fleet.state / CA_KEY_FILE).write_text("")
    codes.append(ended())
    (fleet.state / LOG).write_text("{}\n")
    codes.append(ended())
    with sqlite3.connect(fleet.state / DATABASE) as connection:
        connection.execute("pragma user_version = 1")
    codes.append(ended())
    (fleet.state / DATABASE).write_bytes(b"no database" * 1000)
    codes.append(ended())
    kinds = (BundleError, DataError, AddressError, TrustError, AuditError, VersionError)
    assert codes == [2, *(kind.code for kind in (*kinds, DamagedDatabaseError))]
    assert set(codes) <= {int(code) for code in setting("RestartPreventExitStatus").split()}


def test_the_container_is_built_of_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["setuptools"]["packages"]
    copied = re.findall(r"^COPY (\w+) \1$", CONTAINERFILE, re.MULTILINE)
    assert set(copied) == {package.partition(".")[0] for package in packages}


@contextmanager
def somebody_else() -> Iterator[None]:
    """Root may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_bundle_that_the_services_user_may_not_read(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    name = bundle.manifest.files[0].path
    (bundle.path / name).chmod(0)
    with (
        somebody_else(),
        pytest.raises(BundleError, match=r"cannot read .*: Permission denied; let"),
    ):
        bundle.file(name)
