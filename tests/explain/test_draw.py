"""Pictures: what is in them, and that they are written whole."""

from pathlib import Path

import numpy as np
import pytest

from flowerray.explain import draw, table
from flowerray.explain.draw import (
    ConceptStrip,
    Match,
    Pair,
    best_matches,
    draw_pair,
    draw_scores,
    draw_sheet,
)
from flowerray.show.contact import Group
from flowerray.show.style import BLUE, ORANGE
from flowerray.statistics import Interval
from tests.show.drawn import catch

RNG = np.random.default_rng(0)
PHOTOGRAPHS = RNG.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)


def test_best_matches_use_each_region_once_and_none_below_zero() -> None:
    shares = np.full((4, 4), -1.0)
    shares[1, 2], shares[1, 3], shares[3, 2], shares[0, 0] = 0.9, 0.8, 0.7, 0.1
    found = best_matches(shares, (2, 2))
    assert found == (Match((0, 1), (1, 0), 0.9), Match((0, 0), (0, 0), 0.1))
    assert best_matches(-np.ones((4, 4)), (2, 2)) == ()


@pytest.mark.parametrize("strips", [0, 2])
@pytest.mark.parametrize("similarity", [0.2, 0.8])
def test_a_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strips: int, similarity: float
) -> None:
    maps = RNG.normal(size=(2, 4, 4)).astype(np.float32)
    strip = ConceptStrip("concept 3", 0.1, (0.4, 0.0), np.abs(maps), PHOTOGRAPHS[:, :16, :16])
    matches = best_matches(RNG.normal(size=(16, 16)), (4, 4)) if strips else ()
    pair = Pair(
        PHOTOGRAPHS, ("a/1.jpg", "b/2.jpg"), maps, "gradcam at layer4", similarity, 0.5, matches,
        (4, 4), (strip,) * strips,
    )  # fmt: skip
    if strips and similarity > 0.5:
        draw_pair(pair, tmp_path / "deep" / "pair.png")
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["pair.png"]
    figures = catch(monkeypatch, draw)
    draw_pair(pair, tmp_path / "pair.png")
    (figure,) = figures
    verdict = "same class" if similarity > 0.5 else "different classes"
    assert figure.get_suptitle().endswith(verdict)
    images = [axes for axes in figure.axes if axes.images]
    assert len(images) == 4 + strips * (2 + 2)
    np.testing.assert_array_equal(images[0].images[0].get_array(), PHOTOGRAPHS[0])
    assert len(images[0].patches) == 2 * len(matches)  # each box has a white rim


def test_maps_are_tiles_beside_their_photographs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = {"flat": np.zeros((2, 4, 4), np.float32), "own size": np.ones((2, 32, 32), np.float32)}
    captions = {name: ["energy 0.10", "energy 0.20"] for name in maps}
    masks = np.zeros((2, 32, 32), bool)
    masks[1, 8:24, 8:24] = True
    given = ("title", PHOTOGRAPHS, masks, maps, captions, ["1.jpg", "2.jpg"])
    assert draw_sheet(*given, tmp_path / "sheet.png").exists()
    drawn: list[list[list[Group]]] = []
    monkeypatch.setattr(draw, "contact_sheet", lambda rows, *_: drawn.append(rows))
    draw_sheet(*given, tmp_path / "sheet.png")
    draw_sheet("title", PHOTOGRAPHS, None, maps, captions, ["1.jpg", "2.jpg"], tmp_path / "x.png")
    (first, second), (bare, _) = drawn
    assert [g.heading for g in first] == ["photograph, mask", "flat", "own size"]
    assert [g.heading for g in second] == [""] * 3
    assert [g.tiles[0].captions for g in second] == [("2.jpg",), *[("energy 0.20",)] * 2]
    plain, flat, full = (np.asarray(g.tiles[0].picture, float) for g in bare)
    np.testing.assert_array_equal(first[0].tiles[0].picture, plain)  # an empty mask draws nothing
    assert np.ptp(flat, axis=2).max() <= 1  # a map of zeros leaves the grey photograph
    assert (full[..., 0] - full[..., 2]).min() > 50  # more alike is orange
    outlined = np.asarray(second[0].tiles[0].picture)
    assert (outlined == 255).all(2).sum() > 500 and (outlined == 34).all(2).sum() > 200


def test_scores_with_and_without_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"energy": Interval(9, 0.5, 0.4, 0.6), "iou": Interval(1, 0.5, np.nan, np.nan)}
    figures, labels = catch(monkeypatch, draw), {"energy": "energy", "iou": "IoU"}
    draw_scores("t", {"ours": rows, "edges": rows}, labels, Path("scores.png"))
    (figure,) = figures
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["energy", "IoU"]
    energy = figure.axes[0]
    assert [label.get_text() for label in energy.get_yticklabels()] == ["ours", "edges"]
    bars = [list(line.get_xdata()) for line in energy.lines if len(line.get_xdata()) == 2]
    assert bars == [[0.4, 0.6], [0.4, 0.6], [0.5, 0.5]]  # and the mark of the first
    assert {line.get_color() for line in energy.lines} == {ORANGE, BLUE}


def test_tables_fit_80_columns() -> None:
    cell = {"mean": -0.123, "low": -0.987, "high": 0.876}
    metrics = ("energy", "pointing", "iou", "deletion", "insertion", "road_morf")
    rows = {n: dict.fromkeys(metrics, cell) for n in ("chosen", "centre Gaussian")}
    check = {"value": -0.0123, "passed": False, "rule": "below 0.5"}
    result = {
        "run": "runs/mine", "images": 300, "split": "test",
        "chosen": {"method": "eigengradcam", "layer": "features.denseblock3", "norm": "held",
                   "on": "val", "images": 100, "candidates": 62},
        "scores": rows, "gain_over": {"centre Gaussian": rows["chosen"]},
        "sanity": {"chosen": {"randomised": check, "complete": check},
                   "edges": {"randomised": check}},
    }  # fmt: skip
    text = table.split(result | {"beside": result | {"gain_over_run": rows["chosen"]}})
    assert max(map(len, text.splitlines())) <= 80
    assert "-0.12 [-0.99, +0.88]" in text and "FAILED" in text
    score = {"name": "a very long name of some concept", "score": 1.0, "random": 0.5,
             "accuracy": 0.9, "p_value": 1.2e-9, "significant": True}  # fmt: skip
    named = {"images": 300, "split": "test", "class": "daisy", "layer": "bn2", "concepts": [score]}
    assert max(map(len, table.concepts(named).splitlines())) <= 80
