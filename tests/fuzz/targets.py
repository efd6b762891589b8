"""What is fuzzed: every decoder of bytes that somebody else may have written.

A target takes any bytes. It returns if they were understood or refused as documented; whatever else
it raises is a bug. Each also checks what it let through.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cryptography import x509
from google.protobuf.message import DecodeError, Message
from safetensors import SafetensorError
from safetensors.numpy import load, save

sys.path.insert(0, str(Path(__file__).parents[1] / "coordinator"))

from coordinator_help import make_bundle
from masking_help import HISTORY, Round, World
from masking_help import SIZE as STEP_SIZE

from coordinator.secure_aggregation import Masking, RefusedStepError, SecureAggregation
from coordinator.state import State
from coordinator.tables import Device, MaskingStage, MaskingStep, Settings, Update
from coordinator.tls import RefusedRequestError, requested_key
from edge_runtime import adapters, compression, invitation, training_config, wire
from edge_runtime.bundle import contract_sha256, open_bundle
from edge_runtime.errors import AdapterError, BundleError, TrustError, VersionError
from edge_runtime.identity import new_key, read_identity, signing_request
from edge_runtime.secure_aggregation import DistrustedError, Session, task_sha256
from edge_runtime.store import Home, Progress, _digest
from edge_runtime.training import new_state
from protos import coordinator_pb2 as pb

SCRATCH = Path(tempfile.mkdtemp(prefix="fuzz"))
BUNDLE = make_bundle(SCRATCH / "bundle", width=4)
MANIFEST = BUNDLE.manifest
MANIFEST.mixture.alpha = 16
SIZE = next(role.size for role in MANIFEST.roles if role.name == "generalist")
FRESH = adapters.load_fresh(BUNDLE)
STEP = np.linspace(-1, 1, SIZE, dtype=np.float32)
KINDS = list(compression.NAMES.values())


def _summer(name: str, stage: MaskingStage | None) -> tuple[State, Device, SecureAggregation]:
    """A coordinator's state with a round in that stage, and the first of its devices."""
    state = State(SCRATCH / name).of("base")
    options = {"recipe": "mean", "selection": None, "training": "{}", "contract_sha256": "c"}
    state.begin(Settings(rounds=9, min_devices=3, deadline_seconds=1, **options), b"generalist")
    state.history = lambda: HISTORY  # type: ignore[method-assign]
    devices = [state.named(f"device {i}", cohort="base", contract_sha256="c") for i in (1, 2, 3)]
    state.open(1, deadline=0, recipe="mean", participants=[device.id for device in devices])
    masking = Masking(
        staying=1.0, stage_seconds=60, min_devices=3, clip_norm=None, noise_multiplier=0.0
    )
    authority = x509.load_der_x509_certificate(WORLD.authority.der)
    secure = SecureAggregation(
        state=state, masking=masking, training=TRAINING, size=STEP_SIZE, authority=authority
    )
    if stage is not None:
        for device, session in zip(devices, PLAYED.sessions.values(), strict=True):
            keys = session.advertisement.SerializeToString()
            state.commit([MaskingStep(1, device.id, "keys", keys)])
        terms = PLAYED.terms.SerializeToString()
        numbers = {device.id: number for number, device in enumerate(devices, 1)}
        state.settle(1, numbers, degree=PLAYED.graph.degree, terms=terms)
        for device in devices if stage != MaskingStage.SHARE else ():
            shares = ASKED[1].shares.SerializeToString()
            state.commit([MaskingStep(1, device.id, "shares", shares)])
            place = {"cohort": "base", "round": 1, "device": device.id, "counted": 1}
            known = {"file": device.id, "sha256": b"", "tokens": 1, "contract_sha256": "c"}
            state.commit([Update(**place, **known)])
        if stage == MaskingStage.UNMASK:
            signature = ASKED[2].agreed.signature
            state.commit([MaskingStep(1, devices[0].id, "agreed", signature)])
        state.set_masking_stage(1, stage)
    devices[0].enrolment = "enrolment of device 1"
    return state, devices[0], secure


