"""Commands of the coordinator, and of its administrator."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import io
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import urlsplit

import typer

from edge_runtime import training_config
from edge_runtime.cli import Format, FormatOption, emit, messages, prints_all
from edge_runtime.finite import dumps

if TYPE_CHECKING:
    from edge_runtime.identity import Identity
    from protos import coordinator_pb2 as pb

T = TypeVar("T")

# Headings of `comigs serve --help`; what a first run needs stands above them.
AGGREGATION = "Aggregation"
SELECTION = "Selection"
ASYNCHRONOUS = "Asynchronous rounds"
MIN_DEVICES = 2
DEADLINE_SECONDS = 600.0
CERTIFICATE_DAYS = 30.0
PRIVACY = "Privacy"
QUALITY = "Quality gate"
QUALITY_TOLERANCE = 0.01
CERTIFICATES = "Addresses and certificates"
OPERATION = "Operation"
LIMITS = "Limits"
# gRPC counts milliseconds in 31 bits.
LONGEST_SECONDS = 2_000_000
# Of what has no limit of its own, so that it fits messages and the database.
MOST = 10**9
# Of a round's number in a message.
MOST_ROUND = 2**32 - 1


def _device_names(names: list[str]) -> list[str]:
    from edge_runtime.invitation import NAMING, is_name

    if not all(is_name(name) for name in names):
        raise typer.BadParameter(NAMING)
    return names


def _invited_names(names: list[str]) -> list[str]:
    for name in _device_names(names):
        if names.count(name) > 1:
            raise typer.BadParameter(
                f"{name!r} is there more than once, and of invitations of one name only the last "
                "works; name each device once"
            )
    return names


def _collector(url: str | None) -> str | None:
    """An address of OTLP over gRPC; of anything else the exporter would complain for ever."""
    if url is not None:
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is no number, say
            good = False
        if not good or parts.path.strip("/") or parts.query:
            raise typer.BadParameter(
                f"{url!r} is no address of a collector: write http://HOST:PORT, or https for TLS; "
                "its port for OTLP over gRPC is usually 4317"
            )
    return url


def _cohort_names(names: list[str] | None) -> list[str] | None:
    for name in names or ():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise typer.BadParameter(
                f"{name!r} is no name of a cohort: 1 to 64 letters, digits, '.', '_' or '-'"
            )
    if len(set(names or ())) < len(names or ()):
        raise typer.BadParameter("each cohort has a name of its own; leave out what is there twice")
    return names


def _printable(text: str) -> str:
    """What a message can hold: bytes that are no text come as surrogates."""
    if not text.isprintable():
        raise typer.BadParameter(f"{text!r} is not printable text; leave out what is none")
    return text


def _host_names(names: list[str] | None) -> list[str] | None:
    from coordinator.listening import is_host

    for name in names or ():
        if not is_host(name):
            raise typer.BadParameter(
                f"{name!r} is no host name or IP address; give it alone, without a port, and in "
                "ASCII (xn--...)"
            )
    return names


AdminOption = Annotated[
    Path, typer.Option(help="The administrator's file, or a copy; `comigs serve` says where it is.")
]


def _database(panel: str | None = None) -> Any:
    return typer.Option(
        envvar="COMIGS_DATABASE",
        metavar="URL",
        help="PostgreSQL database with its rows, postgresql://...; without it SQLite in --state.",
        show_envvar=True,
        rich_help_panel=panel,
    )


DatabaseOption = Annotated[str | None, _database()]
AddressOption = Annotated[
    str | None, typer.Option(help="HOST:PORT of the coordinator, if not the one in that file.")
]
CohortOption = Annotated[
    str, typer.Option(help="Which cohort, if there are several.", callback=_printable)
]
DEFAULT_STATE = Path("state")
DEFAULT_ADMIN = DEFAULT_STATE / "admin.json"


def register(app: typer.Typer) -> None:
    """Adds this package's subcommands to `app`."""
    app.command("serve")(serve)
    app.command("rounds")(rounds)
    app.command("models")(models)
    app.command("audit")(audit)
    app.command("backup")(backup)
    app.command("restore")(restore)
    app.command("invite")(invite)
    app.command("revoke")(revoke)
    app.command("devices")(devices)
    app.command("pause")(pause)
    app.command("resume")(resume)
    app.command("abort")(abort)
    app.command("rollback")(rollback)


