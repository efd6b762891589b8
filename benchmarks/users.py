"""The users of the demo: real text that every installation has, or folders of one's own.

    >>> [user.name for user in default_users(20_000)]
    ['python', 'cpp', 'mathematics', 'data-analysis']

Choices:

* A user's text is a sequence of documents (files, or a module's docstrings) in shuffled order,
  and the three splits are cut by position. So train, held-out and test hold the same kind of text
  and never the same passage.
* The order depends on the sorted paths and a fixed seed only: the same packages give the same text.
* A document most of whose text has already occurred is dropped. What a split asks for can then
  not be looked up in another one.
* Neither torch nor sympy is imported; their files are read as text.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from edge_runtime.data import SPLITS, read_splits, read_text, split_text
from edge_runtime.errors import DataError
from edge_runtime.files import write_atomic
from edge_runtime.invitation import NAMING, is_name

# Documents outside these lengths say little, or would fill a split alone.
SHORTEST_DOCUMENT = 200
LONGEST_DOCUMENT = 16_000
SHORTEST_DOCSTRING = 80

# Folders without prose or code of a person: tables, generated code, tests, other people's packages.
NOT_PYTHON = {
    "__pycache__", "dist-packages", "encodings", "idlelib", "lib-dynload", "lib2to3", "msilib",
    "pydoc_data", "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
NOT_MATHEMATICS = {
    "benchmarks", "codegen", "external", "interactive", "multipledispatch", "parsing", "plotting",
    "printing", "sandbox", "strategies", "testing", "tests", "unify", "utilities",
}  # fmt: skip
NOT_DATA_ANALYSIS = {
    "_pyinstaller", "_typing", "distutils", "f2py", "testing", "tests", "typing",
}  # fmt: skip
NOT_CPP = {"ops", "test", "vulkan"}

GENERATED = re.compile(r"@generated|automatically generated|auto-?generated", re.IGNORECASE)
LICENCE = re.compile(r"copyright|licen[cs]e|all rights reserved", re.IGNORECASE)
PYTHON_BANNER = re.compile(r"\A(?:[ \t]*#[^\n]*\n|[ \t]*\n)+")
CPP_BANNER = re.compile(r"\A\s*(?:/\*.*?\*/|(?:[ \t]*//[^\n]*(?:\n|\Z))+)", re.DOTALL)
# The same four lines wrap nearly every header of torch.
CPP_GUARD = re.compile(
    r"^#if !defined\(TORCH_STABLE_ONLY\)[^\n]*\n"
    r"|^#else\n#error \"This file should not be included[^\n]*\n#endif[^\n]*\n?",
    re.MULTILINE,
)


@dataclass(frozen=True)
class UserText:
    """One user's text. `description` says in a few words what it is."""

    name: str
    description: str
    train: str
    valid: str
    test: str


def default_users(characters: int = 250_000) -> list[UserText]:
    """Four users with about `characters` characters each, out of the installed packages.

    Raises:
        DataError: a package or its text is missing, or `characters` is too few to split.
    """
    sources: tuple[tuple[str, str, Iterable[str]], ...] = (
        ("python", "Python sources of the standard library", _python()),
        ("cpp", "C++ headers of PyTorch", _cpp()),
        ("mathematics", "documentation of SymPy", _documentation("sympy", NOT_MATHEMATICS)),
        ("data-analysis", "documentation of NumPy", _documentation("numpy", NOT_DATA_ANALYSIS)),
    )
    users = []
    for name, description, documents in sources:
        text = _take(_distinct(documents), characters)
        if not text:
            raise DataError(f"user {name}: no {description} found; name your own text with --users")
        users.append(_user(name, description, text))
    return users


def load_users(directory: Path) -> list[UserText]:
    """One user per folder of `directory`, by name.

    A folder holds either `train.txt`, `valid.txt` and `test.txt`, which are taken as they are, or
    any UTF-8 text files, also in folders, which are split as `read_splits` says. Names that start
    with a dot are passed over, as is a file that repeats an earlier one.

    Raises:
        DataError: nothing there, not UTF-8 (with file and byte offset), or too short to split.
    """
    try:
        folders = sorted(p for p in directory.iterdir() if p.is_dir() and p.name[0] != ".")
    except OSError as error:
        raise DataError(f"{directory}: {error.strerror}; name a folder with --users") from None
    if not folders:
        raise DataError(f"{directory} holds no folder; make one folder of text files per user")
    for folder in folders:
        if not is_name(folder.name):
            raise DataError(
                f"{directory}: {NAMING}, and so a user's folder; rename {folder.name!r}"
            )
    return [_load_user(folder) for folder in folders]