TRAINING = pb.TrainingConfig(rounds=9)
TASK = task_sha256(hashlib.sha256(b"generalist").digest(), TRAINING)
WORLD = World(SCRATCH / "authority")
# One round in which all is said, and one device of each stage of it.
PLAYED = Round(WORLD, 3, number=1, task=TASK)
_GROUP = PLAYED.group(1)
_INBOXES = PLAYED.share()
_SHARED = copy.copy(PLAYED.sessions[1])
for _index, _session in PLAYED.sessions.items():
    _session.mask(_INBOXES[_index], np.zeros(STEP_SIZE, np.float32))
_MASKED = copy.copy(PLAYED.sessions[1])
_ALL = PLAYED.survivors([1, 2, 3])
_AGREED = PLAYED.agree(_ALL, 1, 2, 3)
_UNMASKING = pb.Unmasking(agreed=_AGREED[1:])
SAID: list[Message] = [_GROUP, _INBOXES[1], _ALL, _UNMASKING]
STAGES: list[tuple[type[Message], Session, Callable[..., object]]] = [
    (pb.MaskingGroup, Session(WORLD.device("device 1"), 1, HISTORY, TASK), Session.share),
    (
        pb.IncomingShares,
        _SHARED,
        lambda session, inbox: session.mask(inbox, np.zeros(STEP_SIZE, np.float32)),
    ),
    (pb.Survivors, _MASKED, Session.agree),
    (pb.Unmasking, PLAYED.sessions[1], Session.unmask),
]
ASKED = [
    pb.AggregateRequest(keys=PLAYED.sessions[1].advertisement),
    pb.AggregateRequest(shares=PLAYED.sessions[1].share(_GROUP)),
    pb.AggregateRequest(agreed=_AGREED[0]),
    pb.AggregateRequest(revealed=PLAYED.sessions[1].unmask(_UNMASKING)),
]
SUMMERS = [
    _summer("keys", None),
    _summer("sharing", MaskingStage.SHARE),
    _summer("agreeing", MaskingStage.AGREE),
    _summer("unmasking", MaskingStage.UNMASK),
]


def payload(data: bytes) -> None:
    """An update as it comes."""
    with contextlib.suppress(AdapterError):
        vectors = wire.decode(MANIFEST, data)
        assert [vector.shape for vector in vectors.values()] == [(SIZE,)]
        assert np.isfinite(vectors["generalist"]).all()


def payload_file(data: bytes) -> None:
    """The same, on the coordinator's disk: what is let through is what `decode` lets through."""
    with contextlib.suppress(AdapterError):
        wire.check(MANIFEST, _file("update", data))
        if len(data) <= wire.max_bytes(MANIFEST):
            wire.decode(MANIFEST, data)


def compressed(data: bytes) -> None:
    """A compressed update; the first byte says how."""
    with contextlib.suppress(AdapterError):
        step = compression.decompress(
            KINDS[data[0] % len(KINDS)] if data else KINDS[0], data[1:], SIZE
        )
        assert step.shape == (SIZE,)
        assert np.isfinite(step).all()


def invited(data: bytes) -> None:
    """What a person pastes; behind a zero byte, with a right checksum."""
    text = data.decode(errors="replace")
    if data[:1] == b"\0":
        with contextlib.suppress(DecodeError):
            text = invitation.encode(pb.Invitation.FromString(data[1:]))
    with contextlib.suppress(TrustError):
        assert invitation.is_name(invitation.decode(text).name)


def manifest(data: bytes) -> None:
    """A bundle's manifest, and the first things that are done with it."""
    _file("other/manifest.json", data)
    with contextlib.suppress(BundleError, AdapterError):
        opened = open_bundle(SCRATCH / "other")
        contract_sha256(opened.manifest)
        assert wire.max_bytes(opened.manifest) > 0
        small = sum(role.size for role in opened.manifest.roles) < 10**6
        if small:
            wire.decode(opened.manifest, wire.encode(MANIFEST, FRESH))
        for file in list(opened.manifest.files)[:3]:
            opened.file(file.path)


def pkcs10(data: bytes) -> None:
    """A request for a certificate."""
    with contextlib.suppress(RefusedRequestError):
        requested_key(data, "ada")


def state(data: bytes) -> None:
    """A device's state; one whose only fault is its checksum is given a right one."""
    with contextlib.suppress(SafetensorError, KeyError, TypeError, ValueError):
        arrays = load(data)
        start = int.from_bytes(data[:8], "little")
        text = json.loads(data[8 : 8 + start])["__metadata__"]["comigs"]
        data = save(arrays, metadata={"comigs": text, "sha256": _digest(text, arrays)})
    _file("home/state.safetensors", data)
    with contextlib.suppress(AdapterError, VersionError):
        loaded, _ = Home(SCRATCH / "home").load_state(BUNDLE)
        assert [loaded.vectors[role.name].size for role in MANIFEST.roles] == [
            role.size for role in MANIFEST.roles
        ]


