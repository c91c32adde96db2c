"""Means over seeds and paired tests, against hand-made references."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from flowerray.report.gather import group, read_run
from flowerray.report.numbers import FROZEN, compare, comparisons, evaluations, scores, summary
from flowerray.statistics import mean_interval
from tests.report.runs import QUERIES, draw, evaluation, make_run, read

ROOT = Path("flowers")


def test_several_seeds_have_an_interval_over_queries_and_seeds_else_students() -> None:
    records = [evaluation(share, seed, ROOT) for seed, share in enumerate((0.9, 0.95, 1.0))]
    found = summary(records, "recall_at_1")
    assert found == mean_interval(scores(records, "recall_at_1")) and found.n == QUERIES
    half = stats.t.ppf(0.975, 2) * 0.05 / np.sqrt(3)
    for queries in (records[0]["queries"][::-1], None):  # other queries, none known
        records[0]["queries"] = queries
        if queries is None:
            del records[0]["per_query"]
        found = summary(records, "recall_at_1")
        assert found is not None and found.mean == pytest.approx(0.95) and found.n == 3
        assert found.low == pytest.approx(0.95 - half) and found.high == 1.0
    assert summary(records, "pair_eer") is None


def test_one_seed_has_an_interval_only_where_its_queries_are_known() -> None:
    record = evaluation(0.5, 0, ROOT)
    found = summary([record], "recall_at_1")
    assert found is not None and found.n == QUERIES and 0.2 < found.low < 0.5 < found.high < 0.8
    found = summary([record], "pair_auc")
    assert found is not None and found.mean == 0.9 and np.isnan(found.low)
    del record["per_query"]
    found = summary([record], "recall_at_1")
    assert found is not None and np.isnan(found.low)


def test_queries_with_nothing_to_find_do_not_count() -> None:
    record = evaluation(0.5, 0, ROOT)
    record["per_query"]["num_relevant"][:3] = [0, 0, 0]
    assert scores([record], "recall_at_1").shape == (1, QUERIES - 3)


def test_trained_rows_are_paired_by_the_seeds_that_both_have() -> None:
    """In either order; frozen features meet every seed."""
    one = [{**evaluation(hits, seed, ROOT), "seed": seed} for seed, hits in ((0, 0.9), (2, 0.8))]
    two = [{**evaluation(0.5, seed + 9, ROOT), "seed": seed} for seed in (1, 2)]
    found, back = compare("one", one, "two", two), compare("two", two, "one", one)
    assert found is not None and back is not None
    assert found.recall.mean == pytest.approx(-back.recall.mean)
    assert found.recall.p_value == back.recall.p_value
    hits = [record["metrics"]["recall_at_1"] for record in (one[1], two[1])]
    assert found.recall.mean == pytest.approx(hits[0] - hits[1]), "seed 2 of both"
    assert compare("one", one, "two", two[:1]) is None
    floor = compare("one", one, FROZEN, [evaluation(0.4, 5, ROOT)])
    mean = np.mean([record["metrics"]["recall_at_1"] for record in one])
    assert floor is not None and floor.recall.mean == pytest.approx(mean - 0.4)


def test_a_row_is_not_compared_with_another_backbones_floor(tmp_path: Path) -> None:
    """That of its own could not be measured."""
    paths = [make_run(tmp_path / f"r{seed}", "triplet", seed, hits=0.9) for seed in range(2)]
    runs = [read_run(path) for path in paths]
    runs[1].options["embedder.backbone"] = "resnet50"
    (setting,) = group(runs)
    floors = [run.floor for run in setting.runs]
    assert len(set(floors)) == 2
    setting.frozen[floors[0], "test", QUERIES, 10] = evaluation(0.4, 5, ROOT)
    (table,) = evaluations(setting)
    against = [(c.first, c.second) for c in comparisons(setting, table) if FROZEN in c.second]
    assert len(against) == 1 and floors[0] in against[0][1]


def test_robust_is_compared_with_standard_and_both_with_frozen(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{name}{seed}", method, seed, robust=robust, hits=hits)
        for name, method, robust, hits in (
            ("t", "triplet", False, 0.9), ("r", "triplet", True, 0.5), ("s", "siamese", False, 0.8)
        )
        for seed in range(2)
    ]  # fmt: skip
    (setting,) = group([read_run(path) for path in runs])
    floor = setting.runs[0].floor
    setting.frozen[floor, "test", QUERIES, 10] = evaluation(0.4, 5, ROOT)
    (table,) = evaluations(setting)
    assert table.title == f"{QUERIES} test queries, 10 gallery images"
    assert list(table.records) == [FROZEN, "siamese", "triplet", "triplet robust (pgd)"]
    found = {(c.first, c.second): c for c in comparisons(setting, table)}
    assert list(found) == [
        ("siamese", FROZEN), ("triplet", FROZEN), ("triplet robust (pgd)", FROZEN),
        ("triplet robust (pgd)", "triplet"), ("siamese", "triplet"),
    ]  # fmt: skip
    pair = found["triplet robust (pgd)", "triplet"]
    assert pair.recall.mean == pytest.approx(-0.4) and pair.recall.high < 0
    assert pair.average_precision is not None
    assert pair.average_precision.mean == pytest.approx(-0.2)
    assert all(c.recall.p_value <= c.p_holm <= 1 for c in found.values())
    assert any(c.recall.p_value < c.p_holm for c in found.values())


def test_one_run_against_one_is_mcnemars_test(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "t", hits=0.8),
        make_run(tmp_path / "s", "siamese", hits=0.4),
    ]
    (setting,) = group([read_run(path) for path in runs])
    (table,) = evaluations(setting)
    (found,) = comparisons(setting, table)
    assert (found.first, found.second) == ("siamese", "triplet")
    # Of one seed, so the hits of one are among the hits of the other: 8 queries differ.
    assert (draw(0.4, 0) <= draw(0.8, 0)).all()
    assert found.recall.p_value == pytest.approx(2 * 0.5**8) and found.p_holm == pytest.approx(
        2 * 0.5**8
    )


def test_other_queries_or_galleries_are_not_compared(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "t", hits=0.8), make_run(tmp_path / "s", "siamese", hits=0.4)]
    file = runs[1] / "evaluation" / "test.json"
    record = read(file)
    text = file.read_text()
    file.write_text(text.replace(record["queries"][0], "another"))
    (setting,) = group([read_run(path) for path in runs])
    (table,) = evaluations(setting)
    assert comparisons(setting, table) == []
    file.write_text(text.replace('"num_gallery": 10', '"num_gallery": 11'))
    (setting,) = group([read_run(path) for path in runs])
    assert len(evaluations(setting)) == 2
