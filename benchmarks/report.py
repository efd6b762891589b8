"""The demo's result for people: one HTML page that needs nothing else, and a terminal's table.

    write(result, Path("demo/report.html"))
    rich.print(table(result))

Choices:

* The page loads nothing: style and charts are inline, there is no script, and its content security
  policy forbids both. It can be mailed.
* Every sentence about success is computed from the figures. Figures are compared as printed, so two
  that look equal are equal: a tie is a tie, and no arm wins by a hidden digit.
* Figures, positions and the parts of sentences are made here; `report.html.jinja` only arranges
  them, and escapes all of them. Colours come from a palette that colour-blind people can tell
  apart, and every arm also has its own dash and marker.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Literal, TypedDict

import jinja2
from rich import box
from rich.table import Table
from rich.text import Text

from edge_runtime.files import write_atomic

Trained = Literal["local", "fedavg", "method"]
Arm = Literal["base", "local", "fedavg", "method"]
TRAINED: tuple[Trained, ...] = ("local", "fedavg", "method")
ARMS: tuple[Arm, ...] = ("base", "local", "fedavg", "method")
NAMES: Mapping[Arm, str] = {
    "base": "the base model",
    "local": "training alone",
    "fedavg": "FedAvg",
    "method": "the method",
}

# A line never breaks between a figure and its unit.
UNIT = "\N{NO-BREAK SPACE}%"

Point = tuple[float, float]


class Perplexities(TypedDict):
    """Perplexity per token of the test split."""

    base: float
    local: float
    fedavg: float
    method: float


class Curves(TypedDict):
    """Held-out perplexity after each round, as (expert steps so far, perplexity); step 0: base."""

    local: Sequence[Point]
    fedavg: Sequence[Point]
    method: Sequence[Point]


class Suggestion(TypedDict):
    """The likeliest next tokens, with probabilities, after `context`; `truth` is the next token."""

    context: str
    truth: str
    before: Sequence[tuple[str, float]]
    after: Sequence[tuple[str, float]]


class Routing(TypedDict):
    """For each token its weight on each expert, in the order of `experts`, generalist first."""

    tokens: Sequence[str]
    experts: Sequence[str]
    weights: Sequence[Sequence[float]]


class UserResult(TypedDict):
    name: str
    description: str
    test_perplexity: Perplexities
    bytes_sent: int
    bytes_received: int
    peak_rss_mib: float
    step_seconds: float
    curves: Curves
    suggestions: Sequence[Suggestion]
    routing: Routing


class DemoResult(TypedDict):
    """What `comigs demo --format json` prints."""

    users: Sequence[UserResult]
    seconds: float
    engine: str
    rounds: int
    base: str
    versions: Mapping[str, str]
    setup: Mapping[str, object]
    notes: Sequence[str]


def render(result: DemoResult) -> str:
    """The report as one HTML document."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        bytes=_bytes, duration=_duration, figure=figure, percent=_percent, plain=_plain,
        visible=visible, wide=_wide,
    )  # fmt: skip
    source = files("benchmarks").joinpath("report.html.jinja").read_text(encoding="utf-8")
    users = result["users"]
    most = max((max(u["bytes_sent"], u["bytes_received"]) for u in users), default=0)
    return environment.from_string(source).render(
        result=result,
        headline=headline(result),
        verdicts=[verdict(user) for user in users],
        best=[best(user["test_perplexity"]) for user in users],
        mean=_mean(users),
        best_of_mean=best(_mean(users)),
        tiles=_tiles(result),
        charts=[_chart(user["curves"]) for user in users],
        heats=[_heat(user["routing"]) for user in users],
        most_bytes=max(most, 1),
        arms=ARMS,
        trained=TRAINED,
        names=NAMES,
    )


def write(result: DemoResult, path: Path) -> None:
    """Writes the report.

    Raises:
        StorageError: the file cannot be written.
    """
    write_atomic(path, render(result).encode("utf-8"))


def table(result: DemoResult) -> Table:
    """The figures per user for the terminal; the best perplexity of a row is bold and starred."""
    lost = [user["name"] for user in result["users"] if "method" not in _winners(user)]
    caption = "test perplexity, lower is better; * best of the row"
    if lost:
        caption += f"\nthe method is not best for {_listed(lost)}"
    shown = Table(
        title="Each user's own unseen text",
        caption=Text(visible(caption, "\n ")),
        box=box.SIMPLE_HEAD,
    )
    shown.add_column("user", min_width=8, overflow="fold")
    for column in ("base", "alone", "FedAvg", "method", "sent", "peak\nMiB", "step\nms"):
        shown.add_column(column, justify="right", no_wrap=True)
    for user in result["users"]:
        winners = _winners(user)
        shown.add_row(
            Text(visible(user["name"], " ")),
            *(
                Text(
                    ("*" if arm in winners else "") + figure(user["test_perplexity"][arm]),
                    style="bold green" if arm in winners else "",
                )
                for arm in ARMS
            ),
            _bytes(user["bytes_sent"]),
            f"{user['peak_rss_mib']:,.0f}",
            f"{user['step_seconds'] * 1000:,.0f}",
        )
    return shown


