"""`comigs bench coordinator`: one round of many devices, beside the least that receiving costs.

The coordinator is `comigs serve` as anybody runs it, in a process of its own. Devices are real gRPC
clients with certificates of its authority, a few processes with many channels each. The updates are
of the size of GPT-2's generalist with rank 8, attention included. A round is

* `check_in`: all devices, which are connected and wait, are told to train;
* `download`: each gets the generalist;
* `upload`: all send their updates at once; until the next generalist is on the disk.

The bare loop is the same devices sending the same messages to a server that throws them away
(`benchmarks.load_floor`), and numpy's sum of as many vectors. That has no counterpart of the
download, so `ratio_to_bare_loop` compares the uploads; `ratio_with_downloads` compares both ways.

A few of the devices check in all the time meanwhile; how long they wait for an answer is the
latency of a check-in. What came out is compared with the mean that it must be.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, TypedDict

import numpy as np

from benchmarks.load_devices import COORDINATOR, FLOOR
from benchmarks.machine import Machine, machine
from coordinator.cohorts import UNNAMED
from coordinator.state import State
from coordinator.tls import CA_FILE, Authority
from edge_runtime import adapters, wire
from edge_runtime.bundle import (
    FORMAT_VERSION,
    Bundle,
    contract_sha256,
    list_files,
    open_bundle,
    write_manifest,
)
from edge_runtime.identity import Identity, new_key, public_key_of
from edge_runtime.processor import usable_cores
from protos import manifest_pb2 as pb

MIB = 1024**2
FLOWER = Path(__file__).parent / "peers" / "flower.py"
HOST = "127.0.0.1"
# Devices that check in all the time.
POLLERS = 8
DEADLINE_SECONDS = 3600
# Of the coordinator's events so many are shown when the benchmark fails.
LATEST = 20
LAST_WORDS_SECONDS = 15


class Phases(TypedDict):
    """Of one round, in seconds."""

    check_in: float
    download: float
    upload: float
    upload_cpu: float
    """Processor time of the coordinator in `upload`."""
    devices_cpu: float
    """Likewise, of the devices; without those that check in all the time."""
    broken_downloads: int
    """That were begun again; likewise the next."""
    broken_uploads: int


class Floor(TypedDict):
    """Of one bare loop, in seconds."""

    upload: float
    upload_cpu: float
    """Processor time of the server in `upload`."""
    devices_cpu: float
    """Likewise, of the devices, as above."""
    sum: float
    sum_cpu: float
    """Processor time of `sum`."""
    download: float
    raw_tls_upload: float


class Peer(TypedDict):
    """What `benchmarks/peers/flower.py` prints."""

    name: str
    devices: int
    round_seconds: float
    """From the model's going out until its successor."""
    peak_rss_mib: float
    """Of all its server processes together."""
    processes: dict[str, float]
    """The same for each."""
    settings: str


class Result(TypedDict):
    """What `comigs bench coordinator --format json` prints. Medians over the repetitions."""

    benchmark: str
    machine: Machine
    devices: int
    round_seconds: float
    ratio_to_bare_loop: float
    """The round's uploads to the bare loop's with its sum."""
    ratio_with_downloads: float
    """The whole round to the bare loop's uploads, sum and downloads."""
    processor_time_ratio: float
    """As `ratio_to_bare_loop`, by the processor time of both ends, which other programs on the same
    cores change less."""
    peak_rss_mib: float
    """Of the coordinator's process, from its start to the last round's end."""
    checkin_p99_ms: float
    """Of check-ins that were sent while a round went on."""
    peers: list[Peer]
    missing: dict[str, str]
    """Peers that were asked for and could not run, with the reason."""
    update_bytes: int
    repetitions: int
    rounds: list[Phases]
    bare_loops: list[Floor]
    checkins: int
    checkin_median_ms: float
    checkin_max_ms: float
    idle_rss_mib: float
    """Of the coordinator with all devices connected, before the first round."""
    client_processes: int
    cores: int
    versions: dict[str, str]


