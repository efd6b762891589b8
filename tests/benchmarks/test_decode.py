"""`comigs bench decode` on the tiny base: what it says of ours, and of peers that are not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_runtime", "bench", "decode", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def with_peers(base: Path, cache: Path, python: Path) -> subprocess.CompletedProcess[str]:
    return bench(
        *("--base", base, "--weights", "pretrained", "--prompt", 12, "--tokens", 8),
        *("--engines", "onnxruntime", "--turns", 4, "--cache", cache, "--format", "json"),
        *("--peers", "--peers-python", python),
    )


def test_ours_is_measured_and_what_is_missing_is_named(tiny_base_dir: Path, cache: Path) -> None:
    done = with_peers(tiny_base_dir, cache, cache / "none" / "python")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (row,) = result["rows"]
    assert (row["engine"], row["weights"]) == ("onnxruntime", "float32")
    low, high = row["decode_spread"]
    assert 0 < low <= row["decode_tokens_per_second"] <= high
    assert row["prefill_tokens_per_second"] > 0
    assert row["adapter_cost"] > -0.5
    assert 0 < row["bandwidth_share"] < 1
    assert 0.1 < row["first_suggestion_seconds"] < 60
    assert 0 < row["swap_seconds"] < row["first_suggestion_seconds"]
    assert 0 < row["swap_all_seconds"] < row["first_suggestion_seconds"]
    assert 10 < row["peak_rss_mib"] < 500
    assert row["same_tokens"] == 8
    # Without peers there is nothing to compare with, and each is named.
    assert row["ratio_to_fastest_peer"] is None
    assert result["peers"] == []
    assert {m["engine"] for m in result["missing"]} >= {"ctranslate2", "llama_cpp", "openvino"}
    assert all("benchmarks/peers/README.md" in m["why"] for m in result["missing"])


def test_a_peer_that_crashes_is_named(tiny_base_dir: Path, cache: Path, tmp_path: Path) -> None:
    """As llama.cpp does, which loads on some processors and then cannot compute."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'case "$2 $3" in\n'
        '*llama_cpp\\ convert) mkdir "$5" ;;\n'
        "*llama_cpp\\ run) echo '\"ready\"'; read -r asked; kill -SEGV $$ ;;\n"
        "*) exit 1 ;;\n"
        "esac\n"
    )
    python.chmod(0o755)
    done = with_peers(tiny_base_dir, cache, python)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (why,) = (m["why"] for m in result["missing"] if m["engine"] == "llama_cpp")
    assert "ended with -11" in why
    assert result["peers"] == []
    assert len(result["rows"]) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--prompt", 30, "--tokens", 3), "32 positions"),
        (("--engines", "onnxruntime:int2"), "int2"),
        (("--engines", "llama_cpp"), "llama_cpp"),
        (("--prompt", 1), "--prompt"),
        (("--weights", "rnd"), "pretrained or random"),
    ],
)
def test_wrong_usage_is_refused(
    tiny_base_dir: Path, arguments: tuple[object, ...], says: str
) -> None:
    done = bench("--base", tiny_base_dir, *arguments)
    assert done.returncode == 2
    assert says in done.stderr


def test_peers_for_another_family_are_refused(tiny_llama_dir: Path) -> None:
    done = bench(
        "--base", tiny_llama_dir, "--weights", "pretrained", "--prompt", 8, "--tokens", 4, "--peers"
    )
    assert done.returncode == 2
    assert "no GPT-2" in done.stderr
