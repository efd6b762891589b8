"""Prediction: the cache changes nothing, text may be long, adapters are the freshest."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from string import ascii_letters

import numpy as np
import onnx
import oracle
import pytest
import torch
from device_help import TIMEOUT, comigs, command, device_run, refusal, run_alone, tokens
from tiny import TIER, ExportTiny
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from tokenizers.trainers import BpeTrainer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from edge_runtime.adapters import Vectors, load_fresh, views
from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.data import tokenize
from edge_runtime.engines import load_engine
from edge_runtime.errors import AdapterError, DivergedError, ParityError
from edge_runtime.predict import Predictor, memory_plan
from edge_runtime.store import Home
from export import mixture
from export.base import load_base
from export.bundle import export_bundle
from export.mixture import Mixture


def predictor(bundle: Bundle, vectors: Vectors) -> Predictor:
    return Predictor(bundle, load_engine("onnxruntime", threads=1), vectors)


def reference(bundle: Bundle, base: Path, vectors: Vectors) -> oracle.OracleModel:
    """The same model in plain PyTorch and float64."""
    m = bundle.manifest.mixture
    return oracle.OracleModel(
        GPT2LMHeadModel.from_pretrained(base, dtype=torch.float64),
        mixing=m.mixing,
        experts=1 + m.specialists,
        rank=m.rank,
        alpha=m.alpha,
        targets=tuple(m.targets),
        values=views(bundle.manifest, vectors),
    )


# --- adapters count ----------------------------------------------------------------------------


def test_a_program_that_ignores_adapters_is_found_at_load(own_bundle: Path) -> None:
    bundle = open_bundle(own_bundle)
    relative = bundle.program("decode", "onnxruntime").file
    file = own_bundle / relative
    model = onnx.load(file, load_external_data=False)
    ignored = [port.name for port in model.graph.input if "/" in port.name]
    assert ignored
    for node in model.graph.node:
        node.input[:] = [f"{name} ignored" if name in ignored else name for name in node.input]
    zero = onnx.numpy_helper.from_array(np.zeros((), np.float32), "zero")
    model.graph.initializer.append(zero)
    for name in ignored:
        model.graph.node.insert(
            0, onnx.helper.make_node("Mul", [name, "zero"], [f"{name} ignored"])
        )
    file.write_bytes(model.SerializeToString())
    (entry,) = (entry for entry in bundle.manifest.files if entry.path == relative)
    entry.size = file.stat().st_size
    entry.sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(ParityError, match="same with any adapters"):
        predictor(bundle, load_fresh(bundle))


def test_adapters_of_queries_and_keys_alone_count(
    export_tiny: ExportTiny, tiny_llama_dir: Path
) -> None:
    """They have no say in what follows a single token."""
    only = Mixture(rank=4, specialists=0, targets=("self_attn.q_proj", "self_attn.k_proj"))
    bundle = export_tiny(only, base=tiny_llama_dir, programs=("prefill", "decode"))
    assert predictor(bundle, load_fresh(bundle)).logits([1, 2]).size


# --- logits ------------------------------------------------------------------------------------


def test_fresh_adapters_are_the_base_at_every_length(
    tiny_bundle: Bundle, tiny_base_dir: Path
) -> None:
    context = tiny_bundle.manifest.tier.context
    text = tokens(1, context)
    model = GPT2LMHeadModel.from_pretrained(tiny_base_dir)
    with torch.no_grad():
        want = model(torch.from_numpy(text)[None]).logits[0].numpy()
    fresh = load_fresh(tiny_bundle)
    growing = predictor(tiny_bundle, fresh)
    at_once = predictor(tiny_bundle, fresh)
    for length in range(1, context + 1):
        start = text[:length].tolist()
        np.testing.assert_allclose(growing.logits(start), want[length - 1], atol=1e-4)
        at_once.use(fresh)  # forgets its cache
        np.testing.assert_allclose(at_once.logits(start), want[length - 1], atol=1e-4)


@pytest.mark.parametrize("specialists", [0, 1])
def test_trained_adapters_are_the_method_at_every_length(
    export_tiny: ExportTiny, tiny_base_dir: Path, specialists: int
) -> None:
    """Logits and routing of prefill and decode against the whole pass in plain PyTorch."""
    bundle = export_tiny(Mixture(rank=4, specialists=specialists))
    vectors = mixture.random(bundle.manifest, 2)
    words = "Whatever it is, 123 are in view."
    model = reference(bundle, tiny_base_dir, vectors)
    growing, at_once = predictor(bundle, vectors), predictor(bundle, vectors)
    text = tokenize(growing.tokenizer, words)
    assert len(text) == bundle.manifest.tier.context
    with torch.no_grad():
        logits, routed = model(torch.from_numpy(text)[None])
        shares = torch.stack([oracle.mixing_weights(r[0], 2) for r in routed] or [torch.ones(1, 1)])
    for length in range(1, len(text) + 1):
        want = logits[0, length - 1].numpy()
        start = text[:length].tolist()
        np.testing.assert_allclose(growing.logits(start), want, atol=1e-4)
        at_once.use(vectors)
        np.testing.assert_allclose(at_once.logits(start), want, atol=1e-4)
    explained = growing.explain(words)
    assert [token for token, _ in explained] == list(words)
    rows = np.array([list(row.values()) for _, row in explained])
    assert rows.shape == (len(text), 1 + specialists)
    np.testing.assert_allclose(rows.sum(1), 1.0, atol=1e-5)
    np.testing.assert_allclose(rows, np.broadcast_to(shares.mean(0).numpy(), rows.shape), atol=1e-4)
    if specialists:
        assert rows.std(0).max() > 0.01  # tokens do differ


def test_any_edit_gives_what_a_fresh_start_gives(tiny_bundle: Bundle) -> None:
    """Typing, deleting, changing the middle, pasting, going beyond the context."""
    vectors = mixture.random(tiny_bundle.manifest, 3)
    kept, scratch = predictor(tiny_bundle, vectors), predictor(tiny_bundle, vectors)
    rng = np.random.default_rng(4)
    text: list[int] = [65]
    lengths = set()
    for _ in range(60):
        edit = rng.integers(4)
        if edit == 0:
            text = text + rng.integers(0, 256, int(rng.integers(1, 12))).tolist()
        elif edit == 1:
            text = text[: int(rng.integers(1, len(text) + 1))]
        elif edit == 2:
            text = list(text)
            text[int(rng.integers(len(text)))] = int(rng.integers(256))
        # else: the same text again
        lengths.add(len(text))
        scratch.use(vectors)  # forgets its cache
        np.testing.assert_allclose(kept.logits(text), scratch.logits(text), atol=1e-4)
    assert max(lengths) > tiny_bundle.manifest.tier.context


def test_of_a_long_text_the_end_counts(tiny_bundle: Bundle) -> None:
    context = tiny_bundle.manifest.tier.context
    vectors = mixture.random(tiny_bundle.manifest, 3)
    ours = predictor(tiny_bundle, vectors)
    text = "It is a long text, longer than the context of this little model. " * 3
    in_view = "".join(token for token, _ in ours.explain(text))
    assert text.endswith(in_view)
    assert 3 * context // 4 <= len(in_view) <= context
    by_text = {s.text: s.probability for s in ours.suggest(text, top=256)}
    end = {s.text: s.probability for s in ours.suggest(in_view, top=256)}
    less = {s.text: s.probability for s in ours.suggest(text[: context - 1], top=256)}
    assert by_text == pytest.approx(end, abs=1e-6)
    assert by_text != pytest.approx(less, abs=1e-3)


def test_beyond_the_context_most_tokens_cost_no_more_than_before_it(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Typed on and on, all that is in view is computed anew only now and then."""
    context = tiny_bundle.manifest.tier.context
    ours = predictor(tiny_bundle, mixture.random(tiny_bundle.manifest, 3))
    computed: list[int] = []
    extend = Predictor._extend

    def counting(self: Predictor, name: str, tokens: list[int]) -> object:
        computed.append(len(tokens))
        return extend(self, name, tokens)

    monkeypatch.setattr(Predictor, "_extend", counting)
    text = tokens(5, 4 * context).tolist()
    for length in range(1, len(text) + 1):
        ours.logits(text[:length])
    assert max(computed) <= context
    assert computed.count(1) >= 0.85 * len(text)


