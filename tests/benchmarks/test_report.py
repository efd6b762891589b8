"""The report: every figure is there, nothing is loaded, nothing is unescaped, a loss is a loss."""

import copy
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks.report import (
    DemoResult,
    Perplexities,
    UserResult,
    best,
    figure,
    headline,
    render,
    table,
    verdict,
    visible,
    write,
)
from edge_runtime.errors import StorageError

VOID = {"br", "meta", "wbr"}
PERCENT = "\N{NO-BREAK SPACE}%"


def perplexities(base: float, local: float, fedavg: float, method: float) -> Perplexities:
    return {"base": base, "local": local, "fedavg": fedavg, "method": method}


def make_user(name: str, test: Perplexities) -> UserResult:
    return {
        "name": name,
        "description": f"text of {name}",
        "test_perplexity": test,
        "bytes_sent": 1_773_912,
        "bytes_received": 1_775_400,
        "peak_rss_mib": 231.4,
        "step_seconds": 0.0814,
        "curves": {
            "local": [(0, 200.0), (30, 120.0), (60, 96.0)],
            "fedavg": [(0, 200.0), (30, 130.0), (60, 101.0)],
            "method": [(0, 200.0), (30, 110.0), (60, 88.25)],
        },
        "suggestions": [
            {
                "context": "def main(\n",
                "truth": " self",
                "before": [(" the", 0.081), ("\n", 0.03)],
                "after": [(" self", 0.62), (")", 0.0012)],
            }
        ],
        "routing": {
            "tokens": ["def", " main", "(\n"],
            "experts": ["generalist", "specialist 1"],
            "weights": [[0.4, 0.6], [0.71, 0.29], [0.5, 0.5]],
        },
    }


@pytest.fixture
def result() -> DemoResult:
    return {
        "users": [
            make_user("ann", perplexities(212.43, 96.1, 101.7, 88.3)),
            make_user("ben", perplexities(148.2, 61.9, 66.4, 63.05)),
        ],
        "seconds": 213.4,
        "engine": "onnxruntime",
        "rounds": 2,
        "base": "gpt2-mini",
        "versions": {"onnxruntime": "1.99.1"},
        "setup": {"rank": 8, "mixing": "per_linear"},
        "notes": ["Two rounds only."],
    }


class Page(HTMLParser):
    """Checks that elements nest, and collects tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def printed(result: DemoResult, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table(result))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_figures_are_in_the_page(result: DemoResult) -> None:
    text = Page(render(result)).text
    for part in (
        "212.4", "96.10", "101.7", "88.30", "63.05",  # the table
        "1.69 MiB", "231 MiB", "81 ms", "3 min 33 s",  # what it cost
        "·self", f"62{PERCENT}", f"0.1{PERCENT}", "⏎", "def main(",  # suggestions
        f"71{PERCENT}", "specialist 1: 75", "·main",  # routing
        "text of ann", "1.99.1", "per_linear", "Two rounds only.", "gpt2-mini",
    ):  # fmt: skip
        assert part in text, part


def test_the_page_takes_what_json_gives_back(result: DemoResult) -> None:
    assert render(json.loads(json.dumps(result))) == render(result)


def test_a_chart_starts_at_the_base_and_has_three_arms(result: DemoResult) -> None:
    html = render(result)
    first = re.findall(r'<polyline class="(\w+)" points="([\d.]+),([\d.]+) ', html)
    assert [arm for arm, _, _ in first] == ["local", "fedavg", "method"] * 2
    assert len({(x, y) for _, x, y in first}) == 1
    assert {("text-anchor", "middle"), ("role", "img")} <= set(Page(html).attributes)


def test_the_page_loads_nothing(result: DemoResult) -> None:
    html = render(result)
    page = Page(html)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "use"}
    assert not {name for name, _ in page.attributes} & {"src", "href", "srcset", "xlink:href"}
    assert not re.search(r"https?://|url\(|@import", html)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def poison(value: Any, text: str) -> Any:
    """Puts `text` in place of every string, keys of free mappings included."""
    if isinstance(value, str):
        return text
    if isinstance(value, dict):
        return {
            (text if key in ("onnxruntime", "rank") else key): poison(item, text)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [poison(item, text) for item in value]
    return value


def test_users_text_is_escaped_everywhere(result: DemoResult) -> None:
    clean = Page(render(result))
    hostile = """</pre></style>"'><script>alert(1)</script>&amp;{{ 7 * 7 }}\x00\u202e"""
    html = render(poison(result, hostile))
    page = Page(html)
    assert "script" not in page.tags
    assert page.tags <= clean.tags
    assert {name for name, _ in page.attributes} <= {name for name, _ in clean.attributes}
    assert "<script>alert(1)</script>&amp;{{ 7 * 7 }}␀\ufffd" in page.text
    assert "\x00" not in html
    assert "\u202e" not in html


def test_a_loss_is_said(result: DemoResult) -> None:
    html = render(result)
    text = Page(html).text
    assert headline(result) in text
    assert "best for 1 of 2" in headline(result)
    ben = verdict(result["users"][1])
    assert ben in text
    assert ben.endswith("not the best, training alone reached 61.90.")
    assert html.count("method not best") == 1
    assert re.search(r'<td class="num local best"><span>61\.90', html)
    assert not re.search(r'<td class="num method best"><span>63\.05', html)
    assert "not best for ben" in printed(result)


