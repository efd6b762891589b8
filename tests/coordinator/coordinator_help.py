"""A hand-made bundle, a coordinator process, and devices that pretend to train."""

from __future__ import annotations

import datetime
import functools
import glob
import hashlib
import json
import math
import os
import queue
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from typer.testing import CliRunner

from coordinator.administrator import Administrator
from coordinator.tls import CA_KEY_FILE
from edge_runtime import adapters, cli, wire
from edge_runtime.bundle import (
    FORMAT_VERSION,
    Bundle,
    contract_sha256,
    list_files,
    open_bundle,
    write_manifest,
)
from edge_runtime.client import Client, connect_to_enrol, enrol
from edge_runtime.connection import Patience, Traffic, Unproven
from edge_runtime.identity import Identity, new_key, read_identity
from edge_runtime.invitation import decode
from protos import coordinator_pb2 as pb
from protos import manifest_pb2

TIMEOUT = 30.0
# What `comigs device run` has if it is not told otherwise: a coordinator that is killed again and
# again, on a busy machine, may be away for longer than the above. More where it is killed often.
PATIENCE = Patience(1200.0 if os.environ.get("COMIGS_SOAK") else 120.0, on_wait=lambda _: None)


def make_manifest(width: int = 16, rank: int = 2) -> manifest_pb2.Manifest:
    """One block, one LoRA pair per expert, one specialist and a router."""
    manifest = manifest_pb2.Manifest(format_version=FORMAT_VERSION)
    manifest.base.sha256 = hashlib.sha256(b"a base").hexdigest()
    manifest.base.architecture = "gpt2"
    manifest.mixture.rank, manifest.mixture.alpha = rank, 16
    manifest.mixture.specialists = 1
    manifest.tier.name = "phone-low"
    pair = {"h.0.mlp.c_fc.lora_A.weight": [rank, width], "h.0.mlp.c_fc.lora_B.weight": [8, rank]}
    contents = {
        "generalist": pair,
        "specialist.1": pair,
        "router": {"h.0.router.weight": [2, width]},
    }
    for name, tensors in contents.items():
        role = manifest.roles.add(name=name, shared=name == "generalist")
        role.path = adapters.ROUTER_FILE if name == "router" else f"adapters/{name}"
        for module, shape in tensors.items():
            manifest.tensors.add(
                name=f"{name}/{module}", role=name, shape=shape, dtype="float32", offset=role.size
            )
            role.size += math.prod(shape)
    return manifest


def make_bundle(path: Path, width: int = 16, rank: int = 2) -> Bundle:
    manifest = make_manifest(width, rank)
    generator = np.random.default_rng(0)
    fresh = {
        role.name: generator.normal(size=role.size).astype(np.float32) for role in manifest.roles
    }
    adapters.save_directory(manifest, fresh, path)
    list_files(manifest, path)
    write_manifest(manifest, path)
    return open_bundle(path)


def serve_command(bundle: Path, state: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "coordinator", "serve"]
    return [*command, "--bundle", str(bundle), "--state", str(state), *options]


def misused(bundle: Bundle, *options: str) -> str:
    """What `comigs serve` says to options that it refuses before it does anything."""
    command = serve_command(bundle.path, bundle.path / "state", "--listen", "127.0.0.1:0", *options)
    done = CliRunner().invoke(cli.build("serve"), command[3:])
    assert done.exit_code == 2, (options, done.output)
    return " ".join(done.output.replace("│", " ").split())


