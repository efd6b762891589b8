"""Adapters as vectors.

Each role (generalist, specialist, router) is one contiguous float32 vector; the manifest names its
slices. A program's inputs and outputs are views into such vectors, so an optimizer step, an average
or a checkpoint is one operation on one array.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edge_runtime.bundle import Bundle
from edge_runtime.errors import AdapterError
from edge_runtime.files import write_atomic
from protos import manifest_pb2 as pb

Vector = NDArray[np.float32]
Vectors = dict[str, Vector]

ROUTER = "router"
STACK = "experts"
ROUTER_FILE = "router.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
# Options of PEFT with which an adapter is not a sum of products B A any more, or not on one scale.
BEYOND_LORA = (
    "use_dora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
)
# Ways to begin that change the base, too; an adapter from there means nothing on the plain one.
BESIDE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def zeros(manifest: pb.Manifest) -> Vectors:
    """A zero vector per role, in the manifest's order."""
    return {role.name: np.zeros(role.size, np.float32) for role in manifest.roles}


class Layout:
    """Where the tensors of a manifest lie in the vectors of their roles."""

    def __init__(self, manifest: pb.Manifest) -> None:
        self._sizes = {role.name: role.size for role in manifest.roles}
        self._tensors: dict[str, list[tuple[str, slice, tuple[int, ...]]]] = defaultdict(list)
        for tensor in manifest.tensors:
            end = tensor.offset + math.prod(tensor.shape)
            found = tensor.name, slice(tensor.offset, end), tuple(tensor.shape)
            self._tensors[tensor.role].append(found)

    def views(self, vectors: Mapping[str, Vector]) -> dict[str, Vector]:
        """Tensor name -> view of its slice, for the roles in `vectors`. Nothing is copied.

        Raises:
            AdapterError: a vector is not float32 of its role's size.
        """
        for role, vector in vectors.items():
            if vector.shape != (self._sizes.get(role),) or vector.dtype != np.float32:
                raise AdapterError(
                    f"{role} is {vector.dtype}{list(vector.shape)}, the bundle wants "
                    f"float32[{self._sizes.get(role, 0)}]; use the bundle that these adapters came "
                    "from"
                )
        return {
            name: vector[where].reshape(shape)
            for role, vector in vectors.items()
            for name, where, shape in self._tensors[role]
        }


def views(manifest: pb.Manifest, vectors: Mapping[str, Vector]) -> dict[str, Vector]:
    """`Layout.views`, for once."""
    return Layout(manifest).views(vectors)


class Stacks:
    """The LoRA pairs of all experts on each map as one, for programs whose inputs they are.

    `experts/<module>.lora_A.weight` is (n r, in): the A of the experts that have the module, in the
    manifest's order, each times the scale alpha / sqrt(r). `experts/<module>.lora_B.weight` is
    (n r, out), as B^T, which is read faster. So sum_j p_j s B_j A_j x is two products, with the p_j
    between them.
    """

    def __init__(self, manifest: pb.Manifest) -> None:
        self._scale = np.float32(manifest.mixture.alpha / math.sqrt(manifest.mixture.rank))
        pairs: dict[str, list[pb.Tensor]] = defaultdict(list)
        for tensor in manifest.tensors:
            if tensor.role != ROUTER:
                pairs[f"{STACK}/{tensor.name.split('/', 1)[1]}"].append(tensor)
        self.arrays: dict[str, Vector] = {}
        self._slots: dict[str, Vector] = {}
        for name, tensors in pairs.items():
            n, (rows, columns) = len(tensors), tensors[0].shape
            below = name.endswith(".lora_A.weight")
            stack = np.zeros((n * rows, columns) if below else (n * columns, rows), np.float32)
            slots = stack.reshape(n, -1, stack.shape[1])
            self.arrays[name] = stack
            self._slots |= {t.name: slot for t, slot in zip(tensors, slots, strict=True)}

    def fill(self, named: Mapping[str, Vector]) -> None:
        """Takes over LoRA pairs, by the names of their tensors; what else there is, is left."""
        for name, value in named.items():
            if name.endswith(".lora_A.weight"):
                np.multiply(value, self._scale, out=self._slots[name])
            elif name in self._slots:
                self._slots[name][...] = value.T


def load_fresh(bundle: Bundle) -> Vectors:
    """The untrained adapters that the bundle was exported with."""
    return load_directory(bundle.manifest, bundle.path, checked_by=bundle)


def load_directory(
    manifest: pb.Manifest, path: Path, *, checked_by: Bundle | None = None
) -> Vectors:
    """Reads every role from `path`, laid out as in a bundle (see `save_directory`).

    Raises:
        AdapterError: a file is missing or damaged, or has other tensors or shapes.
        BundleError: with `checked_by`, a file differs from that bundle's manifest.
    """
    vectors = zeros(manifest)
    for role in manifest.roles:
        file = role_file(role)
        _fill(manifest, vectors, role.name, checked_by.file(file) if checked_by else path / file)
    return vectors


