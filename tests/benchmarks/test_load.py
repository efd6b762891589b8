"""`comigs bench coordinator` with few devices: the round is right, and everything is reported."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.results import coordinator_table, heading


def test_a_round_is_compared_with_the_bare_loop() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "edge_runtime", "bench", "coordinator"),
            *("--devices", "12", "--processes", "1", "--repetitions", "2", "--format", "json"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    # The benchmark itself compares what came out with the mean of what the devices sent.
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["devices"] == 12
    assert result["repetitions"] == len(result["rounds"]) == len(result["bare_loops"]) == 2
    assert 4.7e6 < result["update_bytes"] < 4.8e6
    slowest = max(sum(phases.values()) for phases in result["rounds"])
    assert 0 < result["round_seconds"] <= slowest
    assert result["ratio_to_bare_loop"] > 0
    assert result["processor_time_ratio"] > 0
    assert 30 < result["idle_rss_mib"] < result["peak_rss_mib"]
    assert 0 < result["checkin_median_ms"] <= result["checkin_p99_ms"] <= result["checkin_max_ms"]
    assert result["checkins"] > 0
    assert result["peers"] == []

    peer = {"name": "Another", "devices": 6, "round_seconds": 9.0, "peak_rss_mib": 800.0}
    peer["settings"] = "its own"
    table = coordinator_table({**result, "peers": [peer]})
    assert heading(result) == "12 devices, updates of 4.7 MB"
    (ours,) = (line for line in table.splitlines() if line.startswith("| comigs |"))
    assert f"take {result['ratio_to_bare_loop']:.2f} times as long" in table
    assert f"| {result['peak_rss_mib']:.0f} |" in ours
    assert "| Another | 6 | 9.0 |" in table
    assert "* Another: its own." in table
