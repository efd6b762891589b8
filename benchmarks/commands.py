"""`comigs demo` and `comigs bench`."""

from __future__ import annotations

import contextlib
import csv
import signal
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from edge_runtime import training_config
from edge_runtime.cli import (
    LARGEST_SEED,
    MOST_ROUNDS,
    Format,
    FormatOption,
    emit,
    messages,
    telling,
)
from edge_runtime.engines import ENGINES
from export import PRECISIONS
from export.commands import check_precision, check_weights


class TableFormat(StrEnum):
    TEXT = "text"
    JSON = "json"
    CSV = "csv"


TableFormatOption = Annotated[
    TableFormat, typer.Option("--format", help="For people, for programs, or the rows as CSV.")
]
BaseOption = Annotated[str, typer.Option(help="As for `comigs export`.")]
WeightsOption = Annotated[str, typer.Option(help="random or pretrained.")]
ThreadsOption = Annotated[int, typer.Option(min=1)]
EnginesOption = Annotated[str, typer.Option(help="Comma-separated: engine or engine:precision.")]
CacheOption = Annotated[
    Path | None,
    typer.Option(help="Where what is compiled is kept, for the next run (default: nowhere)."),
]


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)
    bench = typer.Typer(no_args_is_help=True, help="Measure programs beside what else there is.")
    bench.callback()(_clean_up_at_the_end)
    bench.command("train")(bench_train)
    bench.command("decode")(bench_decode)
    bench.command("tier")(bench_tier)
    bench.command("profile")(bench_profile)
    bench.command("coordinator")(bench_coordinator)
    app.add_typer(bench, name="bench")