# --- what the figures say ----------------------------------------------------------------------


def best(perplexity: Perplexities) -> set[Arm]:
    """The arms whose printed figure is lowest: several at a tie, none where none is a number."""
    shown = {arm: _printed(perplexity[arm]) for arm in ARMS}
    lowest = min(shown.values())
    return {arm for arm in ARMS if shown[arm] == lowest < math.inf}


def headline(result: DemoResult) -> str:
    """One sentence: for how many users the method beats the base, and for how many everything."""
    users = result["users"]
    if not users:
        return "No user took part."
    improved = sum(_change(user) < 0 for user in users)
    won = sum(_winners(user) == {"method"} for user in users)
    tied = sum("method" in _winners(user) for user in users) - won
    total = len(users)
    if not improved:
        sentence = "No device predicts its user better than the base model"
    elif improved < total:
        verb = "predicts its" if improved == 1 else "predict their"
        sentence = f"{improved} of {total} devices now {verb} user better than the base model"
    else:
        subject = "Every device" if total > 1 else "The device"
        sentence = f"{subject} now predicts its user better than the base model"
    if won == total:
        praise = f"best for all {total}" if total > 1 else "the best of the four ways"
        return f"{sentence}, and CoMiGS, the method, was {praise}."
    shared = f", level with another for {tied}" if tied else ""
    return f"{sentence}; CoMiGS, the method, was best for {won} of {total}{shared}."


def verdict(user: UserResult) -> str:
    """What happened to one user: against the base, and against the other arms."""
    perplexity, winners = user["test_perplexity"], _winners(user)
    base, method = figure(perplexity["base"]), figure(perplexity["method"])
    change = _change(user)
    if math.isnan(change):
        return f"No comparison: the base has {base}, the method {method}."
    if change < 0:
        start = f"Perplexity fell from {base} to {method} ({_signed(change)})"
    elif change > 0:
        start = f"Perplexity rose from {base} to {method} ({_signed(change)})"
    else:
        start = f"Perplexity stayed at {base}"
    if winners == {"method"}:
        return f"{start}: the best of the four."
    others = _listed([NAMES[arm] for arm in ARMS if arm in winners and arm != "method"])
    if "method" in winners:
        return f"{start}: level with {others}."
    lowest = figure(min(perplexity[arm] for arm in winners))
    return f"{start}: not the best, {others} reached {lowest}."


def _winners(user: UserResult) -> set[Arm]:
    return best(user["test_perplexity"])


def _change(user: UserResult) -> float:
    """Relative change of the printed perplexity from base to method; NaN where there is none."""
    base = _printed(user["test_perplexity"]["base"])
    method = _printed(user["test_perplexity"]["method"])
    if not math.isfinite(base) or base <= 0:
        return math.nan
    return method / base - 1


def _mean(users: Sequence[UserResult]) -> Perplexities:
    """The geometric mean over users, which is the perplexity of the mean loss."""

    def mean(arm: Arm) -> float:
        values = [user["test_perplexity"][arm] for user in users]
        if not values or any(not math.isfinite(value) or value <= 0 for value in values):
            return math.inf
        return math.exp(fmean(map(math.log, values)))

    return {arm: mean(arm) for arm in ARMS}  # type: ignore[return-value]


def _tiles(result: DemoResult) -> list[tuple[str, str]]:
    users = result["users"]
    changes = [change for change in map(_change, users) if not math.isnan(change)]
    won = sum("method" in _winners(user) for user in users)
    sent = fmean(user["bytes_sent"] for user in users) if users else 0
    rounds = "1 round" if result["rounds"] == 1 else f"{result['rounds']} rounds"
    return [
        (_signed(median(changes)) if changes else "?", "perplexity, base to method (median user)"),
        (f"{won} of {len(users)}", "users for whom no other way is better"),
        (_bytes(sent), f"sent per device in {rounds}"),
        (_duration(result["seconds"]), "for everything, on this machine"),
    ]


# --- words and figures -------------------------------------------------------------------------


