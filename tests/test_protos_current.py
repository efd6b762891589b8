"""protos/: the committed Python is current, and nothing that was released has changed."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from golden import __main__ as golden
from google.protobuf import json_format, message_factory

from edge_runtime.compression import NAMES, compress, decompress
from protos.__main__ import BIN, HERE, RELEASED, generate

# What an old device, or a bundle of an old compiler, would not survive.
BREAKING = {
    "a field removed": ("  // Of the invitation.\n  bytes token = 1;\n", ""),
    "a field renumbered": ("uint64 tokens = 4;", "uint64 tokens = 14;"),
    "a field of another type": ("uint64 tokens = 4;", "double tokens = 4;"),
    "a field renamed": ("uint64 tokens = 4;", "uint64 words = 4;"),
    "a field repeated": ("uint64 tokens = 4;", "repeated uint64 tokens = 4;"),
    "a value removed": ("    FINISH = 3;\n", ""),
    "a message renamed": ("UploadReply", "UploadAnswer"),
    "a call removed": ("  rpc Renew(SigningRequest) returns (Certificate);\n", ""),
    "a call of another type": ("rpc Renew(Sig", "rpc Renew(stream Sig"),
    "a service renamed": ("service Admin ", "service Administration "),
    "a package renamed": ("package comigs.v1;", "package comigs.v2;"),
}


def test_generated_code_is_current(tmp_path: Path) -> None:
    generate(tmp_path)
    fresh = {path.name: path.read_text() for path in (tmp_path / "protos").iterdir()}
    committed = {path.name: path.read_text() for path in HERE.glob("*_pb2*.py*")}
    assert sorted(fresh) == sorted(committed)
    stale = [name for name, text in fresh.items() if committed[name] != text]
    assert not stale, "run `python -m protos`"


def breaking(protos: Path) -> str:
    """What `buf breaking` says of a folder beside the last release; nothing if all is well."""
    done = subprocess.run(
        [BIN / "buf", "breaking", protos, "--against", RELEASED],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == (not done.stdout), done.stderr
    return done.stdout


def test_nothing_that_was_released_has_changed() -> None:
    assert breaking(HERE) == ""


@pytest.mark.parametrize("change", BREAKING)
def test_a_breaking_change_would_be_noticed(change: str, tmp_path: Path) -> None:
    for path in [*HERE.glob("*.proto"), HERE / "buf.yaml"]:
        shutil.copy(path, tmp_path)
    path = tmp_path / "coordinator.proto"
    before, after = BREAKING[change]
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    assert breaking(tmp_path)


def test_messages_have_their_golden_bytes() -> None:
    now = golden.lines(golden.golden(golden.current()))
    assert (golden.HERE / "messages.txt").read_text() == now, "run `python -m tests.golden`"


def test_compressed_payloads_have_their_golden_bytes() -> None:
    kept = golden.read(golden.HERE / "payloads.txt")
    sent = np.frombuffer(kept["step"], "<f4")
    for name, kind in NAMES.items():
        assert compress(kind, sent) == kept[name], "run `python -m tests.golden`"
        unpacked = decompress(kind, kept[name], sent.size)
        assert unpacked.tobytes() == kept[f"{name}.unpacked"]
    assert kept == golden.payloads()


def test_golden_bytes_of_the_release_mean_the_same_today() -> None:
    now = {message.full_name: message for message in golden.current()}
    bytes_of = golden.read(golden.HERE / "released.txt")
    for then in golden.released():
        for name in (name for name, _ in golden.variants(then)):
            read = message_factory.GetMessageClass(now[then.full_name]).FromString(bytes_of[name])
            meant = message_factory.GetMessageClass(then).FromString(bytes_of[name])
            assert json_format.MessageToDict(read) == json_format.MessageToDict(meant), name
            assert read.SerializeToString(deterministic=True) == bytes_of[name], name
