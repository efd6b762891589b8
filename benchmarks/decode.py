"""`comigs bench decode`: suggestions, beside the engines that people decode with otherwise.

Every contestant is a process of its own and has its turn while the others stand still: a prompt
into an empty cache (prefill), then tokens one by one, the most probable each. Ours carries adapters
and router; what they cost is told by the barest program that the compiler makes (no router, rank 1
on one map of attention), which takes its turns as well. A peer is compared with ours of the same
weights.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, TypedDict

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from benchmarks.compiled import Compiler, kept_in
from benchmarks.contest import (
    ROOT,
    Contestant,
    ContestError,
    WrongOptionError,
    quartiles,
    turns,
)
from benchmarks.machine import Machine, machine
from export.base import Base, load_base
from export.mixture import Mixture
from export.tiers import tiers

# The weights that each peer has; a module of benchmarks/peers each.
PEERS = {
    "ctranslate2": ("float32", "int8"),
    "llama_cpp": ("float32", "int8", "int4"),
    "openvino": ("float32", "int8", "int4"),
    "onnxruntime_genai": ("float32", "int8", "int4"),
    "onnxruntime": ("float32", "int8", "int4"),
    "pytorch": ("float32",),
}
PEERS_PYTHON = Path(".venv-peers/bin/python")
# What tells the versions of all packages there.
INSTALLED = (
    "from importlib.metadata import distributions\n"
    "print(sorted(f'{each.name} {each.version}' for each in distributions()))"
)
SAVED = "saved"  # beside a whole model
BITS = {"float32": 32, "int8": 8, "int4": 4}
BARE = Mixture(specialists=0, rank=1, targets=("attn.c_proj",))
BARE_LLAMA = replace(BARE, targets=("self_attn.o_proj",))
Spread = tuple[float, float]


class Who(TypedDict):
    """A contestant."""

    engine: str
    weights: str


class Speed(Who):
    """What is measured of every contestant; spreads are first and third quartile over turns."""

    decode_tokens_per_second: float
    decode_spread: Spread
    prefill_tokens_per_second: float
    prefill_spread: Spread
    first_suggestion_seconds: float
    first_suggestion_spread: Spread
    peak_rss_mib: float
    same_tokens: int | None
    """How many of the decoded tokens are those of the first float32 contestant, if there is one."""


class Row(Speed):
    """One of ours. Ratios are speeds over those of the fastest peer with the same weights, in the
    same turn; `adapter_cost` is the time that adapters and router add, over that without;
    `bandwidth_share` counts the frozen matrices, head included, once for each token."""

    ratio_to_fastest_peer: float | None
    ratio_spread: Spread | None
    fastest_peer: str | None
    prefill_ratio_to_fastest_peer: float | None
    adapter_cost: float
    adapter_cost_spread: Spread
    bandwidth_share: float
    swap_seconds: float
    """Of a person's adapters: the specialists' and the router."""
    swap_all_seconds: float
    """With the generalist."""


class Peer(Speed):
    """One of theirs, and how it was set."""

    version: str
    settings: str


class Missing(Who):
    """A peer that could not take part."""

    why: str


class Result(TypedDict):
    """What `comigs bench decode --format json` prints."""

    benchmark: str
    base: str
    weights: str
    prompt: int
    tokens: int
    context: int
    threads: int
    turns: int
    machine: Machine
    limits: dict[str, float]
    versions: dict[str, str]
    rows: list[Row]
    peers: list[Peer]
    missing: list[Missing]


def run(
    *,
    base_name: str,
    random_weights: bool,
    prompt: int,
    tokens: int,
    contestants: Sequence[tuple[str, str]],
    peers_python: Path | None,
    threads: int,
    count: int,
    cache: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Result:
    """Times each (engine, precision) of `contestants`, and the peers that have such weights.

    Args:
        peers_python: of the peers' environment; None for no peers.
        count: turns of each that count.

    Raises:
        BaseModelError: the base is not available.
        WrongOptionError: the base has too few positions, or peers are asked for and it is no
            GPT-2.
        ContestError: one of ours failed.
    """
    base = load_base(base_name, random_weights=random_weights)
    positions = base.architecture.positions
    if prompt + tokens > positions:
        raise WrongOptionError(
            "--prompt",
            f"{base_name} has {positions} positions, {prompt} + {tokens} tokens are too many",
        )
    if peers_python and not isinstance(base.config, GPT2Config):
        raise WrongOptionError(
            "--peers", f"{base_name} is no GPT-2, the only family that they are set up for"
        )
    laptop = tiers()["laptop"]
    tier = replace(laptop, context=max(laptop.context, prompt + tokens)).fitted(positions)
    with ExitStack() as stack:
        folder = stack.enter_context(kept_in(cache))
        compiler = Compiler(base=base, folder=folder, progress=progress)
        bare = BARE if isinstance(base.config, GPT2Config) else BARE_LLAMA
        commands: dict[str, list[str]] = {}
        for engine, precision in contestants:
            for kind, mixture in (("", Mixture()), (" bare", bare)):
                bundle = compiler.bundle(
                    tier,
                    engine=engine,
                    precision=precision,
                    mixture=mixture,
                    programs=("prefill", "decode"),
                )
                module = ["-m", "benchmarks.device_process", "predict"]
                commands[f"{engine} {precision}{kind}"] = [
                    *(sys.executable, *module, str(bundle.path), engine, str(threads))
                ]
        wanted = {precision for _, precision in contestants}
        theirs, missing = _peers(
            base, folder, wanted, peers_python, threads, tier.context, progress
        )
        commands |= theirs
        del base  # half a gigabyte that is not needed beside the contestants
        progress("loading")
        for name in list(theirs):
            try:
                with Contestant(name, theirs[name]) as peer:
                    peer.ask("prefill", prompt)
            except ContestError as error:
                missing.append({**_who(name), "why": str(error)})
                del theirs[name], commands[name]
        measured = _measure(commands, prompt, tokens, count, progress, stack)
        limits = stack.enter_context(
            Contestant("limits", [sys.executable, "-m", "benchmarks.limits", str(threads)])
        )
        read = max(limits.ask("read") for _ in range(3))
    bytes_per_token = _weights_read(compiler.base)
    return {
        "benchmark": "decode",
        "base": base_name,
        "weights": "random" if random_weights else "pretrained",
        "prompt": prompt,
        "tokens": tokens,
        "context": tier.context,
        "threads": threads,
        "turns": count,
        "machine": machine(),
        "limits": {"read_gb_per_s": read},
        "versions": {n: version(n) for n in ("torch", *{engine for engine, _ in contestants})},
        "rows": [
            _row(
                engine,
                precision,
                measured,
                [name for name in theirs if _who(name)["weights"] == precision],
                bytes_per_token * BITS[precision] / 8,
                read * 1e9,
            )
            for engine, precision in contestants
        ],
        "peers": [_peer(name, measured) for name in theirs],
        "missing": missing,
    }


def _weights_read(base: Base) -> int:
    """Numbers in the frozen matrices that every token needs: all maps, and the head."""
    a = base.architecture
    return a.layers * sum(m.inputs * m.outputs for m in a.maps) + a.vocabulary * a.width


# --- peers -------------------------------------------------------------------------------------


def _peers(
    base: Base,
    folder: Path,
    wanted: set[str],
    python: Path | None,
    threads: int,
    context: int,
    progress: Callable[[str], None],
) -> tuple[dict[str, list[str]], list[Missing]]:
    """The processes of all peers with such weights, converted, and what is missing."""
    commands: dict[str, list[str]] = {}
    missing: list[Missing] = []
    if python is None:
        return commands, missing
    model = _saved(base, folder)
    for engine, kinds in PEERS.items():
        for weights in (kind for kind in kinds if kind in wanted):
            module = [str(python.absolute()), "-m", f"benchmarks.peers.{engine}"]
            out = model.with_name(f"{model.name}-{engine}-{weights}")
            progress(f"converting for {engine} {weights}")
            why = _convert([*module, "convert", str(model), str(out), weights], out)
            if why:
                missing.append({"engine": engine, "weights": weights, "why": why})
            else:
                run_it = ["run", str(out), weights, str(threads), str(context)]
                commands[f"{engine} {weights} peer"] = [*module, *run_it]
    return commands, missing


def _saved(base: Base, folder: Path) -> Path:
    """The base as transformers saves it, with a tokenizer of one word for each token."""
    path = folder / f"peers-{base.fingerprint[:16]}"
    if (path / SAVED).exists():
        return path
    model: Any = AutoModelForCausalLM.from_config(base.config)  # type: ignore[no-untyped-call]
    prefix = model.base_model_prefix + "."
    state = {k if k == "lm_head.weight" else prefix + k: v for k, v in base.tensors.items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    words = {f"t{i}": i for i in range(base.architecture.vocabulary)}
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="t0")),  # noqa: S106
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "t0"),
    )
    tokenizer.save_pretrained(path)
    model.save_pretrained(path)
    (path / SAVED).touch()
    return path


def _convert(command: list[str], out: Path) -> str:
    """Converts unless an earlier run of the same versions has; why it could not, or nothing."""
    if not Path(command[0]).exists():
        return f"no Python at {command[0]}; benchmarks/peers/README.md says how to install peers"

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)

    installed = run(command[0], "-c", INSTALLED).stdout
    sources = [path.read_text() for path in sorted((ROOT / "benchmarks" / "peers").glob("*.py"))]
    made_by = hashlib.sha256("\n".join([installed, *sources]).encode()).hexdigest()
    done_before = out / "converted"
    if done_before.exists() and done_before.read_text() == made_by:
        return ""
    shutil.rmtree(out, ignore_errors=True)
    done = run(*command)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]
    done_before.write_text(made_by)
    return ""


# --- measuring -----------------------------------------------------------------------------------


class Measured(TypedDict):
    """Of one contestant, per turn that counted; speeds in tokens per second."""

    speeds: dict[str, list[float]]
    first: list[float]
    swap: list[tuple[float, float]]
    chosen: list[int]
    peak: float
    about: dict[str, str]


def _measure(
    commands: dict[str, list[str]],
    prompt: int,
    tokens: int,
    count: int,
    progress: Callable[[str], None],
    stack: ExitStack,
) -> dict[str, Measured]:
    everyone = {
        name: stack.enter_context(Contestant(name, command)) for name, command in commands.items()
    }
    measured: dict[str, Measured] = {
        name: {
            "speeds": {"prefill": [], "decode": []},
            "first": [],
            "swap": [],
            "chosen": [],
            "peak": 0.0,
            "about": {},
        }
        for name in commands
    }
    for counts in turns(count, progress):  # a second prompt is what loads `prefill`
        for name, each in everyone.items():
            own = measured[name]
            prefill, _ = each.ask("prefill", prompt)
            seconds, own["chosen"] = each.ask("decode", tokens)
            if counts:
                own["speeds"]["prefill"].append(prompt / prefill)
                own["speeds"]["decode"].append(tokens / sum(seconds))
                if "device_process" in " ".join(commands[name]):
                    own["swap"].append(each.ask("swap"))
    for name, each in everyone.items():
        measured[name]["peak"] = each.ask("peak")
        if "benchmarks.peers" in " ".join(commands[name]):
            measured[name]["about"] = each.ask("about")
        each.close()
    for counts in turns(count, lambda turn: progress(f"starting, {turn}"), warm_up=1):
        for name, command in commands.items():
            with Contestant(name, command) as each:
                each.ask("prefill", prompt)
                if counts:
                    measured[name]["first"].append(time.perf_counter() - each.started)
    return measured


def _who(name: str) -> Who:
    engine, weights, *_ = name.split()  # what follows sets apart "bare" and "peer"
    return {"engine": engine, "weights": weights}


def _speed(name: str, measured: dict[str, Measured]) -> Speed:
    own = measured[name]
    exact = next(
        (m["chosen"] for n, m in measured.items() if _who(n)["weights"] == "float32"), None
    )
    same = None if exact is None else sum(map(int.__eq__, exact, own["chosen"]))
    return {
        **_who(name),
        "decode_tokens_per_second": median(own["speeds"]["decode"]),
        "decode_spread": quartiles(own["speeds"]["decode"]),
        "prefill_tokens_per_second": median(own["speeds"]["prefill"]),
        "prefill_spread": quartiles(own["speeds"]["prefill"]),
        "first_suggestion_seconds": median(own["first"]),
        "first_suggestion_spread": quartiles(own["first"]),
        "peak_rss_mib": own["peak"],
        "same_tokens": same,
    }


def _row(
    engine: str,
    precision: str,
    measured: dict[str, Measured],
    peers: list[str],
    bytes_per_token: float,
    bytes_per_second: float,
) -> Row:
    name = f"{engine} {precision}"
    own = measured[name]
    bare = measured[f"{name} bare"]
    costs = [
        b / a - 1 for a, b in zip(own["speeds"]["decode"], bare["speeds"]["decode"], strict=True)
    ]
    speed = _speed(name, measured)
    row: Row = {
        **speed,
        "ratio_to_fastest_peer": None,
        "ratio_spread": None,
        "fastest_peer": None,
        "prefill_ratio_to_fastest_peer": None,
        "adapter_cost": median(costs),
        "adapter_cost_spread": quartiles(costs),
        "bandwidth_share": speed["decode_tokens_per_second"] * bytes_per_token / bytes_per_second,
        "swap_seconds": median(personal for personal, _ in own["swap"]),
        "swap_all_seconds": median(every for _, every in own["swap"]),
    }
    if peers:
        fastest = {
            what: max(peers, key=lambda p: median(measured[p]["speeds"][what]))
            for what in ("decode", "prefill")
        }

        def ratios(what: str) -> list[float]:
            theirs = measured[fastest[what]]["speeds"][what]
            return [a / b for a, b in zip(own["speeds"][what], theirs, strict=True)]

        row["ratio_to_fastest_peer"] = median(ratios("decode"))
        row["ratio_spread"] = quartiles(ratios("decode"))
        row["fastest_peer"] = fastest["decode"].split()[0]
        row["prefill_ratio_to_fastest_peer"] = median(ratios("prefill"))
    return row


def _peer(name: str, measured: dict[str, Measured]) -> Peer:
    about = measured[name]["about"]
    return {
        **_speed(name, measured),
        "version": about["version"],
        "settings": about["settings"],
    }


def table(result: Result) -> Any:
    """All contestants for people, the fastest decoding first within the same weights."""
    from rich.table import Table

    view = Table(
        title=f"{result['base']} ({result['weights']} weights): {result['tokens']} tokens after "
        f"{result['prompt']}; {result['threads']} threads, {result['turns']} turns"
    )
    view.add_column("")
    for heading in (
        "decode, tokens/s", "of fastest peer", "prefill, tokens/s", "adapters cost",
        "of bandwidth", "first suggestion", "peak memory",
    ):  # fmt: skip
        view.add_column(heading, justify="right")
    rows: list[tuple[Speed, Row | None]] = [
        *((row, row) for row in result["rows"]),
        *((peer, None) for peer in result["peers"]),
    ]
    order = list(BITS)
    rows.sort(key=lambda r: (order.index(r[0]["weights"]), -r[0]["decode_tokens_per_second"]))
    for speed, ours in rows:
        low, high = speed["decode_spread"]
        ratio = ours and ours["ratio_to_fastest_peer"]
        view.add_row(
            f"{'comigs ' if ours else ''}{speed['engine']} {speed['weights']}",
            f"{speed['decode_tokens_per_second']:.1f} ({low:.1f}-{high:.1f})",
            f"{ratio:.2f}" if ratio else "",
            f"{speed['prefill_tokens_per_second']:.0f}",
            f"{ours['adapter_cost']:.0%}" if ours else "",
            f"{ours['bandwidth_share']:.0%}" if ours else "",
            f"{speed['first_suggestion_seconds']:.2f} s",
            f"{speed['peak_rss_mib']:.0f} MiB",
        )
    return view