def test_suggestions_are_characters_with_their_probabilities_best_first(
    tiny_bundle: Bundle,
) -> None:
    """Its tokens are bytes, of which those above 127 are part of a character."""
    ours = predictor(tiny_bundle, mixture.random(tiny_bundle.manifest, 3))
    for text in ("A", "Line 1", "caf\u00e9"):
        every = ours.suggest(text, top=256)
        assert sorted(s.text for s in every) == [chr(i) for i in range(128)]
        logits = torch.from_numpy(ours.logits(tokenize(ours.tokenizer, text).tolist()))
        probabilities = logits.softmax(0)
        for suggestion in every:
            (token,) = tokenize(ours.tokenizer, suggestion.text)
            assert suggestion.probability == pytest.approx(probabilities[token].item(), rel=1e-4)
        found = [s.probability for s in every]
        assert found == sorted(found, reverse=True)
        assert [s.text for s in ours.suggest(text, top=3)] == [s.text for s in every[:3]]
    assert len(ours.suggest("")) == 5


WORDS = "it is as good as a sister is to a stork, plan b, b and b; "


def byte_words() -> Tokenizer:
    """As GPT-2's and Llama 3's."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def marked_words() -> Tokenizer:
    """As Llama 2's."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = Metaspace()
    made.decoder = decoders.Metaspace()
    return made


