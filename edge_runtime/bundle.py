"""A bundle: its manifest is checked first, every file before it is used."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from google.protobuf import json_format

from edge_runtime.errors import BundleError
from protos import manifest_pb2 as pb

# 2: programs for any number of tokens, which update their cache in place.
# 3: experts of a module as one input; the memory of a tier.
# 4: there, B transposed.
# 5: where there is no form with unsigned weights, none is needed.
FORMAT_VERSION = 5
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest has been read and understood."""

    path: Path
    manifest: pb.Manifest

    def file(self, relative: str) -> Path:
        """Path of a file that the manifest lists, after checking its size and SHA-256.

        Raises:
            BundleError: not listed, missing, not readable, truncated or altered.
        """
        path = self.path / relative
        try:
            entry = self._sized(relative)
            digest = sha256_of(path)
        except OSError as error:
            raise BundleError(
                f"cannot read {path}: {error.strerror}; let this user read the bundle's files and "
                "directories, or copy the bundle again"
            ) from error
        if digest != entry.sha256:
            raise BundleError(
                f"bundle {self.path}: {relative} was altered (its SHA-256 differs from the "
                "manifest's); copy the bundle again"
            )
        return path

    def _sized(self, relative: str) -> pb.File:
        """The manifest's entry of a file that is there with that many bytes."""
        entry = next((f for f in self.manifest.files if f.path == relative), None)
        if entry is None:
            raise BundleError(f"bundle {self.path}: {relative} is not listed in its manifest")
        path = self.path / relative
        if not path.is_file():
            raise BundleError(f"bundle {self.path}: {relative} is missing; copy the bundle again")
        if path.stat().st_size != entry.size:
            raise BundleError(
                f"bundle {self.path}: {relative} has {path.stat().st_size} bytes instead of "
                f"{entry.size}; copy the bundle again"
            )
        return entry

    @contextlib.contextmanager
    def checking(self, files: Iterable[str]) -> Iterator[None]:
        """Checks the content of large files while the block reads them, and their sizes before it.

        Raises:
            BundleError: like `file`; whatever the block made of them is not to be used.
        """
        names = list(files)
        for name in names:
            self._sized(name)
        with ThreadPoolExecutor(max_workers=1) as pool:
            done = [pool.submit(self.file, name) for name in names]
            try:
                yield
            finally:
                for check in done:  # an error of theirs explains one of the block
                    check.result()

    def has_program(self, name: str, engine: str) -> bool:
        return any((p.name, p.engine) == (name, engine) for p in self.manifest.programs)

    def program(self, name: str, engine: str) -> pb.Program:
        """The manifest's entry of a program.

        Raises:
            BundleError: the bundle has no such program for this engine.
        """
        for program in self.manifest.programs:
            if (program.name, program.engine) == (name, engine):
                return program
        others = sorted(p.name for p in self.manifest.programs if p.engine == engine)
        if others:
            raise BundleError(
                f"bundle {self.path} has no {name} for engine {engine}, only {', '.join(others)}; "
                "export it again for a --tier that has it"
            )
        engines = sorted({p.engine for p in self.manifest.programs}) or ["none"]
        raise BundleError(
            f"bundle {self.path} has no {name} for engine {engine} (engines in it: "
            f"{', '.join(engines)}); export it again with --engine {engine}"
        )

    def experts(self) -> list[str]:
        """Role names of the experts: the generalist, then the specialists."""
        return [role.name for role in self.manifest.roles if role.name != "router"]


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(manifest: pb.Manifest, directory: Path) -> None:
    """Puts all files of a bundle that is being made into its manifest."""
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST):
        name = path.relative_to(directory).as_posix()
        manifest.files.add(path=name, size=path.stat().st_size, sha256=sha256_of(path))


def write_manifest(manifest: pb.Manifest, directory: Path) -> None:
    """Replaces it at once: another process may be about to read it."""
    text = json_format.MessageToJson(manifest, preserving_proto_field_name=True)
    written = directory / f".{MANIFEST}"
    written.write_text(text + "\n", encoding="utf-8")
    written.replace(directory / MANIFEST)


