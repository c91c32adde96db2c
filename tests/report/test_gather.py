"""Which runs are found, and which numbers may stand together."""

import json
import os
import shutil
from pathlib import Path

import pytest

from flowerray.errors import UserError
from flowerray.report.gather import find_runs, group, read_run
from flowerray.training.rundir import FolderReporter
from tests.report.runs import make_run


def test_runs_are_found_in_folders(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a")
    second = make_run(tmp_path / "study" / "b")
    (first / "checkpoints" / "best").mkdir(parents=True)
    (first / "checkpoints" / "best" / "run.json").write_text("{}")
    (tmp_path / "other").mkdir()
    assert find_runs([tmp_path]) == [first, second]
    assert find_runs([first, tmp_path, first]) == [first, second]
    compared = make_run(tmp_path / "runs" / "compare-1" / "runs" / "official-triplet-seed0")
    tried = make_run(tmp_path / "runs" / "tune-1" / "trials" / "0003")
    assert find_runs([tmp_path / "runs"]) == [compared, tried]
    with pytest.raises(UserError, match="holds none"):
        find_runs([tmp_path / "other"])


def labels(*paths: Path) -> list[list[tuple[str, list[int]]]]:
    settings = group([read_run(path) for path in paths])
    return [[(v.label, [e.seed for e in v.runs]) for v in s.variants] for s in settings]


def test_seeds_make_a_variant_and_options_part_them(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "1", seed=1),
        make_run(tmp_path / "0", seed=0),
        make_run(tmp_path / "m", margin=0.5),
        make_run(tmp_path / "r", robust=True),
        make_run(tmp_path / "s", "siamese"),
    ]
    assert labels(*runs) == [
        [
            ("siamese", [0]),
            ("triplet, margin 0.2", [0, 1]),
            ("triplet, margin 0.5", [0]),
            ("triplet robust (pgd)", [0]),
        ]
    ]


def test_a_copy_of_a_run_is_no_other_seed(tmp_path: Path) -> None:
    """A training repeats itself exactly: two of them would make an interval of no width."""
    first = make_run(tmp_path / "first", hits=0.5)
    again = make_run(tmp_path / "again", hits=0.5)
    other = make_run(tmp_path / "other", seed=1, hits=0.5)
    os.utime(again / "run.json", (2e9, 2e9))
    assert labels(first, again, other) == [[("triplet", [0, 1])]]
    (setting,) = group([read_run(path) for path in (again, first, other)])
    assert [run.folder.path for run in setting.runs] == [again, other]
    assert f"Left out, since another run has the same options and seed: {first}." in setting.notes
    (first / "evaluation").mkdir(exist_ok=True)
    # that one was measured once more
    measured = {"metrics": {}, "split": "val", "gallery": "train", "per_query": {}, "queries": []}
    (first / "evaluation" / "val.json").write_text(json.dumps(measured))
    (setting,) = group([read_run(path) for path in (again, first, other)])
    assert [run.folder.path for run in setting.runs] == [first, other]
    (first / "evaluation" / "val.json").unlink()
    (first / "best_model_triplet_loss.pth").touch()  # that one came to its end
    (setting,) = group([read_run(path) for path in (again, first, other)])
    assert [run.folder.path for run in setting.runs] == [first, other]


def test_the_copies_that_mlflow_keeps_are_no_runs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "one")
    shutil.copytree(run, tmp_path / "runs" / "mlartifacts" / "0123" / "artifacts")
    assert find_runs([tmp_path / "runs"]) == [run]


def test_a_run_from_before_hardening_is_of_the_same_variant(tmp_path: Path) -> None:
    old = make_run(tmp_path / "old", seed=0)
    text = (old / "run.json").read_text()
    start = text.index(',\n  "harden"')
    end = text.index("}", start) + 1
    (old / "run.json").write_text(text[:start] + text[end:])
    assert "harden" not in (old / "run.json").read_text()
    assert labels(old, make_run(tmp_path / "new", seed=1)) == [[("triplet", [0, 1])]]


def test_a_run_without_the_options_of_newer_versions_is_of_the_same_variant(tmp_path: Path) -> None:
    old, new = make_run(tmp_path / "old", seed=0), make_run(tmp_path / "new", seed=1)
    content = json.loads((old / "run.json").read_text())
    del content["train"]["images"], content["embedder"]["train"]
    (old / "run.json").write_text(json.dumps({**content, "flowerray": "0.1.0"}))
    assert labels(old, new) == [[("triplet", [0, 1])]]


def test_other_data_or_another_split_is_another_setting(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", fingerprint="one"),
        make_run(tmp_path / "b", fingerprint="two"),
        make_run(tmp_path / "c", fingerprint="one", root=tmp_path / "moved", seed=1),
    ]
    assert labels(*runs) == [[("triplet", [0, 1])], [("triplet", [0])]]
    settings = group([read_run(path) for path in runs])
    assert settings[0].title == "flowers: 2 classes, 1,234 images, protocol official"
    (runs[0] / "mlflow.json").unlink()  # without tags the data's options decide
    (runs[2] / "mlflow.json").unlink()
    assert len(labels(*runs)) == 3


def test_labels_never_collide(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", margin=0.3)
    text = (first / "run.json").read_text()
    runs = [first]
    for n in (1, 2):  # four options differ, so that the label leaves some out
        other = make_run(tmp_path / f"{n}", margin=0.4)
        changed = text.replace('"lr": 0.0001', f'"lr": 0.{n}').replace('"dim": 128', '"dim": 64')
        changed = changed.replace('"warmup_epochs": 1.0', f'"warmup_epochs": {n + 1}.0')
        changed = changed.replace('"margin": 0.3', '"margin": 0.4')
        (other / "run.json").write_text(changed.replace('"hue": 0.02', f'"hue": 0.{n}'))
        runs.append(other)
    (found,) = labels(*runs)
    names = [label for label, _ in found]
    assert len(names) == 3 == len(set(names)) and names[1].endswith("more"), names


def test_metrics_of_an_older_evaluation_are_taken_from_the_log(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    assert read_run(run).evaluations == {}
    for value in (0.5, 0.75):
        numbers = {"test/recall_at_1": value, "test/num_queries": 20.0, "test/num_gallery": 10.0}
        FolderReporter(run).report(20, 2, numbers)
    (record,) = read_run(run).evaluations.values()
    assert record["metrics"]["recall_at_1"] == 0.75 and "per_query" not in record


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run\.json"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="names no method"):
        read_run(tmp_path)
    run = make_run(tmp_path / "run")
    for text in ("[]", "{"):
        (run / "robustness.json").write_text(text)
        with pytest.raises(UserError, match="JSON"):
            read_run(run)
