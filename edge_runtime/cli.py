"""The `comigs` command: collects the subcommands that the installed packages register."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from edge_runtime.errors import ComigsError, MissingPartError, StorageError
from edge_runtime.finite import dumps

# The commands of each entry point, and the extra that brings the packages that they need.
COMMANDS = {
    "device": ("device", "predict", "perplexity", "plan", "doctor"),
    "coordinator": (
        *("serve", "rounds", "models", "audit", "backup", "restore"),
        *("invite", "revoke", "devices", "pause", "resume", "abort", "rollback"),
    ),
    "export": ("export",),
    "benchmarks": ("demo", "bench"),
}
EXTRAS = {"device": "device", "coordinator": "coordinator", "export": "export", "benchmarks": "dev"}


class Format(StrEnum):
    TEXT = "text"
    JSON = "json"


FormatOption = Annotated[
    Format, typer.Option("--format", help="Output for people or for programs.")
]

# Of options: what every generator of random numbers takes, and more than anybody waits for.
LARGEST_SEED = 2**32 - 1
MOST_ROUNDS = 10**6

# What is wrong with a path from the command line, wherever it is looked at first.
NO_PLACE = (errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP)
# What is wrong with a file that output is redirected to; files of ours are written under
# `files.storage_errors`.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)

# Progress and messages go to stderr, results to stdout: `--format json | jq` must work.
messages = Console(stderr=True)


def emit(value: dict[str, Any], *, in_a_line: bool = False) -> None:
    """Prints a command's result, or one of several in a line each, as a JSON document."""
    indent = None if in_a_line else 2
    sys.stdout.write(dumps(value, indent=indent, ensure_ascii=not prints_all()) + "\n")


def prints_all() -> bool:
    """Whether standard output takes every character; JSON has escapes of its own for others."""
    return (sys.stdout.encoding or "").lower() in ("utf-8", "utf8")


@contextlib.contextmanager
def telling(first: str) -> Iterator[Callable[[str], None]]:
    """Tells what a long command does: one line that changes, or without a terminal, a log."""
    if messages.is_terminal:
        with messages.status(first) as status:
            yield status.update
        return

    def tell(line: str) -> None:
        messages.print(line, markup=False, highlight=False, soft_wrap=True)

    yield tell


def build(command: str | None = None) -> typer.Typer:
    """The command with everything that is installed, or with as much of it as `command` needs."""
    app = typer.Typer(
        name="comigs",
        help="Personalised next-token prediction that learns on the device, together.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)  # so that a single command is named, too
    group = _group(command)
    for point in sorted(entry_points(group="comigs.commands"), key=lambda p: p.name):
        if group not in (None, point.name):
            continue
        try:
            register = point.load()
        except ModuleNotFoundError as error:
            _register_missing(app, point.name, error.name or "a package")
        else:
            register(app)
    return app


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"comigs {version('comigs')}")
        raise typer.Exit


def _root(
    asked: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_tell_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


def _group(command: str | None) -> str | None:
    """Whose command it is, if anybody's."""
    return next((group for group, names in COMMANDS.items() if command in names), None)


def _register_missing(app: typer.Typer, group: str, package: str) -> None:
    """Commands of a part that is not installed say which extra brings it."""

    def refuse() -> None:
        raise _missing(package, group)

    for name in COMMANDS[group]:
        app.command(
            name,
            hidden=True,
            context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        )(refuse)


def _missing(package: str, group: str) -> MissingPartError:
    return MissingPartError(
        f"{package} is not installed; install it with `pip install 'comigs[{EXTRAS[group]}]'`"
    )


def _run() -> None:
    """Runs the command; turns a package that it comes to lack into a MissingPartError.

    Commands import heavy packages only when they run.
    """
    command = sys.argv[1] if len(sys.argv) > 1 else None
    try:
        build(command)()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        group = _group(command)
        if not package or find_spec(package) is not None or group is None:
            raise  # a bug: what is there lacks a part of itself
        raise _missing(package, group) from error


def _refuse(error: ComigsError) -> NoReturn:
    with contextlib.suppress(OSError):  # a log on a full disk: the code has to say it
        messages.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
    sys.exit(error.code)


def _refuse_output(error: OSError) -> NoReturn:
    """What is left in the buffers would fail once more at the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    try:
        _refuse(StorageError(f"standard output: {error.strerror}; free some space there"))
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os.dup2(nowhere, sys.stderr.fileno())


def _open_streams() -> None:
    """Opens those that whoever started this has closed, as daemons are started: else the next file
    would take their place. What the terminal's encoding lacks is written as an escape."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def main() -> None:
    _open_streams()
    # gRPC reads the first two when it is imported. It logs handshakes and the like from C; what
    # matters of it is in our own messages.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # TLS 1.3 only. gRPC for Python has no setting for that, but this names the cipher suites of
    # TLS 1.2, and those of 1.3 are not subject to it: one that needs an RSA certificate never fits
    # ours, which are ECDSA, so that no handshake of TLS 1.2 succeeds. Nobody may say otherwise.
    os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES128-GCM-SHA256"
    # Bars that transformers draws between our lines; likewise read at the import.
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        _run()
    except ComigsError as error:
        _refuse(error)
    except OSError as error:
        if error.filename is None and error.errno in NO_SPACE:
            _refuse_output(error)
        if error.errno not in NO_PLACE or error.filename is None:
            raise
        _refuse(StorageError(f"{error.filename}: {error.strerror}; give another path"))
    except KeyboardInterrupt:
        sys.exit(130)
