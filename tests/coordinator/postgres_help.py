"""A PostgreSQL server of our own, and devices whose updates are looked for in it."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import psycopg
from coordinator_help import Fleet, finish, free_port, header, mean_of, train

from edge_runtime import adapters, wire
from edge_runtime.bundle import Bundle
from edge_runtime.client import Client
from protos import coordinator_pb2 as pb


def binaries() -> Path | None:
    """Where PostgreSQL's programs are; Debian keeps them off the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    on_path = shutil.which("pg_ctl")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


class Server:
    """A PostgreSQL cluster of our own, which does not run as root."""

    def __init__(self, directory: Path, programs: Path) -> None:
        self.directory, self.programs = directory, programs
        self.data, self.port = directory / "data", free_port()
        self._as_user: list[str] = []
        if os.geteuid() == 0:
            owner = pwd.getpwnam("postgres")
            os.chown(directory, owner.pw_uid, owner.pw_gid)
            # Not by `subprocess`, whose way to do it does not go with gRPC's threads.
            ids = (f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups")
            self._as_user = ["setpriv", *ids]
        self._run("initdb", "-D", self.data, "-U", "comigs", "-A", "trust", "-N")

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.directory}"
        log = self.directory / "log"
        self._run("pg_ctl", "-D", self.data, "-l", log, "-w", "-o", options, "start")

    def stop(self, mode: str = "immediate") -> None:
        self._run("pg_ctl", "-D", self.data, "-m", mode, "-w", "stop")

    def url(self, name: str) -> str:
        """Of a new database."""
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"create database {name}")
        return self._url(name)

    def _url(self, name: str) -> str:
        return f"postgresql://comigs:secret@127.0.0.1:{self.port}/{name}"

    def _run(self, program: str, *arguments: object) -> None:
        command = [*self._as_user, str(self.programs / program), *map(str, arguments)]
        # A server that is started would keep a pipe open.
        output = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        subprocess.run(command, cwd=self.directory, check=True, **output)


def rows(url: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(query).fetchall()


def replay(fleet: Fleet, bundle: Bundle, url: str, lives: list[dict[int, bytes]]) -> bytes:
    """The generalist that the acknowledged updates amount to; every one was counted once."""
    known = dict(rows(url, "select name, id from devices"))
    order = sorted(range(len(lives)), key=lambda i: known[f"device {i}"])
    generalist = wire.encode(bundle.manifest, adapters.load_fresh(bundle))
    (count,) = rows(url, "select count(*) from rounds where status = 'aggregated'")[0]
    for number in range(1, count + 1):
        updates = [lives[index].pop(number) for index in order]
        assert updates == [train(bundle, generalist, index, number) for index in order]
        generalist = wire.encode(bundle.manifest, {"generalist": mean_of(bundle, updates)})
    assert not any(lives), "an update was acknowledged and is in no round"
    assert rows(url, "select count(*) from updates") == [(count * len(lives),)]
    return generalist


def live(
    bundle: Bundle, client: Client, seed: int, turns: threading.Semaphore | None = None
) -> tuple[dict[int, bytes], bytes]:
    """Takes part to the end, in as many rounds at a time as there are `turns`."""
    acknowledged: dict[int, bytes] = {}
    while (reply := client.check_in(2)).action != pb.CheckInReply.FINISH:
        if reply.action == pb.CheckInReply.TRAIN:
            if turns:
                turns.acquire()
            update = train(bundle, client.download(reply.round), seed, reply.round)
            assert client.upload(header(reply.round), update).accepted
            acknowledged[reply.round] = update
    return acknowledged, finish(client, reply.round)