def _clean_up_at_the_end() -> None:
    """Ended by SIGTERM, too, it leaves no processes and no temporary files."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def demo(
    users: Annotated[
        Path | None, typer.Option(help="One folder of text per user (default: built-in texts).")
    ] = None,
    base: BaseOption = "gpt2-mini",
    engine: Annotated[str, typer.Option(help=" or ".join(ENGINES))] = ENGINES[0],
    precision: Annotated[str, typer.Option(help="As for `comigs export`.")] = "float32",
    rounds: Annotated[int, typer.Option(min=1, max=MOST_ROUNDS)] = 4,
    local_steps: Annotated[
        int, typer.Option(min=1, max=10**6, help="Expert steps per round.")
    ] = 10,
    seed: Annotated[
        int, typer.Option(help="Seed of adapters and batches.", min=0, max=LARGEST_SEED)
    ] = 0,
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo"),
    output: FormatOption = Format.TEXT,
) -> None:
    """Compile, learn together, predict: the whole story on this machine."""
    _clean_up_at_the_end()
    from benchmarks import report
    from benchmarks.demo import Demo
    from benchmarks.users import default_users, load_users

    if engine not in ENGINES:
        raise typer.BadParameter(f"choose {' or '.join(ENGINES)}", param_hint="--engine")
    check_precision(precision)
    config = training_config.load(None)
    config.rounds, config.local_steps = rounds, local_steps
    # A burst per round: with few rounds, every 30 steps would leave the router nearly untrained.
    config.tau, config.router_steps = local_steps, 5
    texts = default_users() if users is None else load_users(users)
    result = Demo(
        users=texts,
        base=base,
        engine=engine,
        precision=precision,
        training=config,
        out=out,
        seed=seed,
    ).run()
    page = out / "report.html"
    report.write(result, page)
    if output is Format.JSON:
        emit(dict(result))
    else:
        messages.print(report.table(result))
        messages.print(f"took {result['seconds']:.0f} s; the whole story: {page.resolve()}")


def bench_train(
    base: BaseOption = "gpt2",
    weights: WeightsOption = "random",
    batch: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 128,
    specialists: Annotated[int, typer.Option(min=1, help="Beside the generalist.")] = 1,
    engines: EnginesOption = "onnxruntime,onnxruntime:int8,executorch,executorch:int8",
    threads: ThreadsOption = 2,
    steps: Annotated[int, typer.Option(min=4, help="Timed steps of each.")] = 10,
    cache: CacheOption = None,
    output: TableFormatOption = TableFormat.TEXT,
) -> None:
    """Time a training step beside PyTorch eager, taking turns; memory, gradients, share of peak."""
    check_weights(weights)
    contestants = _contestants(engines)
    if four_bits := next((engine for engine, kind in contestants if kind == "int4"), None):
        raise typer.BadParameter(
            f"the training step of an int4 bundle is int8's; time {four_bits}:int8 instead",
            param_hint="--engines",
        )
    from benchmarks import train_step

    with telling("loading the base") as tell, _wrong_usage():
        result = train_step.run(
            base_name=base,
            random_weights=weights == "random",
            batch=batch,
            length=length,
            specialists=specialists,
            contestants=contestants,
            threads=threads,
            steps=steps,
            cache=cache,
            progress=tell,
        )
    if not _emitted(dict(result), output):
        messages.print(train_step.table(result))


def bench_decode(
    base: BaseOption = "gpt2",
    weights: WeightsOption = "random",
    prompt: Annotated[int, typer.Option(min=2, help="Tokens of the prompt.")] = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after it.")] = 64,
    engines: EnginesOption = "onnxruntime,onnxruntime:int8,executorch",
    peers: Annotated[
        bool, typer.Option("--peers", help="Beside other engines; see benchmarks/peers/README.md.")
    ] = False,
    peers_python: Annotated[
        Path, typer.Option(help="Python of the environment that has them.")
    ] = Path(".venv-peers/bin/python"),
    threads: ThreadsOption = 2,
    turns: Annotated[int, typer.Option(min=4, help="Timed turns, and starts, of each.")] = 10,
    cache: CacheOption = None,
    output: TableFormatOption = TableFormat.TEXT,
) -> None:
    """Time suggestions, taking turns: prefill, decode, first suggestion, cost of adapters."""
    check_weights(weights)
    contestants = _contestants(engines)
    from benchmarks import decode

    with telling("loading the base") as tell, _wrong_usage():
        result = decode.run(
            base_name=base,
            random_weights=weights == "random",
            prompt=prompt,
            tokens=tokens,
            contestants=contestants,
            peers_python=peers_python if peers else None,
            threads=threads,
            count=turns,
            cache=cache,
            progress=tell,
        )
    if _emitted(dict(result), output):
        return
    messages.print(decode.table(result))
    for lack in result["missing"]:
        messages.print(f"without {lack['engine']} {lack['weights']}: {lack['why']}", markup=False)


def bench_tier(
    base: BaseOption = "gpt2",
    weights: WeightsOption = "random",
    names: Annotated[
        str, typer.Option("--tiers", help="Comma-separated (default: all of export/tiers.json).")
    ] = "",
    engines: EnginesOption = "onnxruntime:int8",
    turns: Annotated[int, typer.Option(min=2, help="Starts, and training steps, of each.")] = 10,
    cache: CacheOption = None,
    output: TableFormatOption = TableFormat.TEXT,
) -> None:
    """Run every tier's own bundle within its memory, on its threads."""
    check_weights(weights)
    contestants = _contestants(engines)
    from benchmarks import tier
    from export.tiers import tiers

    known = list(tiers())
    chosen = [name.strip() for name in names.split(",") if name.strip()] or known
    if unknown := [name for name in chosen if name not in known]:
        raise typer.BadParameter(
            f"{unknown[0]} is none of {', '.join(known)}", param_hint="--tiers"
        )
    with telling("loading the base") as tell:
        result = tier.run(
            base_name=base,
            random_weights=weights == "random",
            names=chosen,
            contestants=contestants,
            count=turns,
            cache=cache,
            progress=tell,
        )
    if _emitted(dict(result), output):
        return
    messages.print(tier.table(result))
    for row in result["rows"]:
        for why in row["refused"]:
            messages.print(f"{row['tier']}: {why}", markup=False)