@pytest.mark.parametrize("make", [byte_words, marked_words])
def test_a_typed_space_leaves_the_words_that_begin_with_one(
    export_tiny: ExportTiny, tmp_path: Path, make: Callable[[], Tokenizer]
) -> None:
    tokenizer = make()
    learn = BpeTrainer(vocab_size=60, show_progress=False, special_tokens=["<end>"])
    tokenizer.train_from_iterator([WORDS, "  two  "] * 9, learn)
    config = GPT2Config(n_positions=32, n_embd=32, n_layer=1, n_head=2)
    config.vocab_size = tokenizer.get_vocab_size()
    base = tmp_path / make.__name__
    GPT2LMHeadModel(config).save_pretrained(base)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(base)
    bundle = export_tiny(base=base, programs=("decode", "prefill"))
    ours = predictor(bundle, mixture.random(bundle.manifest, 3))

    without = ours.suggest("it is", top=100)
    words = [s for s in without if s.text.startswith(" ") and s.text.strip()]
    assert 5 < len(words) < len(without) - 5
    share = sum(s.probability for s in words)
    after = ours.suggest("it is ", top=100)
    assert [s.text for s in after] == [s.text[1:] for s in words]
    assert [s.probability for s in after] == pytest.approx([s.probability / share for s in words])
    for text in (" ", "it is  ", "it is\n "):  # there is no word that the space may belong to
        every = ours.suggest(text, top=100)
        assert len(every) == len(without) == tokenizer.get_vocab_size() - 1, "all but <end>"
        assert sum(s.probability for s in every) < 1


def test_other_adapters_leave_nothing_behind(tiny_bundle: Bundle) -> None:
    one, other = (mixture.random(tiny_bundle.manifest, seed) for seed in (5, 6))
    switched = predictor(tiny_bundle, one)
    before = switched.suggest("Line 12")
    switched.use(other)
    after = switched.suggest("Line 12")
    assert after != before
    assert after == predictor(tiny_bundle, other).suggest("Line 12")
    one["generalist"][...] = 0  # the caller's array is not the predictor's
    switched.use(mixture.random(tiny_bundle.manifest, 5))
    assert switched.suggest("Line 12") == before


def test_a_program_for_many_tokens_is_used_where_both_fit(
    tiny_base_dir: Path, tmp_path: Path
) -> None:
    """The base is random and small, so what rounding does to it is small, too."""
    words = list(range(40, 70))
    chosen, planned = [], []
    for memory in (4096, 1):
        bundle = export_bundle(
            load_base(str(tiny_base_dir)),
            Mixture(rank=4),
            replace(TIER, memory_mib=memory),
            engines=("onnxruntime",),
            precision="int8",
            programs=("prefill", "decode"),
            out=tmp_path / str(memory),
        )
        files = {name: bundle.program(name, "onnxruntime").file for name in ("prefill", "decode")}
        assert files["prefill"] != files["decode"]
        ours = predictor(bundle, mixture.random(bundle.manifest, 3))
        first = ours.logits(words).copy()
        ours.use(mixture.random(bundle.manifest, 3))
        np.testing.assert_allclose(ours.logits(words), first, atol=0.1)
        chosen.append(sorted(ours._programs))
        planned.append(memory_plan(bundle, "onnxruntime"))
    assert chosen == [["decode", "prefill"], ["decode"]]
    assert [second for second, _ in planned] == [True, False]
    assert planned[0][1] > planned[1][1]