@pytest.mark.parametrize(
    ("test", "words"),
    [
        (perplexities(100, 50, 60, 40), "fell from 100.0 to 40.00 (\N{MINUS SIGN}60"),
        (perplexities(100, 50, 60, 40), ": the best of the four."),
        (perplexities(100, 50, 60, 50), "level with training alone."),
        (perplexities(100, 50, 50, 50.001), "level with training alone and FedAvg."),
        (perplexities(100, 150, 160, 120), "rose from 100.0 to 120.0 (+20"),
        (perplexities(100, 150, 160, 120), "not the best, the base model reached 100.0."),
        (perplexities(100, 90, 95, 100), "stayed at 100.0: not the best"),
        (perplexities(100, 50, 60, math.inf), "not the best"),
        (perplexities(math.nan, 50, 60, 40), "No comparison"),
    ],
)
def test_a_verdict_follows_the_figures(test: Perplexities, words: str) -> None:
    assert words in verdict(make_user("ann", test))


@pytest.mark.parametrize(
    ("tests", "words"),
    [
        ([(100, 50, 60, 40)] * 4, "Every device now .* was best for all 4"),
        ([(100, 50, 60, 40)], "The device now .* was the best of the four ways"),
        ([(100, 50, 60, 40), (100, 50, 60, 50)], "best for 1 of 2, level with another for 1"),
        ([(100, 50, 60, 40), (100, 50, 60, 110)], "1 of 2 devices now predicts .* best for 1 of 2"),
        ([(100, 90, 95, 110)] * 2, "No device predicts .* best for 0 of 2"),
        ([], "No user took part"),
    ],
)
def test_the_headline_follows_the_figures(
    tests: list[tuple[float, float, float, float]], words: str, result: DemoResult
) -> None:
    result["users"] = [make_user(f"u{i}", perplexities(*test)) for i, test in enumerate(tests)]
    assert re.search(words, headline(result))
    Page(render(result))


@given(st.lists(st.floats(0.5, 1e6), min_size=4, max_size=4))
def test_the_best_is_the_lowest_printed_figure(values: list[float]) -> None:
    test = perplexities(*values)
    printed = {arm: float(figure(value).replace(",", "")) for arm, value in test.items()}  # type: ignore[arg-type]
    assert best(test) == {arm for arm in printed if printed[arm] == min(printed.values())}


def test_the_terminal_fits_eighty_columns(result: DemoResult) -> None:
    result["users"][0]["name"] = "[red]data-analysis\x1b[31m"
    text = printed(result)
    assert all(len(line) <= 80 for line in text.splitlines())
    for part in ("212.4", "96.10", "*88.30", "*61.90", "1.69 MiB", "231", "81"):
        assert part in text
    assert "\x1b" not in text
    assert "[red]" in text


def test_odd_results_are_drawn(result: DemoResult) -> None:
    ann, ben = result["users"]
    ann["curves"] = {"local": [], "fedavg": [], "method": []}
    ann["suggestions"] = []
    ann["routing"] = {"tokens": ["a"], "experts": ["generalist"], "weights": [[1.0]]}
    ben["curves"] = {"local": [(0, 5.0)], "fedavg": [(0, 5.0), (30, math.nan)], "method": []}
    ben["routing"] = {
        "tokens": ["a", "\n\n"],
        "experts": ["generalist", "specialist 1", "specialist 2"],
        "weights": [[0.2, 0.8, 0.0], [0.0, 0.3, 0.7]],
    }
    text = Page(render(result)).text
    for part in ("No curve", "No example", "nothing to route", "specialist 2", "⏎⏎"):
        assert part in text, part


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.floats(1.0, 1e9, exclude_min=True)), min_size=1)
)
def test_any_curve_stays_inside_its_chart(points: list[tuple[float, float]]) -> None:
    from benchmarks.report import BOTTOM, LEFT, RIGHT, TOP, _chart

    chart = _chart({"local": points, "fedavg": [], "method": points})
    assert chart is not None
    for line in chart.lines:
        for point in line.points.split():
            x, y = map(float, point.split(","))
            assert LEFT <= x <= RIGHT
            assert TOP <= y <= BOTTOM
    assert all(TOP <= tick.at <= BOTTOM for tick in chart.levels)
    assert all(LEFT <= tick.at <= RIGHT for tick in chart.steps)
    places = sorted(line.label.at for line in chart.lines)
    assert places[1] - places[0] >= 14.9
    assert 2 <= len(chart.levels) <= 12


def test_whitespace_is_visible() -> None:
    assert visible(" a\tb\n\x1b\u2028") == "·a⇥b⏎␛\ufffd"


def test_a_report_is_written_where_asked(result: DemoResult, tmp_path: Path) -> None:
    before = copy.deepcopy(result)
    result["users"][0]["suggestions"][0]["context"] = "half a pair \ud800"
    write(result, tmp_path / "out" / "report.html")
    Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    with pytest.raises(StorageError, match="cannot write"):
        write(before, tmp_path / "out" / "report.html" / "report.html")
