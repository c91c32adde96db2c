"""Pictures and table of a synthetic study."""

import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from PIL import Image

from flowerray.tuning import pictures
from flowerray.tuning.pictures import Row, common_epoch, importances, plot_study, scale, study_table
from tests.show.drawn import catch

SPACE: dict[str, Any] = {
    "method.margin": FloatDistribution(0.03, 0.5, log=True),
    "method.miner": CategoricalDistribution(["all", "distance-weighted"]),
    "train.classes_per_batch": CategoricalDistribution([12, 8, 16]),
    "augment.strength": FloatDistribution(0.0, 2.0),
}
LABELS = ["val MAP@R", "adversarial R@1"]


def rows(count: int) -> list[Row]:
    """Trials whose value depends on the miner alone; every third is complete, the second failed."""
    rng = random.Random(0)
    found = []
    for number in range(count):
        params = {
            "method.margin": math.exp(rng.uniform(math.log(0.03), math.log(0.5))),
            "method.miner": rng.choice(["all", "distance-weighted"]),
            "train.classes_per_batch": rng.choice([8, 12, 16]),
            "augment.strength": rng.uniform(0, 2),
        }
        value = 0.6 if params["method.miner"] == "all" else 0.3
        epochs = 6 if number % 3 == 0 else 2
        curve = tuple((e, value * e / (e + 1)) for e in range(1, epochs + 1))
        if number == 1:
            found.append(Row(number, "failed", params, (), ()))
            continue
        values = (curve[-1][1], rng.random())
        found.append(Row(number, "complete" if epochs == 6 else "stopped", params, values, curve))
    return found


def test_every_picture_is_drawn(tmp_path: Path) -> None:
    drawn = plot_study(rows(24), SPACE, LABELS, tmp_path / "plots")
    names = {path.name for path in drawn}
    assert names == {"history.png", "slice.png", "parallel.png", "importance.png", "front.png"}
    for path in drawn:
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).min() < 100, path


def test_what_the_pictures_show(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = rows(24)
    alive = [row for row in trials if row.outcome != "failed"]
    complete = [row for row in alive if row.outcome == "complete"]
    figures = catch(monkeypatch, pictures)
    plot_study(trials, SPACE, LABELS, Path())
    history, slices, parallel, importance, front = (figure.axes for figure in figures)
    assert history[0].get_title(loc="left") == "Search history (23 trials, 1 more failed)"
    (best,) = history[0].lines
    values = [row.values[0] for row in complete]
    assert list(best.get_ydata()) == [max(values[: i + 1]) for i in range(len(values))]
    dots = history[0].collections[0].get_offsets().tolist()
    assert dots == [[row.number, row.values[0]] for row in complete]
    assert [axes.get_xlabel() for axes in slices] == list(SPACE)
    stopped = slices[0].collections[1].get_offsets()[:, 0]
    expected = [math.log10(r.params["method.margin"]) for r in alive if r.outcome == "stopped"]
    np.testing.assert_allclose(stopped, expected)
    heights = [line.get_ydata() for line in parallel[0].lines if len(line.get_xdata()) == 4]
    assert len(heights) == len(alive) and 0 <= np.min(heights) <= np.max(heights) <= 1
    assert importance[0].get_yticklabels()[-1].get_text() == "method.miner"
    ends = front[0].lines[-1].get_xydata()
    assert (np.diff(ends[:, 0]) > 0).all() and (np.diff(ends[:, 1]) <= 0).all()


def test_few_or_failed_trials_draw_what_they_can(tmp_path: Path) -> None:
    assert plot_study([rows(3)[1]], SPACE, LABELS[:1], tmp_path / "none") == []
    drawn = plot_study(rows(3), SPACE, LABELS[:1], tmp_path / "few")
    assert {path.name for path in drawn} == {"history.png", "slice.png", "parallel.png"}


def test_trials_are_compared_where_all_of_them_were() -> None:
    alive = [row for row in rows(24) if row.curve]
    assert common_epoch(alive) == 2
    found = importances(alive, SPACE)
    assert max(found, key=lambda name: found[name]) == "method.miner"
    assert found["method.miner"] > 0.9 and sum(found.values()) == pytest.approx(1)
    assert importances(alive[:3], SPACE) == {}


def test_a_knobs_axis() -> None:
    assert scale(SPACE["train.classes_per_batch"], [16, 8]) == (
        [2.0, 0.0], [(0.0, "8"), (1.0, "12"), (2.0, "16")],
    )  # fmt: skip
    assert scale(SPACE["method.margin"], [0.1])[0] == pytest.approx([-1])
    assert scale(SPACE["augment.strength"], [1.5]) == ([1.5], [])


RESULT: dict[str, Any] = {
    "method": "triplet",
    "objectives": ["val/map_at_r", "val/adversarial_recall_at_1"],
    "trials": {"complete": 9, "stopped": 6, "failed": 1},
    "images": 87360,
    "best_trial": "0011",
    "best": {"method.margin": 0.1123456, "method.miner": "distance-weighted"},
    "default": {"method.margin": 0.2, "method.miner": "distance-weighted"},
    "searched": {"val/map_at_r": 0.8123, "val/adversarial_recall_at_1": 0.4},
    "winner": "tuned",
    "confirmed": {
        "seeds": [1000, 1001, 1002],
        "tuned": {
            "val/map_at_r": [0.80, 0.81, 0.82],
            "val/adversarial_recall_at_1": [0.4, 0.4, 0.4],
        },
        "default": {
            "val/map_at_r": [0.79, 0.78, 0.77],
            "val/adversarial_recall_at_1": [0.3, 0.3, 0.3],
        },
        "gain": {
            "val/map_at_r": {"n": 3, "mean": 0.03, "low": -0.02, "high": 0.08},
            "val/adversarial_recall_at_1": {"n": 3, "mean": 0.1, "low": None, "high": None},
        },
    },
    "champion": "runs/study/confirm/trial-0011-seed-1002",
    "registered": {"name": "flowerray-triplet", "alias": "champion", "version": "3"},
}


def test_the_table() -> None:
    text = study_table(RESULT)
    assert max(map(len, text.splitlines())) <= 80
    assert "16 trials (9 complete, 6 stopped early, 1 failed)" in text and "87,360" in text
    rows = {tuple(re.split("  +", line.strip())) for line in text.splitlines()}
    assert ("method.margin", "0.112", "0.2") in rows
    assert ("val MAP@R, 3 fresh seeds", "0.810", "0.780") in rows
    assert ("gain", "+0.030 [-0.020, +0.080]", "(95 %)") in rows and ("gain", "+0.100") in rows
    assert "models:/flowerray-triplet@champion" in text


def test_the_table_of_a_default_that_won() -> None:
    confirmed = {"seeds": [1000], "default": {"val/map_at_r": [0.79]}}
    changed = {
        **RESULT,
        "objectives": ["val/map_at_r"],
        "winner": "default",
        "confirmed": confirmed,
        "registered": {**RESULT["registered"], "version": None},
        "study": "runs/study",
    }
    text = study_table(changed)
    assert "no trial was better than the default" in text
    assert "flowerray evaluate runs/study/confirm/trial-0011-seed-1002" in text
    assert "flowerray tune triplet --resume runs/study" in text
    del changed["confirmed"]
    assert "not confirmed" in study_table(changed)
