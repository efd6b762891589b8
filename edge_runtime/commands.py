"""The device's commands: `comigs device run | evaluate | experts`, `predict`, `perplexity`, `plan`,
`doctor`."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.markup import escape
from rich.text import Text

from edge_runtime import adapters, planner, training_config, wire
from edge_runtime.bundle import Bundle, contract_sha256, open_bundle
from edge_runtime.cli import LARGEST_SEED, MOST_ROUNDS, Format, FormatOption, emit, messages
from edge_runtime.compression import NAMES
from edge_runtime.data import SPLITS, load_tokenizer, read_all, read_splits, tokenize
from edge_runtime.engines import ENGINES, load_engine
from edge_runtime.errors import AdapterError, DataError, StorageError
from edge_runtime.files import removed_on_failure
from edge_runtime.invitation import decode
from edge_runtime.memory import return_freed_memory
from edge_runtime.predict import Predictor, Suggestion, memory_plan
from edge_runtime.store import DeviceConfig, Home
from edge_runtime.training import Evaluator, perplexity_of
from protos import coordinator_pb2 as pb

if TYPE_CHECKING:
    from edge_runtime.connection import Patience, Traffic
    from edge_runtime.device import Device
    from edge_runtime.identity import Identity

T = TypeVar("T")

ROUNDS, RETRY_SECONDS = 3, 120.0
LONGEST_RETRY_SECONDS = 1e9
FRESH = Path("the bundle's own")

HomeOption = Annotated[Path, typer.Option(help="The device's home directory.")]


def _known_engine(name: str | None) -> str | None:
    if name is not None and name not in ENGINES:
        raise typer.BadParameter(f"choose {' or '.join(ENGINES)}")
    return name


EngineOption = Annotated[
    str | None,
    typer.Option(help=f"{' or '.join(ENGINES)} (default: the home's).", callback=_known_engine),
]


def _parser(parse: Callable[[str], T]) -> Callable[[str], T]:
    """`parse` for an option: its ValueError is a wrong usage of the command line."""

    def parser(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error

    return parser


MemoryOption = Annotated[
    int | None,
    typer.Option(
        parser=_parser(planner.parse_size), metavar="SIZE", help="Memory budget, such as 512MiB."
    ),
]
ComputeOption = Annotated[
    float | None,
    typer.Option(
        parser=_parser(planner.parse_seconds),
        metavar="TIME",
        help="Training time per round, such as 60s; one step is always made.",
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option(help="Worker threads (default: all cores).", min=1, max=1024)
]


def register(app: typer.Typer) -> None:
    device = typer.Typer(
        help="Be a device: train, evaluate, take experts along.", no_args_is_help=True
    )
    device.command("run")(run)
    device.command("evaluate")(evaluate)
    device.command("experts")(experts)
    app.add_typer(device, name="device")
    app.command("predict")(predict)
    app.command("perplexity")(perplexity)
    app.command("plan")(plan)
    app.command("doctor")(doctor)


def run(
    home: HomeOption,
    data: Annotated[
        Path,
        typer.Option(help="train.txt, valid.txt and test.txt, or any text files.", readable=False),
    ],
    invitation: Annotated[
        str | None,
        typer.Option(
            help="What `comigs invite` printed, or - to read that from standard input, which keeps "
            "it out of the list of processes; needed the first time, remembered after."
        ),
    ] = None,
    coordinator: Annotated[
        str | None, typer.Option(help="HOST:PORT of the coordinator if it moved; remembered.")
    ] = None,
    alone: Annotated[bool, typer.Option(help="Train without a coordinator.")] = False,
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle; needed the first time, remembered after.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The device's name; an invitation brings its own.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Order of the text; set the first time.",
            show_default="0",
            min=0,
            max=LARGEST_SEED,
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            help="Development: with --coordinator, no TLS and no proof of who is who.",
        ),
    ] = False,
    engine: EngineOption = None,
    memory: MemoryOption = None,
    compute: ComputeOption = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            help="With --alone: rounds to train.", show_default="3", min=1, max=MOST_ROUNDS
        ),
    ] = None,
    training: Annotated[
        Path | None, typer.Option(help="With --alone: TrainingConfig as JSON.")
    ] = None,
    retry: Annotated[
        float | None,
        typer.Option(
            help="Seconds to retry a coordinator that cannot be reached, or fails.",
            show_default="120",
            min=0,
            max=LONGEST_RETRY_SECONDS,
        ),
    ] = None,
    compression: Annotated[
        str | None,
        typer.Option(
            help=f"Of updates: {', '.join(NAMES)} (if the coordinator takes it) or none.",
            show_default="what it prefers",
        ),
    ] = None,
    require_secure_aggregation: Annotated[
        bool,
        typer.Option(
            "--require-secure-aggregation",
            help="Send no update that the coordinator could see as it is; end with 21 instead.",
        ),
    ] = False,
    threads: ThreadsOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Train on this device's text, with a coordinator or alone. Safe to kill and run again."""
    # Suggestions wait for nothing of the network: a sixth of a second, and memory.
    from edge_runtime.device import Device

    at = Home(home)
    invited = _invited(invitation)
    of_coordinators = (invited, coordinator, insecure, require_secure_aggregation, compression)
    if retry is not None and math.isnan(retry):
        raise typer.BadParameter("--retry nan is no number of seconds")
    if alone and (any(of_coordinators) or retry is not None):
        raise typer.BadParameter("--alone has no coordinator, so no option of one")
    if not alone and (rounds is not None or training is not None):
        raise typer.BadParameter("--rounds and --training are the coordinator's without --alone")
    if insecure and (invited or not coordinator):
        raise typer.BadParameter("--insecure needs --coordinator HOST:PORT and no --invitation")
    if invited and name not in (None, invited.name):
        raise typer.BadParameter(f"the invitation is for {invited.name}, not for {name}")
    if not (alone or insecure or invited or at.identity()):
        raise typer.BadParameter(
            "this device has not enrolled: give --invitation (from `comigs invite`) or --alone"
        )
    if compression not in (None, "none", *NAMES):
        raise typer.BadParameter(f"--compression {compression} is not one of {', '.join(NAMES)}")
    config = _training_config(training, rounds)
    report = _reporter(output)
    with at.locked():
        own = None if invited else name
        device_config = _device_config(at, name=own, seed=seed, bundle=bundle, engine=engine)
        if invited:
            device_config.name = invited.name
        opened = open_bundle(Path(device_config.bundle))
        device = Device(
            home=at,
            config=device_config,
            bundle=opened,
            engine=load_engine(engine or device_config.engine, threads=threads),
            data=data,
            batch_sequences=config.batch_sequences,
            memory_bytes=memory,
            compute_seconds=compute,
            report=report,
            alone=alone,
            compression=compression,
            only_masked=require_secure_aggregation,
        )
        device.report_plan()
        # Too little text: say so before anything is computed. A coordinator's batch is unknown yet.
        device.require_text(config.batch_sequences if alone else 1)
        # Only now: a mistake must not stay in the home, nor a name whose invitation is refused.
        if not (invited and at.identity()):
            _save_config(device)
        if alone:
            device.train_alone(config)
        else:
            _with_coordinator(
                device,
                invited=invited,
                coordinator=coordinator,
                insecure=insecure,
                retry=RETRY_SECONDS if retry is None else retry,
            )
    report({"event": "summary", **device.summary()})


