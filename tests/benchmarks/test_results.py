"""`benchmarks/RESULTS.md` says what the committed figures say."""

from __future__ import annotations

from benchmarks.results import FOLDER, PAGE, page, plots, read


def test_the_page_is_made_from_the_committed_figures() -> None:
    results = read(FOLDER)
    assert PAGE.read_text(encoding="utf-8") == page(results, FOLDER), "python -m benchmarks.results"
    for name in plots(results):
        assert (FOLDER / f"{name}.svg").read_text().startswith("<?xml")


def test_every_figure_says_where_it_is_from() -> None:
    for name, result in read(FOLDER):
        assert result["machine"]["processor"], name
        assert result["versions"], name
        assert result.get("turns", 10) >= 10, f"{name} has too few turns"
