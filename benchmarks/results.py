"""Writes `benchmarks/RESULTS.md` and its plots from `benchmarks/results/*.json`.

    comigs bench train --format json > benchmarks/results/train-1x128.json
    python -m benchmarks.results

Every file is what a `comigs bench ... --format json` printed; the page repeats its figures and adds
nothing but `notes.md`, which says what they mean.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

FOLDER = Path(__file__).parent / "results"
PAGE = Path(__file__).parent / "RESULTS.md"
OURS, THEIRS, LIMIT = "#1b6ca8", "#b9c2cb", "#c0392b"
WEIGHTS = ("float32", "int8", "int4")
SWAPS = ("swap_seconds", "swap_all_seconds")
Results = list[tuple[str, dict[str, Any]]]
"""(file name without its ending, what is in it), by name."""


def main() -> None:
    results = read(FOLDER)
    for name, draw in plots(results).items():
        _save(FOLDER / f"{name}.svg", draw)
    PAGE.write_text(page(results, FOLDER), encoding="utf-8")


def read(folder: Path) -> Results:
    return [(p.stem, json.loads(p.read_text())) for p in sorted(folder.glob("*.json"))]


def page(results: Results, folder: Path) -> str:
    """The whole page."""
    parts = [
        "# Results",
        "Made by `python -m benchmarks.results` from `benchmarks/results/*.json`; change those and "
        "`benchmarks/results/notes.md`, not this page. A figure is a median, with the first and "
        "the third quartile in parentheses. Of training steps and suggestions, the contestants of "
        "a table took turns in one run, each in a process of its own while the others stood still.",
        (folder / "notes.md").read_text(encoding="utf-8").strip(),
    ]
    sections: tuple[tuple[str, str, Callable[[dict[str, Any]], str]], ...] = (
        ("train", "Training step", train_table),
        ("decode", "Suggestions", decode_table),
        ("tier", "Tiers", tier_table),
        ("profile", "Where the time goes", profile_table),
        ("coordinator", "Coordinator", coordinator_table),
    )
    for kind, title, table in sections:
        found = [(name, result) for name, result in results if result["benchmark"] == kind]
        if not found:
            continue
        parts.append(f"## {title}")
        for name, result in found:
            processor = result["machine"]["processor"]
            parts += [f"### {heading(result)}, on {processor}", table(result)]
            if name in plots([(name, result)]):
                parts.append(f"![{heading(result)}](results/{name}.svg)")
            parts.append(f"`results/{name}.json`; {ran_on(result)}")
    parts += ["## Machines", machines(results)]
    return "\n\n".join(parts) + "\n"


# --- text --------------------------------------------------------------------------------------


def heading(result: dict[str, Any]) -> str:
    if result["benchmark"] == "coordinator":
        return f"{result['devices']} devices, updates of {result['update_bytes'] / 1e6:.1f} MB"
    base = result["base"] + (" (random weights)" if result["weights"] == "random" else "")
    match result["benchmark"]:
        case "train":
            specialists = result.get("specialists", 1)
            more = f", {specialists} specialists" if specialists > 1 else ""
            return f"{base}, {result['batch']} x {result['length']} tokens{more}"
        case "decode":
            kinds = dict.fromkeys(row["weights"] for row in result["rows"])
            return f"{base}, {result['tokens']} tokens after {result['prompt']}: {', '.join(kinds)}"
        case _:
            return str(base)


def ran_on(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in sorted(result["versions"].items()))
    threads = f"{result['threads']} threads; " if "threads" in result else ""
    limits = ", ".join(
        f"{LIMITS[name]} {value:.0f} {unit(name)}"
        for name, value in result.get("limits", {}).items()
    )
    machine = result["machine"]
    load, cores = machine["load_average"], machine["cores"]
    noise = (
        f" **On {cores} cores that is other programs' work as well: the figures are rough, and "
        "speeds lower than alone.**"
        if load > cores + 1
        else ""
    )
    return (
        f"{machine['processor']}; {threads}{versions}; {limits + '; ' if limits else ''}load of "
        f"the machine at the end {load:.1f}.{noise}"
    )


LIMITS = {
    "float32_gflops": "peak of float32 products",
    "int8_gflops": "peak of int8 products",
    "read_gb_per_s": "reading memory",
}


def unit(limit: str) -> str:
    return {"float32_gflops": "GFLOP/s", "int8_gflops": "GOP/s", "read_gb_per_s": "GB/s"}[limit]


def machines(results: Results) -> str:
    rows = dict.fromkeys(
        (
            m["processor"],
            m["architecture"],
            str(m["cores"]),
            ", ".join(m["features"]),
            f"{m['memory_gib']:.0f} GiB",
            m["kernel"],
            m["python"],
        )
        for m in (result["machine"] for _, result in results)
    )
    heads = ("processor", "architecture", "cores", "features", "memory", "kernel", "Python")
    return markdown(heads, rows, right=())


def markdown(
    heads: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] | None = None
) -> str:
    aligned = set(range(1, len(heads)) if right is None else right)
    rule = ["---:" if i in aligned else "---" for i in range(len(heads))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, rule, *rows))


def interval(value: float, spread: Sequence[float], digits: int) -> str:
    low, high = spread
    return f"{value:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def train_table(result: dict[str, Any]) -> str:
    reference = result["reference"]
    rows = [
        (
            reference["name"],
            interval(reference["seconds"], reference["seconds_spread"], 3),
            "1",
            f"{reference['peak_rss_mib']:.0f}",
            "",
            f"{reference['gemm_peak_share']:.0%}",
        ),
        *(
            (
                train_name(row),
                interval(row["seconds"], row["seconds_spread"], 3),
                interval(row["time_ratio"], row["time_ratio_spread"], 2),
                f"{row['peak_rss_mib']:.0f}",
                f"{row['gradient_cosine_min']:.4f} / {row['gradient_cosine_mean']:.4f}",
                f"{row['gemm_peak_share']:.0%}",
            )
            for row in result["rows"]
        ),
    ]
    heads = (
        *("", "seconds", "of PyTorch's time", "peak memory, MiB"),
        *("gradients' cosine, worst / mean", "of GEMM peak"),
    )
    return markdown(heads, rows)


def train_name(row: dict[str, Any]) -> str:
    variant = "" if row["variant"] == "standard" else f", {row['variant']}"
    return f"{row['engine']} {row['base_dtype']}{variant}"


def decode_rows(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, row) of ours and theirs, by weights, the fastest first."""
    rows = [
        *((f"comigs, {row['engine']}", row) for row in result["rows"]),
        *((row["engine"].replace("_", " "), row) for row in result["peers"]),
    ]
    return sorted(
        rows, key=lambda r: (WEIGHTS.index(r[1]["weights"]), -r[1]["decode_tokens_per_second"])
    )


