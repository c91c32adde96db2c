"""What the benchmarks conclude from their raw figures."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowerray.cli import dispatch
from tests.benchmarks import flowers, robust, tables, tuned
from tests.small import words


def attacked(**right: str) -> dict[str, Any]:
    """The part of a record of robustness.json that is read; `e2="0110"`: who withstood 2/255."""
    worst = {name[1:]: {"right": hits} for name, hits in right.items()}
    return {"worst_case": worst, "audit": None}


def test_robust_models_are_paired_with_their_twins_query_by_query() -> None:
    pairs = [
        (attacked(e0="1110", e2="1100"), attacked(e0="1111", e2="0000")),
        (attacked(e0="1101", e2="1000"), attacked(e0="1110", e2="0001")),
    ]
    pairs[0][0]["audit"] = {"failed": ["floor"]}
    summary = robust.summary(pairs)
    found = summary["by_eps"]
    assert found["0"]["robust"]["values"] == [0.75, 0.75]
    assert found["0"]["difference"]["mean"] == pytest.approx(-0.125)
    assert found["2"]["robust"]["values"] == [0.5, 0.25]
    assert found["2"]["difference"]["mean"] == pytest.approx(0.25)
    assert found["2"]["difference"]["low"] < 0.25 < found["2"]["difference"]["high"]
    assert found["2"]["robust"]["low"] < 0.375 < found["2"]["robust"]["high"]
    assert summary["audits_failed"] == [["floor"], None]
    lines = robust.table({"triplet": summary}).splitlines()
    assert len(lines) == 5 and max(map(len, lines)) <= 80
    assert lines[2].startswith("triplet   2  0.375 [") and lines[2].count("[") == 3
    assert lines[3] == "triplet, 1. seed: AUDIT FAILED floor"
    assert lines[4] == "triplet, 2. seed: not audited"


def test_the_tuned_table_is_readable_in_80_columns() -> None:
    def row(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.01, "high": mean + 0.01, "p": 0.0004}

    side = {column: row(0.75) for column in tuned.METRICS}
    gain = {column: row(0.05) for column in tuned.METRICS}
    found = {"default": side, "trials": {"complete": 4, "stopped": 12, "failed": 0}}
    text = tuned.table({"siamese": {**found, "tuned": side, "gain": gain}, "triplet": found})
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("0.750 [0.740, 0.760] ") == 3 and "+0.050 [+0.040, +0.060] +0.050" in text
    assert text.splitlines()[-1].endswith("no trial of 16 was better than the default")


def test_figures_are_made_once_and_become_a_table(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flowers, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(flowers, "flowerray", lambda words, log: dispatch(words))
    said = ["--data.root", str(small_set), "--out", str(tmp_path / "runs"), "--size", "32"]
    said += ["--seeds", "0", "--rows", "frozen", "center", *words(small_set)[4:]]
    monkeypatch.setattr(sys, "argv", ["flowers", *said])
    flowers.main()
    file = tmp_path / "results" / "flowers102-official-32.json"
    content = json.loads(file.read_text())
    assert str(tmp_path) not in file.read_text() and str(small_set) not in file.read_text()
    found = content["rows"]["center"]["0"]
    hits_Q = flowers.unpacked(found["hits"], found["metrics"]["num_queries"])
    assert hits_Q.mean() == pytest.approx(found["metrics"]["recall_at_1"])
    assert 0 <= found["probe_accuracy"] <= 1 and found["metrics"]["pair_auc_hard"] >= 0
    monkeypatch.setattr(flowers, "one", None)  # nothing is made again
    flowers.main()
    page = "before\n<!-- table flowers102-official-32 -->\nold\n<!-- end -->\nafter\n"
    written = tables.with_tables(page)
    assert tables.with_tables(written) == written and "old" not in written
    assert f"| `center` | 1 | {hits_Q.mean():.3f} [" in written and written.endswith("after\n")


def test_hits_are_kept_a_bit_each() -> None:
    hits_Q = np.random.default_rng(0).random(77) < 0.6
    assert (flowers.unpacked(flowers.packed(hits_Q), 77) == hits_Q).all()


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_tables_of_the_pages_are_those_of_the_results(page: Path) -> None:
    text = page.read_text()
    assert tables.with_tables(text) == text, "uv run python -m tests.benchmarks.tables writes them"


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [("disjoint", ["disjoint"]), ("trainval", ["official", "--from"])],
)
def test_a_row_is_typed_as_a_user_would(
    protocol: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[str]] = []

    def trained(words: list[str], log: Path) -> None:
        folder = Path(words[words.index("--out") + 1])
        folder.mkdir()
        (folder / "thresholds.json").touch()
        made.append(words)

    monkeypatch.setattr(flowers, "flowerray", trained)
    options = argparse.Namespace(out=tmp_path, protocol=protocol, size=32, root=None)
    for _ in range(2):  # nothing is made again
        flowers.train(options, [], "center:init=head,train.ema=0.9", 4)
    split = [w[w.index("--data.protocol") + 1] if "--from" not in w else "--from" for w in made]
    assert split == expected
    assert made[0][-6:-2] == ["--init", "head", "--train.ema", "0.9"]