def run(
    *,
    devices: int,
    processes: int,
    repetitions: int,
    peers_python: Path | None,
    peer_devices: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Result:
    """Runs rounds and bare loops in turns, then the peers.

    Args:
        peers_python: of an environment that has `flwr`; None for no peers.
        peer_devices: in their rounds; None: as many as in ours.

    Raises:
        RuntimeError: a process ended early, or the aggregate is not the mean of the updates.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        progress(f"enrolling {devices} devices")
        bundle = make_bundle(folder / "bundle")
        payload = wire.encode(bundle.manifest, adapters.load_fresh(bundle))
        (folder / "payload").write_bytes(payload)
        state = folder / "state"
        floor = enrol(state, bundle, devices, folder / "identities.json")
        served = stack.enter_context(_Served(bundle.path, state, devices, repetitions))
        bare = stack.enter_context(_Process("benchmarks.load_floor"))
        ports = bare.ask({**floor, "bytes": len(payload)})
        crowd = stack.enter_context(_Crowd(folder, POLLERS, devices, processes))
        pollers = stack.enter_context(_Crowd(folder, 0, POLLERS, 1))

        progress("connecting")
        crowd.do("connect", service=FLOOR, address=f"{HOST}:{ports['grpc']}")
        crowd.do("connect", service=COORDINATOR, address=served.address)
        pollers.do("connect", service=COORDINATOR, address=served.address)
        idle = rss(served.process.pid)["VmRSS"]
        rounds: list[Phases] = []
        floors: list[Floor] = []
        latencies: list[float] = []
        for repetition in range(repetitions):
            progress(f"bare loop {repetition + 1} of {repetitions}")
            floors.append(_bare_loop(crowd, bare, ports, devices, payload))
            progress(f"round {repetition + 1} of {repetitions}")
            if repetition == 0:
                pollers.do("poll")
            rounds.append(_round(crowd, served))
            end = time.monotonic()
            began = end - sum(rounds[-1][name] for name in ("check_in", "download", "upload"))
            polls = pollers.do("polled")[0]
            latencies += [seconds for when, seconds in polls if began <= when <= end]
            _check(state, bundle, payload, devices, repetition + 2)
        peak = rss(served.process.pid)["VmHWM"]
    result = _result(devices, processes, payload, rounds, floors, latencies, idle, peak)
    if peers_python is not None:
        progress("a round of Flower's SuperLink")
        found = _flower(peers_python, peer_devices or devices, processes, len(payload))
        if isinstance(found, str):
            result["missing"]["Flower SuperLink"] = found
        else:
            result["peers"].append(found)
    return result


def _flower(python: Path, devices: int, processes: int, size: int) -> Peer | str:
    """A round of as many nodes with updates of `size` bytes; or why there was none."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        authority = Authority.open(folder, timedelta(days=1))
        made = authority.server_credentials([])
        (folder / "key.pem").write_bytes(made.private_key)
        (folder / "chain.pem").write_bytes(made.certificate_chain)
        try:
            done = subprocess.run(
                [
                    *(str(python), str(FLOWER), "--devices", str(devices)),
                    *("--processes", str(processes), "--size", str(size // 4)),
                    *("--ca", str(folder / CA_FILE), "--key", str(folder / "key.pem")),
                    *("--chain", str(folder / "chain.pem")),
                ],
                capture_output=True,
                text=True,
                check=False,
            )
        except FileNotFoundError:
            return f"there is no {python}; benchmarks/peers/README.md says how to set it up"
    if done.returncode:
        return done.stderr.strip()[-2000:]
    peer: Peer = json.loads(done.stdout.splitlines()[-1])
    return peer


def _bare_loop(
    crowd: _Crowd, bare: _Process, ports: dict[str, int], devices: int, payload: bytes
) -> Floor:
    used, busy = cpu_seconds(bare.pid), crowd.cpu_seconds()
    upload = _timed(lambda: crowd.do("upload", service=FLOOR, number=1))
    used, busy = cpu_seconds(bare.pid) - used, crowd.cpu_seconds() - busy
    download = _timed(lambda: crowd.do("download", service=FLOOR, number=1))
    crowd.do("connect_raw", address=f"{HOST}:{ports['raw']}")
    raw = _timed(lambda: crowd.do("upload_raw"))
    vector = np.frombuffer(payload[-(len(payload) // 4 * 4) :], "<f4")
    total = np.zeros(vector.size)

    def add() -> None:
        for _ in range(devices):
            np.add(total, vector, out=total)

    adding = time.process_time()
    summed = _timed(add)
    # The pollers have no channel to that server; as few as they are, the rest stands for all.
    whole = devices / (devices - POLLERS)
    return {
        "upload": upload * whole,
        "upload_cpu": used * whole,
        "devices_cpu": busy,
        "sum": summed,
        "sum_cpu": time.process_time() - adding,
        "download": download * whole,
        "raw_tls_upload": raw * whole,
    }


def _round(crowd: _Crowd, served: _Served) -> Phases:
    began = time.monotonic()
    (number,) = set(crowd.do("check_in"))
    told = time.monotonic()
    broken_downloads = sum(crowd.do("download", service=COORDINATOR, number=number))
    downloaded, used = time.monotonic(), cpu_seconds(served.process.pid)
    busy = crowd.cpu_seconds()
    broken_uploads = sum(crowd.do("upload", service=COORDINATOR, number=number))
    served.wait_for("round_closed")
    return {
        "check_in": told - began,
        "download": downloaded - told,
        "upload": time.monotonic() - downloaded,
        "upload_cpu": cpu_seconds(served.process.pid) - used,
        "devices_cpu": crowd.cpu_seconds() - busy,
        "broken_downloads": broken_downloads,
        "broken_uploads": broken_uploads,
    }


def _check(state: Path, bundle: Bundle, payload: bytes, devices: int, number: int) -> None:
    """Whether the generalist of round `number` is the mean of what the devices sent."""
    (file,) = (state / "generalists").glob(f"{number}-*")
    expected = bytearray(payload)
    expected[-4:] = np.array((devices - 1) / 2, "<f4").tobytes()
    right = wire.decode(bundle.manifest, bytes(expected))
    got = wire.decode(bundle.manifest, file.read_bytes())
    for role, vector in right.items():
        if not np.array_equal(vector, got[role]):
            raise RuntimeError(f"the {role} of round {number} is not the mean of the updates")


def _result(
    devices: int,
    processes: int,
    payload: bytes,
    rounds: list[Phases],
    floors: list[Floor],
    latencies: list[float],
    idle: float,
    peak: float,
) -> Result:
    def ratio(phases: Sequence[str], parts: Sequence[str]) -> float:
        return median(
            sum(r[p] for p in phases) / sum(f[p] for p in parts)  # type: ignore[literal-required]
            for r, f in zip(rounds, floors, strict=True)
        )

    ordered = sorted(1000 * seconds for seconds in latencies)
    return {
        "benchmark": "coordinator",
        "machine": machine(),
        "devices": devices,
        "round_seconds": median(r["check_in"] + r["download"] + r["upload"] for r in rounds),
        "ratio_to_bare_loop": ratio(["upload"], ["upload", "sum"]),
        "ratio_with_downloads": ratio(
            ["check_in", "download", "upload"], ["upload", "sum", "download"]
        ),
        "processor_time_ratio": ratio(
            ["upload_cpu", "devices_cpu"], ["upload_cpu", "devices_cpu", "sum_cpu"]
        ),
        "peak_rss_mib": peak,
        "checkin_p99_ms": ordered[math.ceil(0.99 * len(ordered)) - 1],
        "peers": [],
        "missing": {},
        "update_bytes": len(payload),
        "repetitions": len(rounds),
        "rounds": rounds,
        "bare_loops": floors,
        "checkins": len(ordered),
        "checkin_median_ms": median(ordered),
        "checkin_max_ms": ordered[-1],
        "idle_rss_mib": idle,
        "client_processes": processes + 1,
        "cores": usable_cores(),
        "versions": {
            "python": platform.python_version(),
            **{n: version(n) for n in ("grpcio", "numpy", "protobuf", "sqlalchemy")},
        },
    }


def make_bundle(path: Path) -> Bundle:
    """A bundle with the roles of GPT-2 124M at rank 8, attention included, and no programs."""
    manifest = pb.Manifest(format_version=FORMAT_VERSION, minimum_reader_version=FORMAT_VERSION)
    manifest.base.architecture, manifest.base.sha256 = "gpt2", "0" * 64
    manifest.mixture.rank = rank = 8
    width = 768
    mlp = {"mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)}
    attention = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
    for name, maps in (("generalist", attention | mlp), ("specialist.1", mlp)):
        role = manifest.roles.add(name=name, shared=name == "generalist", path=f"adapters/{name}")
        for layer in range(12):
            for module, (inputs, outputs) in maps.items():
                for half, shape in (("A", [rank, inputs]), ("B", [outputs, rank])):
                    manifest.tensors.add(
                        name=f"{name}/transformer.h.{layer}.{module}.lora_{half}.weight",
                        role=name,
                        shape=shape,
                        dtype="float32",
                        offset=role.size,
                    )
                    role.size += math.prod(shape)
    generator = np.random.default_rng(0)
    fresh = {r.name: generator.normal(size=r.size).astype(np.float32) for r in manifest.roles}
    adapters.save_directory(manifest, fresh, path)
    list_files(manifest, path)
    write_manifest(manifest, path)
    return open_bundle(path)


def enrol(state: Path, bundle: Bundle, devices: int, out: Path) -> dict[str, str]:
    """Enrols devices in a new state directory as the coordinator would, but without asking it.

    Returns:
        Key, certificate chain and authority (PEM) for another server that they trust.
    """
    lifetime = timedelta(days=1)
    known = []
    with contextlib.closing(State(state)) as kept:
        authority = Authority.open(state, lifetime)
        for index in range(devices):
            name, enrolment = f"device-{index}", f"{index:032x}"
            key = new_key()
            issued = authority.issue_to_device(public_key_of(key), name, enrolment)
            kept.invite(name, name.encode(), time.time() + 60)
            kept.enrol(
                name,
                cohort=UNNAMED,
                contract_sha256=contract_sha256(bundle.manifest),
                enrolment=enrolment,
                key_sha256=b"",
                tier=None,
                valid_until=issued.valid_until,
            )
            known.append(
                asdict(
                    Identity(
                        coordinator="", ca=authority.pem.decode(), certificate=issued.pem, key=key
                    )
                )
            )
    out.touch(mode=0o600)
    out.write_text(json.dumps(known))
    made = authority.server_credentials([])
    return {
        "key": made.private_key.decode(),
        "chain": made.certificate_chain.decode(),
        "ca": authority.pem.decode(),
    }


def rss(pid: int) -> dict[str, float]:
    """Resident set now (VmRSS) and at its largest (VmHWM), in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 / MIB for name in ("VmRSS", "VmHWM")}


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used, in user and kernel mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _Process:
    """A module as a process that answers JSON lines."""

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def tell(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a process of the benchmark ended early; see its message above")
        return json.loads(line)

    def ask(self, command: dict[str, Any]) -> Any:
        self.tell(command)
        return self.answer()

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


class _Crowd:
    """Devices `first` to `stop` in some processes, which act at once."""

    def __init__(self, folder: Path, first: int, stop: int, processes: int) -> None:
        self._processes = [_Process("benchmarks.load_devices") for _ in range(processes)]
        bounds = np.linspace(first, stop, processes + 1, dtype=int).tolist()
        for process, begin, end in zip(self._processes, bounds, bounds[1:], strict=False):
            process.ask(
                {
                    "do": "make",
                    "payload": str(folder / "payload"),
                    "identities": str(folder / "identities.json"),
                    "first": begin,
                    "stop": end,
                }
            )

    def do(self, action: str, **arguments: Any) -> list[Any]:
        for process in self._processes:
            process.tell({"do": action, **arguments})
        return [process.answer() for process in self._processes]

    def cpu_seconds(self) -> float:
        """Processor time that their processes have used."""
        return sum(cpu_seconds(process.pid) for process in self._processes)

    def __enter__(self) -> _Crowd:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.__exit__(*error)


class _Served:
    """`comigs serve` for rounds of all devices."""

    def __init__(self, bundle: Path, state: Path, devices: int, rounds: int) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "coordinator", "serve", "--format", "json"),
                *("--bundle", str(bundle), "--state", str(state), "--listen", f"{HOST}:0"),
                *("--rounds", str(rounds + 1), "--min-devices", str(devices)),
                *("--deadline", str(DEADLINE_SECONDS)),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._latest: deque[str] = deque(maxlen=LATEST)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.address = str(self.wait_for("listening")["address"])

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._latest.append(line)
            self._events.put(json.loads(line))
        self._events.put(None)

    def wait_for(self, name: str) -> dict[str, Any]:
        while (event := self._events.get()) is not None:
            if event["event"] == name:
                return event
        raise RuntimeError("the coordinator ended early; see its message above")

    def __enter__(self) -> _Served:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After a failure, lets the coordinator say what it has to say."""
        if kind is not None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(LAST_WORDS_SECONDS)
        self.process.kill()
        self.process.wait()
        if kind is not None:
            self._reader.join(LAST_WORDS_SECONDS)
            sys.stderr.write("the coordinator's latest events:\n" + "".join(self._latest))


def _timed(act: Callable[[], object]) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


def table(result: Result) -> Iterator[str]:
    """Lines for people."""
    yield (
        f"{result['devices']} devices, updates of {result['update_bytes'] / 1e6:.1f} MB, "
        f"{result['cores']} cores, {result['repetitions']} repetitions"
    )
    for name in ("check_in", "download", "upload", "upload_cpu", "devices_cpu"):
        seconds = ", ".join(f"{r[name]:.2f}" for r in result["rounds"])
        yield f"  {name}: {seconds} s"
    for name in ("upload", "upload_cpu", "devices_cpu", "sum", "download", "raw_tls_upload"):
        seconds = ", ".join(f"{f[name]:.2f}" for f in result["bare_loops"])  # type: ignore[literal-required]
        yield f"  bare {name}: {seconds} s"
    yield (
        f"a round takes {result['round_seconds']:.1f} s; its uploads "
        f"{result['ratio_to_bare_loop']:.2f} of the bare loop, with downloads "
        f"{result['ratio_with_downloads']:.2f}; by processor time, devices included, "
        f"{result['processor_time_ratio']:.2f}"
    )
    yield (
        f"the coordinator's memory: {result['peak_rss_mib']:.0f} MiB at most, "
        f"{result['idle_rss_mib']:.0f} with all connected"
    )
    yield (
        f"{result['checkins']} check-ins meanwhile: median {result['checkin_median_ms']:.1f} ms, "
        f"99 % within {result['checkin_p99_ms']:.1f} ms, slowest {result['checkin_max_ms']:.1f} ms"
    )
    for peer in result["peers"]:
        yield (
            f"{peer['name']}, {peer['devices']} devices: {peer['round_seconds']:.1f} s, "
            f"{peer['peak_rss_mib']:.0f} MiB"
        )
    for name, reason in result["missing"].items():
        yield f"{name} did not run: {reason}"