def figure(perplexity: float) -> str:
    """A perplexity as printed everywhere: 7.31, 42.18, 173.4, 12,345."""
    if not math.isfinite(perplexity):
        return "∞"
    digits = 2 if perplexity < 100 else 1 if perplexity < 10_000 else 0
    return f"{perplexity:,.{digits}f}"


def visible(text: str, keep: str = "") -> str:
    """Whitespace as signs, and nothing that could reorder or hide text; `keep` stays as it is."""
    signs = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍", "\x7f": "␡"}
    return "".join(c if c in keep else signs.get(c) or _safe(c) for c in text)


def _plain(text: str) -> str:
    return visible(text, " \n\t")


def _safe(character: str) -> str:
    code = ord(character)
    if code < 32:
        return chr(0x2400 + code)  # the control pictures
    bidirectional = code in (0x200E, 0x200F) or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    if bidirectional or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        return "\ufffd"
    return character


def _printed(perplexity: float) -> float:
    return float(figure(perplexity).replace(",", "")) if math.isfinite(perplexity) else math.inf


def _signed(change: float) -> str:
    if not math.isfinite(change):
        return "∞"
    percent = round(100 * change, 1) if abs(change) < 0.1 else round(100 * change)
    sign = "\N{MINUS SIGN}" if percent < 0 else "+" if percent > 0 else "±"
    return f"{sign}{abs(percent)}{UNIT}"


def _percent(probability: float) -> str:
    percent = 100 * probability
    return f"{percent:.{0 if percent >= 9.95 else 1}f}{UNIT}"


def _wide(share: float) -> str:
    """A share as a CSS length, clamped so that a bar stays in its box."""
    share = share if math.isfinite(share) else 0.0
    return f"{100 * min(max(share, 0.0), 1.0):.1f}%"


def _bytes(count: float) -> str:
    if count < 1024:
        return f"{count:.0f} B"
    return f"{count / 1024:.1f} KiB" if count < 1024**2 else f"{count / 1024**2:.2f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{int(seconds + 0.5) // 60} min {int(seconds + 0.5) % 60} s"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


# --- learning curves ---------------------------------------------------------------------------

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 60, 404, 14, 222


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """One arm: its polyline, the markers' path, and its last figure beside the end."""

    arm: Trained
    points: str
    markers: str
    label: Tick


@dataclass(frozen=True)
class Chart:
    """Positions in an SVG of WIDTH x HEIGHT; the perplexity's axis is logarithmic."""

    lines: Sequence[Line]
    steps: Sequence[Tick]
    levels: Sequence[Tick]
    base: float
    summary: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    top: int = TOP
    bottom: int = BOTTOM


def _chart(curves: Curves) -> Chart | None:
    """The chart of what can be drawn; None where no arm has a point."""
    arms = {arm: [(x, y) for x, y in curves[arm] if math.isfinite(y) and y > 0] for arm in TRAINED}
    points = [point for arm in TRAINED for point in arms[arm]]
    if not points:
        return None
    last = max(1, *(x for x, _ in points))
    low, high = min(y for _, y in points), max(y for _, y in points)
    margin = max((high / low) ** 0.06, 1.01)
    low, high = low / margin, high * margin

    def across(step: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * step / last, 1)

    def down(perplexity: float) -> float:
        share = math.log(perplexity / low) / math.log(high / low)
        return round(BOTTOM - (BOTTOM - TOP) * share, 1)

    drawn = {arm: [(across(x), down(y)) for x, y in arms[arm]] for arm in TRAINED if arms[arm]}
    places = _apart([ends[-1][1] for ends in drawn.values()])
    lines = [
        Line(
            arm=arm,
            points=" ".join(f"{x},{y}" for x, y in ends),
            markers=" ".join(MARKERS[arm](x, y) for x, y in ends[0 if len(ends) <= 16 else -1 :]),
            label=Tick(place, figure(arms[arm][-1][1])),
        )
        for (arm, ends), place in zip(drawn.items(), places, strict=True)
    ]
    ends = [
        f"{NAMES[arm]} {figure(arms[arm][0][1])} to {figure(arms[arm][-1][1])}" for arm in drawn
    ]
    return Chart(
        lines=lines,
        steps=[Tick(across(x), f"{x:,.0f}") for x in _round_numbers(0, last) if x == int(x)],
        levels=[Tick(down(y), f"{y:,g}") for y in _levels(low, high)],
        base=drawn[next(iter(drawn))][0][1],
        summary=f"Held-out perplexity over {last:,.0f} expert steps: {', '.join(ends)}.",
    )


