"""No single device's step is in the coordinator's memory or on its disk: it is looked for."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
from coordinator_help import Fleet, header, in_parallel
from masking_help import Masked, joined, step_of, vector

from edge_runtime import wire
from edge_runtime.quantization import grid_for, quantize, residues

DEVICES = 4
WINDOW = 48
OPTIONS = ("--min-devices", "3", "--rounds", "1")


def windows(array: np.ndarray) -> list[bytes]:
    """Pieces of an array's bytes that occur nowhere by chance."""
    content = np.ascontiguousarray(array).tobytes()
    pieces = 6 if os.environ.get("COMIGS_SOAK") else 1
    places = range(len(content) // (2 * pieces), len(content), len(content) // pieces)
    return [content[at : at + WINDOW] for at in places]


def forms(start: np.ndarray, step: np.ndarray, group: int) -> list[np.ndarray]:
    """How a device's update may be written down: as a float32 or float64 vector or step, or as
    whole numbers of 32 or 64 bits."""
    whole, _ = quantize(step, grid_for(1.0, group))
    floats = (start + step, step)
    exact = ((start + step).astype(np.float64), start.astype(np.float64) + step, step.astype(float))
    return [*floats, *exact, whole, residues(whole)]


def memory(pid: int) -> list[bytes]:
    """Everything that a process can write to, but for pages of nothing."""
    regions = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as mem:
        for line in maps:
            place, rights = line.split()[:2]
            first, last = (int(end, 16) for end in place.split("-"))
            if rights.startswith("rw") and "[v" not in line:
                try:
                    mem.seek(first)
                    pages = np.frombuffer(mem.read(last - first), np.uint8).reshape(-1, 4096)
                except OSError:  # reserved, not used
                    continue
                regions.append(pages[pages.any(axis=1)].tobytes())
    return [b"".join(regions)]


def disk(state: Path) -> list[bytes]:
    contents = []
    for directory, _, names in os.walk(state):  # goes on where one is deleted meanwhile
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                contents.append(Path(directory, name).read_bytes())
    return contents


def found(needles: list[bytes], haystacks: list[bytes]) -> int:
    """How many of the needles are somewhere."""
    return sum(any(needle in haystack for haystack in haystacks) for needle in needles)


def test_no_single_step_is_in_memory_or_on_disk(fleet: Fleet) -> None:
    bundle = fleet.bundle(width=2000)
    # All are needed in every stage, so none ends before the look at it does.
    options = (*OPTIONS, "--secure-aggregation", "--secure-threshold", "1")
    served = fleet.serve(bundle, *options)
    clients = fleet.enrolled(served, bundle, *(f"device {i}" for i in range(DEVICES)))
    number = in_parallel(*(lambda c=c: joined([c]) for c in clients))[0]
    start = vector(bundle, clients[0].download(number))
    steps = [step_of(bundle, index, number) for index in range(DEVICES)]
    secret = [
        piece for step in steps for form in forms(start, step, DEVICES) for piece in windows(form)
    ]
    maskers = [Masked(client, number) for client in clients]
    seen, looks = [], []

    def look() -> None:
        """What has been freed is still there, mostly: so is what was there in between."""
        places = memory(served.process.pid) + disk(fleet.state)
        masked = [
            piece
            for m in maskers
            if m.payload
            for piece in windows(np.frombuffer(m.payload, "<u4"))
        ]
        seen.append(found(secret, places))
        looks.append((found(masked, places), len(masked)))

    in_parallel(
        lambda: maskers[0].run(steps[0], pause=look),
        *(lambda i=i: maskers[i].run(steps[i]) for i in range(1, DEVICES)),
    )
    served.wait_for("round_closed", round=number)
    look()
    assert seen == [0] * 5, "in four stages and after them"
    # What it should hold it held: the masked steps, until the round was over, and then the sum.
    assert any(held == asked > 0 for held, asked in looks)
    total = vector(bundle, clients[0].download(number + 1))
    assert found(windows(total), disk(fleet.state)) == len(windows(total))
    assert found(windows(total), memory(served.process.pid)) > 0


def test_the_look_would_find_a_step(fleet: Fleet) -> None:
    """Without secure aggregation it does, so the other test can fail."""
    bundle = fleet.bundle(width=2000)
    served = fleet.serve(bundle, *OPTIONS)
    clients = fleet.enrolled(served, bundle, *(f"device {i}" for i in range(DEVICES)))
    number = in_parallel(*(lambda c=c: joined([c]) for c in clients))[0]
    start = vector(bundle, clients[0].download(number))
    for index, client in enumerate(clients[:-1]):
        update = start + step_of(bundle, index, number)
        client.upload(header(number), wire.encode(bundle.manifest, {"generalist": update}))
    for index in range(DEVICES - 1):
        needles = windows(start + step_of(bundle, index, number))
        assert found(needles, disk(fleet.state)) == len(needles)