def serve(
    *,
    bundle: Annotated[
        list[Path], typer.Option(help="Bundle whose generalist devices share; may be repeated.")
    ],
    state: Annotated[Path, typer.Option(help="Directory that holds everything it remembers.")],
    listen: Annotated[str, typer.Option(help="HOST:PORT; port 0 takes a free one.")],
    rounds: Annotated[int, typer.Option(min=1, max=MOST, help="Rounds in all.")] = 3,
    min_devices: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Updates that a round needs.", show_default="2"),
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(min=0.1, max=MOST, help="Longest round, in seconds.", show_default="600"),
    ] = None,
    training: Annotated[
        Path | None, typer.Option(help="How devices train: TrainingConfig as JSON.")
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure", help="Development: no TLS, and devices are who they say they are."
        ),
    ] = False,
    exit_when_done: Annotated[
        bool, typer.Option("--exit-when-done", help="End once the last devices have the result.")
    ] = False,
    output: FormatOption = Format.TEXT,
    aggregation: Annotated[
        str,
        typer.Option(
            help="Of updates: mean, token-mean, median, trimmed-mean, krum, multi-krum.",
            rich_help_panel=AGGREGATION,
        ),
    ] = "mean",
    malicious: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Malicious updates per round that trimmed-mean, krum and multi-krum bear.",
            show_default="1",
            rich_help_panel=AGGREGATION,
        ),
    ] = None,
    clip_norm: Annotated[
        float | None,
        typer.Option(
            help="Longest step of a device from the generalist, as an L2 norm.",
            rich_help_panel=AGGREGATION,
        ),
    ] = None,
    server_optimizer: Annotated[
        str | None,
        typer.Option(
            help="Takes the aggregate as a gradient: momentum, adam, yogi.",
            rich_help_panel=AGGREGATION,
        ),
    ] = None,
    server_rate: Annotated[
        float | None,
        typer.Option(
            help="Its learning rate.",
            show_default="0.01, momentum 1",
            rich_help_panel=AGGREGATION,
        ),
    ] = None,
    server_beta1: Annotated[
        float | None,
        typer.Option(
            help="Its decay of the first moment.",
            show_default="0.9",
            rich_help_panel=AGGREGATION,
        ),
    ] = None,
    server_beta2: Annotated[
        float | None,
        typer.Option(
            help="Decay of the second moment, of adam and yogi.",
            show_default="0.99",
            rich_help_panel=AGGREGATION,
        ),
    ] = None,
    server_tau: Annotated[
        float | None,
        typer.Option(
            help="How little they adapt to each coordinate.",
            show_default="0.001",
            rich_help_panel=AGGREGATION,
        ),
    ] = None,
    mixed_ranks: Annotated[
        str | None,
        typer.Option(
            help="Bundles of different LoRA ranks share a generalist: zero-pad, hetlora, flexlora.",
            rich_help_panel=AGGREGATION,
        ),
    ] = None,
    compression: Annotated[
        list[str] | None,
        typer.Option(
            help="How devices may compress updates: float16, int8, top-k; repeat it, best first.",
            show_default="not at all",
            rich_help_panel=AGGREGATION,
        ),
    ] = None,
    cohort: Annotated[
        list[str] | None,
        typer.Option(
            help="A further cohort, with rounds of its own; see `comigs invite --cohort`.",
            callback=_cohort_names,
            rich_help_panel=SELECTION,
        ),
    ] = None,
    devices_per_round: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST,
            help="Updates that a round wants; without it every device takes part.",
            rich_help_panel=SELECTION,
        ),
    ] = None,
    over_selection: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=MOST,
            help="Devices selected for each wanted update.",
            show_default="1.3",
            rich_help_panel=SELECTION,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the selection; drawn if not given.", rich_help_panel=SELECTION),
    ] = None,
    asynchronous: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST,
            metavar="K",
            help="Wait for nobody: a generalist for every K updates, stale ones weighing less.",
            rich_help_panel=ASYNCHRONOUS,
        ),
    ] = None,
    max_staleness: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MOST,
            help="Refuse updates that started from an earlier generalist than so many before.",
            show_default="10",
            rich_help_panel=ASYNCHRONOUS,
        ),
    ] = None,
    secure_aggregation: Annotated[
        bool,
        typer.Option(
            "--secure-aggregation",
            help="Only the sum of all updates can be read, by nobody any single one.",
            rich_help_panel=PRIVACY,
        ),
    ] = False,
    secure_threshold: Annotated[
        float | None,
        typer.Option(
            help="Share of the devices that has to stay until the sum is known.",
            show_default="0.75",
            rich_help_panel=PRIVACY,
        ),
    ] = None,
    stage_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=MOST,
            help="Longest stage of secure aggregation, after training.",
            show_default="60",
            rich_help_panel=PRIVACY,
        ),
    ] = None,
    dp_noise: Annotated[
        float | None,
        typer.Option(
            metavar="MULTIPLIER",
            help="Differential privacy: noise on the sum, as a multiple of --clip-norm.",
            rich_help_panel=PRIVACY,
        ),
    ] = None,
    dp_delta: Annotated[
        float | None,
        typer.Option(help="Its delta.", show_default="1e-5", rich_help_panel=PRIVACY),
    ] = None,
    dp_budget: Annotated[
        float | None,
        typer.Option(
            metavar="EPSILON",
            help="No round is opened that would exceed this epsilon.",
            rich_help_panel=PRIVACY,
        ),
    ] = None,
    quality_gate: Annotated[
        Path | None,
        typer.Option(
            help="Held-out text, a file or a directory: refuse a generalist that does worse on it "
            "than the one before.",
            rich_help_panel=QUALITY,
        ),
    ] = None,
    quality_tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="By which share the perplexity may rise.",
            show_default="0.01",
            rich_help_panel=QUALITY,
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            help="Further host name or address that devices reach it by.",
            callback=_host_names,
            rich_help_panel=CERTIFICATES,
        ),
    ] = None,
    enrolment_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Where invitations are used (default: the next port).",
            rich_help_panel=CERTIFICATES,
        ),
    ] = None,
    certificate_days: Annotated[
        float | None,
        typer.Option(
            min=1e-5,
            max=3650,
            help="How long a device may stay away: its certificate.",
            show_default="30",
            rich_help_panel=CERTIFICATES,
        ),
    ] = None,
    database: Annotated[str | None, _database(OPERATION)] = None,
    monitor: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Serve a dashboard and Prometheus metrics there, to everybody who can reach it.",
            rich_help_panel=OPERATION,
        ),
    ] = None,
    traces: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            callback=_collector,
            help="Send OpenTelemetry traces to a collector, such as http://127.0.0.1:4317.",
            rich_help_panel=OPERATION,
        ),
    ] = None,
    keep_generalists: Annotated[
        int,
        typer.Option(
            min=1, help="Of each cohort: as many can be rolled back to.", rich_help_panel=OPERATION
        ),
    ] = 100,
    max_connections: Annotated[
        int, typer.Option(min=1, help="To each port.", rich_help_panel=LIMITS)
    ] = 4096,
    max_connections_per_address: Annotated[
        int, typer.Option(min=1, help="From one IP address.", rich_help_panel=LIMITS)
    ] = 2048,
    handshake_timeout: Annotated[
        float,
        typer.Option(min=0.1, max=LONGEST_SECONDS, help="In seconds.", rich_help_panel=LIMITS),
    ] = 10,
    max_idle: Annotated[
        float,
        typer.Option(
            min=0.1,
            max=LONGEST_SECONDS,
            help="Of a connection without calls, in seconds.",
            rich_help_panel=LIMITS,
        ),
    ] = 300,
    max_age: Annotated[
        float,
        typer.Option(
            min=0.1,
            max=LONGEST_SECONDS,
            help="Of a connection, in seconds.",
            rich_help_panel=LIMITS,
        ),
    ] = 3600,
    calls_per_second: Annotated[
        float, typer.Option(min=0.01, help="Of one device, on average.", rich_help_panel=LIMITS)
    ] = 10,
    transfers: Annotated[
        int,
        typer.Option(
            min=1, help="Uploads at once, and downloads likewise.", rich_help_panel=LIMITS
        ),
    ] = 16,
    least_rate: Annotated[
        float,
        typer.Option(min=1, help="Of a transfer, in bytes per second.", rich_help_panel=LIMITS),
    ] = 8192,
) -> None:
    """Runs rounds in which devices exchange the generalist, and nothing else."""
    # Imported here: the other commands must not wait for gRPC and SQLAlchemy.
    from coordinator import privacy
    from coordinator.accounting import UnsoundError
    from coordinator.aggregation import choose
    from coordinator.buffering import buffer
    from coordinator.cohorts import CohortsError
    from coordinator.database import postgres_engine
    from coordinator.event_log import EventLog
    from coordinator.limits import Limits
    from coordinator.options import Options
    from coordinator.policy import Policy
    from coordinator.quality import QualityGate
    from coordinator.selection import select
    from coordinator.server import serve as run

    if insecure:
        _refuse_certified(
            {
                "--cohort": cohort or None,
                "--enrolment-port": enrolment_port,
                "--certificate-days": certificate_days,
            }
        )
    least = asynchronous or (MIN_DEVICES if min_devices is None else min_devices)
    try:
        recipe = choose(
            aggregation=aggregation,
            min_devices=least,
            malicious=malicious,
            clip_norm=clip_norm,
            optimizer=server_optimizer,
            ranks=mixed_ranks,
            constants={
                "rate": server_rate,
                "beta1": server_beta1,
                "beta2": server_beta2,
                "tau": server_tau,
            },
        )
        selection = select(devices_per_round, over_selection, seed, min_devices=least)
        recipe, differential = privacy.noise(
            dp_noise, delta=dp_delta, budget=dp_budget, recipe=recipe, selection=selection
        )
        buffering = buffer(
            asynchronous,
            max_staleness=max_staleness,
            min_devices=min_devices,
            deadline=deadline,
            recipe=recipe,
            selection=selection,
            masked=secure_aggregation,
        )
        masking = privacy.mask(
            secure_aggregation,
            staying=secure_threshold,
            stage_seconds=stage_seconds,
            recipe=recipe,
            selection=selection,
            min_devices=least,
            insecure=insecure,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    offered = _compressions(compression or [], masked=masking is not None, ranks=mixed_ranks)
    if quality_tolerance is not None and quality_gate is None:
        raise typer.BadParameter("--quality-tolerance means nothing without --quality-gate")
    gate = None
    if quality_gate is not None:
        tolerance = QUALITY_TOLERANCE if quality_tolerance is None else quality_tolerance
        gate = QualityGate(bundle=bundle[0], text=quality_gate, tolerance=tolerance)
    try:
        config = training_config.load(training)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--training") from error
    config.rounds = rounds
    if database is not None:
        try:
            postgres_engine(database)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--database") from error
    options = Options(
        bundles=tuple(bundle),
        cohorts=tuple(cohort or ()),
        listen=listen,
        state=state,
        database=database,
        policy=Policy(
            rounds=rounds,
            min_devices=least,
            deadline_seconds=DEADLINE_SECONDS if deadline is None else deadline,
            recipe=recipe,
            selection=selection,
            masking=masking,
            gate=gate,
            privacy=differential,
            buffering=buffering,
            training=config,
            compressions=offered,
        ),
        enrolment_port=enrolment_port,
        names=tuple(name or ()),
        certificate_lifetime=datetime.timedelta(days=certificate_days or CERTIFICATE_DAYS),
        limits=Limits(
            connections=max_connections,
            connections_per_address=max_connections_per_address,
            handshake_seconds=handshake_timeout,
            idle_seconds=max_idle,
            age_seconds=max_age,
            calls_per_second=calls_per_second,
            transfers=transfers,
            least_rate=least_rate,
        ),
        insecure=insecure,
        exit_when_done=exit_when_done,
        monitor=monitor,
        traces=traces,
        keep_generalists=keep_generalists,
    )
    line = _json_line if output is Format.JSON else _text_line
    try:
        with contextlib.closing(EventLog(sys.stdout, line)) as log:
            asyncio.run(run(options, log))
    except (CohortsError, UnsoundError) as error:
        raise typer.BadParameter(str(error)) from error


def _refuse_certified(options: dict[str, Any]) -> None:
    """With --insecure nobody is invited, into a cohort or at all, and nobody gets a certificate."""
    for option, value in options.items():
        if value is not None:
            raise typer.BadParameter(
                f"{option} is about invitations and certificates, and --insecure has none; leave "
                "one out"
            )


StateOption = Annotated[
    Path, typer.Option(help="State directory of a coordinator, running or not.")
]


def rounds(
    *,
    state: StateOption = DEFAULT_STATE,
    database: DatabaseOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Lists the rounds of a coordinator, also while it runs."""
    from coordinator import listing

    _list("rounds", listing.rounds, listing.table, state, database, output)


def models(
    *,
    state: StateOption = DEFAULT_STATE,
    database: DatabaseOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Lists the generalists: which round starts from each, and how far it is from the last."""
    from coordinator import models

    _list("models", models.generalists, models.table, state, database, output)


def _list(
    what: str,
    read: Callable[[Path, str | None], list[T]],
    table: Callable[[list[T]], list[str]],
    state: Path,
    database: str | None,
    output: Format,
) -> None:
    try:
        rows = read(state, database)
    except ValueError as error:
        hint = "--database" if database else "--state"
        raise typer.BadParameter(str(error), param_hint=hint) from error
    if output is Format.JSON:
        emit({what: [vars(row) for row in rows]})
        return
    for line in table(rows):
        _print(line)


def audit(
    *,
    state: StateOption,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the chain only; print its length and last hash.")
    ] = False,
    expect: Annotated[
        str | None,
        typer.Option(metavar="HASH", help="A hash printed earlier, which must still be in it."),
    ] = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Lists what was done and refused, and checks that nobody altered the list."""
    from coordinator import audit

    path = state / audit.LOG
    if not path.exists():
        raise typer.BadParameter(
            f"{state} holds no audit log; give what `comigs serve` has", param_hint="--state"
        )
    entries: list[audit.Entry] = []
    count, head, found = 0, audit.BEGINNING, expect is None
    try:
        for entry in audit.read(path):
            count, head, found = entry.number, entry.hash, found or entry.hash == expect
            if verify:
                continue
            if output is Format.JSON:
                entries.append(entry)
            else:
                _print(audit.text(entry))
    finally:
        if output is Format.JSON and not verify:  # also those before a broken chain, and none
            emit({"entries": [vars(entry) for entry in entries]})
    if not found:
        raise audit.missing(path, str(expect))
    if verify and output is Format.JSON:
        emit({"entries": count, "head": head})
    elif verify:
        _print(f"{count} entries, none altered; the last one's hash is {head}")


def _compressions(
    names: list[str], *, masked: bool, ranks: str | None
) -> tuple[pb.Compression.ValueType, ...]:
    """What `--compression` offers."""
    from edge_runtime.compression import NAMES

    for name in names:
        if name not in NAMES:
            known = ", ".join(NAMES)
            raise typer.BadParameter(f"--compression {name} is not one of {known}")
    if names and masked:
        raise typer.BadParameter(
            "--compression does not go with --secure-aggregation: masked steps are integers that "
            "must add up, and look random, so there is nothing to compress; leave one out"
        )
    if ranks == "flexlora" and {"int8", "top-k"} & set(names):
        raise typer.BadParameter(
            "--compression int8 and top-k add what they leave out of a step to the next one, "
            "number by number, and with --mixed-ranks flexlora numbers mean something else after "
            "every round; choose float16, or another way to mix ranks"
        )
    return tuple(NAMES[name] for name in names)


def backup(
    *,
    state: StateOption,
    out: Annotated[Path, typer.Option(help="File to write; it must not exist.")],
    database: DatabaseOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Copies what a coordinator remembers into one file, also while it runs."""
    from coordinator import backup

    try:
        summary = backup.back_up(state, out, database)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if output is Format.JSON:
        emit(vars(summary))
    else:
        _print(f"{out}: {summary.files} files, {summary.bytes} bytes")
    messages.print(
        f"{out} holds the authority's key: whoever reads it can let devices in, and command",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )


def restore(
    *,
    file: Annotated[Path, typer.Argument(help="What `comigs backup` wrote.")],
    state: Annotated[Path, typer.Option(help="State directory to make; not there, or empty.")],
    database: DatabaseOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Makes a coordinator's state out of a backup."""
    from coordinator import backup

    try:
        summary = backup.restore(file, state, database)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--database") from error
    if output is Format.JSON:
        emit(vars(summary))
    else:
        _print(f"{state} is as it was on {summary.made_at}: {summary.files} files")
    messages.print(
        "what happened since is forgotten: revoke again who was revoked, invite again who "
        "enrolled, and see that the coordinator that this was copied from does not run any more; "
        "the next start makes another administrator's file",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )


def invite(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME", help="One invitation is made for each.", callback=_invited_names
        ),
    ],
    hours: Annotated[float, typer.Option(help="How long they work.")] = 24,
    cohort: Annotated[
        str,
        typer.Option(
            help="Which cohort they are to be in, if not their bundle's first.",
            callback=_printable,
        ),
    ] = "",
    qr: Annotated[bool, typer.Option("--qr", help="Draw them, for a phone's camera.")] = False,
    admin: AdminOption = DEFAULT_ADMIN,
    coordinator: AddressOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Let devices enrol: prints a secret for each, which works once."""
    from coordinator.administrator import Administrator

    made: list[dict[str, Any]] = []
    try:
        with Administrator(_administrator(admin, coordinator)) as administrator:
            for name in names:
                reply = administrator.invite(name, 3600 * hours, cohort)
                entry = {"invitation": reply.invitation, "expires_at": reply.expires_at}
                made.append({"name": name, **entry})
    finally:  # those that were made work already, and earlier ones do not any more
        if output is Format.JSON:
            emit({"invitations": made})
        else:
            _print_invitations(made, qr)


def _print_invitations(made: list[dict[str, Any]], qr: bool) -> None:
    for each in made:
        messages.print(
            f"for one device, {each['name']}, until {_moment(each['expires_at'])}:",
            markup=False,
            highlight=False,
        )
        if qr:
            _draw(each["invitation"])
        _print(each["invitation"])


def revoke(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME", help="Which devices.", callback=_device_names)
    ],
    admin: AdminOption = DEFAULT_ADMIN,
    coordinator: AddressOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Refuse devices from now on, also on connections that are open."""
    from coordinator.administrator import Administrator
    from edge_runtime.errors import RefusedError

    revoked: list[str] = []
    refusals: list[str] = []
    try:
        with Administrator(_administrator(admin, coordinator)) as administrator:
            for name in names:  # all of them, whatever comes of one
                try:
                    administrator.revoke(name)
                except RefusedError as error:
                    refusals.append(str(error))
                    continue
                revoked.append(name)
                if output is Format.TEXT:
                    _print(f"{name} is revoked")
    finally:
        if output is Format.JSON:
            emit({"revoked": revoked})
    if refusals:
        raise RefusedError("; ".join(refusals))


def devices(
    admin: AdminOption = DEFAULT_ADMIN,
    coordinator: AddressOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """List the devices that have enrolled."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from coordinator.administrator import Administrator

    with Administrator(_administrator(admin, coordinator)) as administrator:
        entries = administrator.devices()
    if output is Format.JSON:
        fields = (
            "name",
            "id",
            "cohort",
            "tier",
            "enrolled_at",
            "valid_until",
            "last_seen",
            "revoked_at",
        )
        emit({"devices": [{name: getattr(e, name) or None for name in fields} for e in entries]})
        return
    table = Table(
        "name", "cohort", "tier", "enrolled", "certificate until", "last seen", "revoked", box=None
    )
    for entry in entries:
        times = (entry.enrolled_at, entry.valid_until, entry.last_seen, entry.revoked_at)
        table.add_row(
            Text(entry.name),
            Text(entry.cohort),
            Text(entry.tier or "-"),
            *(_moment(time) if time else "-" for time in times),
        )
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a line stays a line for grep
    console.print(table)


def pause(
    cohort: CohortOption = "",
    admin: AdminOption = DEFAULT_ADMIN,
    coordinator: AddressOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Let no round begin or end, and send no device to train, until `comigs resume`."""
    from coordinator.administrator import Administrator

    with Administrator(_administrator(admin, coordinator)) as administrator:
        administrator.pause(cohort)
    _tell(output, {"paused": True}, "paused; updates of the open round are still accepted")


def resume(
    cohort: CohortOption = "",
    admin: AdminOption = DEFAULT_ADMIN,
    coordinator: AddressOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Go on after `comigs pause`."""
    from coordinator.administrator import Administrator

    with Administrator(_administrator(admin, coordinator)) as administrator:
        administrator.resume(cohort)
    _tell(output, {"paused": False}, "rounds go on")


def abort(
    reason: Annotated[
        str,
        typer.Option(help="Why, for those who read `comigs rounds`.", callback=_printable),
    ] = "",
    cohort: CohortOption = "",
    admin: AdminOption = DEFAULT_ADMIN,
    coordinator: AddressOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Abandon the open round and drop its updates."""
    from coordinator.administrator import Administrator

    with Administrator(_administrator(admin, coordinator)) as administrator:
        number = administrator.abort(reason, cohort)
    _tell(output, {"aborted": number}, f"round {number} is abandoned, its updates are dropped")


def rollback(
    number: Annotated[
        int,
        typer.Argument(
            metavar="ROUND", min=1, max=MOST_ROUND, help="The first round to be undone."
        ),
    ],
    cohort: CohortOption = "",
    admin: AdminOption = DEFAULT_ADMIN,
    coordinator: AddressOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Go on from the generalist that an earlier round started from."""
    from coordinator.administrator import Administrator

    with Administrator(_administrator(admin, coordinator)) as administrator:
        successor = administrator.roll_back(number, cohort)
    _tell(
        output,
        {"rolled_back_to": number, "round": successor},
        f"round {successor} starts from what round {number} started from",
    )


def _tell(output: Format, fields: dict[str, Any], text: str) -> None:
    if output is Format.JSON:
        emit(fields)
    else:
        _print(text)


def _administrator(path: Path, coordinator: str | None) -> Identity:
    """What is in the administrator's file.

    Raises:
        TrustError: it is damaged or not there.
        StorageError: it cannot be read.
    """
    from edge_runtime.errors import TrustError
    from edge_runtime.identity import read_identity

    identity = read_identity(path)
    if identity is None:
        raise TrustError(
            f"there is no administrator's file {path}; give --admin and the one that the "
            "coordinator printed when it started, or a copy of it"
        )
    return replace(identity, coordinator=coordinator or identity.coordinator)


def _draw(text: str) -> None:
    """A QR code in the terminal, as small as it gets."""
    import segno
    from rich.console import Console

    drawn = io.StringIO()
    segno.make(text, error="L", boost_error=False).terminal(drawn, border=1, compact=True)
    # segno draws the light parts, so on a light background that would be the negative.
    Console().print(drawn.getvalue(), style="#ffffff on #000000", end="", soft_wrap=True)


def _moment(time: float) -> str:
    return datetime.datetime.fromtimestamp(time).strftime("%Y-%m-%d %H:%M")


def _json_line(event: str, fields: dict[str, Any]) -> str:
    line = {"event": event, **fields}
    return dumps(line, separators=(",", ":"), ensure_ascii=not prints_all())


def _text_line(event: str, fields: dict[str, Any]) -> str:
    cohort = f"{fields['cohort']}: " if "cohort" in fields else ""
    return cohort + TEXTS[event].format(**fields, **_readable(fields))


TEXTS = {
    "listening": "listening on {address}, {trust}",
    "monitoring": "dashboard on http://{address}/, metrics on http://{address}/metrics",
    "standing_by": "another coordinator uses {state}; this one goes on when that one ends",
    "following": "listening on {address} beside it, enrolment on {enrolment}",
    "not_following": "{state}: this one waits and does not follow: {reason}",
    "device_enrolled": "{device} has enrolled",
    "device_revoked": "{device} is revoked",
    "round_opened": "round {round}: open",
    "round_resumed": "round {round}: resumed with {updates} updates",
    "update_accepted": "round {round}: {device} reported ({bytes} bytes{late})",
    "update_refused": "round {round}: refused an update of {device}: {reason}",
    "shares_refused": "round {round}: of {device}, {reason}",
    "upload_broken": "round {round}: an upload of {device} broke: {reason}",
    "privacy": "differential privacy: epsilon {epsilon} spent at delta {delta}{budgeted}",
    "privacy_spent": "round {round}: epsilon is {epsilon} at delta {delta} now",
    "budget_spent": "round {round} is not opened: epsilon is {epsilon} at delta {delta}, and it "
    "would exceed the budget of {budget}; all rounds are over",
    "masking_began": "round {round}: {devices} devices mask their updates",
    "update_damaged": "round {round}: goes on without the update of {device}: {reason}",
    "settings_changed": "going on with other settings than before: {changed}",
    "quality_measured": "round {round}: starts from perplexity {perplexity:.2f}",
    "round_closed": (
        "round {round}: aggregated {updates} updates{clipping} after {seconds:.1f} s{measured}"
    ),
    "round_abandoned": "round {round}: abandoned with {updates} updates: {reason}",
    "connections_closed": "closed {connections} connections from {address}: too many from there",
    "not_ready": "this one can neither follow nor lead for now: {reason}",
    "storage_failed": "nothing can be stored for now, and devices try again: {reason}",
    "storage_recovered": "the state can be written again",
    "lines_lost": "{lines} lines were left out: whoever reads this had stopped",
    "paused": "paused by the administrator; updates of the open round are still accepted",
    "resumed": "the administrator lets rounds go on",
    "rolled_back": "round {round}: starts from what round {to} started from",
    "finished": "all rounds are over; {bytes_received} bytes received, {bytes_sent} bytes sent",
}


def _readable(fields: dict[str, Any]) -> dict[str, str]:
    """Words for what may be missing in `fields`."""
    words = {"late": ""}
    if "admin" in fields:
        words["trust"] = (
            "enrolment on {enrolment}; invite devices with: comigs invite NAME --admin {admin}"
            if fields["admin"]
            else "without TLS: devices need --insecure"
        ).format(**fields)
    if "rounds_left" in fields:
        budgeted = ", of {budget}: enough for {rounds_left} of {rounds_wanted} rounds"
        words["budgeted"] = "" if fields["budget"] is None else budgeted.format(**fields)
    if "clipped" in fields:
        clipped, coordinates = fields["clipped"], fields["clipped_coordinates"]
        counts = [f"{clipped} of them clipped"] * bool(clipped)
        counts += [f"{coordinates} coordinates clipped"] * bool(coordinates)
        words["clipping"] = "".join(f", {count}" for count in counts) + "," * bool(counts)
        quality = fields.get("perplexity")
        words["measured"] = (
            "; perplexity {incoming:.2f} to {candidate:.2f}".format(**quality) if quality else ""
        )
    if fields.get("behind"):
        words["late"] = f", {fields['behind']} behind"
    if "changes" in fields:
        words["changed"] = "; ".join(
            f"{name} {new}, was {old}" for name, (old, new) in fields["changes"].items()
        )
    return words


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