def load_peft(manifest: pb.Manifest, role: str, path: Path) -> Vector:
    """An expert that PEFT trained on the same targets, at the scale of this bundle.

    Raises:
        AdapterError: a file is missing or damaged, or it is another kind of adapter, of another
            rank or on other targets.
    """
    source = path / ADAPTER_CONFIG
    try:
        config = json.loads(source.read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except OSError as error:
        raise AdapterError(f"cannot read {source}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"{source} is not a LoRA configuration of PEFT: {error}") from error
    odd = [option for option in BEYOND_LORA if config.get(option)]
    if str(config.get("init_lora_weights")).lower().startswith(BESIDE_THE_BASE):
        odd.append("init_lora_weights")
    if config.get("peft_type") != "LORA" or odd or config.get("bias", "none") != "none":
        raise AdapterError(
            f"{path} is more than LoRA ({', '.join(odd) or 'see its peft_type and bias'}); train "
            "it without, or merge that into the base"
        )
    mixture = manifest.mixture
    if rank != mixture.rank:
        raise AdapterError(
            f"{path} has rank {rank}, the bundle {mixture.rank}; export with --rank {rank}"
        )
    vectors = {role: zeros(manifest)[role]}
    _fill(manifest, vectors, role, path / ADAPTER_FILE)
    theirs = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    for name, view in views(manifest, vectors).items():
        if name.endswith(".lora_B.weight"):
            view[...] *= theirs / (mixture.alpha / math.sqrt(rank))
    if not np.isfinite(vectors[role]).all():
        raise AdapterError(f"{path} holds a NaN or an infinity, or its lora_alpha is none")
    return vectors[role]


def _fill(manifest: pb.Manifest, vectors: Vectors, role: str, source: Path) -> None:
    """Reads the tensors of `role` into its vector."""
    stored = _read(source)
    wanted = {_key_in_file(n): v for n, v in views(manifest, vectors).items() if _role(n) == role}
    if stored.keys() != wanted.keys():
        odd = sorted(stored.keys() ^ wanted.keys())
        raise AdapterError(
            f"{source} does not hold the bundle's {role}: {odd[0]} is in only one of them; export "
            "a bundle with the adapter's targets, or use the bundle that it came from"
        )
    for key, view in wanted.items():
        if stored[key].shape != view.shape:
            raise AdapterError(
                f"{source}: {key} has shape {list(stored[key].shape)}, the bundle wants "
                f"{list(view.shape)} (rank {manifest.mixture.rank}); use an adapter of that "
                "rank, or export a bundle with the adapter's"
            )
        view[...] = stored[key]


def save_directory(manifest: pb.Manifest, vectors: Mapping[str, Vector], path: Path) -> None:
    """Writes each expert as a PEFT directory and the router as one safetensors file.

    Raises:
        StorageError: the disk is full or not writable.
    """
    named = views(manifest, vectors)
    for role in manifest.roles:
        if role.name not in vectors:
            continue
        tensors = {
            _key_in_file(name): np.ascontiguousarray(view)
            for name, view in named.items()
            if _role(name) == role.name
        }
        write_atomic(path / role_file(role), save(tensors, metadata={"format": "pt"}))
        if role.name != ROUTER:
            config = json.dumps(peft_config(manifest, role.name), indent=2) + "\n"
            write_atomic(path / role.path / ADAPTER_CONFIG, config.encode())


def peft_config(manifest: pb.Manifest, role: str) -> dict[str, Any]:
    """`adapter_config.json` of one expert, as PEFT reads it."""
    modules = {t.name.split("/", 1)[1] for t in manifest.tensors if t.role == role}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": manifest.base.name,
        "r": manifest.mixture.rank,
        "lora_alpha": manifest.mixture.alpha,
        "use_rslora": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": manifest.base.architecture == "gpt2",
        "target_modules": sorted({module.rsplit(".lora_", 1)[0] for module in modules}),
        "inference_mode": True,
    }


def role_file(role: pb.Role) -> str:
    """Path, inside the bundle, of the safetensors file that holds `role`."""
    return role.path if role.name == ROUTER else f"{role.path}/{ADAPTER_FILE}"


def _role(tensor: str) -> str:
    return tensor.split("/", 1)[0]


def _key_in_file(tensor: str) -> str:
    role, module = tensor.split("/", 1)
    return module if role == ROUTER else PEFT_PREFIX + module


def _read(path: Path) -> dict[str, NDArray[Any]]:
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror}") from error
    except SafetensorError as error:
        raise AdapterError(f"{path} is damaged: {error}; restore it from a copy") from error
    except (KeyError, TypeError) as error:  # a dtype that numpy does not have
        raise AdapterError(f"{path} holds {error}; save it in float32") from error
