"""What the coordinator says holds it up nowhere, whoever reads it or does not."""

import fcntl
import json
import os
import signal
import subprocess
from contextlib import closing
from io import TextIOWrapper
from pathlib import Path

from coordinator_help import TIMEOUT, Fleet, serve_command

from coordinator import event_log
from coordinator.administrator import Administrator
from coordinator.event_log import EventLog
from edge_runtime.identity import read_identity

COMMANDS = 300


def test_a_reader_that_has_stopped_holds_nobody_up(fleet: Fleet) -> None:
    ours, theirs = os.pipe()
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
    options = ("--listen", "127.0.0.1:0", "--format", "json")
    served = subprocess.Popen(
        serve_command(fleet.bundle().path, fleet.state, *options), stdout=theirs
    )
    os.close(theirs)
    try:
        with open(ours, encoding="utf-8") as reader:
            while json.loads(reader.readline())["event"] != "listening":
                pass
            who = read_identity(fleet.state / "admin.json")
            assert who is not None
            with Administrator(who) as administrator:
                for _ in range(COMMANDS):
                    administrator.pause()
                    administrator.resume()
            served.send_signal(signal.SIGTERM)
            assert served.wait(TIMEOUT) == 0
            # What was in the pipe are whole lines, but perhaps for the last one.
            *said, _ = reader.read().split("\n")
            assert [json.loads(line)["event"] for line in said][:2] == ["paused", "resumed"]
            assert len(said) < COMMANDS
    finally:
        served.kill()


def test_lines_that_were_left_out_are_counted(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
    more = 5
    with open(ours) as reader, open(theirs, "w") as stream:
        log = EventLog(stream, lambda event, fields: json.dumps({"event": event, **fields}))
        filling = 4096 // len('{"event": "a", "n": 10000}')
        for number in range(event_log.MOST_LINES + filling + more):
            log("a", {"n": 10_000 + number})
        said = [json.loads(reader.readline()) for _ in range(event_log.MOST_LINES)]
        log("b", {})
        while said[-1]["event"] != "b":
            said.append(json.loads(reader.readline()))
        log.close()
    numbers = [line["n"] for line in said if line["event"] == "a"]
    assert numbers == [*range(10_000, 10_000 + len(numbers))]
    (lost,) = [line["lines"] for line in said if line["event"] == "lines_lost"]
    assert lost == event_log.MOST_LINES + filling + more - len(numbers) > 0


def test_names_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w", encoding="latin-1") as stream:
        assert isinstance(stream, TextIOWrapper)
        with closing(EventLog(stream, lambda event, fields: f"{fields['device']} is there")) as log:
            log("device_enrolled", {"device": "日本é"})
    assert (tmp_path / "log").read_bytes() == b"\\u65e5\\u672c\xe9 is there\n"


def test_nobody_reads_at_all() -> None:
    with closing(EventLog(None, lambda event, fields: event)) as log:
        log("finished", {})