def test_adapters_of_another_bundle_change_nothing(tiny_bundle: Bundle) -> None:
    ours = predictor(tiny_bundle, mixture.random(tiny_bundle.manifest, 5))
    before = ours.suggest("Line 12")
    other = mixture.random(tiny_bundle.manifest, 6)
    with pytest.raises(AdapterError, match="the bundle wants"):
        ours.use(other | {"router": other["router"][:1]})
    after = ours.suggest("Line 12")
    assert [s.text for s in after] == [s.text for s in before]
    assert [s.probability for s in after] == pytest.approx([s.probability for s in before])


# --- the command -------------------------------------------------------------------------------


def ask(home: Path, text: str = "Line 1") -> list[dict[str, object]]:
    done = comigs("predict", "--home", home, text, "--format", "json", "--threads", 1)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["text"] == text
    suggestions: list[dict[str, object]] = answer["suggestions"]
    return suggestions


def test_predict_works_beside_training_and_sees_what_it_saved(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "home"
    home = Home(path)
    training = tmp_path / "training.json"
    training.write_text('{"localSteps": 100000, "weightDecay": 0.01, "tau": 30}')
    process = subprocess.Popen(
        device_run(path, text_dir, "--bundle", tiny_bundle.path, "--training", training),
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: (path / "device.json").exists() and home.state_modified() > 0)
        early = ask(path)
        step = home.load_state(tiny_bundle)[0].expert_steps
        wait_until(lambda: home.load_state(tiny_bundle)[0].expert_steps > step)
        late = ask(path)
        assert process.poll() is None  # it trained all the while
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert early != late
    state, _ = home.load_state(tiny_bundle)
    want = predictor(tiny_bundle, state.vectors).suggest("Line 1")
    last = ask(path)
    assert [s["text"] for s in last] == [s.text for s in want]
    assert [s["probability"] for s in last] == pytest.approx([s.probability for s in want])


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def trained_home(
    tiny_bundle: Bundle, text_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    home = tmp_path_factory.mktemp("trained") / "home"
    run_alone(home, text_dir, "--bundle", tiny_bundle.path, "--rounds", 2)
    return home


def test_predict_for_people_shows_suggestions_and_routing(trained_home: Path) -> None:
    done = comigs("predict", "--home", trained_home, "Line 1", "--top", 3, "--explain")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(re.match(r" *\d+\.\d%  '", line) for line in lines[:3])
    assert not re.match(r" *\d+\.\d%  '", lines[3])
    assert "generalist" in done.stdout
    assert "specialist.1" in done.stdout
    assert comigs("predict", "--home", trained_home, "Line", "--top", 0).returncode == 2


class Terminal:
    """`comigs predict` on a pseudo-terminal."""

    def __init__(self, home: Path) -> None:
        pid, self.file = pty.fork()
        if pid == 0:
            os.environ |= {"TERM": "xterm", "COLUMNS": "160", "LINES": "24"}
            arguments = command("predict", "--home", home, "--threads", 1)
            os.execv(arguments[0], arguments)
        self.pid = pid
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))

    def type(self, keys: str) -> None:
        os.write(self.file, keys.encode(errors="surrogateescape"))

    def shows(self, *wanted: str) -> str:
        """Redraws (Ctrl-L) until everything wanted is on the screen; the screen as plain text."""
        end = time.monotonic() + TIMEOUT
        while True:
            self.type("\x0c")
            screen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]", "", self._read(0.5))
            if all(text in screen for text in wanted):
                return screen
            assert time.monotonic() < end, f"{wanted} not in {screen!r}"

    def _read(self, quiet_seconds: float) -> str:
        """What it writes until it has been quiet for a while."""
        got = b""
        while select.select([self.file], [], [], quiet_seconds)[0]:
            try:
                part = os.read(self.file, 65536)
            except OSError:  # the other side is closed
                break
            got += part
            # A terminal answers when it is asked where its cursor is.
            if b"\x1b[6n" in part:
                self.type("\x1b[1;1R")
        return got.decode(errors="replace")

    def end(self) -> int:
        """The exit code, once it ended by itself."""
        end = time.monotonic() + TIMEOUT
        while True:
            self._read(0.05)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < end, "it did not end"

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.file)


@pytest.fixture
def terminal(trained_home: Path) -> Iterator[Terminal]:
    opened = Terminal(trained_home)
    yield opened
    opened.close()


def test_lines_that_are_piped_in_are_answered(trained_home: Path) -> None:
    lines = ["Line 1", "It is", ""]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "edge_runtime", "predict", "--home", str(trained_home)),
            *("--format", "json", "--top", "2"),
        ],
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
        check=True,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["text"] for answer in answers] == lines
    assert all(len(answer["suggestions"]) == 2 for answer in answers)
    assert answers[0]["suggestions"] != answers[1]["suggestions"]


