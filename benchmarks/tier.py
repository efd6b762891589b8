"""`comigs bench tier`: every tier's own bundle, within that tier's memory and on its threads.

Suggesting is a process of its own, and training is `comigs device run --alone` with the tier's
memory as its budget, so that what was planned stands beside what was measured. Both are watched:
a process whose resident set, mapped files included, exceeds the tier's memory is ended, as a phone
does it. Resident sets are looked at every 20 ms, and the largest is compared at the end, too.

The processor is this machine's: what is told of a tier's speed is how its shapes and threads do
here, what is told of its memory holds there.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypedDict

from benchmarks.compiled import kept_in, sources_digest
from benchmarks.contest import ROOT, WATCH_SECONDS, Contestant, check_memory, turns
from benchmarks.machine import Machine, machine
from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.data import SPLITS
from edge_runtime.errors import BudgetError, ComigsError
from edge_runtime.predict import memory_plan
from edge_runtime.processor import usable_cores
from export.base import load_base
from export.tiers import DeviceClass, device_classes

TOKENS = 32  # decoded after a prompt
TEXT_CHARACTERS = 12_000  # per split: enough for a batch, whatever the tokenizer


class Exporting(TypedDict):
    """Of `comigs export`, a process of its own: all programs compiled, compared and measured."""

    seconds: float
    processor_seconds: float
    peak_rss_mib: float


class Suggesting(TypedDict):
    """Of the process that suggests. Times in seconds."""

    token_p50: float
    token_p95: float
    prompt: int
    prefill_tokens_per_second: float
    cold_start: float
    planned_mib: float
    peak_rss_mib: float


class Training(TypedDict):
    """What the device reported. A step has `sequences` of the tier's length, in micro-batches."""

    step_seconds: float
    sequences: int
    micro_batch: int
    planned_mib: float
    peak_rss_mib: float


class Row(TypedDict):
    """One tier. What does not fit is null, and `refused` says why."""

    tier: str
    device: str
    engine: str
    base_dtype: str
    threads: int
    tier_threads: int
    memory_limit_mib: int
    context: int
    train_length: int
    bundle_mib: float
    exporting: Exporting
    suggesting: Suggesting | None
    training: Training | None
    refused: list[str]


class Result(TypedDict):
    """What `comigs bench tier --format json` prints."""

    benchmark: str
    base: str
    weights: str
    turns: int
    machine: Machine
    versions: dict[str, str]
    rows: list[Row]