class Served:
    """`comigs serve` as a process; its events as they come."""

    def __init__(
        self,
        bundle: Path,
        state: Path,
        *options: str,
        listen: str = "127.0.0.1:0",
        program: list[str] | None = None,
    ):
        """`program`: what to start instead of this version's `comigs`."""
        self.events: list[dict[str, Any]] = []
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue()
        command = serve_command(bundle, state, "--listen", listen, "--format", "json", *options)
        if program:
            command[:3] = program
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(json.loads(line))
        self._queue.put(None)

    def wait_for(self, event: str, **fields: Any) -> dict[str, Any]:
        """The next such event; those before it are in `events`."""
        end = time.monotonic() + 4 * TIMEOUT
        while True:
            try:
                got = self._queue.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {event}, but {self.events[-5:]}") from None
            assert got is not None, f"the coordinator ended without {event}: {self.stderr()}"
            self.events.append(got)
            if got["event"] == event and fields.items() <= got.items():
                return got

    def has_said(self, event: str) -> bool:
        """Whether there was such an event so far."""
        while not self._queue.empty():
            if (got := self._queue.get()) is not None:
                self.events.append(got)
        return any(got["event"] == event for got in self.events)

    def ready(self) -> str:
        """Its address, once it listens."""
        return str(self.listening["address"])

    @functools.cached_property
    def listening(self) -> dict[str, Any]:
        return self.wait_for("listening")

    def administrator(self) -> Identity:
        identity = read_identity(Path(self.listening["admin"]))
        assert identity is not None
        return identity

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> list[dict[str, Any]]:
        """Waits for it to end by itself with success; all its events."""
        assert self.process.wait(timeout=TIMEOUT) == 0, self.stderr()
        self._reader.join()
        while (got := self._queue.get()) is not None:
            self.events.append(got)
        return self.events

    def stop(self) -> list[dict[str, Any]]:
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def stderr(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()


class Fleet:
    """Starts coordinators and clients of one bundle, and ends them all."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.state = directory / "state"
        self._served: list[Served] = []
        self._clients: list[Client] = []

    def bundle(self, width: int = 16, rank: int = 2) -> Bundle:
        return make_bundle(self.directory / f"bundle-{width}-{rank}", width, rank)

    def serve(self, bundle: Bundle, *options: str, **more: Any) -> Served:
        served = Served(bundle.path, more.pop("state", self.state), *options, **more)
        self._served.append(served)
        return served

    def client(
        self,
        who: Identity | Unproven,
        patience: Patience | None = None,
        traffic: Traffic | None = None,
    ) -> Client:
        client = Client(who, patience=patience or PATIENCE, traffic=traffic)
        self._clients.append(client)
        return client

    def enrolled(self, served: Served, bundle: Bundle, *names: str) -> list[Client]:
        """One enrolled client per name."""
        clients = []
        for invitation in invited(served, *names):
            traffic = Traffic()
            identity = enrol_with(invitation, bundle, traffic=traffic)
            clients.append(self.client(identity, traffic=traffic))
        return clients

    def close(self) -> None:
        for client in self._clients:
            client.close()
        for served in self._served:
            if served.process.poll() is None:
                served.kill()


def invited(served: Served, *names: str, seconds: float = 600) -> list[pb.Invitation]:
    """One invitation per name."""
    with Administrator(served.administrator()) as administrator:
        return [decode(administrator.invite(name, seconds).invitation) for name in names]


def enrol_with(
    invitation: pb.Invitation,
    bundle: Bundle,
    *,
    key: str | None = None,
    patience: Patience | None = None,
    traffic: Traffic | None = None,
) -> Identity:
    """What a device gets for `invitation`; with a new key unless one is given."""
    with connect_to_enrol(invitation, patience or PATIENCE) as connection:
        return enrol(
            connection,
            invitation,
            key=key or new_key(),
            contract=contract_sha256(bundle.manifest),
            tier=bundle.manifest.tier.name,
            traffic=traffic or Traffic(),
        )


def aged(identity: Identity, state: Path, left: datetime.timedelta) -> Identity:
    """`identity` as it is when `left` remains of its certificate's thirty days."""
    certificate = x509.load_pem_x509_certificate(identity.certificate.encode())
    key = load_pem_private_key((state / CA_KEY_FILE).read_bytes(), password=None)
    end = datetime.datetime.now(datetime.UTC) + left
    begin = end - datetime.timedelta(days=30)
    builder = (
        x509.CertificateBuilder(extensions=list(certificate.extensions))
        .subject_name(certificate.subject)
        .issuer_name(certificate.issuer)
        .public_key(certificate.public_key())
        .serial_number(certificate.serial_number)
        .not_valid_before(begin)
        .not_valid_after(end)
    )
    pem = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    return replace(identity, certificate=pem.decode(), received=begin.timestamp())


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for what only the coordinator can tell."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def files_of(state: Path, pattern: str) -> list[Path]:
    """What is there of a coordinator that may be deleting: Path.glob fails where a directory goes
    meanwhile."""
    return [state / name for name in glob.glob(pattern, root_dir=state)]


def seen(administrator: Administrator, name: str) -> bool:
    """Whether a call of that device has begun; one that is to wait is waiting then."""
    return any(entry.last_seen for entry in administrator.devices() if entry.name == name)


def ids(state: Path) -> dict[str, str]:
    """Name -> id of the devices that are not revoked."""
    with sqlite3.connect(state / "coordinator.sqlite3") as connection:
        return dict(
            connection.execute("select name, id from devices where revoked_at is null").fetchall()
        )


def train(bundle: Bundle, generalist: bytes, device: int, number: int) -> bytes:
    """What device `device` makes of `generalist` in round `number`; the same each time."""
    vectors = wire.decode(bundle.manifest, generalist)
    noise = np.random.default_rng([device, number]).normal(size=vectors["generalist"].size)
    return wire.encode(
        bundle.manifest, {"generalist": vectors["generalist"] + noise.astype(np.float32)}
    )


def header(number: int, tokens: int = 100, **fields: Any) -> pb.UploadHeader:
    return pb.UploadHeader(round=number, tokens=tokens, **fields)


def check_in_until(client: Client, action: pb.CheckInReply.Action, wait: float = 5) -> Any:
    """Checks in until the answer is `action`."""
    end = time.monotonic() + TIMEOUT
    while (reply := client.check_in(wait)).action != action:
        assert time.monotonic() < end, f"the coordinator keeps saying {reply}"
        time.sleep(0.02)
    return reply


def finish(client: Client, number: int) -> bytes:
    """The final generalist, and the coordinator is told that it is here."""
    content = client.download(number)
    client.check_in(0, stored_round=number)
    return content


def in_parallel(*tasks: Callable[[], Any]) -> list[Any]:
    """Results of `tasks`, each run in a thread; the first error is raised at once, since the others
    may wait for what failed."""
    results: list[Any] = [None] * len(tasks)
    ended: queue.Queue[BaseException | None] = queue.Queue()

    def run(index: int) -> None:
        try:
            results[index] = tasks[index]()
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    for index in range(len(tasks)):
        threading.Thread(target=run, args=(index,), daemon=True).start()
    for _ in tasks:
        if (error := ended.get()) is not None:
            raise error
    return results


def comigs(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge_runtime", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def join_round(*clients: Client) -> list[Any]:
    """Checks all in together until each is told to train."""
    return in_parallel(
        *(lambda c=client: check_in_until(c, pb.CheckInReply.TRAIN) for client in clients)
    )


def mean_of(bundle: Bundle, payloads: list[bytes], weights: list[int] | None = None) -> Any:
    """The mean by numpy, in float64; payloads in the order of device ids."""
    vectors = [wire.decode(bundle.manifest, payload)["generalist"] for payload in payloads]
    stacked = np.stack(vectors).astype(np.float64)
    shares = np.array(weights or [1] * len(payloads), np.float64)[:, None]
    return ((stacked * shares).sum(axis=0) / shares.sum()).astype(np.float32)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