def adapter(data: bytes) -> None:
    """An expert as PEFT wrote it: its weights or, from a brace on, its configuration."""
    files = adapters.ADAPTER_CONFIG, adapters.ADAPTER_FILE
    role = next(role for role in MANIFEST.roles if role.name == "generalist")
    for file in files:
        shutil.copy(BUNDLE.path / role.path / file, _made("peft") / file)
    _file(f"peft/{files[0] if data[:1] == b'{' else files[1]}", data)
    with contextlib.suppress(AdapterError):
        assert adapters.load_peft(MANIFEST, "generalist", SCRATCH / "peft").shape == (SIZE,)


def identity(data: bytes) -> None:
    """A key and a certificate."""
    with contextlib.suppress(TrustError):
        read = read_identity(_file("identity.json", data))
        assert read is not None
        read.check()


def config(data: bytes) -> None:
    """How devices train."""
    with contextlib.suppress(ValueError):
        read = training_config.load(_file("training.json", data))
        assert all(math.isfinite(value) for _, value in read.ListFields())


def masking_device(data: bytes) -> None:
    """What a coordinator says in secure aggregation; the first byte says in which stage."""
    stage = (data[0] if data else 0) % len(STAGES)
    kind, session, step = STAGES[stage]
    with contextlib.suppress(DecodeError, DistrustedError):
        step(copy.copy(session), kind.FromString(data[1:]))


def masking_coordinator(data: bytes) -> None:
    """What a device says in secure aggregation; the first byte says in which stage."""
    stage = (data[0] if data else 0) % len(SUMMERS)
    state, device, secure = SUMMERS[stage]
    with contextlib.suppress(DecodeError, RefusedStepError):
        request = pb.AggregateRequest.FromString(data[1:])
        request.round = 1
        said = secure.step(device, request)
        if said is not None:
            state.commit([said])
        secure.answer(device.id, request)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        payload,
        payload_file,
        compressed,
        invited,
        manifest,
        pkcs10,
        state,
        adapter,
        identity,
        config,
        masking_device,
        masking_coordinator,
    )
}


def seeds() -> dict[str, list[bytes]]:
    """Good inputs of each target, to begin with."""
    good = wire.encode(MANIFEST, FRESH)
    home = Home(SCRATCH / "seed")
    home.save_state(BUNDLE, new_state(MANIFEST, FRESH), Progress())
    role = next(role for role in MANIFEST.roles if role.name == "generalist")
    folder = BUNDLE.path / role.path
    ticket = pb.Invitation(name="ada", token=bytes(16), host="localhost", port=1, enrolment_port=2)
    return {
        "payload": [good],
        "payload_file": [good],
        "compressed": [
            bytes([number]) + compression.compress(kind, STEP) for number, kind in enumerate(KINDS)
        ],
        "invited": [invitation.encode(ticket).encode(), b"\0" + ticket.SerializeToString()],
        "manifest": [(BUNDLE.path / "manifest.json").read_bytes()],
        "pkcs10": [signing_request(new_key(), "ada")],
        "state": [(home.path / "state.safetensors").read_bytes()],
        "adapter": [
            (folder / adapters.ADAPTER_FILE).read_bytes(),
            (folder / adapters.ADAPTER_CONFIG).read_bytes(),
        ],
        "identity": [
            b'{"coordinator": "a:1", "ca": "", "certificate": "", "key": "", "invitation": ""}'
        ],
        "masking_device": [
            bytes([stage]) + said.SerializeToString() for stage, said in enumerate(SAID)
        ],
        "masking_coordinator": [
            bytes([stage]) + asked.SerializeToString()
            for stage in range(len(SUMMERS))
            for asked in ASKED
        ],
        "config": [b'{"rounds": 3, "local_steps": 10, "learning_rate": 0.002, "tau": 30}'],
    }


def _made(folder: str) -> Path:
    (SCRATCH / folder).mkdir(parents=True, exist_ok=True)
    return SCRATCH / folder


def _file(name: str, data: bytes) -> Path:
    path = SCRATCH / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path
