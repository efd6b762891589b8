"""The audit log: what is in it, that it survives kills, and that `comigs audit` finds changes."""

import contextlib
import errno
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from coordinator_help import PATIENCE, Fleet, header, invited, join_round
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from coordinator import audit
from coordinator.administrator import Administrator
from coordinator.audit import AuditLog, Auditor, read
from coordinator.tls import subject_of
from edge_runtime import cli
from edge_runtime.connection import Patience, connect
from edge_runtime.errors import AuditError, RefusedError, StorageError, TrustError, UnreachableError
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc

NAMES = ("ada", "bén\u202e", "cy\n", "d" * 2000, "e\udc80")


def written(directory: Path, count: int) -> bytes:
    """The content of a log of `count` entries, which it leaves in `directory`."""
    with contextlib.closing(AuditLog(directory)) as log:
        for number in range(count):
            log.append([("act", "admin", {"act": "Invite", "name": NAMES[number % len(NAMES)]})])
    return (directory / audit.LOG).read_bytes()


def checked(content: bytes) -> tuple[int, str]:
    """Number and hash of the last entry of a log with that content."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        entries = list(read(Path(file.name)))
    return (entries[-1].number, entries[-1].hash) if entries else (0, audit.BEGINNING)


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return written(tmp_path_factory.mktemp("ten"), 10).splitlines(keepends=True)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_every_change_is_found_where_it_is(ten: list[bytes], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, 8))
    changed = list(ten)
    kind = data.draw(st.sampled_from(["flip", "drop", "swap", "copy"]))
    if kind == "flip":
        line = bytearray(changed[place])
        line[data.draw(st.integers(0, len(line) - 2))] ^= 1 << data.draw(st.integers(0, 7))
        changed[place] = bytes(line)
    elif kind == "drop":
        del changed[place]
    elif kind == "swap":
        changed[place], changed[place + 1] = changed[place + 1], changed[place]
    else:
        changed.insert(data.draw(st.integers(0, 9)), changed[place])
    with pytest.raises(AuditError, match="broken at entry") as found:
        checked(b"".join(changed))
    if kind != "copy":
        entry = int(str(found.value).partition("at entry ")[2].partition(":")[0])
        assert entry in (place + 1, place + 2), "that one, or the one that does not follow it"


@given(cut=st.integers(0, 2000))
@example(cut=0)
@settings(max_examples=60, deadline=None)
def test_a_torn_end_is_cut_off_and_the_chain_goes_on(ten: list[bytes], cut: int) -> None:
    whole = b"".join(ten)
    kept = whole[: max(0, len(whole) - cut)]
    lines, torn = kept.count(b"\n"), len(kept) - (kept.rfind(b"\n") + 1)
    assert checked(kept)[0] == lines, "a torn end is no entry, and no fault"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / audit.LOG
        path.write_bytes(kept)
        with contextlib.closing(AuditLog(Path(directory))) as log:
            log.append([("stopped", audit.COORDINATOR, {})])
        after = list(read(path))
    assert [entry.event for entry in after[lines:]] == ["torn_entry_removed"] * bool(torn) + [
        "stopped"
    ]
    if torn:
        assert after[lines].fields["bytes"] == torn


def test_nothing_follows_what_is_no_entry(tmp_path: Path) -> None:
    written(tmp_path, 2)
    with (tmp_path / audit.LOG).open("ab") as file:
        file.write(b"not written by us\n")
    with pytest.raises(AuditError, match="is no entry"):
        AuditLog(tmp_path)


def test_one_who_is_refused_all_the_time_does_not_fill_the_disk(tmp_path: Path) -> None:
    with contextlib.closing(AuditLog(tmp_path)) as log:
        auditor = Auditor(log)
        for _ in range(1000):
            auditor.refused("call_refused", audit.NOBODY, {"reason": "x" * 100_000})
        auditor.refused("call_refused", "ada", {"reason": "another one is still seen"})
        auditor.close()
    *refused, left_out = read(tmp_path / audit.LOG)
    assert [entry.by for entry in refused] == [audit.NOBODY] * audit.MOST_REFUSALS + ["ada"]
    assert (left_out.by, left_out.fields["refusals"]) == (audit.NOBODY, 1000 - audit.MOST_REFUSALS)
    assert (tmp_path / audit.LOG).stat().st_size < 20_000


def comigs(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "coordinator", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def entries(state: Path) -> list[dict[str, Any]]:
    done = comigs("audit", "--state", state, "--format", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["entries"]


def until_logged(state: Path, is_there: Callable[[audit.Entry], bool]) -> None:
    """Waits for an entry that is written a moment after what it is about."""
    end = time.monotonic() + 10
    while not any(is_there(entry) for entry in read(state / audit.LOG)):
        assert time.monotonic() < end, "it is never logged"
        time.sleep(0.01)


def test_acts_and_refusals_of_a_coordinator_that_is_killed(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--min-devices", "2")
    ada, ben = fleet.enrolled(served, bundle, "ada", "ben")
    admin = subject_of(served.administrator().certificate.encode()).id
    ada_id = subject_of(ada.who.certificate.encode()).id
    join_round(ada, ben)
    assert not ada.upload(header(1), b"nonsense").accepted
    with connect(ben.who, PATIENCE) as connection:
        stub = coordinator_pb2_grpc.AdminStub(connection.channel)
        with pytest.raises(TrustError, match="needs a certificate of the role administrator"):
            connection.retry(lambda: stub.Revoke(pb.RevokeRequest(name="ada")))
    with Administrator(served.administrator()) as administrator:
        with pytest.raises(RefusedError):
            administrator.revoke("nobody of that name")
        administrator.devices()
        administrator.revoke("ben")
    # The act was acknowledged, so it is there. Refusals are a moment later.
    assert [e for e in read(fleet.state / audit.LOG) if e.event == "act"][-1].fields["request"] == {
        "name": "ben"
    }
    with pytest.raises(TrustError):
        ben.check_in(0)
    until_logged(fleet.state, lambda e: e.fields.get("call") == "CheckIn")
    served.kill()
    again = fleet.serve(bundle, "--rounds", "9")
    again.ready()
    again.stop()

    logged = entries(fleet.state)
    assert [entry["event"] for entry in logged] == [
        *("administrator_made", "started", "act", "act", "device_enrolled", "device_enrolled"),
        *("update_refused", "call_refused", "act", "act_failed", "act", "call_refused"),
        *("settings_changed", "started", "stopped"),
    ]
    assert logged[1]["fields"]["administrator"] == admin
    invite, refused, denied = logged[2], logged[6], logged[7]
    assert (invite["by"], invite["fields"]["act"]) == (admin, "Invite")
    assert invite["fields"]["request"] == {"name": "ada", "valid_seconds": 600}
    assert invite["fields"]["address"] == "127.0.0.1"
    assert (refused["by"], refused["fields"]["device"]) == (ada_id, "ada")
    assert "bytes" in refused["fields"]["reason"] or "safetensors" in refused["fields"]["reason"]
    assert denied["by"] == subject_of(ben.who.certificate.encode()).id
    assert denied["fields"]["code"] == "PERMISSION_DENIED"
    assert logged[9]["fields"]["code"] == "NOT_FOUND"
    assert logged[11]["fields"]["code"] == "UNAUTHENTICATED"
    assert all(abs(entry["time"] - time.time()) < 120 for entry in logged)
    assert "COMIGS1" not in (fleet.state / audit.LOG).read_text(), "an invitation is a secret"


def test_the_command(fleet: Fleet) -> None:
    served = fleet.serve(fleet.bundle())
    invited(served, "ada", "ben")
    log = fleet.state / audit.LOG
    done = comigs("audit", "--state", fleet.state, "--verify", "--format", "json")  # it runs
    assert done.returncode == 0, done.stderr
    noted = json.loads(done.stdout)
    assert noted["entries"] == 4
    served.stop()
    verify = ("audit", "--state", fleet.state, "--verify")
    assert comigs(*verify, "--expect", noted["head"]).stdout.startswith("5 entries, none altered")
    lines = comigs("audit", "--state", fleet.state).stdout.splitlines()
    assert len(lines) == 5
    assert 'act="Invite" request={"name": "ada"' in lines[2]

    whole = log.read_bytes()
    log.write_bytes(whole.replace(b'"ada"', b'"eve"'))
    done = comigs(*verify)
    assert (done.returncode, done.stdout) == (AuditError.code, "")
    assert "broken at entry 4: it does not follow the line before it" in " ".join(
        done.stderr.split()
    )
    log.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    assert comigs(*verify).returncode == 0, "a cut-off end alone does not show"
    done = comigs(*verify, "--expect", noted["head"])
    assert done.returncode == AuditError.code
    assert "its end was cut off" in " ".join(done.stderr.split())
    assert comigs("audit", "--state", fleet.directory / "none").returncode == 2


def test_entries_for_programs(tmp_path: Path) -> None:
    """None of an empty log, and of a broken chain those before."""
    words = ["audit", "--state", str(tmp_path), "--format", "json"]
    log = tmp_path / audit.LOG
    log.write_bytes(b"")
    done = CliRunner().invoke(cli.build(), words)
    assert (done.exit_code, json.loads(done.stdout)) == (0, {"entries": []})
    log.write_bytes(written(tmp_path, 3).replace(b'"entry":3', b'"entry":4'))
    done = CliRunner().invoke(cli.build(), words)
    assert isinstance(done.exception, AuditError)
    assert [entry["number"] for entry in json.loads(done.stdout)["entries"]] == [1, 2]


def test_an_act_that_cannot_be_logged_is_not_done(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle)
    (ada,) = fleet.enrolled(served, bundle, "ada")
    identity = served.administrator()
    size = (fleet.state / audit.LOG).stat().st_size
    _, hard = resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, (size, hard))
    with connect(identity, Patience(0, print)) as connection:
        stub = coordinator_pb2_grpc.AdminStub(connection.channel)
        with pytest.raises(UnreachableError, match="cannot write its audit log"):
            connection.retry(lambda: stub.Revoke(pb.RevokeRequest(name="ada")))
    ada.check_in(0)
    resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    with Administrator(identity) as administrator:
        administrator.revoke("ada")
    with pytest.raises(TrustError):
        ada.check_in(0)
    served.stop()
    acts = [entry.fields.get("act") for entry in read(fleet.state / audit.LOG)]
    assert acts.count("Revoke") == 1


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    content = written(tmp_path, 3)
    with contextlib.closing(AuditLog(tmp_path)) as log:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) + 20, limits[1]))
        try:
            with pytest.raises(StorageError):
                log.append([("act", "admin", {})])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / audit.LOG).read_bytes() == content
        log.append([("act", "admin", {})])
    assert checked((tmp_path / audit.LOG).read_bytes())[0] == 4


def test_half_an_entry_that_could_not_be_taken_back_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails may keep one from shortening a file, too."""

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "it fails")

    content = written(tmp_path, 3)
    with contextlib.closing(AuditLog(tmp_path)) as log:
        with monkeypatch.context() as failing:
            failing.setattr("os.fsync", fail)
            failing.setattr("os.ftruncate", fail)
            for _ in range(2):
                with pytest.raises(StorageError):
                    log.append([("act", "admin", {})])
        assert (tmp_path / audit.LOG).read_bytes() != content
        log.append([("act", "admin", {})])
    assert checked((tmp_path / audit.LOG).read_bytes())[0] == 4


def test_a_replaced_administrator_cannot_fill_the_log(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle)
    copy = served.administrator()
    served.stop()
    (fleet.state / "admin.json").unlink()
    again = fleet.serve(bundle)
    with Administrator(replace(copy, coordinator=again.ready())) as administrator:
        for _ in range(5 * audit.MOST_REFUSALS):
            with pytest.raises(TrustError, match="was replaced"):
                administrator.abort()
    again.stop()
    by = subject_of(copy.certificate.encode()).id
    entries = [entry for entry in read(fleet.state / audit.LOG) if entry.by == by]
    refused = [entry for entry in entries if entry.event == "call_refused"]
    assert [entry for entry in entries if entry.event == "act"] == []
    assert 0 < len(refused) <= 2 * audit.MOST_REFUSALS, "of two minutes at most"