def decode_table(result: dict[str, Any]) -> str:
    def ours(row: dict[str, Any], key: str, form: str) -> str:
        return "" if row.get(key) is None else form.format(row[key])

    rows = [
        (
            f"{name} {row['weights']}",
            interval(row["decode_tokens_per_second"], row["decode_spread"], 1),
            ours(row, "ratio_to_fastest_peer", "{:.2f}"),
            interval(row["prefill_tokens_per_second"], row["prefill_spread"], 0),
            ours(row, "prefill_ratio_to_fastest_peer", "{:.2f}"),
            ours(row, "adapter_cost", "{:.0%}"),
            ours(row, "bandwidth_share", "{:.0%}"),
            f"{row['first_suggestion_seconds']:.2f}",
            " / ".join(f"{1000 * row[key]:.2f}" for key in SWAPS if key in row),
            f"{row['peak_rss_mib']:.0f}",
        )
        for name, row in decode_rows(result)
    ]
    heads = (
        *("", "decode, tokens/s", "of fastest peer", "prefill, tokens/s", "of fastest peer"),
        *("adapters cost", "of bandwidth", "first suggestion, s"),
        *("swap personal / all, ms", "peak memory, MiB"),
    )
    lines = [markdown(heads, rows)]
    settings = dict.fromkeys(
        f"* {p['engine'].replace('_', ' ')} {p['version']}: {p['settings']}."
        for p in result["peers"]
    )
    if settings:
        lines.append("\n".join(settings))
    if result["missing"]:
        named = "; ".join(f"{m['engine']} {m['weights']} ({m['why']})" for m in result["missing"])
        lines.append(f"Missing: {named}.")
    return "\n\n".join(lines)