def write_users(users: Sequence[UserText], directory: Path) -> list[Path]:
    """Writes `directory/<name>/{train,valid,test}.txt`; returns the users' folders, in order.

    Raises:
        StorageError: the directory cannot be written.
    """
    folders = []
    for user in users:
        if user.name in ("", ".", "..") or re.search(r"[/\\\0]", user.name):
            raise ValueError(f"a user's name must be a file name, not {user.name!r}")
        folder = directory / user.name
        for name, text in zip(SPLITS, (user.train, user.valid, user.test), strict=True):
            write_atomic(folder / f"{name}.txt", text.encode("utf-8"))
        folders.append(folder)
    return folders


def _user(name: str, description: str, text: str) -> UserText:
    try:
        train, valid, test = split_text(text)
    except DataError as error:
        raise DataError(f"user {name}: {error}") from None
    return UserText(name, description, train, valid, test)


def _load_user(folder: Path) -> UserText:
    try:
        splits = read_splits(folder, needed=SPLITS)
    except DataError as error:
        raise DataError(f"user {folder.name}: {error}") from None
    length = sum(map(len, splits.values()))
    return UserText(folder.name, f"{length:,} characters of one's own", **splits)


# --- text of the installed packages ------------------------------------------------------------


def _python() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    return _files(root, "*.py", NOT_PYTHON, lambda text: PYTHON_BANNER.sub("", text))


def _cpp() -> Iterator[str]:
    root = _package("torch") / "include"
    for text in _files(root, "*.h", NOT_CPP, _without_cpp_banners, ("ATen", "c10")):
        if not GENERATED.search(text[:1000]):
            yield text


def _without_cpp_banners(text: str) -> str:
    text = CPP_GUARD.sub("", text)
    while (banner := CPP_BANNER.match(text)) and LICENCE.search(banner[0]):
        text = text[banner.end() :]
    return text


def _files(
    root: Path,
    pattern: str,
    skip: set[str],
    clean: Callable[[str], str],
    folders: Sequence[str] = (".",),
) -> Iterator[str]:
    """The files' cleaned texts, in shuffled order, without the very short and the very long."""
    for path in _shuffled(root, pattern, skip, folders):
        try:
            text = clean(read_text(path)).strip()
        except DataError:  # a few sources of other encodings
            continue
        if SHORTEST_DOCUMENT <= len(text) <= LONGEST_DOCUMENT:
            yield text


def _documentation(package: str, skip: set[str]) -> Iterator[str]:
    """The docstrings of a package; those of one module follow each other, as in its source."""
    for path in _shuffled(_package(package), "*.py", skip):
        length = 0
        for docstring in _docstrings(path):
            if len(docstring) < SHORTEST_DOCSTRING:
                continue
            yield docstring
            length += len(docstring)
            if length > LONGEST_DOCUMENT:
                break


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # escapes in other people's docstrings
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            tree = ast.parse(read_text(path))
        except (DataError, SyntaxError):
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=True)
            if docstring and not LICENCE.search(docstring):
                yield docstring.strip()


def _package(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise DataError(f"{name} is not installed; install it, or name your own text with --users")
    return Path(spec.origin).parent


def _shuffled(
    root: Path, pattern: str, skip: set[str], folders: Sequence[str] = (".",)
) -> list[Path]:
    paths = (path for folder in folders for path in (root / folder).rglob(pattern))
    names = sorted(path.relative_to(root).as_posix() for path in paths)
    names = [name for name in names if skip.isdisjoint(name.split("/")[:-1])]
    random.Random(0).shuffle(names)  # noqa: S311 - an order, not a secret
    return [root / name for name in names]


def _distinct(documents: Iterable[str]) -> Iterator[str]:
    """Drops what repeats: a document of which half or more has occurred in earlier ones."""
    seen: set[str] = set()
    for document in documents:
        lines = [line for line in map(str.strip, document.splitlines()) if len(line) >= 20]
        repeated = sum(len(line) for line in lines if line in seen)
        if document not in seen and repeated <= sum(map(len, lines)) / 2:
            yield document
        seen.update(lines)
        seen.add(document)


def _take(documents: Iterable[str], characters: int) -> str:
    """Documents until there are `characters` of them; the last one is cut at a line."""
    taken: list[str] = []
    length = 0
    for document in documents:
        taken.append(document)
        length += len(document) + 2
        if length >= characters:
            break
    text = "\n\n".join(taken)
    if len(text) <= characters:
        return text
    end = text.rfind("\n", 0, characters)
    return text[:end] if end > 0 else text[:characters]