def run(
    *,
    base_name: str,
    random_weights: bool,
    names: Sequence[str],
    contestants: Sequence[tuple[str, str]],
    count: int,
    cache: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Result:
    """Runs the tiers `names` for each (engine, precision) of `contestants`.

    Raises:
        BaseModelError: the base is not available.
    """
    weights = "random" if random_weights else "pretrained"
    classes = device_classes()
    made_from = load_base(base_name, random_weights=random_weights).fingerprint
    rows = []
    with kept_in(cache) as folder:
        jobs = []
        for name in names:
            for engine, precision in contestants:
                progress(f"{name}: exporting for {engine} {precision}")
                options = {"base": base_name, "weights": weights, "tier": name}
                options |= {"engine": engine, "precision": precision}
                jobs.append((name, engine, precision, *_export(options, made_from, folder)))
        for name, engine, precision, bundle, exporting in jobs:
            row = _row(classes[name], bundle, exporting, engine, precision, count, progress)
            rows.append(row)
    return {
        "benchmark": "tier",
        "base": base_name,
        "weights": weights,
        "turns": count,
        "machine": machine(),
        "versions": {n: version(n) for n in {engine for engine, _ in contestants}},
        "rows": rows,
    }


def _export(options: dict[str, str], made_from: str, folder: Path) -> tuple[Bundle, Exporting]:
    """What `comigs export` wrote with these options, now or in an earlier run of the same code on
    a base with the fingerprint `made_from`."""
    key = repr((sorted(options.items()), made_from, sources_digest())).encode()
    path = folder / f"tier-{hashlib.sha256(key).hexdigest()[:16]}"
    figures = path.with_suffix(".json")
    if not figures.exists():
        command = [sys.executable, "-m", "edge_runtime", "export", "--out", str(path)]
        command += [part for name, value in options.items() for part in (f"--{name}", value)]
        started = time.perf_counter()
        with tempfile.TemporaryFile("w+") as err:
            process = subprocess.Popen(
                [*command, "--overwrite"],
                stdout=subprocess.DEVNULL,
                stderr=err,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            err.seek(0)
            said = " ".join(err.read().split())
        if process.returncode:
            raise ComigsError(f"the export for {options['tier']} failed: {said[-400:]}")
        exporting: Exporting = {
            "seconds": time.perf_counter() - started,
            "processor_seconds": usage.ru_utime + usage.ru_stime,
            "peak_rss_mib": usage.ru_maxrss / 1024,
        }
        figures.write_text(json.dumps(exporting))
    exporting = json.loads(figures.read_text())
    return open_bundle(path), exporting


def _row(
    device: DeviceClass,
    bundle: Bundle,
    exporting: Exporting,
    engine: str,
    precision: str,
    count: int,
    progress: Callable[[str], None],
) -> Row:
    tier = bundle.manifest.tier
    threads = min(device.threads, usable_cores())
    limit = device.memory_mib * 2**20
    row: Row = {
        "tier": tier.name,
        "device": device.device,
        "engine": engine,
        "base_dtype": precision,
        "threads": threads,
        "tier_threads": device.threads,
        "memory_limit_mib": device.memory_mib,
        "context": tier.context,
        "train_length": tier.train_length,
        "bundle_mib": sum(file.size for file in bundle.manifest.files) / 2**20,
        "exporting": exporting,
        "suggesting": None,
        "training": None,
        "refused": [],
    }
    try:
        row["suggesting"] = _suggest(
            bundle, engine, threads, limit, count, lambda turn: progress(f"{tier.name}: {turn}")
        )
    except BudgetError as error:
        row["refused"].append(str(error))
    progress(f"{tier.name}: training")
    try:
        row["training"] = _train(bundle, engine, threads, limit, count)
    except BudgetError as error:
        row["refused"].append(str(error))
    for what in (row["suggesting"], row["training"]):
        if what and what["peak_rss_mib"] > device.memory_mib:
            row["refused"].append(
                f"a peak of {what['peak_rss_mib']:.0f} MiB is more than {device.memory_mib} MiB"
            )
    return row


def _suggest(
    bundle: Bundle,
    engine: str,
    threads: int,
    limit: int,
    count: int,
    progress: Callable[[str], None],
) -> Suggesting:
    prompt = bundle.manifest.tier.context // 2
    tokens = min(TOKENS, bundle.manifest.tier.context - prompt)
    command = [sys.executable, "-m", "benchmarks.device_process", "predict"]
    command += [str(bundle.path), engine, str(threads)]
    latencies: list[float] = []
    prefills: list[float] = []
    starts: list[float] = []
    peak = 0.0
    for counts in turns(count, progress, warm_up=1):
        with Contestant("suggesting", command, limit=limit) as each:
            each.ask("prefill", prompt)
            start = time.perf_counter() - each.started
            each.ask("decode", tokens)  # warms up
            each.ask("prefill", prompt)  # loads the program for long texts, if there is room for it
            prefill, _ = each.ask("prefill", prompt)
            seconds, _ = each.ask("decode", tokens)
            peak = max(peak, each.ask("peak"))
        if counts:
            starts.append(start)
            prefills.append(prompt / prefill)
            latencies += seconds
    _, planned = memory_plan(bundle, engine)
    return {
        "token_p50": median(latencies),
        "token_p95": quantiles(latencies, n=20)[-1],
        "prompt": prompt,
        "prefill_tokens_per_second": median(prefills),
        "cold_start": median(starts),
        "planned_mib": planned / 2**20,
        "peak_rss_mib": peak,
    }


def _train(bundle: Bundle, engine: str, threads: int, limit: int, count: int) -> Training:
    with tempfile.TemporaryDirectory(prefix="comigs-bench-") as name:
        folder = Path(name)
        sentence = "The quick brown fox, number {}, jumps over the lazy dog.\n"
        for split in SPLITS:
            lines = (sentence.format(i) for i in range(TEXT_CHARACTERS // len(sentence)))
            (folder / f"{split}.txt").write_text("".join(lines))
        config = {"rounds": 1, "local_steps": count, "tau": 1000}
        (folder / "training.json").write_text(json.dumps(config))
        command = [
            *(sys.executable, "-m", "edge_runtime", "device", "run", "--alone"),
            *("--home", str(folder / "home"), "--data", name, "--bundle", str(bundle.path)),
            *("--engine", engine, "--threads", str(threads), "--memory", f"{limit} B"),
            *("--training", str(folder / "training.json"), "--format", "json"),
        ]
        with (
            (folder / "out").open("w+") as out,
            (folder / "err").open("w+") as err,
            subprocess.Popen(
                command, stdout=out, stderr=err, env={**os.environ, "PYTHONPATH": str(ROOT)}
            ) as process,
        ):
            try:
                while process.poll() is None:
                    check_memory("training", process.pid, limit)
                    time.sleep(WATCH_SECONDS)
            finally:
                process.kill()
            said = " ".join((folder / "err").read_text().split()).removeprefix("error: ")
            if process.returncode:
                kind = BudgetError if process.returncode == BudgetError.code else ComigsError
                raise kind(said[:400])
            report = json.loads((folder / "out").read_text().splitlines()[-1])
    return {
        "step_seconds": report["step_seconds"],
        "sequences": 8,
        "micro_batch": report["micro_batch"],
        "planned_mib": report["planned_memory_mib"],
        "peak_rss_mib": report["peak_rss_mib"],
    }


def table(result: Result) -> Any:
    """A tier a row, for people."""
    from rich.table import Table

    view = Table(title=f"{result['base']} ({result['weights']} weights), {result['turns']} turns")
    view.add_column("tier")
    for heading in (
        "limit, MiB", "threads", "token p50 / p95, ms", "prefill, tokens/s", "first suggestion",
        "train step", "suggesting, MiB", "training, MiB (planned)", "bundle, MiB", "export",
    ):  # fmt: skip
        view.add_column(heading, justify="right")
    for row in result["rows"]:
        e, s, t = row["exporting"], row["suggesting"], row["training"]
        view.add_row(
            f"{row['tier']}, {row['engine']} {row['base_dtype']}",
            str(row["memory_limit_mib"]),
            f"{row['threads']}"
            + (f" of {row['tier_threads']}" if row["threads"] < row["tier_threads"] else ""),
            f"{1000 * s['token_p50']:.1f} / {1000 * s['token_p95']:.1f}" if s else "-",
            f"{s['prefill_tokens_per_second']:.0f}" if s else "-",
            f"{s['cold_start']:.2f} s" if s else "-",
            f"{t['step_seconds']:.2f} s" if t else "-",
            f"{s['peak_rss_mib']:.0f}" if s else "-",
            f"{t['peak_rss_mib']:.0f} ({t['planned_mib']:.0f})" if t else "-",
            f"{row['bundle_mib']:.0f}",
            f"{e['seconds']:.0f} s, {e['peak_rss_mib'] / 1024:.1f} GiB",
        )
    return view
