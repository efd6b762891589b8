"""Devices that take part in secure aggregation, and what the coordinator should make of it."""

from __future__ import annotations

import datetime
import hashlib
import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from coordinator_help import check_in_until, header

from coordinator.secure_aggregation import Masking
from coordinator.tls import Authority
from edge_runtime import wire
from edge_runtime.bundle import Bundle
from edge_runtime.client import Client
from edge_runtime.identity import Identity, new_key, public_key_of
from edge_runtime.quantization import grid_for
from edge_runtime.secure_aggregation import Session, bitmap, members_of, task_sha256
from protos import coordinator_pb2 as pb

ROUND = 7
HISTORY = "the first"
TASK = bytes(range(32))
SIZE = 20
STAGES = ("keys", "share", "mask", "agree", "unmask")


def vector(bundle: Bundle, payload: bytes) -> np.ndarray:
    return wire.decode(bundle.manifest, payload)["generalist"]


def step_of(bundle: Bundle, device: int, number: int) -> np.ndarray:
    """How far device `device` goes in round `number`; the same each time."""
    size = next(role.size for role in bundle.manifest.roles if role.name == "generalist")
    noise = np.random.default_rng([device, number]).normal(size=size)
    return (0.01 * noise).astype(np.float32)


def say(client: Client, number: int, wait: float = 20, **step: Any) -> pb.AggregateReply:
    return client.aggregate(pb.AggregateRequest(round=number, wait_seconds=wait, **step))


class World:
    """An authority and devices that it certified."""

    def __init__(self, path: Path) -> None:
        self.authority = Authority.open(path, datetime.timedelta(days=30))

    def device(self, name: str) -> Identity:
        key = new_key()
        issued = self.authority.issue_to_device(public_key_of(key), name, f"enrolment of {name}")
        return Identity("nowhere:1", self.authority.pem.decode(), issued.pem, key)


class Round:
    """Sessions of one round, without a network, and what an honest coordinator tells them."""

    def __init__(
        self,
        world: World,
        devices: int,
        *,
        number: int = ROUND,
        task: bytes = TASK,
        **masking: float,
    ) -> None:
        self.identities = {i: world.device(f"device {i}") for i in range(1, devices + 1)}
        self.sessions = {
            i: Session(identity, number, HISTORY, task) for i, identity in self.identities.items()
        }
        options = {"staying": 0.6, "clip_norm": None, "noise_multiplier": 0.0} | masking
        self.graph, self.terms = Masking(stage_seconds=60, min_devices=3, **options).terms(devices)

    def group(self, index: int) -> pb.MaskingGroup:
        group = pb.MaskingGroup()
        group.CopyFrom(self.terms)
        group.index = index
        if not self.graph.is_complete:
            told = (session.advertisement for _, session in sorted(self.sessions.items()))
            group.members = members_of(told)
        for other in self.graph.neighbours(index):
            group.neighbours.add(index=other, keys=self.sessions[other].advertisement)
        return group

    def share(self) -> dict[int, pb.IncomingShares]:
        """Runs the first stage; what arrives at each device."""
        inboxes = {index: pb.IncomingShares() for index in self.sessions}
        for index, session in self.sessions.items():
            for share in session.share(self.group(index)).shares:
                inboxes[share.index].shares.add(index=index, sealed=share.sealed)
        return inboxes

    def mask(self) -> dict[int, bytes]:
        return {
            index: self.sessions[index].mask(inbox, np.zeros(SIZE, np.float32))
            for index, inbox in self.share().items()
        }

    def survivors(self, summed: Iterable[int], dropped: Iterable[int] = ()) -> pb.Survivors:
        devices = len(self.sessions)
        return pb.Survivors(summed=bitmap(summed, devices), dropped=bitmap(dropped, devices))

    def agree(self, survivors: pb.Survivors, *signers: int) -> list[pb.Agreement]:
        return [self.sessions[index].agree(survivors) for index in signers]


class Masked:
    """A device's part in one round, as `edge_runtime.device` plays it, up to a stage."""

    def __init__(self, client: Client, number: int) -> None:
        self.client, self.number = client, number
        reply = client.check_in(0)
        start = hashlib.sha256(client.download(number)).digest()
        task = task_sha256(start, reply.training)
        self.session = Session(client.who, number, reply.history, task)
        self.group = pb.MaskingGroup()
        self.payload = b""
        self.revealed = False
        self.calls = 0
        # A stage, and what is set when the device is asked for it.
        self.reached: tuple[str, threading.Event] | None = None

    def run(
        self,
        step: np.ndarray,
        *,
        until: str | None = None,
        pause: Callable[[], None] = lambda: None,
    ) -> str:
        """Takes part; vanishes instead of saying what belongs to the stage `until`.

        Args:
            pause: called before the device answers in each stage.

        Returns:
            Why it was over, empty if the device did all it was asked for.
        """
        if until == "keys":
            return "gone"
        reply = say(self.client, self.number, keys=self.session.advertisement)
        while True:
            self.calls += 1
            asked = reply.WhichOneof("next")
            if self.reached and asked == self.reached[0]:
                self.reached[1].set()
            if asked not in ("wait", "over"):
                pause()
            if asked == until:
                return "gone"
            if asked == "share":
                self.group.CopyFrom(reply.share)
                shares = self.session.share(reply.share)
                reply = say(self.client, self.number, shares=shares)
            elif asked == "mask":
                self.payload = self.session.mask(reply.mask, step)
                answer = self.client.upload(header(self.number), self.payload)
                self.calls += 1
                if not answer.accepted:
                    return answer.reason
                reply = say(self.client, self.number)
            elif asked == "agree":
                agreed = self.session.agree(reply.agree)
                reply = say(self.client, self.number, agreed=agreed)
            elif asked == "unmask":
                revealed = self.session.unmask(reply.unmask)
                self.revealed = True
                reply = say(self.client, self.number, revealed=revealed)
            elif asked == "wait":
                reply = say(self.client, self.number)
            else:
                return reply.over.reason


def joined(clients: Collection[Client]) -> int:
    """The round that all of them are to train in."""
    numbers = {check_in_until(client, pb.CheckInReply.TRAIN).round for client in clients}
    assert len(numbers) == 1
    return numbers.pop()


def expected(
    start: np.ndarray, steps: list[np.ndarray], *, group: int, bound: float = 1.0
) -> np.ndarray:
    """The next generalist if `steps` were summed up out of a group of so many, in whole numbers."""
    grid = grid_for(bound, group)
    total = [0] * len(start)
    for step in steps:
        for index, x in enumerate(step.astype(float)):
            total[index] += round(max(-bound, min(bound, x)) / grid.unit)
    assert max(map(abs, total)) < 2**31
    mean = np.array(total, np.float64) * grid.unit / len(steps)
    return (start.astype(np.float64) + mean).astype(np.float32)
