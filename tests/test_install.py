"""What is installed where: extras by role, direction of imports, exit codes, `comigs doctor`."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from edge_runtime import cli, errors

ROOT = Path(__file__).parents[1]
PACKAGES = ("benchmarks", "coordinator", "edge_runtime", "export", "protos")
HEAVY = ("executorch", "onnx", "peft", "torch", "transformers")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Package -> what of ours it may import. The coordinator sees of the device what the contract needs.
MAY_IMPORT = {
    "protos": {"protos"},
    "edge_runtime": {"edge_runtime", "protos"},
    "coordinator": {
        "coordinator",
        "protos",
        *(
            f"edge_runtime.{name}"
            for name in (
                *("adapters", "bundle", "cli", "compression", "connection", "errors", "files"),
                *("finite", "identity", "neighbours"),
                *("invitation", "masking", "noise", "protocol", "quantization"),
                *("secure_aggregation", "shamir", "training_config", "wire"),
            )
        ),
    },
    "export": {"export", "edge_runtime", "protos"},
    "benchmarks": set(PACKAGES),
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Dotted names of what a source imports of ours, wherever in it: modules, or names in them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.partition(".")[0] in PACKAGES)


def requirements(extra: str) -> set[str]:
    """Names of the packages that an extra asks for, with those of the extras that it includes."""
    found = set(PROJECT["dependencies"]) | set(PROJECT["optional-dependencies"][extra])
    names = {re.match(r"[\w.-]+", line)[0].lower() for line in found}
    for line in found:
        if included := re.fullmatch(r"comigs\[(.+)\]", line):
            for other in included[1].split(","):
                names |= requirements(other)
    return names - {"comigs"}


@pytest.mark.parametrize("role", ["device", "coordinator"])
def test_a_role_installs_no_compiler(role: str) -> None:
    assert not requirements(role) & set(HEAVY)


def test_dev_installs_every_role() -> None:
    for extra in PROJECT["optional-dependencies"].keys() - {"smollm2"}:  # a model, not a role
        assert requirements(extra) <= requirements("dev")


def test_constraints_pin_what_is_asked_for() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert not any("+" in version for version in pins.values()), "a local version is not everywhere"
    normal = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    assert requirements("dev") <= normal


@pytest.mark.parametrize("package", ["protos", "edge_runtime", "coordinator"])
def test_imports_without_torch(package: str) -> None:
    modules = [module_name(p) for p in sources(package) if p.name != "__main__.py"]
    code = (
        f"{without(*HEAVY)}import importlib\nfor name in {modules}: importlib.import_module(name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_direction_of_imports(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imports(path)
        if not any(name == may or name.startswith(f"{may}.") for may in MAY_IMPORT[package])
    ]
    assert not wrong


def without(*packages: str) -> str:
    """Statements after which these packages cannot be imported, nor found."""
    return f"import sys\nsys.modules.update(dict.fromkeys({packages}))\n"


def table(text: str) -> dict[int, list[str]]:
    """The rows of a Markdown table whose first cell is a number: number -> other cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {int(row[0]): row[1:] for row in rows if row[0].isdecimal()}


def test_exit_codes_are_documented() -> None:
    documented = {row[0]: code for code, row in table(inspect.getdoc(errors) or "").items()}
    documented.pop("")
    classes = {
        name: value.code
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value is not errors.ComigsError
    }
    assert classes == documented
    assert len(set(classes.values())) == len(classes), "two errors have the same code"


def test_the_readme_has_the_same_exit_codes() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("\n## Exit codes\n")[1].split("\n## ")[0]
    in_code = {code: row[-1] for code, row in table(inspect.getdoc(errors) or "").items()}
    assert {code: row[-1] for code, row in table(section).items()} == in_code
    # Older bundles are refused like newer ones.
    assert "of another format" in in_code[errors.BundleError.code]


def comigs(*arguments: object, before: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command, after the statements `before`."""
    code = f"{before}\nfrom edge_runtime.cli import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_version_is_told() -> None:
    done = comigs("--version")
    assert (done.returncode, done.stdout) == (0, f"comigs {version('comigs')}\n")


def test_doctor_finds_this_installation_sound(tmp_path: Path) -> None:
    done = comigs("doctor", "--home", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BAD" not in done.stdout


def test_doctor_ends_with_the_code_of_what_it_finds(tmp_path: Path) -> None:
    done = comigs("doctor", "--home", tmp_path, "--insecure", "127.0.0.1:1")
    assert done.returncode == errors.UnreachableError.code
    assert "BAD  coordinator: no answer" in done.stdout


def test_doctor_speaks_json(tmp_path: Path) -> None:
    done = comigs("doctor", "--home", tmp_path, "--format", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["ok"]
    assert {"Python", "engine onnxruntime", "integer products", "memory", "disk"} <= {
        c["what"] for c in report["checks"]
    }


@pytest.mark.parametrize(
    ("gone", "arguments", "extra"),
    [
        ("torch", ("export", "--out", "x"), "export"),
        ("jinja2", ("demo",), "dev"),
        ("torch", ("bench", "train"), "dev"),
        ("sqlalchemy", ("serve", "--bundle=b", "--state=s", "--listen=127.0.0.1:0"), "coordinator"),
        ("sqlalchemy", ("backup", "--state=s", "--out=o"), "coordinator"),
        ("sqlalchemy", ("restore", "b", "--state=s"), "coordinator"),
        ("grpc", ("devices", "--admin", "none"), "coordinator"),
        ("tokenizers", ("device", "run", "--home", "h"), "device"),
        ("tokenizers", ("predict",), "device"),
    ],
)
def test_a_missing_part_is_named(gone: str, arguments: tuple[str, ...], extra: str) -> None:
    """What an installation without the part says: one line, and the extra that brings it."""
    done = comigs(*arguments, before=without(gone))
    assert done.returncode == errors.MissingPartError.code, done.stderr
    assert done.stderr == (
        f"error: {gone} is not installed; install it with `pip install 'comigs[{extra}]'`\n"
    )


def test_every_command_is_known_to_be_of_a_part() -> None:
    for point in entry_points(group="comigs.commands"):
        app = typer.Typer()
        point.load()(app)
        named = typer.main.get_group(app).commands.keys()
        assert named == set(cli.COMMANDS[point.name]), point.name


def test_a_bug_is_not_taken_for_a_missing_part() -> None:
    """A module that an installed package lacks is no reason to install that package."""
    before = """
import edge_runtime.commands
def lacks(*_):
    import numpy.no_such_module
edge_runtime.commands.open_bundle = lacks
"""
    done = comigs("plan", "--bundle", "b", before=before)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_serve_shows_first_what_a_first_run_needs() -> None:
    shown = CliRunner().invoke(cli.build(), ["serve", "--help"], env={"COLUMNS": "200"})
    first, _, rest = shown.stdout.partition(" Aggregation ─")
    options = re.findall(r"^│ [* ]  (--[a-z-]+)", first, re.MULTILINE)
    assert options[:5] == ["--bundle", "--state", "--listen", "--rounds", "--min-devices"]
    assert len(options) <= 11
    assert "--dp-noise" in rest


def test_a_command_waits_for_no_other_packages() -> None:
    script = (
        "import sys\nfrom edge_runtime.cli import build\n"
        "build('invite')\nassert 'coordinator.commands' in sys.modules\n"
        "print(*{'edge_runtime.commands', 'export.commands', 'tokenizers'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