def tier_table(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        s, t = row["suggesting"], row["training"]
        held = row["tier_threads"] > row["threads"]
        export = row["exporting"]
        rows.append(
            (
                f"{row['tier']}, {row['engine']} {row['base_dtype']}",
                str(row["memory_limit_mib"]),
                f"{row['threads']}" + (f" of {row['tier_threads']}" if held else ""),
                f"{1e3 * s['token_p50']:.1f} / {1e3 * s['token_p95']:.1f}" if s else "-",
                f"{s['prefill_tokens_per_second']:.0f}" if s else "-",
                f"{s['cold_start']:.2f}" if s else "-",
                f"{t['step_seconds']:.2f}" if t else "-",
                f"{s['planned_mib']:.0f} / {s['peak_rss_mib']:.0f}" if s else "-",
                f"{t['planned_mib']:.0f} / {t['peak_rss_mib']:.0f}" if t else "-",
                f"{row['bundle_mib']:.0f}",
                f"{export['seconds']:.0f} / {export['peak_rss_mib']:.0f}",
            )
        )
    heads = (
        *("tier", "limit, MiB", "threads", "token p50 / p95, ms", "prefill, tokens/s"),
        *("first suggestion, s", "train step, s", "suggesting: planned / peak, MiB"),
        *("training: planned / peak, MiB", "bundle, MiB", "its export, s / MiB"),
    )
    refused = [f"* {row['tier']}: {why}." for row in result["rows"] for why in row["refused"]]
    return "\n\n".join([markdown(heads, rows), *(["\n".join(refused)] if refused else [])])


def profile_table(result: dict[str, Any]) -> str:
    programs: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        name = f"{row['engine']} {row['weights']}, {row['program']}"
        programs.setdefault(name, []).append(row)
    parts = []
    for name, rows in programs.items():
        # Of the whole call, with what is between operators.
        whole = sum(row["milliseconds"] or 0 for row in rows)
        lines = [
            (
                row["operator"],
                str(row["calls"]),
                "" if row["milliseconds"] is None else f"{row['milliseconds']:.2f}",
                "" if row["milliseconds"] is None else f"{row['milliseconds'] / whole:.0%}",
            )
            for row in rows
        ]
        parts += [f"**{name}**", markdown(("operator", "calls", "ms", "share"), lines)]
    return "\n\n".join(parts)


def coordinator_table(result: dict[str, Any]) -> str:
    def middle(parts: str, *names: str) -> float:
        return float(median(sum(part[name] for name in names) for part in result[parts]))

    def per_update(seconds: float, devices: int) -> str:
        return f"{1000 * seconds / devices:.1f}"

    devices = result["devices"]
    ours = (
        *("comigs", str(devices), f"{result['round_seconds']:.1f}"),
        per_update(result["round_seconds"], devices),
        f"{middle('rounds', 'upload'):.1f}",
        per_update(middle("rounds", "upload_cpu"), devices),
        f"{result['peak_rss_mib']:.0f}",
        f"{result['checkin_median_ms']:.0f} / {result['checkin_p99_ms']:.0f}",
    )
    whole = middle("bare_loops", "upload", "sum", "download")
    bare = (
        *("bare loop", str(devices), f"{whole:.1f}", per_update(whole, devices)),
        f"{middle('bare_loops', 'upload', 'sum'):.1f}",
        per_update(middle("bare_loops", "upload_cpu", "sum_cpu"), devices),
        *("", ""),
    )
    peers = (
        (
            *(peer["name"], str(peer["devices"]), f"{peer['round_seconds']:.1f}"),
            per_update(peer["round_seconds"], peer["devices"]),
            *("", "", f"{peer['peak_rss_mib']:.0f}", ""),
        )
        for peer in result["peers"]
    )
    heads = (
        *("", "devices", "round, s", "for each device, ms", "its uploads, s"),
        *("processor time per upload, ms", "peak memory, MiB", "check-in, median / 99 %, ms"),
    )
    said = (
        f"The round's uploads take {result['ratio_to_bare_loop']:.2f} times as long as the bare "
        f"loop's with its sum, the whole round {result['ratio_with_downloads']:.2f} times. By the "
        f"processor time of coordinator and devices, which other programs change less, uploads "
        f"cost {result['processor_time_ratio']:.2f} times as much."
    )
    settings = "\n".join(f"* {peer['name']}: {peer['settings']}." for peer in result["peers"])
    missing = "\n".join(f"* {name} is missing: {why}." for name, why in result["missing"].items())
    parts = [markdown(heads, [ours, bare, *peers]), said, settings, missing]
    return "\n\n".join(part for part in parts if part)


# --- plots -------------------------------------------------------------------------------------


def plots(results: Results) -> dict[str, Callable[[Any], None]]:
    """File name -> what draws it into a figure."""
    kinds = {
        "train": draw_train,
        "decode": draw_decode,
        "tier": draw_tier,
        "coordinator": draw_coordinator,
    }
    return {
        name: functools.partial(kinds[result["benchmark"]], result=result)
        for name, result in results
        if result["benchmark"] in kinds
    }


def draw_train(figure: Any, result: dict[str, Any]) -> None:
    names = [result["reference"]["name"], *map(train_name, result["rows"])]
    axes = figure.subplots(1, 2, sharey=True)
    memory = [row["peak_rss_mib"] for row in (result["reference"], *result["rows"])]
    ratios = [1.0, *(row["time_ratio"] for row in result["rows"])]
    colours = [THEIRS, *[OURS] * len(result["rows"])]
    spreads = [(1.0, 1.0), *(row["time_ratio_spread"] for row in result["rows"])]
    _bars(axes[0], names, ratios, colours, "{:.2f}", spreads)
    _bars(axes[1], names, memory, colours, "{:.0f}")
    axes[0].set_title("time of a step, of PyTorch's")
    axes[1].set_title("peak memory, MiB")


def draw_decode(figure: Any, result: dict[str, Any]) -> None:
    rows = decode_rows(result)
    names = [f"{name} {row['weights']}" for name, row in rows]
    colours = [OURS if name.startswith("comigs") else THEIRS for name, _ in rows]
    axes = figure.subplots(1, 2, sharey=True)
    for axis, what in zip(axes, ("decode", "prefill"), strict=True):
        speeds = [row[f"{what}_tokens_per_second"] for _, row in rows]
        _bars(axis, names, speeds, colours, "{:.0f}", [row[f"{what}_spread"] for _, row in rows])
        axis.set_title(f"{what}, tokens per second")


def draw_tier(figure: Any, result: dict[str, Any]) -> None:
    rows = result["rows"]
    names = [f"{row['tier']} ({row['engine']} {row['base_dtype']})" for row in rows]
    axes = figure.subplots(1, 2, sharey=True)
    for axis, what in zip(axes, ("suggesting", "training"), strict=True):
        peaks = [row[what]["peak_rss_mib"] if row[what] else 0.0 for row in rows]
        limits = [row["memory_limit_mib"] for row in rows]
        shown = [
            f"{{:.0f}} of {limit}" if row[what] else f"more than {limit}"
            for row, limit in zip(rows, limits, strict=True)
        ]
        _bars(axis, names, peaks, [OURS] * len(rows), shown, beyond=limits)
        for index, limit in enumerate(limits):
            axis.plot([limit, limit], [index - 0.4, index + 0.4], color=LIMIT, linewidth=2)
        axis.set_title(f"{what}: peak memory and limit, MiB")
        axis.set_xscale("symlog", linthresh=100)
        axis.set_xlim(0, 9 * max(limits))


def draw_coordinator(figure: Any, result: dict[str, Any]) -> None:
    rows = [
        ("comigs", result["devices"], result),
        *((p["name"], p["devices"], p) for p in result["peers"]),
    ]
    names = [f"{name}, {devices} devices" for name, devices, _ in rows]
    colours = [OURS, *[THEIRS] * len(result["peers"])]
    axes = figure.subplots(1, 2, sharey=True)
    times = [1000 * row["round_seconds"] / devices for _, devices, row in rows]
    _bars(axes[0], names, times, colours, "{:.0f}")
    _bars(axes[1], names, [row["peak_rss_mib"] for _, _, row in rows], colours, "{:.0f}")
    axes[0].set_title("a round, ms for each device")
    axes[1].set_title("peak memory, MiB")


def _bars(
    axis: Any,
    names: Sequence[str],
    values: Sequence[float],
    colours: Sequence[str],
    form: str | Sequence[str],
    spreads: Sequence[Sequence[float]] | None = None,
    beyond: Sequence[float] | None = None,
) -> None:
    """Horizontal bars, the first on top, each with its value, if asked for `beyond` a place;
    spreads as thin lines."""
    places = range(len(names))
    axis.barh(places, values, color=colours, height=0.65)
    axis.set_yticks(places, names)
    axis.tick_params(axis="y", length=0)
    for place, (low, high) in zip(places, spreads or [], strict=False):
        axis.plot([low, high], [place, place], color="black", linewidth=1)
    ends = [max(v, s[1]) for v, s in zip(values, spreads or [(0, 0)] * len(values), strict=True)]
    ends = [max(pair) for pair in zip(ends, beyond or ends, strict=True)]
    forms = [form] * len(values) if isinstance(form, str) else form
    for place, end, value, each in zip(places, ends, values, forms, strict=True):
        axis.annotate(
            each.format(value), (end, place), (4, 0), textcoords="offset points", va="center"
        )
    axis.set_xlim(0, 1.2 * max([*ends, 1e-9]))
    if not axis.yaxis_inverted():
        axis.invert_yaxis()
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _save(path: Path, draw: Callable[[Any], None]) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.hashsalt": "comigs", "font.size": 9, "axes.titlesize": 10})
    figure = Figure(figsize=(9, 3), layout="constrained")
    draw(figure)
    figure.set_size_inches(9, 1.0 + 0.28 * len(figure.axes[0].get_yticks()))
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
