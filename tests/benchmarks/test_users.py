"""The demo's users: splits without overlap, the same text every time, and errors that help."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.users import UserText, default_users, load_users, write_users
from edge_runtime.data import split_text
from edge_runtime.errors import DataError, StorageError

WORDS = st.sampled_from(["word ", "line\n", "paragraph\n\n", "x" * 30, "\t\n", "é", "\r\n", " "])
TEXTS = st.builds(lambda unit, tail, n: (unit + tail) * n, st.lists(WORDS, min_size=1).map("".join),
                  st.text(max_size=20), st.integers(20, 400))  # fmt: skip
SHARES = st.tuples(*[st.integers(1, 10)] * 3).map(lambda t: tuple(x / sum(t) for x in t))


@given(TEXTS, SHARES, st.integers(1, 50))
def test_a_split_is_a_partition_with_at_least_half_of_each_share(
    text: str, shares: tuple[float, float, float], shortest: int
) -> None:
    try:
        parts = split_text(text, shares, shortest)
    except DataError:
        assert len(text) * min(shares) < 2 * shortest + 1
        return
    assert "".join(parts) == text
    for part, share in zip(parts, shares, strict=True):
        assert len(part) >= max(shortest, int(len(text) * share / 2))


@given(st.integers(0, 5119))
def test_a_text_too_short_to_split_says_how_much_is_needed(length: int) -> None:
    with pytest.raises(DataError, match="at least 5,120 are needed"):
        split_text("x" * length)


def test_the_message_of_a_short_text_is_true() -> None:
    assert [len(part) for part in split_text("x" * 5120)] == [4096, 512, 512]


@pytest.mark.parametrize("separator", ["\n\n", "\n", " "])
def test_cuts_fall_on_the_largest_boundary_near(separator: str) -> None:
    text = separator.join(["some text"] * 1000)
    train, valid, _ = split_text(text)
    assert train.endswith(separator)
    assert valid.endswith(separator)


@pytest.mark.parametrize("shares", [(1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (1.2, -0.1, -0.1)])
def test_shares_are_a_partition(shares: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="shares"):
        split_text("x" * 10_000, shares)


@pytest.fixture(scope="module")
def users() -> list[UserText]:
    return default_users()


def parts(user: UserText) -> tuple[str, str, str]:
    return user.train, user.valid, user.test


def lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 20}


def test_a_folder_is_named_as_a_device_may_be(tmp_path: Path) -> None:
    (tmp_path / ("n" * 65)).mkdir()
    with pytest.raises(DataError, match="a device's name has 1 to 64 bytes"):
        load_users(tmp_path)


def test_default_users_are_long_enough_and_the_same_every_time(users: list[UserText]) -> None:
    assert [user.name for user in users] == ["python", "cpp", "mathematics", "data-analysis"]
    assert users == default_users()
    for user in users:
        train, valid, test = map(len, parts(user))
        assert 240_000 < train + valid + test <= 250_000
        assert min(valid, test) > 22_000
        assert user.description


def test_what_a_split_of_a_default_user_asks_for_is_not_in_another(users: list[UserText]) -> None:
    for user in users:
        train, valid, test = map(lines, parts(user))
        for asked, known in ((valid, train), (test, train), (test, valid)):
            assert len(asked & known) < 0.1 * len(asked), user.name
        paragraphs = [
            {p.strip() for p in part.split("\n\n") if len(p) > 300} for part in parts(user)
        ]
        assert not paragraphs[0] & (paragraphs[1] | paragraphs[2]), user.name


def test_default_users_are_text_without_licence_headers(users: list[UserText]) -> None:
    for user in users:
        text = "".join(parts(user))
        assert not {c for c in text if ord(c) < 32} - set("\n\t\f"), user.name
        assert text.count("Copyright") < 10, user.name
        assert "@generated" not in text


def test_default_users_are_found_without_importing_their_packages() -> None:
    code = (
        "import sys; from benchmarks.users import default_users; default_users(20000);"
        "print(sorted({'torch', 'sympy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_too_few_characters_are_refused() -> None:
    with pytest.raises(DataError, match=r"user python: .* at least 5,120"):
        default_users(1000)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.users.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"torch is not installed; .* --users"):
        default_users(20_000)


def fill(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def test_written_users_are_loaded_again(tmp_path: Path) -> None:
    written = [UserText(name, "", "train é\n", "valid\n", "test\n") for name in ("b", "a")]
    assert write_users(written, tmp_path) == [tmp_path / "b", tmp_path / "a"]
    loaded = load_users(tmp_path)
    assert [user.name for user in loaded] == ["a", "b"]
    assert [parts(user) for user in loaded] == [parts(user) for user in written]


def test_short_files_are_joined_in_sorted_order_and_split(tmp_path: Path) -> None:
    folder = fill(tmp_path / "ann", b="second\n" * 600, a="first\n" * 600, copy="first\n" * 600)
    (folder / ".hidden").write_bytes(b"\xff")
    (folder / "sub").mkdir()
    (folder / "sub" / "more.md").write_bytes(b"\xef\xbb\xbf" + b"third\r\n" * 100)
    (tmp_path / ".git").mkdir()
    (user,) = load_users(tmp_path)
    text = "".join(parts(user))
    assert text.index("first") < text.index("second") < text.index("third")
    assert text.count("first") == 600
    assert "\r" not in text
    assert user.description == "8,404 characters of one's own"


def test_one_line_is_split_between_words(tmp_path: Path) -> None:
    fill(tmp_path / "ann", line="word " * 2000)
    (user,) = load_users(tmp_path)
    assert all(part.startswith("word") and part.endswith(" ") for part in parts(user))


def test_bad_directories_get_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: No such file .*--users"):
        load_users(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no folder; make one folder of text files per user"):
        load_users(tmp_path)
    folder = fill(tmp_path / "ann")
    with pytest.raises(DataError, match=r"user ann: .* holds no text"):
        load_users(tmp_path)
    (folder / "blank.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"user ann: .* holds no text"):
        load_users(tmp_path)
    (folder / "short.txt").write_text("short\n")
    with pytest.raises(
        DataError, match=r"user ann: .* 6 characters are too few to split; at least"
    ):
        load_users(tmp_path)
    (folder / "train.txt").write_text("train\n")
    with pytest.raises(DataError, match=r"user ann: .* has no valid\.txt and no test\.txt"):
        load_users(tmp_path)
    (folder / "valid.txt").write_text("valid\n")
    (folder / "test.txt").write_text("")
    with pytest.raises(DataError, match=r"user ann: .*test\.txt is empty"):
        load_users(tmp_path)
    (folder / "test.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"ann/test\.txt is not UTF-8 text \(byte 3\)") as error:
        load_users(tmp_path)
    assert "\n" not in str(error.value)


def test_a_name_that_leaves_the_directory_is_refused(tmp_path: Path) -> None:
    for name in ("", "..", "a/b", "/etc"):
        with pytest.raises(ValueError, match="file name"):
            write_users([UserText(name, "", "a", "b", "c")], tmp_path)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        write_users([UserText("ann", "", "a", "b", "c")], tmp_path / "file")
