"""The pictures of an attack, from records made by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowerray.robustness import pictures
from flowerray.robustness.attack import Example, Robustness, Score
from flowerray.robustness.pictures import plot_robustness, worst_sheet
from flowerray.show.contact import Group
from flowerray.show.style import SERIES
from tests.robustness.victim import victim_of
from tests.show.drawn import catch


def record(scores: dict[str, float], **more: Any) -> dict[str, Any]:
    worst = {e: {"recall_at_1": r, "ci": [r - 0.1, None]} for e, r in scores.items()}
    return {"worst_case": worst, "attacks": {}, "rows": "cumulative", "audit": None, **more}


def test_the_worst_case_over_the_radius(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {"attacks": {"fgsm": {"2": {"recall_at_1": 0.6}}}, "rows": "independent"}
    results = {
        "mine": record({"0": 0.9, "2": 0.5, "16": 0.1}, **alone),
        "other": record({"0": 0.8, "0.5": 0.7}, audit={"failed": ["gradients"]}),
    }
    figures = catch(monkeypatch, pictures)
    plot_robustness(results, "64 queries", Path("robustness.png"))
    (figure,) = figures
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "64 queries" and axes.get_ylim() == (-0.02, 1.02)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "0.5", "2", "16"]
    own, other, fgsm = axes.lines
    assert own.get_xydata().tolist() == [[0, 0.9], [2, 0.5], [3, 0.1]]
    assert other.get_xydata().tolist() == [[0, 0.8], [1, 0.7]]
    assert fgsm.get_xydata().tolist() == [[2, 0.6]] and fgsm.get_color() == SERIES[0]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["mine", "other: AUDIT FAILED"]


def test_turned_queries_and_what_they_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[list[Group]]] = []
    monkeypatch.setattr(pictures, "contact_sheet", lambda rows, *_: drawn.append(rows))
    victim, clean = victim_of(), torch.full((3, 2, 2), 0.5)
    label = victim.labels_Q[0]
    own, other = (int(np.flatnonzero((victim.gallery_labels_G == label) == x)[0]) for x in (1, 0))
    row = Example(0, "fgsm", clean, clean + 0.02, np.array([other, -1]), 0.1)
    score = Score(np.ones(24, bool), np.ones(24))
    result = Robustness(False, score, np.array([[own, other, -1]]), examples={8.0: [row, row]})
    worst_sheet(victim, result, 8.0, tmp_path / "sheet.png")
    (first, second) = drawn[0]
    assert [g.heading for g in first] == [
        "query", "change x10", "attacked query", "neighbours before", "after",
    ]  # fmt: skip
    assert [g.heading for g in second] == [""] * 5
    query, change, attacked, before, after = first
    levels = [int(np.asarray(g.tiles[0].picture).mean()) for g in (query, change, attacked)]
    assert levels == [128, 178, 133]
    assert attacked.tiles[0].captions == ("by fgsm",)
    assert [tile.right for tile in before.tiles] == [True, False]
    assert [tile.right for tile in after.tiles] == [False]
    assert before.tiles[0].picture == victim.gallery_paths[own]
