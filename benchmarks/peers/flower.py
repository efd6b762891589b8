"""Flower's side of `comigs bench coordinator --peers`: one FedAvg round of many nodes.

Runs in an environment of its own that has `flwr`, and prints one JSON object. SuperLink runs as its
command starts it, over TLS; its state is in memory, which is its default, so that nothing survives
a kill. The ServerApp is its library's FedAvg on one array. Nodes are Flower's own SuperNode
connections (`http_request_response`), each with its key and its HTTP connection, a thread for each
in a few processes. They do what a SuperNode does with a message, without starting a ClientApp: pull
its objects, confirm, push the reply; and they poll as often as a SuperNode does.

    python flower.py --devices 100 --size 1179648 --ca ca.pem --key key.pem --chain chain.pem
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

SETTINGS = "state in memory, TLS, ServerApp in a subprocess, FedAvg; nodes poll every 3 s"
POLL_SECONDS = 3.0  # flwr.supernode.start_client_internal
SERVER_APP = """
import json, os, time
import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

@app.main()
def main(grid, context):
    nodes = int(os.environ["BENCH_DEVICES"])
    while len(list(grid.get_node_ids())) < nodes:
        time.sleep(0.2)
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=nodes,
                      min_available_nodes=nodes)
    initial = ArrayRecord([np.ones(int(os.environ["BENCH_SIZE"]), np.float32)])
    began = time.monotonic()
    result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=1, timeout=3600)
    seconds = time.monotonic() - began
    mean = float(result.arrays.to_numpy_ndarrays()[0].mean())
    with open(os.environ["BENCH_OUT"], "w") as file:
        json.dump({"round_seconds": seconds, "mean": mean}, file)
"""
CLIENT_APP = """
from flwr.clientapp import ClientApp

app = ClientApp()
"""
PROJECT = """
[project]
name = "bench"
version = "1.0.0"
dependencies = ["flwr"]

[tool.flwr.app]
publisher = "bench"

[tool.flwr.app.components]
serverapp = "bench.server_app:app"
clientapp = "bench.client_app:app"
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--size", type=int, required=True, help="Numbers in an update.")
    parser.add_argument("--ca", required=True)
    parser.add_argument("--key")
    parser.add_argument("--chain")
    parser.add_argument("--address", help="Only be nodes of the SuperLink there.")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what it started ends, too
    if given.address:
        be_nodes(given.address, given.ca, given.devices, given.size)
    else:
        print(json.dumps(run(given)))


