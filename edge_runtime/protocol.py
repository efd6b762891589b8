"""What both ends of protos/coordinator.proto hold each other to, beside the messages: versions and
sizes.

| version | what it can do |
|---|---|
| 1 | comigs 0.1.0 |
| 2 | uploads go on after a break (UploadOffset); compressed updates |
| 3 | secure aggregation |
| 4 | secure aggregation in which devices agree on who is summed up |
| 5 | likewise, on what they were given, and masks bound to both ends of a pair |
| 6 | likewise, in a large group too on whose keys are in it |

A device says the newest version that it speaks, the coordinator answers with the newest that both
do. Whoever is too old for the other is told to update.
"""

from __future__ import annotations

from google.protobuf.message import Message

from edge_runtime.errors import VersionError
from edge_runtime.wire import CHUNK_BYTES

NEWEST = 6
OLDEST = 1
# The oldest that can take part in secure aggregation: before 3 devices send updates as they are,
# with 3 they believe what the coordinator tells them of each other, with 4 a device's mask does not
# depend on whom it is shared with, and with 5 devices of another group sign in a large one.
SECURE_AGGREGATION = 6

# How the answer ends that an upload gets while its round is closed, which may take long: whether it
# counts is not known yet.
CLOSING = "is being closed"
# What calls get while the coordinator can store nothing.
NO_STORAGE = "the coordinator cannot use its disk"

KIB = 1024
# Largest serialized message of each kind, in bytes, whoever sends it. `check` refuses what is
# larger; gRPC does not even read what is larger than the largest.
MOST_BYTES = {
    "EnrollRequest": 4 * KIB,
    "Certificate": 16 * KIB,
    "SigningRequest": 4 * KIB,
    "CheckInRequest": KIB,
    "CheckInReply": 4 * KIB,
    "DownloadRequest": KIB,
    "Chunk": CHUNK_BYTES + KIB,
    "UploadHeader": KIB,
    "UploadOffsetReply": KIB,
    "UploadPart": CHUNK_BYTES + KIB,
    "UploadReply": 4 * KIB,
    "AggregateRequest": 64 * KIB,
    # The agreements of the largest group.
    "AggregateReply": 4 * KIB * KIB,
    "InviteRequest": KIB,
    "InviteReply": 16 * KIB,
    "RevokeRequest": KIB,
    "RevokeReply": KIB,
    "PauseRequest": KIB,
    "PauseReply": KIB,
    "ResumeRequest": KIB,
    "ResumeReply": KIB,
    "AbortRequest": 4 * KIB,
    "AbortReply": KIB,
    "RollBackRequest": KIB,
    "RollBackReply": KIB,
    "ListDevicesRequest": KIB,
    "ListDevicesReply": 16 * KIB * KIB,
}
# Of what devices and administrators send, and of what devices get.
LARGEST = CHUNK_BYTES + KIB
# Of what administrators get.
LARGEST_LIST = 16 * KIB * KIB


class TooLargeError(Exception):
    """A message is larger than any honest one; one line that says so."""


def check(message: Message) -> None:
    """
    Raises:
        TooLargeError: `message` is larger than one of its kind may be.
    """
    check_size(message.DESCRIPTOR.name, message.ByteSize())


def check_size(name: str, size: int) -> None:
    """
    Raises:
        TooLargeError: a message of that name may not be so large.
    """
    most = MOST_BYTES.get(name, LARGEST)
    if size > most:
        raise TooLargeError(f"a {name} of {size} bytes is larger than the {most} that one may have")


def common(newest: int, oldest: int | None = None) -> int:
    """The version to speak with somebody whose newest is that; 0, from before it was said, is 1.

    Args:
        oldest: that will do, if not OLDEST.

    Raises:
        VersionError: there is none.
    """
    spoken = min(NEWEST, newest or 1)
    oldest = oldest or OLDEST
    if spoken < oldest:
        raise VersionError(
            f"version {newest or 1} of the protocol, and the oldest understood here is {oldest}"
        )
    return spoken
