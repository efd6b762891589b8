"""A backup of a running coordinator is whole, and rounds go on soundly from an older one."""

import io
import json
import os
import random
import sqlite3
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from coordinator_help import (
    Fleet,
    comigs,
    enrol_with,
    finish,
    free_port,
    header,
    in_parallel,
    invited,
    join_round,
    train,
    until,
)

from coordinator import backup
from coordinator.administrator import Administrator
from coordinator.state import DATABASE
from coordinator.tables import SCHEMA
from edge_runtime import adapters, wire
from edge_runtime.bundle import Bundle
from edge_runtime.client import Client
from edge_runtime.errors import BackupError, StorageError, TrustError
from edge_runtime.store import Home
from protos import coordinator_pb2 as pb


def test_backups_while_rounds_end(fleet: Fleet, tmp_path: Path) -> None:
    """Each is the state of one moment, with every file that belongs to it."""
    bundle = fleet.bundle(width=60_000)
    options = ("--rounds", "15", "--server-optimizer", "momentum", "--exit-when-done")
    served = fleet.serve(bundle, *options)
    clients = fleet.enrolled(served, bundle, "ada", "ben")
    began: dict[int, bytes] = {}

    def live(client: Client, seed: int) -> None:
        while (reply := client.check_in(5)).action != pb.CheckInReply.FINISH:
            if reply.action == pb.CheckInReply.TRAIN:
                began[reply.round] = client.download(reply.round)
                update = train(bundle, began[reply.round], seed, reply.round)
                assert client.upload(header(reply.round), update).accepted
        finish(client, reply.round)

    def back_up_again_and_again() -> list[Path]:
        files = []
        while served.process.poll() is None:
            files.append(tmp_path / f"backup-{len(files)}")
            backup.back_up(fleet.state, files[-1])
        return files

    files, *_ = in_parallel(
        back_up_again_and_again, *(lambda i=i: live(clients[i], i) for i in range(2))
    )
    assert len(files) > 3
    seen = set()
    for file in files:
        state = tmp_path / "restored" / file.name
        backup.restore(file, state)
        with sqlite3.connect(state / "coordinator.sqlite3") as connection:
            query = "select generalist_file, memory_file from rounds order by number desc"
            generalist, memory = connection.execute(query).fetchone()
            (ended,) = connection.execute("select count(*) from rounds where status = 'aggregated'")
        content = (state / generalist).read_bytes()
        # What was open is abandoned: the next round starts from what that one did.
        if ended[0] + 1 in began:
            assert content == began[ended[0] + 1]
        assert memory is None or (state / memory).exists()
        assert (memory is None) == (ended[0] == 0)
        seen.add(ended[0])
    assert len(seen) > 1


def test_rounds_go_on_from_an_older_backup(fleet: Fleet, tmp_path: Path) -> None:
    bundle = fleet.bundle()
    ports = ("--enrolment-port", str(free_port()))
    listen = f"127.0.0.1:{free_port()}"
    served = fleet.serve(bundle, "--rounds", "5", *ports, listen=listen)
    ada, ben, eve = fleet.enrolled(served, bundle, "ada", "ben", "eve")
    (unused,) = invited(served, "cy")
    before, _ = join_round(ada, ben)
    start = ada.download(1)
    assert ada.upload(header(1), train(bundle, start, 0, 1)).accepted

    made = comigs("backup", "--state", fleet.state, "--out", tmp_path / "b", "--format", "json")
    assert made.returncode == 0, made.stderr
    assert "the authority's key" in made.stderr
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o600
    with tarfile.open(tmp_path / "b") as archive:
        names = archive.getnames()
    assert {"coordinator.sqlite3", "ca-key.pem", "audit.jsonl"} <= {*names}
    assert not [name for name in names if "updates" in name], "they are personal"

    # What the backup knows nothing of: a round, and the device that came for it.
    assert ben.upload(header(1), train(bundle, start, 1, 1)).accepted
    served.wait_for("round_closed", round=1)
    later = fleet.client(enrol_with(unused, bundle))
    join_round(ada, ben, later)
    served.kill()

    fleet.state = tmp_path / "restored"
    restored = comigs("restore", tmp_path / "b", "--state", fleet.state)
    assert restored.returncode == 0, restored.stderr
    assert "is forgotten" in restored.stderr
    again = fleet.serve(bundle, "--rounds", "5", *ports, listen=listen)
    again.ready()
    after, _ = join_round(ada, ben)
    assert after.round == 2
    assert after.history != before.history
    assert ada.download(2) == start, "round 2 as it was before is forgotten"
    late = ada.upload(header(2, history=before.history), train(bundle, start, 0, 2))
    assert not late.accepted
    assert "restored from a backup" in late.reason
    for seed, client in enumerate((ben, eve)):
        if client is eve:
            join_round(eve)
        update = train(bundle, start, seed, 2)
        assert client.upload(header(2, history=after.history), update).accepted
    assert again.wait_for("round_closed")["updates"] == 2
    with pytest.raises(TrustError, match="ask for a new invitation"):
        later.check_in(0)
    with pytest.raises(TrustError, match="ask for a new one"):
        enrol_with(unused, bundle)
    events = [json.loads(line)["event"] for line in (fleet.state / "audit.jsonl").open()]
    assert "restored" in events
    assert comigs("audit", "--state", fleet.state, "--verify").returncode == 0