def open_bundle(path: Path) -> Bundle:
    """Reads and checks the manifest of the bundle at `path`. Loads no program.

    Raises:
        BundleError: no bundle there, not readable, or of another format.
    """
    file = path / MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BundleError(
            f"no bundle at {path}: {MANIFEST} is missing; make one with `comigs export`, or, if it "
            "was moved, say where it is: `comigs device run --bundle DIR` remembers it"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"cannot read {file}: {error}; copy the bundle again") from error
    manifest = pb.Manifest()
    try:
        json_format.Parse(text, manifest, ignore_unknown_fields=True)
    except json_format.ParseError as error:
        raise BundleError(
            f"{file} is not a valid manifest: {error}; copy the bundle again"
        ) from error
    if manifest.minimum_reader_version > FORMAT_VERSION:
        raise BundleError(
            f"bundle {path} needs a reader of format {manifest.minimum_reader_version}, this "
            f"program reads up to {FORMAT_VERSION}; update comigs"
        )
    if manifest.format_version == 0 or not manifest.tensors:
        raise BundleError(f"{file} is not a valid manifest: it is incomplete; export it again")
    if manifest.format_version < FORMAT_VERSION:
        raise BundleError(
            f"bundle {path} is of format {manifest.format_version}, this program reads "
            f"{FORMAT_VERSION}; export it again (of the same base and options it is the same for "
            "coordinators and homes)"
        )
    # Experts are also written under these names, elsewhere.
    for name in (*(role.path for role in manifest.roles), *(f.path for f in manifest.files)):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BundleError(
                f"{file} is not a valid manifest: {name} leads out of the bundle; copy it again"
            )
    if (odd := _odd(manifest)) is not None:
        raise BundleError(f"{file} is not a valid manifest: {odd}; copy the bundle again")
    return Bundle(path, manifest)


def _odd(manifest: pb.Manifest) -> str | None:
    """What in the manifest cannot be; None if nothing is seen."""
    ends = {role.name: 0 for role in manifest.roles}
    for tensor in sorted(manifest.tensors, key=lambda tensor: tensor.offset):
        if ends.get(tensor.role) != tensor.offset or 0 in tensor.shape:
            return f"{tensor.name} is not where its role has room for it"
        ends[tensor.role] += math.prod(tensor.shape)
    for role in manifest.roles:
        if ends[role.name] != role.size:
            return f"{role.name} has {role.size} numbers, and its tensors {ends[role.name]}"
    needed = {
        "rank": manifest.mixture.rank,
        "alpha": manifest.mixture.alpha,
        "vocabulary": manifest.base.vocabulary,
        "context": manifest.tier.context,
        "train_length": manifest.tier.train_length,
        "micro_batches": len(manifest.tier.micro_batches),
    }
    without = [name for name, value in needed.items() if not value > 0]
    return f"{without[0]} is missing" if manifest.programs and without else None


def shared_tensors(manifest: pb.Manifest) -> list[pb.Tensor]:
    """The tensors that may leave a device, in manifest order."""
    shared = {role.name for role in manifest.roles if role.shared}
    return [tensor for tensor in manifest.tensors if tensor.role in shared]


def contract_sha256(manifest: pb.Manifest) -> str:
    """Hash of what two sides must agree on to exchange generalists."""
    digest = hashlib.sha256(f"{_model(manifest)} {manifest.mixture.alpha:g}".encode())
    for tensor in shared_tensors(manifest):
        digest.update(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    return digest.hexdigest()


def family_sha256(manifest: pb.Manifest) -> str:
    """Hash of what two sides must agree on to exchange generalists of any rank and alpha.

    Raises:
        BundleError: the shared tensors are not all LoRA pairs of the manifest's rank and alpha.
    """
    rank = manifest.mixture.rank
    digest = hashlib.sha256(_model(manifest).encode())
    for tensor in shared_tensors(manifest):
        shape = list(tensor.shape)
        at = 0 if tensor.name.endswith(".lora_A.weight") else 1
        pair = at == 0 or tensor.name.endswith(".lora_B.weight")
        if not pair or len(shape) != 2 or shape[at] != rank or not manifest.mixture.alpha > 0:
            raise BundleError(
                f"{tensor.name} is not half of a LoRA pair of rank {rank} and alpha "
                f"{manifest.mixture.alpha:g}; serve this bundle without --mixed-ranks"
            )
        digest.update(f"{tensor.name} {tensor.dtype} {shape[1 - at]}\n".encode())
    return digest.hexdigest()


def _model(manifest: pb.Manifest) -> str:
    """The base and the mixing: what shared tensors are for. The default mixing is left out, so that
    the contract of most bundles stays what it was before mixing counted."""
    mixing = manifest.mixture.mixing
    return manifest.base.sha256 + ("" if mixing == "per_linear" else f" {mixing}")
