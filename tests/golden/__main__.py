"""Golden bytes of messages and payloads: `python -m tests.golden` writes them anew.

`messages.txt` has every message of the present contract with every field set, as a line of its name
and its bytes in hexadecimal; a message with a `oneof` has a line per choice. `released.txt` has the
same of the last release, from protos/released.binpb. `payloads.txt` has a step, as float32 numbers,
and for each compression (edge_runtime/compression.py) the payload of it and what that is unpacked.
An implementation in another language that writes and reads these bytes agrees with this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from edge_runtime.adapters import Vector
from edge_runtime.compression import BLOCK, NAMES, compress, decompress
from protos import coordinator_pb2, link_pb2, manifest_pb2

HERE = Path(__file__).parent
RELEASED = HERE.parents[1] / "protos" / "released.binpb"
INTEGERS = {
    FieldDescriptor.TYPE_INT32: -3,
    FieldDescriptor.TYPE_UINT32: 2**32 - 5,
    FieldDescriptor.TYPE_UINT64: 2**64 - 7,
}


def current() -> list[Descriptor]:
    files = (coordinator_pb2.DESCRIPTOR, link_pb2.DESCRIPTOR, manifest_pb2.DESCRIPTOR)
    return [message for file in files for message in file.message_types_by_name.values()]


def released() -> list[Descriptor]:
    files = descriptor_pb2.FileDescriptorSet.FromString(RELEASED.read_bytes()).file
    pool = descriptor_pool.DescriptorPool()
    for file in files:
        pool.Add(file)
    return [
        message
        for file in files
        for message in pool.FindFileByName(file.name).message_types_by_name.values()
    ]


def golden(messages: list[Descriptor]) -> dict[str, bytes]:
    """Line's name -> bytes."""
    return {
        name: example(message, chosen).SerializeToString(deterministic=True)
        for message in messages
        for name, chosen in variants(message)
    }


def example(kind: Descriptor, chosen: str | None = None) -> Message:
    """A message with every field set; of a oneof only `chosen`, or the first."""
    message = message_factory.GetMessageClass(kind)()
    for field in kind.fields:
        oneof = field.containing_oneof
        if oneof is None or field.name == (chosen or oneof.fields[0].name):
            _set(message, field)
    return message


def variants(kind: Descriptor) -> Iterator[tuple[str, str | None]]:
    if not kind.oneofs:
        yield kind.full_name, None
    for oneof in kind.oneofs:
        for field in oneof.fields:
            yield f"{kind.full_name}.{field.name}", field.name


def _set(message: Message, field: FieldDescriptor) -> None:
    if field.message_type is not None:
        value = example(field.message_type)
        if field.is_repeated:
            getattr(message, field.name).extend([value, value])
        else:
            getattr(message, field.name).CopyFrom(value)
    elif field.is_repeated:
        getattr(message, field.name).extend([_scalar(field), _scalar(field)])
    else:
        setattr(message, field.name, _scalar(field))


def _scalar(field: FieldDescriptor) -> Any:
    if field.type in INTEGERS:
        return INTEGERS[field.type] - field.number
    if field.type == FieldDescriptor.TYPE_BOOL:
        return True
    if field.type == FieldDescriptor.TYPE_ENUM:
        return field.enum_type.values[-1].number
    if field.type == FieldDescriptor.TYPE_STRING:
        return f"{field.name} ä"
    if field.type == FieldDescriptor.TYPE_BYTES:
        return bytes([0, 255, field.number])
    return field.number + 0.25  # float and double: exact in both


def step() -> Vector:
    """What implementations may disagree about: numbers beyond half precision and below it, ties,
    signed zeros, a block of zeros, and a last block that is not full."""
    numbers = np.zeros(3 * BLOCK + 5, np.float32)
    numbers[:BLOCK] = np.arange(BLOCK) * np.float32(0.37) - 40
    numbers[2 * BLOCK :] = np.float32(2.0) ** -np.arange(BLOCK + 5)
    numbers[:6] = [1e6, -1e6, 65504, -0.0, 1e-40, 1 / 3]
    numbers[10:14] = [-7.5, 7.5, -7.5, 7.5]
    return numbers


def payloads() -> dict[str, bytes]:
    """Line's name -> bytes."""
    made = {"step": step().astype("<f4").tobytes()}
    for name, kind in NAMES.items():
        made[name] = compress(kind, step())
        unpacked = decompress(kind, made[name], step().size)
        made[f"{name}.unpacked"] = unpacked.astype("<f4").tobytes()
    return made


def lines(messages: dict[str, bytes]) -> str:
    return "".join(f"{name} {content.hex()}\n" for name, content in messages.items())


def read(path: Path) -> dict[str, bytes]:
    pairs = (line.split(" ") for line in path.read_text().splitlines())
    return {name: bytes.fromhex(content) for name, content in pairs}


if __name__ == "__main__":
    (HERE / "messages.txt").write_text(lines(golden(current())))
    (HERE / "released.txt").write_text(lines(golden(released())))
    (HERE / "payloads.txt").write_text(lines(payloads()))