def _with_coordinator(
    device: Device,
    *,
    invited: pb.Invitation | None,
    coordinator: str | None,
    insecure: bool,
    retry: float,
) -> None:
    from edge_runtime.client import Client
    from edge_runtime.connection import Patience, Traffic, Unproven, connect
    from edge_runtime.identity import Identity

    traffic = Traffic()

    def wait(message: str) -> None:
        device.report({"event": "waiting", "message": message})

    patience = Patience(retry, wait)
    try:
        who: Identity | Unproven
        if insecure:
            contract = contract_sha256(device.bundle.manifest)
            who = Unproven(str(coordinator), device.config.name, contract)
        else:
            who = _identity(device, invited, coordinator, patience, traffic)
        with Client(who, patience=patience, traffic=traffic) as client:
            if isinstance(who, Identity) and who != device.home.identity():
                with connect(who, patience) as connection:
                    connection.ping()  # a wrong address must not stay in the home
                device.home.save_identity(who)
            _save_config(device)
            device.take_part(client)
    finally:
        device.report(
            {"event": "network", "bytes_sent": traffic.sent, "bytes_received": traffic.received}
        )


def _save_config(device: Device) -> None:
    if device.config != device.home.config():
        device.home.save_config(device.config)


def _identity(
    device: Device,
    invited: pb.Invitation | None,
    coordinator: str | None,
    patience: Patience,
    traffic: Traffic,
) -> Identity:
    """What proves this device, from its invitation or its home, perhaps with a new address."""
    from edge_runtime.enrolment import identity_from

    identity = device.home.identity()
    if invited is not None:
        identity = identity_from(
            invited,
            home=device.home,
            contract=contract_sha256(device.bundle.manifest),
            tier=device.bundle.manifest.tier.name,
            patience=patience,
            traffic=traffic,
        )
    assert identity is not None, "`run` asks for an invitation otherwise"
    if coordinator is not None and coordinator != identity.coordinator:
        identity = replace(identity, coordinator=coordinator)
    return identity