def bench_profile(
    base: BaseOption = "gpt2",
    weights: WeightsOption = "random",
    engines: EnginesOption = "onnxruntime,onnxruntime:int8,executorch",
    threads: ThreadsOption = 2,
    calls: Annotated[int, typer.Option(min=1, help="Runs that are averaged.")] = 10,
    cache: CacheOption = None,
    output: TableFormatOption = TableFormat.TEXT,
) -> None:
    """Tell by operator where the time of a training step, a prompt and a decoded token goes."""
    check_weights(weights)
    contestants = _contestants(engines)
    from benchmarks import profile

    with telling("loading the base") as tell:
        result = profile.run(
            base_name=base,
            random_weights=weights == "random",
            contestants=contestants,
            threads=threads,
            calls=calls,
            cache=cache,
            progress=tell,
        )
    if not _emitted(dict(result), output):
        messages.print(profile.table(result))


def bench_coordinator(
    devices: Annotated[int, typer.Option(min=10, help="Devices in a round.")] = 1000,
    processes: Annotated[int, typer.Option(min=1, help="Processes that they share.")] = 2,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds, in turns with the rest.")] = 1,
    peers: Annotated[
        bool, typer.Option("--peers", help="Beside Flower; see benchmarks/peers/README.md.")
    ] = False,
    peers_python: Annotated[
        Path, typer.Option(help="Interpreter of the environment that has flwr.")
    ] = Path(".venv-flower/bin/python"),
    peer_devices: Annotated[
        int | None,
        typer.Option(min=2, help="In Flower's round, which may need more memory than there is."),
    ] = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Time a round of many devices beside the least that receiving costs."""
    from benchmarks import load

    with telling("starting") as tell:
        result = load.run(
            devices=devices,
            processes=processes,
            repetitions=repetitions,
            peers_python=peers_python if peers else None,
            peer_devices=peer_devices,
            progress=tell,
        )
    if output is Format.JSON:
        emit(dict(result))
        return
    for line in load.table(result):
        messages.print(line, highlight=False)


def _emitted(result: dict[str, Any], output: TableFormat) -> bool:
    """Prints a result for programs if that is asked for."""
    if output is TableFormat.JSON:
        emit(result)
    elif output is TableFormat.CSV:
        rows = [_flat(row) for row in [*result["rows"], *result.get("peers", [])]]
        columns = dict.fromkeys(column for row in rows for column in row)
        writer = csv.DictWriter(sys.stdout, list(columns))
        writer.writeheader()
        writer.writerows(rows)
    return output is not TableFormat.TEXT


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row of one level: `a.b` for what is in `a`, `a.low` and `a.high` for a spread."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": each for inner, each in _flat(value).items()}
        elif isinstance(value, tuple):
            flat[f"{key}.low"], flat[f"{key}.high"] = value
        else:
            flat[key] = "; ".join(value) if isinstance(value, list) else value
    return flat


def _contestants(engines: str) -> list[tuple[str, str]]:
    """(engine, precision) of each part of the option."""
    found = []
    for part in engines.split(","):
        engine, _, precision = part.strip().partition(":")
        precision = precision or "float32"
        if engine not in ENGINES or precision not in PRECISIONS:
            known = [
                name if kind == "float32" else f"{name}:{kind}"
                for kind in PRECISIONS
                for name in ENGINES
            ]
            raise typer.BadParameter(
                f"{part.strip()!r} is none of {', '.join(known)}", param_hint="--engines"
            )
        if (engine, precision) not in found:
            found.append((engine, precision))
    return found


@contextlib.contextmanager
def _wrong_usage() -> Iterator[None]:
    """What does not suit the base is a wrong option."""
    from benchmarks.contest import WrongOptionError

    try:
        yield
    except WrongOptionError as error:
        raise typer.BadParameter(str(error), param_hint=error.option) from error
