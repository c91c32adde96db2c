"""What the report's sections say, from runs made by hand."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from flowerray.files import write_json
from flowerray.report import attacked, evidence, sections
from flowerray.report.command import with_frozen
from flowerray.report.gather import MOST, Setting, group, read_run
from flowerray.show.interval import words
from flowerray.show.page import (
    MAX_BYTES,
    Block,
    Commands,
    Details,
    Note,
    Page,
    Picture,
    Pictures,
    Table,
)
from flowerray.show.style import PALE
from flowerray.statistics import mean_interval
from tests.report.runs import QUERIES, draw, evaluation, make_run, photographs, read
from tests.show.test_page import check_page, noise, png

ALL = (
    sections.summary_of, sections.clean, attacked.attacked, sections.training,
    lambda s: sections.cost(s, {}), evidence.galleries, evidence.failures, evidence.explanations,
    sections.data_card, lambda s: sections.reproduce(s, {}),
)  # fmt: skip


def setting(*paths: Path) -> Setting:
    (found,) = group([read_run(path) for path in paths])
    return found


def said(blocks: list[Block]) -> str:
    return check_page(Page("t").section("s", *blocks).html()).text


def tables(blocks: list[Block]) -> list[Table]:
    return [block for block in blocks if isinstance(block, Table)]


def test_a_bare_run_gets_a_whole_page_that_says_what_is_missing(tmp_path: Path) -> None:
    found = setting(make_run(tmp_path / "a"))
    page = Page("t")
    for section in ALL:
        page.section("s", *section(found))
    text = check_page(page.html()).text
    for command in ("evaluate RUN --split test", "attack RUN --audit", "explain RUN"):
        assert f"flowerray {command} fills this section" in " ".join(text.split())
    assert "Not finished: a" in text


def test_a_run_without_any_record(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (run / "metrics.jsonl").unlink()
    (run / "mlflow.json").unlink()
    found = setting(run)
    text = said([block for section in ALL for block in section(found)])
    assert "No run has finished an epoch" in text and "versions were not noted" in text


def test_clean_results(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{m}{s}", m, s, hits=hits)
        for m, hits in (("triplet", 0.9), ("siamese", 0.6))
        for s in range(2)
    ]
    found = setting(*runs)
    floor = evaluation(0.5, 3, Path("flowers"))
    found.frozen[found.runs[0].floor, "test", QUERIES, 10] = floor
    blocks = sections.clean(found)
    clean, paired = tables(blocks)
    assert [row[0] for row in clean.rows] == ["frozen features", "siamese", "triplet"]
    assert [getattr(row[2], "bold", False) for row in clean.rows] == [False, False, True]
    assert str(clean.rows[2][2]).startswith("0.900 [")
    assert len(paired.rows) == 3 and re.fullmatch(
        r"\+0\.400 \[\+0\.\d+, \+0\.\d+\]", str(paired.rows[1][2])
    )
    assert any(isinstance(block, Picture) for block in blocks)
    assert "Highest R@1 on 20 test queries, 10 gallery images: triplet, 0.900" in said(
        sections.summary_of(found)
    )


def test_a_training_that_ruined_its_start_is_called_so(tmp_path: Path) -> None:
    """By what the evaluations kept of it."""
    record, runs = evaluation(0.65, 3, Path("flowers")), []
    scores = {k: record["per_query"][k] for k in ("hit", "average_precision", "num_relevant")}
    floor = {"metrics": record["metrics"], "per_query": scores}
    for method, hits in (("triplet", 0.2), ("siamese", 0.7), ("center", 1.0)):
        runs.append(make_run(tmp_path / method, method, hits=hits))
        file = runs[-1] / "evaluation" / "test.json"
        write_json(file, {**read(file), "frozen": floor})
    found = with_frozen(setting(*runs), torch.device("cpu"), quiet=True)
    assert [key[1:] for key in found.frozen] == [("test", QUERIES, 10)] and found.notes == ()
    notes = [b.text for b in sections.summary_of(found) if isinstance(b, Note)]
    assert len(notes) == 2 and all(b.startswith(("triplet", "siamese")) for b in notes)
    said = dict(note.split(", on test, ") for note in notes)
    assert said["triplet"].startswith("is worse than its frozen backbone: R@1 -0.450 [")
    assert said["siamese"].startswith("is not shown to be better than its frozen")


def test_a_failed_audit_is_shouted(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "t", right=0.1),
        make_run(tmp_path / "r", robust=True, right=0.8, audit=False),
    ]
    blocks = attacked.attacked(setting(*runs))
    warning, rest = blocks[0], blocks[1:]
    assert isinstance(warning, Note) and warning.level == "warn"
    assert warning.text.startswith("AUDIT FAILED for triplet robust (pgd)")
    assert "gradients" in warning.text
    assert isinstance(rest[0], Note) and "Not audited: 1 of 2" in rest[0].text
    worst = tables(blocks)[0]
    assert list(worst.header) == ["", "seeds", "clean", "2/255", "expected"]
    assert [row[0] for row in worst.rows] == ["triplet", "triplet robust (pgd) (AUDIT FAILED)"]
    assert worst.rows[0][3] == words(mean_interval(draw(0.1, 0))) and worst.rows[1][4] == 0.9
    paired = tables(blocks)[1]
    assert [row[2] for row in paired.rows] == ["2/255"]
    assert str(paired.rows[0][3]).startswith("+0.700 [")
    curve = next(block for block in blocks if isinstance(block, Picture))
    legend = [text.get_text() for text in curve.source.legends[0].get_texts()]
    assert legend == ["triplet", "triplet robust (pgd) (AUDIT FAILED)"]
    text = said(blocks)
    assert "half are zero" in text and "Cumulative" in text and "pixels are changed" in text


def test_a_passed_audit_is_not(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{s}", seed=s, right=0.2 + 0.2 * s, audit=True) for s in (0, 1)]
    blocks = attacked.attacked(setting(*runs))
    assert not any(isinstance(block, Note) for block in blocks)
    assert "FAILED" not in said(blocks)
    (row,) = tables(blocks)[0].rows
    assert row[1] == "2" and str(row[3]).startswith("0.300 [0.00")


def test_the_expected_column_is_over_radii_that_all_have(tmp_path: Path) -> None:
    """A run that was also attacked at a hard radius would look weaker beside one that was not."""
    runs = [make_run(tmp_path / "t", right=0.4), make_run(tmp_path / "s", "siamese", right=0.4)]
    file = runs[1] / "robustness.json"
    content = json.loads(file.read_text())
    (record,) = content["results"]
    record["worst_case"]["8"] = {**record["worst_case"]["2"], "recall_at_1": 0.0}
    file.write_text(json.dumps(content))
    table = tables(attacked.attacked(setting(*runs)))[0]
    assert list(table.header)[2:] == ["clean", "2/255", "8/255", "expected"]
    assert [row[-1] for row in table.rows] == [0.7, 0.7]
    assert "all were attacked at (0, 2)" in table.caption
    assert table.rows[0][3] == words(mean_interval(draw(0.4, 0)))


def test_attacks_of_another_kind_are_another_table(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "t", right=0.1), make_run(tmp_path / "s", "siamese", right=0.1)]
    file = runs[1] / "robustness.json"
    file.write_text(file.read_text().replace('"steps": 20', '"steps": 40'))
    assert len(attacked.attacks_of(setting(*runs))) == 2


def test_robust_and_standard_are_paired_by_seed_and_each_run_counts_once(tmp_path: Path) -> None:
    """Robust 1, 2 beside standard 0, 1, 2: seeds 1 and 2, whatever their places."""
    robust = [make_run(tmp_path / f"r{s}", seed=s, robust=True, right=0.6) for s in (1, 2)]
    standard = [make_run(tmp_path / f"s{s}", seed=s, right=0.1) for s in (0, 1, 2)]
    file = robust[0] / "robustness.json"
    (whole,) = read(file)["results"]
    part = {**whole, "worst_case": {"2": whole["worst_case"]["2"]}, "time": 5.0}
    write_json(file, {"results": [whole, part]})
    found = setting(*robust, *standard)
    (attacks,) = attacked.attacks_of(found)
    assert sorted(len(rows) for rows in attacks.records.values()) == [2, 3]
    assert all("0" in r["worst_case"] for rows in attacks.records.values() for r in rows)
    ((eps, compared),) = attacked.comparisons(found, attacks)
    assert eps == "2" and compared.recall.mean == pytest.approx(0.5)
    strangers = setting(robust[0], standard[0])
    assert attacked.comparisons(strangers, attacked.attacks_of(strangers)[0]) == []


def test_failures_name_what_was_taken_for_what(tmp_path: Path) -> None:
    root = photographs(tmp_path / "flowers")
    runs = [make_run(tmp_path / f"{s}", seed=s, hits=0.8, root=root) for s in range(3)]
    found = setting(*runs)
    records = [run.evaluations["test"] for run in found.runs]
    failures = evidence.find_failures(records)
    missed = {f.query: f.missed for f in failures}
    hand = {
        query: sum(not r["per_query"]["hit"][i] for r in records)
        for i, query in enumerate(records[0]["queries"])
    }
    assert missed == {query: n for query, n in hand.items() if n}
    order = [(f.missed, f.similarity) for f in failures]
    assert order == sorted(order, reverse=True) and all(f.runs == 3 for f in failures)
    assert all({f.class_name, f.nearest_class} == {"rose", "tulip"} for f in failures)
    blocks = evidence.failures(found)
    (grid,) = [block for block in blocks if isinstance(block, Pictures)]
    assert 0 < len(grid.pictures) <= evidence.WORST
    (classes,) = tables(blocks)
    assert {row[0] for row in classes.rows} == {"rose", "tulip"}
    assert sum(float(row[1] or 0) for row in classes.rows) / 2 == pytest.approx(0.8)
    said(blocks)


def test_failures_without_their_photographs_are_listed(tmp_path: Path) -> None:
    found = setting(make_run(tmp_path / "a", hits=0.5, root=tmp_path / "gone"))
    blocks = evidence.failures(found)
    assert any(isinstance(b, Note) and "gone" in b.text for b in blocks)
    assert len(tables(blocks)[1].rows) == evidence.WORST


def test_no_failure_at_all(tmp_path: Path) -> None:
    found = setting(make_run(tmp_path / "a", hits=1.0))
    assert "Every query of every run" in said(evidence.failures(found))


def test_explanations(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    root = photographs(run / "explanations")
    row = {"energy": {"mean": 0.5, "low": 0.4, "high": 0.6}}
    content = {
        "run": "runs/a", "images": 9, "split": "test", "scores": {"chosen": row, "edges": row},
        "chosen": {
            "method": "gradcam", "layer": "blocks.6", "norm": "free", "on": "val", "images": 4,
        },
        "sanity": {"chosen": {"swap": {"value": 0.9, "passed": False, "rule": "below 0.5"}}},
    }  # fmt: skip
    (root / "faithfulness.json").write_text(json.dumps(content))
    blocks = evidence.explanations(setting(run))
    assert isinstance(blocks[0], Note) and "swap (below 0.5)" in blocks[0].text
    (table,) = tables(blocks)
    assert table.rows[0] == ["chosen map", "0.500 [0.400, 0.600]"]
    pictures = [block for block in blocks if isinstance(block, Picture)]
    assert len(pictures) == evidence.EXPLANATIONS and "14 more" in said(blocks)


def test_many_runs_make_a_small_page(tmp_path: Path) -> None:
    """Pictures and tests are of the best and the worst variants, tables of all."""
    sheet = tmp_path / "sheet.png"
    sheet.write_bytes(png(noise(400, 300)))
    runs = []
    for n in range(QUERIES):
        share, margin = n / QUERIES, (n + 1) / 100
        run = make_run(tmp_path / f"{n}", hits=share, right=share / 2, margin=margin)
        for name in ("plots/retrieval_test.png", "plots/worst_queries.png", "explanations/a.png"):
            (run / name).parent.mkdir(exist_ok=True)
            os.link(sheet, run / name)
        runs.append(run)
    found = setting(*runs)
    kept = [n / QUERIES for n in (0, 1, 2, 3, 16, 17, 18, 19)]
    assert [v.recall for v in found.shown] == kept and len(found.variants) == QUERIES
    page = Page("t")
    for section in ALL:
        page.section("s", *section(found))
    text = page.html()
    reader = check_page(text)
    assert len(text) < MAX_BYTES and len(reader.all("img")) == 3 * MOST
    assert "8 variants with the highest" in reader.text
    clean, paired = tables(sections.clean(found))
    assert len(clean.rows) == QUERIES and len(paired.rows) == 8 * 7 / 2
    (curve,) = (b.source for b in sections.training(found) if isinstance(b, Picture))
    colours = [line.get_color() for line in curve.axes[0].lines]
    assert colours.count(PALE) == 12 and len(colours) == QUERIES


def test_cost_data_and_commands(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    (path / "best_model_triplet_loss.pth").touch()
    found = setting(path)
    (run,) = found.runs
    blocks = sections.cost(found, {run: 3_530_000})
    (table,) = tables(blocks)
    assert list(table.rows[0]) == ["triplet", "2", "20", "12", "40", "3.53"]
    assert isinstance(blocks[-1], Details)
    card = {row[0]: row[1] for row in tables(sections.data_card(found))[0].rows}
    assert card["classes"] == "2" and card["root"] == "flowers" and card["protocol"] == "official"
    assert not any(key.startswith("synthetic") for key in map(str, card))
    blocks = sections.reproduce(found, {run: "flowerray train triplet"})
    assert blocks[0] == Commands("flowerray train triplet")
    assert any(row[0] == "torch" for row in tables(blocks)[0].rows)
    assert isinstance(sections.reproduce(found, {})[0], Note)