def test_a_line_is_answered_before_the_next(trained_home: Path) -> None:
    """Of a program that asks line by line, which may end its lines as on Windows."""
    with subprocess.Popen(
        command("predict", "--home", trained_home, "--format", "json"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as asked:
        assert asked.stdin is not None
        assert asked.stdout is not None
        for line in ("Line 1", "It is"):
            asked.stdin.write(f"{line}\r\n".encode())
            asked.stdin.flush()
            readable, _, _ = select.select([asked.stdout], [], [], 60)
            assert readable, "no answer"
            assert json.loads(asked.stdout.readline())["text"] == line


def test_bytes_that_are_no_text_are_refused(trained_home: Path) -> None:
    of_predict = ("predict", "--home", trained_home)
    latin = b"caf\xe9".decode("utf-8", "surrogateescape")  # the process gets the byte
    assert r"not UTF-8 at 'caf\udce9'" in refusal(comigs(*of_predict, latin), 12)
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}  # as in most locales
    done = subprocess.run(
        command(*of_predict), input=b"caf\xe9\n", capture_output=True, check=False, env=strict
    )
    assert done.returncode == 12
    assert b"Traceback" not in done.stderr


def test_the_interactive_line(terminal: Terminal, trained_home: Path, tiny_bundle: Bundle) -> None:
    state, _ = Home(trained_home).load_state(tiny_bundle)
    ours = predictor(tiny_bundle, state.vectors)

    def toolbar(text: str) -> list[str]:
        return [f"{s.text!r} {s.probability:.0%}" for s in ours.suggest(text)]

    terminal.shows("Ctrl-D ends", *toolbar(""))
    terminal.type("Line")
    terminal.shows("> Line", *toolbar("Line"))
    terminal.type(" 4")
    terminal.shows("> Line 4", *toolbar("Line 4"))
    terminal.type("\udce9")  # the byte, which is no UTF-8 and so no text
    terminal.shows("> Line 4", *toolbar("Line 4"))
    terminal.type("\x7f")
    # A line whose first suggestion can be typed, and is far from the second.
    for line in (f"Line 4{more}" for more in ascii_letters):
        first, second = ours.suggest(line)[:2]
        if first.text.isprintable() and first.probability > 1.2 * second.probability:
            break
    terminal.type(line.removeprefix("Line 4"))
    terminal.shows(f"> {line}", *toolbar(line))
    taken = line + first.text
    terminal.type("\t")
    terminal.shows(f"> {taken}".rstrip(), *toolbar(taken))
    terminal.type("\x04")
    assert terminal.end() == 0


def test_the_interactive_line_ends_with_adapters_beyond_float32(
    trained_home: Path, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    shutil.copytree(trained_home, home)
    state, progress = Home(home).load_state(tiny_bundle)
    for vector in state.vectors.values():
        vector[...] = 1e20
    Home(home).save_state(tiny_bundle, state, progress)
    terminal = Terminal(home)
    assert terminal.end() == DivergedError.code
    terminal.close()


def test_the_interactive_line_ends_with_a_damaged_state(trained_home: Path, tmp_path: Path) -> None:
    """It says so, instead of suggesting with what it had read before."""
    home = tmp_path / "home"
    shutil.copytree(trained_home, home)
    terminal = Terminal(home)
    terminal.shows("Ctrl-D ends")
    (home / "state.safetensors").write_bytes(b"damaged")
    terminal.type("Line")
    assert terminal.end() == AdapterError.code
    terminal.close()


def test_the_interactive_line_takes_up_fresher_adapters(
    terminal: Terminal, trained_home: Path, tiny_bundle: Bundle
) -> None:
    home = Home(trained_home)
    terminal.type("Line")
    terminal.shows("> Line")
    state, progress = home.load_state(tiny_bundle)
    kept = {role: vector.copy() for role, vector in state.vectors.items()}
    other = mixture.random(tiny_bundle.manifest, 77)
    for role, vector in other.items():
        state.vectors[role][...] = 3 * vector
    home.save_state(tiny_bundle, state, progress)
    try:
        fresher = predictor(tiny_bundle, state.vectors).suggest("Line")
        terminal.shows("> Line", *(f"{s.text!r} {s.probability:.0%}" for s in fresher))
    finally:
        state.vectors.update(kept)
        home.save_state(tiny_bundle, state, progress)
    terminal.type("\x04")
    assert terminal.end() == 0