MARKERS: Mapping[Trained, Callable[[float, float], str]] = {
    "local": lambda x, y: f"M{x - 3.2:.1f} {y - 3.2:.1f}h6.4v6.4h-6.4z",
    "fedavg": lambda x, y: f"M{x:.1f} {y - 4.4:.1f}l4.2 7.4h-8.4z",
    "method": lambda x, y: f"M{x - 3.8:.1f} {y:.1f}a3.8 3.8 0 1 0 7.6 0a3.8 3.8 0 1 0 -7.6 0z",
}


def _apart(places: Sequence[float], gap: float = 15) -> list[float]:
    """Moves labels that would overlap down from the highest one, and up where there is no room."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for above, below in pairwise(order):
        moved[below] = max(moved[below], moved[above] + gap)
    limit = float(BOTTOM)
    for i in reversed(order):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    return [round(place, 1) for place in moved]


def _levels(low: float, high: float) -> list[float]:
    """Three or more round perplexities for a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 6)):
        levels = [m * 10.0**d for d in decades for m in mantissas if low <= m * 10.0**d <= high]
        if len(levels) >= 3:
            return levels
    return _round_numbers(low, high)


def _round_numbers(low: float, high: float) -> list[float]:
    """About five evenly spaced round numbers."""
    size = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if (high - low) / (m * size) <= 5)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + i) * step, 10) for i in range(count)]


# --- routing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A token; `tint` is a colour's class and `amount` its strength from 0 to 1."""

    text: str
    tint: str
    amount: float
    title: str
    ends_line: bool


@dataclass(frozen=True)
class Strip:
    """The sentence, coloured by one scale: `low` and `high` name its ends."""

    title: str
    low: str
    high: str
    cells: Sequence[Cell]
    diverging: bool


@dataclass(frozen=True)
class Heat:
    strips: Sequence[Strip]
    summary: str


def _heat(routing: Routing) -> Heat | None:
    """One strip from specialist to generalist, or one per expert where there are more than two.

    None where there is nothing to route.
    """
    experts, weights = routing["experts"], routing["weights"]
    if len(experts) < 2 or not weights:
        return None
    means = [fmean(weight[i] for weight in weights) for i in range(len(experts))]
    shares = [f"{name} {_percent(mean)}" for name, mean in zip(experts, means, strict=True)]
    order = sorted(range(len(weights)), key=lambda i: weights[i][0])
    tokens = routing["tokens"]
    summary = (
        f"On average: {_plain(_listed(shares))}. Furthest to the {_plain(experts[0])}: "
        f"{_example(tokens, weights, order[-1])}; furthest from it: "
        f"{_example(tokens, weights, order[0])}."
    )
    if len(experts) == 2:
        return Heat([_diverging(routing)], summary)
    return Heat([_sequential(routing, i) for i in range(len(experts))], summary)


def _example(tokens: Sequence[str], weights: Sequence[Sequence[float]], i: int) -> str:
    return f"“{visible(tokens[i])}” ({_percent(weights[i][0])})"


def _diverging(routing: Routing) -> Strip:
    generalist, specialist = map(_plain, routing["experts"])
    # The scale is even about one half, and only as wide as needed: its ends are printed.
    reach = max(abs(weight[0] - 0.5) for weight in routing["weights"])
    reach = min(max(math.ceil(reach * 20 - 1e-9) / 20, 0.05), 0.5)
    end = _percent(0.5 + reach)
    tints = [
        ("general" if weight[0] >= 0.5 else "special", abs(weight[0] - 0.5) / reach)
        for weight in routing["weights"]
    ]
    cells = _cells(routing, tints)
    return Strip("", f"{specialist}: {end}", f"{generalist}: {end}", cells, diverging=True)


def _sequential(routing: Routing, expert: int) -> Strip:
    most = max(weight[expert] for weight in routing["weights"])
    top = min(max(math.ceil(most * 20 - 1e-9) / 20, 0.05), 1.0)
    tint = "general" if expert == 0 else "special"
    cells = _cells(routing, [(tint, weight[expert] / top) for weight in routing["weights"]])
    name = _plain(routing["experts"][expert])
    return Strip(name, f"0{UNIT}", _percent(top), cells, diverging=False)


def _cells(routing: Routing, tints: Sequence[tuple[str, float]]) -> list[Cell]:
    cells = []
    for token, weight, (tint, amount) in zip(
        routing["tokens"], routing["weights"], tints, strict=True
    ):
        pairs = zip(routing["experts"], weight, strict=True)
        title = ", ".join(f"{_plain(name)} {_percent(share)}" for name, share in pairs)
        cells.append(Cell(visible(token), tint, amount, title, "\n" in token))
    return cells