def _training_config(path: Path | None, rounds: int | None) -> Any:
    try:
        config = training_config.load(path)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--training") from error
    config.rounds = rounds or config.rounds or ROUNDS
    return config


def _device_config(
    home: Home, *, name: str | None, seed: int | None, bundle: Path | None, engine: str | None
) -> DeviceConfig:
    """The home's configuration, or a new one that is not stored yet."""
    config = home.config()
    if config is None:
        if bundle is None:
            raise AdapterError(
                f"{home.path} is new: give --bundle DIR (make one with `comigs export`)"
            )
        open_bundle(bundle)
        config = DeviceConfig(
            name=name or home.path.resolve().name,
            seed=seed or 0,
            bundle=str(bundle.resolve()),
            engine=engine or ENGINES[0],
        )
        return config
    for option, wanted, known in (("--name", name, config.name), ("--seed", seed, config.seed)):
        if wanted not in (None, known):
            raise typer.BadParameter(
                f"{option} {wanted} comes too late: {home.path} was made with {known}; leave it "
                "out, or use another --home"
            )
    if bundle is not None:
        # A bundle may move; that its adapters fit is checked when the state is loaded.
        config.bundle = str(bundle.resolve())
    return config


def _reporter(output: Format) -> Any:
    """Prints events: JSON lines on stdout for programs, short lines on stderr for people."""

    def for_programs(event: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()

    def for_people(event: dict[str, Any]) -> None:
        said = {k.replace("_", " "): _readable(v) for k, v in event.items() if k != "event"}
        rest = ", ".join(f"{name} {value}" for name, value in said.items() if value)
        line = f"[bold]{event['event'].replace('_', ' ')}[/]  {escape(rest)}"
        messages.print(line, highlight=False, soft_wrap=True)

    return for_programs if output is Format.JSON else for_people


def _readable(value: Any) -> str:
    """A field of an event in few words; empty if there is nothing to tell."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):  # a learning curve: (expert step, loss)
        return " → ".join(f"{loss:.4g}" for _, loss in value)
    return str(value)


def evaluate(
    home: HomeOption,
    data: Annotated[Path, typer.Option(help="The device's text.")],
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    fresh: Annotated[bool, typer.Option(help="The base, with untrained adapters.")] = False,
    engine: EngineOption = None,
    threads: ThreadsOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Perplexity over a whole split, each token predicted once."""
    if split not in SPLITS:
        raise typer.BadParameter(f"choose {', '.join(SPLITS)}", param_hint="--split")
    at = Home(home)
    config = _existing(at)
    opened = open_bundle(Path(config.bundle))
    state, _ = at.load_state(opened)
    vectors = adapters.load_fresh(opened) if fresh else state.vectors
    splits = read_splits(data, needed=(split,))
    tokens = tokenize(load_tokenizer(opened), splits[split])
    if len(tokens) < 2:
        raise DataError(f"{data}: the {split} split is empty; add text to it")
    loaded = load_engine(engine or config.engine, threads=threads)
    loss = Evaluator(opened, loaded, vectors).loss(tokens)
    result = {
        "name": config.name,
        "split": split,
        "tokens": len(tokens),
        "loss": loss,
        "perplexity": perplexity_of(loss),
    }
    if output is Format.JSON:
        emit(result)
    else:
        of_what = f"{len(tokens)} {split} tokens"
        print(f"{config.name}: perplexity {perplexity_of(loss):.2f} over {of_what}")


def experts(
    home: HomeOption,
    out: Annotated[Path, typer.Option(help="Directory to make.")],
    output: FormatOption = Format.TEXT,
) -> None:
    """Write each expert as an adapter that opens in PEFT, and the router, which does not."""
    at = Home(home)
    opened = open_bundle(Path(_existing(at).bundle))
    state, _ = at.load_state(opened)
    if out.exists():
        raise StorageError(f"{out} exists; give another --out")
    with removed_on_failure(out):
        adapters.save_directory(opened.manifest, state.vectors, out)
    written = {
        role.name: str(out / role.path)
        for role in opened.manifest.roles
        if role.name != adapters.ROUTER
    }
    if output is Format.JSON:
        emit({"experts": written})
        return
    for path in written.values():
        print(path)


def perplexity(
    *,
    generalists: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files as in a coordinator's `generalists`, or - for one on standard input; "
            "without any, the bundle's own.",
            show_default=False,
        ),
    ] = None,
    bundle: Annotated[Path, typer.Option(help="The bundle that they belong to.")],
    text: Annotated[Path, typer.Option(help="Held-out text: a file, or a directory of files.")],
    engine: Annotated[
        str | None,
        typer.Option(
            help=f"{' or '.join(ENGINES)} (default: one that bundle and installation have).",
            callback=_known_engine,
        ),
    ] = None,
    threads: ThreadsOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Perplexity of generalists on their own: with fresh specialists and a fresh router."""
    opened = open_bundle(bundle)
    tokens = tokenize(load_tokenizer(opened), read_all(text))
    if len(tokens) < 2:
        raise DataError(f"{text} holds no text to predict; add some")
    vectors = adapters.load_fresh(opened)
    loaded = load_engine(engine or _engine_of(opened), threads=threads)
    evaluator = Evaluator(opened, loaded, vectors)
    entries = []
    for generalist in generalists or [FRESH]:
        if generalist is not FRESH:
            try:
                decoded = wire.decode(opened.manifest, _payload(generalist))
            except AdapterError as error:
                message = f"{generalist} is no generalist of this bundle: {error}"
                raise AdapterError(message) from error
            for role, vector in decoded.items():
                # In place: the program is bound to this memory.
                vectors[role][...] = vector
        entries.append((str(generalist), perplexity_of(evaluator.loss(tokens))))
    if output is Format.JSON:
        found = [{"generalist": name, "perplexity": value} for name, value in entries]
        emit({"tokens": len(tokens), "generalists": found})
        return
    for name, value in entries:
        print(f"{value:12.2f}  {name}")


def _engine_of(bundle: Bundle) -> str:
    """An engine of the bundle's, an installed one if there is one."""
    compiled = {program.engine for program in bundle.manifest.programs}
    names = [name for name in ENGINES if name in compiled] or [ENGINES[0]]
    return next((name for name in names if find_spec(name) is not None), names[0])