def run(given: argparse.Namespace) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        app = folder / "app" / "bench"
        app.mkdir(parents=True)
        (app / "__init__.py").touch()
        (app / "server_app.py").write_text(SERVER_APP)
        (app / "client_app.py").write_text(CLIENT_APP)
        (app.parent / "pyproject.toml").write_text(PROJECT)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        address = f"127.0.0.1:{port}"
        home = folder / "home"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "bench"\n[superlink.bench]\naddress = "{address}"\n'
            f'root-certificates = "{given.ca}"\n'
        )
        out = folder / "out.json"
        environment = {
            **os.environ,
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "BENCH_DEVICES": str(given.devices),
            "BENCH_SIZE": str(given.size),
            "BENCH_OUT": str(out),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        commands = Path(sys.executable).parent
        log = stack.enter_context((folder / "log").open("w+"))
        superlink = stack.enter_context(
            running(
                [
                    *(
                        str(commands / "flower-superlink"),
                        "--disable-runtime-dependency-installation",
                    ),
                    *("--ssl-certfile", given.chain, "--ssl-keyfile", given.key),
                    *("--ssl-ca-certfile", given.ca, "--host", "127.0.0.1", "--port", str(port)),
                ],
                env=environment,
                stdout=log,
                stderr=log,
            )
        )
        wait_for_port(port, superlink)
        memory = Peaks(superlink.pid)
        each = [
            given.devices * (i + 1) // given.processes - given.devices * i // given.processes
            for i in range(given.processes)
        ]
        nodes = [
            stack.enter_context(
                running(
                    [
                        *(sys.executable, __file__, "--address", address, "--ca", given.ca),
                        *("--devices", str(count), "--size", str(given.size)),
                    ],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
            )
            for count in each
        ]
        for node in nodes:
            assert node.stdout is not None
            if node.stdout.readline() != "ready\n":
                raise RuntimeError(tail(log))
        subprocess.run(
            [str(commands / "flwr"), "run", str(app.parent), "bench"],
            env=environment,
            check=True,
            stdout=log,
            stderr=log,
        )
        while not out.exists() or not out.read_text().endswith("}"):
            if superlink.poll() is not None:
                raise RuntimeError(tail(log))
            memory.look()
            time.sleep(0.2)
        memory.look()
        result = json.loads(out.read_text())
        if abs(result["mean"] - 1) > 1e-3:
            raise RuntimeError(f"the mean of ones is {result['mean']}")
        return {
            "name": f"Flower SuperLink {version('flwr')}",
            "devices": given.devices,
            "round_seconds": result["round_seconds"],
            "peak_rss_mib": sum(memory.peaks.values()),
            "processes": memory.named(),
            "settings": SETTINGS,
        }


class Peaks:
    """Largest resident sets of SuperLink and the processes that it starts."""

    def __init__(self, pid: int) -> None:
        self._root = pid
        self._names: dict[int, str] = {}
        self.peaks: dict[int, float] = {}

    def look(self) -> None:
        parents = {}
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                fields = dict(
                    line.split(":\t", 1)
                    for line in status.read_text().splitlines()
                    if ":\t" in line
                )
                parents[int(fields["Pid"])] = int(fields["PPid"]), fields
        for pid, (_, fields) in parents.items():
            above = pid
            while above not in (self._root, 0, 1) and above in parents:
                above = parents[above][0]
            if above == self._root and "VmHWM" in fields:
                self.peaks[pid] = int(fields["VmHWM"].split()[0]) / 1024
                self._names[pid] = fields["Name"]

    def named(self) -> dict[str, float]:
        """MiB, by name and process id."""
        return {f"{self._names[pid]} {pid}": peak for pid, peak in self.peaks.items()}


def be_nodes(address: str, ca: str, count: int, size: int) -> None:
    """Connects `count` nodes and answers one message with each."""
    import numpy as np
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
    )
    from flwr.supercore.inflatable.inflatable_utils import (
        pull_and_inflate_object_from_tree,
        push_objects,
    )
    from flwr.supernode.fleet_http_connection import http_request_response

    ready, finished = threading.Semaphore(0), threading.Semaphore(0)
    authority = Path(ca).read_bytes()
    update = np.ones(size, np.float32)

    def live() -> None:
        with http_request_response(address, False, authority) as (
            _node,
            receive,
            send,
            _get_run,
            _get_fab,
            pull,
            push,
            confirm,
        ):
            ready.release()
            while (received := receive()) is None:
                time.sleep(POLL_SECONDS)
            header, tree = received
            run_id = header.metadata.run_id
            message = pull_and_inflate_object_from_tree(
                tree,
                lambda object_id: pull(run_id, object_id),
                lambda object_id: confirm(run_id, object_id),
                return_type=Message,
            )
            message.metadata.__dict__["_message_id"] = tree.object_id
            content = RecordDict(
                {"arrays": ArrayRecord([update]), "metrics": MetricRecord({"num-examples": 1})}
            )
            reply = Message(content, reply_to=message)
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects = get_all_nested_objects(reply)
            wanted, session = send(reply, get_object_tree(reply), 0.0)
            push_objects(
                objects,
                lambda object_id, data: push(run_id, session, object_id, data),
                object_ids_to_push=wanted,
            )
            finished.release()
            threading.Event().wait()

    threading.stack_size(512 * 1024)
    for _ in range(count):
        threading.Thread(target=live, daemon=True).start()
    for _ in range(count):
        ready.acquire()
    print("ready", flush=True)
    for _ in range(count):
        finished.acquire()
    threading.Event().wait()


@contextlib.contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def wait_for_port(port: int, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise RuntimeError("SuperLink ended before it listened")


def tail(log: Any) -> str:
    log.flush()
    log.seek(0)
    return str(log.read()[-2000:])


if __name__ == "__main__":
    main()
