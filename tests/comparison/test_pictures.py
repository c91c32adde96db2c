"""The picture and the table of a comparison."""

from pathlib import Path
from typing import Any

import pytest

from flowerray.comparison import pictures
from flowerray.comparison.pictures import FROZEN, plot_comparison
from flowerray.show.style import BLUE, ORANGE
from tests.show.drawn import catch


def test_seeds_means_and_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(mean: float, low: float | None) -> dict[str, Any]:
        one = {"mean": mean, "low": low, "high": 0.9, "n": 2, "values": [mean - 0.1, mean + 0.1]}
        return {"recall_at_1": one, "map_at_r": one}

    rows = {FROZEN: row(0.5, None), "triplet": row(0.8, 0.7)}
    figures = catch(monkeypatch, pictures)
    plot_comparison({"protocols": {p: {"rows": rows} for p in ("a", "b")}}, Path("compare.png"))
    axes = figures[0].axes
    titles = [one.get_title(loc="left") for one in axes]
    assert titles == ["R@1, a", "R@1, b", "MAP@R, a", "MAP@R, b"]
    lines = [(line.get_color(), list(line.get_xdata())) for line in axes[3].lines[3:]]
    assert lines == [(BLUE, pytest.approx([0.7, 0.9])), (BLUE, [0.7, 0.9]), (BLUE, [0.8])]
    assert {line.get_color() for line in axes[0].lines[:3]} == {ORANGE}
    assert [label.get_text() for label in axes[0].get_yticklabels()] == [FROZEN, "triplet"]
