"""Devices of two ranks in one fleet as people run them: processes, TLS, training, a kill.

With FlexLoRA; with COMIGS_SOAK=1, with the other methods too.
"""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_session import comigs, free_port
from tiny import ExportTiny

from coordinator.administrator import Administrator
from edge_runtime import wire
from edge_runtime.adapters import Vectors, views
from edge_runtime.bundle import Bundle
from edge_runtime.identity import read_identity
from edge_runtime.store import Home
from export.mixture import Mixture

RANKS = {"ada": 2, "grace": 4}
METHODS = ["flexlora", "hetlora", "zero-pad"]


class Coordinator:
    """`comigs serve` of all bundles, killed and started again with the same command."""

    def __init__(self, root: Path, bundles: list[Bundle], method: str) -> None:
        self.state = root / "state"
        training = root / "training.json"
        training.write_text('{"local_steps": 300, "batch_sequences": 2}')
        self.options = [
            *(word for bundle in bundles for word in ("--bundle", bundle.path)),
            *("--state", self.state, "--mixed-ranks", method, "--rounds", 1, "--min-devices", 2),
            *("--listen", f"127.0.0.1:{free_port()}", "--enrolment-port", free_port()),
            *("--training", training, "--exit-when-done", "--format", "json"),
        ]
        self.start()

    def start(self) -> None:
        self.process = comigs("serve", *self.options)
        self.wait_for("listening")

    def wait_for(self, event: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if json.loads(line)["event"] == event:
                return
        raise AssertionError(f"it ended without {event}")

    def administrator(self) -> Administrator:
        identity = read_identity(self.state / "admin.json")
        assert identity is not None
        return Administrator(identity)


def factors(bundle: Bundle, vectors: Vectors) -> list[tuple[np.ndarray, np.ndarray]]:
    """A and s B of each target of the generalist, in float64."""
    mixture = bundle.manifest.mixture
    named = views(bundle.manifest, {"generalist": vectors["generalist"]})
    halves = [half.astype(np.float64) for half in named.values()]
    scale = mixture.alpha / math.sqrt(mixture.rank)
    return [(a, scale * b) for a, b in zip(halves[::2], halves[1::2], strict=True)]


def reference(method: str, pairs: list[tuple[np.ndarray, np.ndarray]], rank: int) -> np.ndarray:
    """What a device of `rank` gets of one target, from what all have sent."""
    if method == "flexlora":
        u, sigma, v = np.linalg.svd(sum(b @ a for a, b in pairs) / len(pairs))
        return (u[:, :rank] * sigma[:rank]) @ v[:rank]
    weights = [np.linalg.norm(b @ a) if method == "hetlora" else 1.0 for a, b in pairs]
    wide = max(RANKS.values())
    mean_a, mean_b = 0.0, 0.0
    for weight, (a, b) in zip(weights, pairs, strict=True):
        mean_a = mean_a + weight * np.pad(a, ((0, wide - len(a)), (0, 0)))
        mean_b = mean_b + weight * np.pad(b, ((0, 0), (0, wide - len(a))))
    return mean_b[:, :rank] @ mean_a[:rank] / sum(weights) ** 2


@pytest.mark.parametrize("method", METHODS if os.environ.get("COMIGS_SOAK") else METHODS[:1])
def test_two_ranks_train_one_generalist(
    method: str, export_tiny: ExportTiny, text_dir: Path, tmp_path: Path
) -> None:
    """What each device ends with is the reference over what both sent, at its rank."""
    programs = ("train_step", "eval_loss")
    bundles = {
        name: export_tiny(Mixture(rank=rank, alpha=4.0 * rank), programs=programs)
        for name, rank in RANKS.items()
    }
    coordinator = Coordinator(tmp_path, list(bundles.values()), method)
    devices: dict[str, subprocess.Popen[str]] = {}
    sent: dict[str, Any] = {}
    with coordinator.administrator() as administrator:
        for name, bundle in bundles.items():
            options = ("--home", tmp_path / name, "--data", text_dir, "--bundle", bundle.path)
            invitation = administrator.invite(name, 600).invitation
            devices[name] = comigs(
                *("device", "run", "--invitation", invitation, *options, "--threads", 1),
                stdout=subprocess.DEVNULL,
            )
        coordinator.wait_for("round_opened")
        administrator.pause()  # so that what is sent stays to be looked at
        coordinator.wait_for("update_accepted")
        coordinator.wait_for("update_accepted")
        names = {entry.id: entry.name for entry in administrator.devices()}
    for file in coordinator.state.glob("updates/*/*.safetensors"):
        name = names[file.name.partition("-")[0]]
        decoded = wire.decode(bundles[name].manifest, file.read_bytes())
        sent[name] = factors(bundles[name], decoded)
    assert sent.keys() == RANKS.keys()

    coordinator.process.kill()
    coordinator.process.wait()
    coordinator.start()
    with coordinator.administrator() as administrator:
        administrator.resume()
    for device in devices.values():
        _, error = device.communicate(timeout=120)
        assert device.returncode == 0, error
    _, error = coordinator.process.communicate(timeout=60)
    assert coordinator.process.returncode == 0, error
    for name, bundle in bundles.items():
        state, _ = Home(tmp_path / name).load_state(bundle)
        got = [b @ a for a, b in factors(bundle, state.vectors)]
        for index, product in enumerate(got):
            expected = reference(method, [sent[each][index] for each in RANKS], RANKS[name])
            assert np.abs(expected).max() > 1e-3, "it has learnt"
            np.testing.assert_allclose(product, expected, atol=1e-4 * np.abs(expected).max())