def test_a_device_ahead_of_a_restored_coordinator_trains_again(
    fleet: Fleet, tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    training = tmp_path / "training.json"
    training.write_text('{"local_steps": 2, "batch_sequences": 2}')
    options = ("--rounds", "1", "--min-devices", "1", "--training", str(training))
    options = (*options, "--enrolment-port", "0")
    listen = f"127.0.0.1:{free_port()}"
    served = fleet.serve(tiny_bundle, *options, listen=listen)
    (invitation,) = invited(served, "ada")
    home = ("--home", tmp_path / "home", "--data", text_dir, "--bundle", tiny_bundle.path)

    def device(*more: object) -> list[tuple[str, int]]:
        run = ("device", "run", *home, "--threads", 1, "--retry", 10, "--format", "json", *more)
        result = comigs(*run)
        assert result.returncode == 0, result.stderr
        events = [json.loads(line) for line in result.stdout.splitlines()]
        return [(e["event"], e["round"]) for e in events if e["event"] in ("uploaded", "finished")]

    Home(tmp_path / "home").save_identity(enrol_with(invitation, tiny_bundle))
    backup.back_up(fleet.state, tmp_path / "backup")
    assert device() == [("uploaded", 1), ("finished", 2)]
    assert device() == [("finished", 2)]
    served.kill()
    fleet.state = tmp_path / "restored"
    backup.restore(tmp_path / "backup", fleet.state)
    fleet.serve(tiny_bundle, *options, listen=listen).ready()
    assert device() == [("uploaded", 1), ("finished", 2)]


def test_a_device_that_was_about_to_download_goes_on_at_a_restored_coordinator(
    fleet: Fleet, tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    training = tmp_path / "training.json"
    training.write_text('{"local_steps": 1, "batch_sequences": 2}')
    options = ("--min-devices", "1", "--training", str(training), "--enrolment-port", "0")
    listen = f"127.0.0.1:{free_port()}"
    served = fleet.serve(tiny_bundle, "--rounds", "5", *options, listen=listen)
    (ada,) = fleet.enrolled(served, tiny_bundle, "ada")
    (invitation,) = invited(served, "ben")
    Home(tmp_path / "home").save_identity(enrol_with(invitation, tiny_bundle))
    backup.back_up(fleet.state, tmp_path / "backup")
    join_round(ada)
    assert ada.upload(header(1), train(tiny_bundle, ada.download(1), 0, 1)).accepted
    served.wait_for("round_closed", round=1)
    join_round(ada)
    (second,) = fleet.state.glob("generalists/2-*")
    second.unlink()  # ben's download of it breaks, and is tried again

    home = ("--home", tmp_path / "home", "--data", text_dir, "--bundle", tiny_bundle.path)
    run = ("device", "run", *home, "--threads", 1, "--retry", 60, "--format", "json")
    said = tmp_path / "said"
    with said.open("w") as out:
        command = [sys.executable, "-m", "edge_runtime", *map(str, run)]
        ben = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True)
    until(lambda: "trying again" in said.read_text(), "it got the generalist")
    assert "generalist" in said.read_text().splitlines()[-1]
    served.kill()
    fleet.state = tmp_path / "restored"
    backup.restore(tmp_path / "backup", fleet.state)
    fleet.serve(tiny_bundle, "--rounds", "1", *options, listen=listen).ready()
    _, trouble = ben.communicate(timeout=120)
    assert ben.returncode == 0, trouble
    events = [json.loads(line) for line in said.read_text().splitlines()]
    assert [e["round"] for e in events if e["event"] in ("uploaded", "finished")] == [1, 2]


def test_damaged_backups_and_places_that_are_taken(fleet: Fleet, tmp_path: Path) -> None:
    bundle = fleet.bundle()
    fleet.serve(bundle).ready()
    good, target = tmp_path / "good", tmp_path / "target"
    backup.back_up(fleet.state, good)
    whole = good.read_bytes()
    with tarfile.open(good) as archive:
        *members, manifest = archive.getmembers()
    generator = random.Random(5)
    end = manifest.offset_data + manifest.size  # zeros follow
    damaged = [b"", b"no backup", *(whole[: generator.randrange(end)] for _ in range(10))]
    for member in members:
        for _ in range(3):
            flipped = bytearray(whole)
            flipped[member.offset_data + generator.randrange(member.size)] ^= 1
            damaged.append(bytes(flipped))
    for content in damaged:
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(BackupError):
            backup.restore(tmp_path / "bad", target)
        assert not target.exists()
    assert not list(tmp_path.glob(".target*")), "nothing is left behind"

    (tmp_path / "bad").write_bytes(damaged[-1])
    for arguments, code, words in (
        (("backup", "--state", fleet.state, "--out", good), StorageError.code, "exists"),
        (("backup", "--state", tmp_path / "none", "--out", target), 2, "holds no state"),
        (("restore", good, "--state", fleet.state), StorageError.code, "not empty"),
        (("restore", tmp_path / "bad", "--state", target), BackupError.code, "damaged"),
        (("restore", tmp_path / "none", "--state", target), BackupError.code, "there is no"),
        (("restore", tmp_path, "--state", target), BackupError.code, f"{tmp_path} cannot be read"),
        (("restore", good, "--state", target, "--database", "mysql://x/y"), 2, "--database"),
    ):
        result = comigs(*arguments)
        assert result.returncode == code, result.stderr
        assert words in " ".join(result.stderr.replace("│", " ").split())
        assert not target.exists()
    assert good.read_bytes() == whole
    start = wire.encode(bundle.manifest, adapters.load_fresh(bundle))
    backup.restore(good, target)
    assert [file.read_bytes() for file in (target / "generalists").iterdir()] == [start]


@pytest.mark.parametrize("files", [[], {}, [DATABASE], {DATABASE: 1}, None])
def test_a_list_of_files_that_no_backup_has(tmp_path: Path, files: object) -> None:
    written = {"format": backup.FORMAT, "schema": SCHEMA, "made_at": "", "files": files}
    content = json.dumps(written).encode()
    with tarfile.open(tmp_path / "bad", "w") as archive:
        member = tarfile.TarInfo(backup.MANIFEST)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    with pytest.raises(BackupError, match="damaged"):
        backup.restore(tmp_path / "bad", tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("kind", ["link", "volume"])
def test_a_directory_that_is_there_and_empty_is_filled(
    fleet: Fleet, tmp_path: Path, kind: str
) -> None:
    """systemd's state directory may be a link, a container's is a mount point."""
    fleet.serve(fleet.bundle()).ready()
    good, place = tmp_path / "good", tmp_path / "place"
    backup.back_up(fleet.state, good)
    (tmp_path / "bad").write_bytes(good.read_bytes()[:-12_000])
    place.mkdir()
    if kind == "link":
        target = tmp_path / "target"
        target.symlink_to(place)
    else:
        target = place
        mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "comigs-test", str(place)]
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
        if mounted.returncode != 0:
            pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
        (place / "lost+found").mkdir()
    before = list(place.iterdir())
    if os.geteuid() == 0:
        os.chown(place, 65534, 65534)
    try:
        with pytest.raises(BackupError):
            backup.restore(tmp_path / "bad", target)
        assert list(place.iterdir()) == before
        backup.restore(good, target)
        assert (place / DATABASE).exists()
        owner = place.stat().st_uid
        assert all(path.stat().st_uid == owner for path in place.rglob("*") if path not in before)
        served = fleet.serve(fleet.bundle(), state=target)
        served.ready()
        served.stop()
    finally:
        if kind == "volume":
            subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_restored_coordinator_has_another_administrator(fleet: Fleet, tmp_path: Path) -> None:
    """The file may have been replaced since the backup, because somebody had taken it."""
    served = fleet.serve(fleet.bundle(), listen=f"127.0.0.1:{free_port()}")
    taken = served.administrator()
    backup.back_up(fleet.state, tmp_path / "backup")
    served.stop()
    fleet.state = tmp_path / "restored"
    backup.restore(tmp_path / "backup", fleet.state)
    again = fleet.serve(fleet.bundle(), listen=taken.coordinator)
    with Administrator(again.administrator()) as administrator:
        assert not administrator.devices()
    with Administrator(taken) as thief, pytest.raises(TrustError, match="was replaced"):
        thief.devices()


@pytest.mark.parametrize(
    ("mark", "words", "code"),
    [("user_version=1", "another version", 23), ("user_version=0", "holds no state", 2)],
)
def test_what_cannot_be_restored_is_not_backed_up(
    fleet: Fleet, tmp_path: Path, mark: str, words: str, code: int
) -> None:
    served = fleet.serve(fleet.bundle())
    served.ready()
    served.stop()
    with sqlite3.connect(fleet.state / DATABASE) as connection:
        connection.execute(f"pragma {mark}")
        if code == 2:  # killed at its first start, before there were tables
            connection.execute("pragma foreign_keys=off")
            connection.execute("alter table rounds rename to others")
    done = comigs("backup", "--state", fleet.state, "--out", tmp_path / "backup")
    assert done.returncode == code, done.stderr
    assert words in " ".join(done.stderr.replace("│", " ").split())
    assert not (tmp_path / "backup").exists()


def test_a_backup_holds_no_earlier_ones(fleet: Fleet) -> None:
    fleet.serve(fleet.bundle()).ready()
    first, second = fleet.state / "first.tar", fleet.state / "second.tar"
    backup.back_up(fleet.state, first)
    backup.back_up(fleet.state, second)
    with tarfile.open(first) as one, tarfile.open(second) as other:
        assert one.getnames() == other.getnames()