def _payload(path: Path) -> bytes:
    if path == Path("-"):
        return sys.stdin.buffer.read()
    try:
        return path.read_bytes()
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror}") from error


def _existing(home: Home) -> DeviceConfig:
    config = home.config()
    if config is None:
        raise AdapterError(f"no device at {home.path}; make one with `comigs device run`")
    return config


def predict(
    home: HomeOption,
    text: Annotated[
        str | None,
        typer.Argument(
            help="Text to continue; without it, an interactive line, or lines of stdin."
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="Number of suggestions.", min=1)] = 5,
    explain: Annotated[bool, typer.Option(help="Show where each token was routed.")] = False,
    engine: EngineOption = None,
    threads: ThreadsOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Suggest the next token, with this device's freshest adapters."""
    at = Home(home)
    config = _existing(at)
    opened = open_bundle(Path(config.bundle))
    modified = at.state_modified()
    vectors = at.load_state(opened)[0].vectors
    return_freed_memory()  # of the optimizer's moments
    predictor = Predictor(opened, load_engine(engine or config.engine, threads=threads), vectors)
    if text is None and output is Format.TEXT and sys.stdin.isatty() and sys.stdout.isatty():
        from edge_runtime.interactive import converse

        def refresh() -> None:
            nonlocal modified
            if (newest := at.state_modified()) != modified:
                predictor.use(at.load_state(opened)[0].vectors)
                modified = newest

        converse(predictor, top=top, refresh=refresh)
        return
    if text is not None:
        _answer(predictor, text, top, explain, output)
        return
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no text are then refused as on the command line, in any locale; lines end
        # as in a text that is trained on.
        sys.stdin.reconfigure(errors="surrogateescape", newline=None)
    for line in sys.stdin:
        _answer(predictor, line.rstrip("\n"), top, explain, output, in_a_line=True)
        sys.stdout.flush()  # whoever asks line by line waits for it


def _answer(
    predictor: Predictor,
    text: str,
    top: int,
    explain: bool,
    output: Format,
    *,
    in_a_line: bool = False,
) -> None:
    suggestions = predictor.suggest(text, top)
    routing = predictor.explain(text) if explain else None
    if output is Format.JSON:
        result: dict[str, Any] = {
            "text": text,
            "suggestions": [vars(suggestion) for suggestion in suggestions],
        }
        if routing is not None:
            result["routing"] = [{"token": token, **shares} for token, shares in routing]
        emit(result, in_a_line=in_a_line)
        return
    _print_suggestions(suggestions)
    if routing is not None:
        _print_routing(routing)


def _print_suggestions(suggestions: list[Suggestion]) -> None:
    for suggestion in suggestions:
        bar = "█" * round(30 * suggestion.probability)
        print(f"{suggestion.probability:6.1%}  {suggestion.text!r:16} {bar}")


def _print_routing(routing: list[tuple[str, dict[str, float]]]) -> None:
    from rich.table import Table

    experts = list(routing[0][1]) if routing else []
    table = Table("token", *experts)
    for token, shares in routing:
        cells = [Text(f"{p:5.1%} " + "▇" * round(10 * p)) for p in shares.values()]
        table.add_row(Text(repr(token)), *cells)
    from rich.console import Console

    Console().print(table)


def plan(
    bundle: Annotated[Path, typer.Option(help="The bundle to plan for.")],
    memory: MemoryOption = None,
    compute: ComputeOption = None,
    engine: Annotated[
        str, typer.Option(help=" or ".join(ENGINES), callback=_known_engine)
    ] = ENGINES[0],
    batch: Annotated[int, typer.Option(help="Sequences per optimizer step.", min=1)] = 8,
    alone: Annotated[bool, typer.Option("--alone", help="For training alone.")] = False,
    output: FormatOption = Format.TEXT,
) -> None:
    """Say what fits a budget, from the manifest alone. Loads no program."""
    opened = open_bundle(bundle)
    shared = 0 if alone else planner.for_rounds()
    chosen = planner.choose(opened, engine, batch, memory, shared_bytes=shared)
    options = planner.plans(opened, engine, batch, shared_bytes=shared)
    _, suggesting = memory_plan(opened, engine)
    if output is Format.JSON:
        emit(
            {
                "engine": engine,
                "chosen_micro_batch": chosen.micro_batch,
                "compute_seconds": compute,
                "suggesting_bytes": suggesting,
                "plans": [
                    {
                        "micro_batch": o.micro_batch,
                        "recompute": o.recompute,
                        "packed": o.packed,
                        "together": o.together,
                        "total_bytes": o.total_bytes,
                        "runtime_bytes": o.runtime_bytes,
                        "program_bytes": o.program_bytes,
                        "adapter_bytes": o.adapter_bytes,
                        "rest_bytes": o.rest_bytes,
                    }
                    for o in options
                ],
            }
        )
        return
    for option in options:
        mark = "→" if option == chosen else " "
        print(
            f"{mark} {option.micro_batch} sequences at a time"
            f"{'' if option.packed else ', weights not copied'}"
            f"{', activations computed twice' if option.recompute else ''}"
            f"{'' if option.together else ', training and evaluation loaded in turns'}: "
            f"{planner.mebibytes(option.total_bytes)} (engine "
            f"{planner.mebibytes(option.runtime_bytes)}, programs "
            f"{planner.mebibytes(option.program_bytes)}, adapters and optimizer "
            f"{planner.mebibytes(option.adapter_bytes)}, everything else "
            f"{planner.mebibytes(option.rest_bytes)})"
        )
    print(f"  suggesting needs {planner.mebibytes(suggesting)}")
    if compute:
        print(
            f"  training stops before the step that would exceed {compute:g} s in a round, "
            "after at least one"
        )


def _invited(text: str | None) -> pb.Invitation | None:
    """What --invitation holds; nothing, as when `comigs invite` failed, is none."""
    if text == "-":
        text = sys.stdin.readline() if sys.stdin.isatty() else sys.stdin.read()
    return decode(text) if text and text.strip() else None


def doctor(
    home: Annotated[
        Path, typer.Option(help="Whose disk is looked at, and whose coordinator is called.")
    ] = Path(),
    invitation: Annotated[
        str | None,
        typer.Option(
            help="Call the coordinator of this invitation (- as for `run`); does not use it."
        ),
    ] = None,
    insecure: Annotated[
        str | None, typer.Option(help="Call the coordinator at HOST:PORT without TLS.")
    ] = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Check this installation and name the command that mends what is wrong.

    Ends with the exit code of the first thing that is."""
    from edge_runtime.doctor import examine

    findings = examine(home, _invited(invitation), insecure)
    if output is Format.JSON:
        checks = [vars(finding) | {"ok": finding.ok} for finding in findings]
        emit({"checks": checks, "ok": all(finding.ok for finding in findings)})
    else:
        for finding in findings:
            print(f"{'ok ' if finding.ok else 'BAD'}  {finding.what}: {finding.found}")
            if finding.mend:
                print(f"     mend it with: {finding.mend}")
    if wrong := [finding for finding in findings if not finding.ok]:
        raise typer.Exit(wrong[0].code)
