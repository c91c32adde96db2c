"""A trial from the worker's side, without Ray: what it tells, and what its failures are."""

from pathlib import Path
from typing import Any

import pytest
import torch

from flowerray.errors import UserError
from flowerray.training.progress import DivergedError, Progress, note_epoch
from flowerray.training.rundir import FolderReporter, RunDir
from flowerray.tuning.trial import TrialReporter, history, outcome_of, story
from tests.small import small, with_hardening
from tests.tuning.studies import pretend

OBJECTIVES = ["val/map_at_r"]


def asked(folder: RunDir) -> dict[str, Any]:
    """What Ray Tune gives a trial."""
    return {"folder": str(folder.path), "objectives": OBJECTIVES, "epochs": 3, "scheduled": 0.0}


def a_run(tmp_path: Path) -> RunDir:
    folder = RunDir(tmp_path / "run")
    folder.create(small(tmp_path, epochs=3).to_dict())
    return folder


def test_a_trial_stands_where_its_best_checkpoint_stands(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    pretend(folder, [0.2, 0.5, 0.4], done=True)
    assert history(folder, OBJECTIVES) == [
        {"epoch": 1, "images": 72, "val/map_at_r": 0.2},
        {"epoch": 2, "images": 144, "val/map_at_r": 0.5},
        {"epoch": 3, "images": 216, "val/map_at_r": 0.5},
    ]
    assert story(folder, OBJECTIVES).images == 18 * 12
    with pytest.raises(UserError, match="reports no finite val/adversarial_recall_at_1"):
        history(folder, [*OBJECTIVES, "val/adversarial_recall_at_1"])


def test_a_trial_stands_where_equal_attacked_figures_are_told_apart(tmp_path: Path) -> None:
    """Tuning is told of the checkpoint that the training keeps."""
    folder = RunDir(tmp_path / "run")
    folder.create(with_hardening(small(tmp_path, epochs=3), kind="pgd").to_dict())
    reporter, progress = FolderReporter(folder.path), Progress()
    selection = "val/adversarial_recall_at_1"
    for epoch, map_at_r in enumerate((0.2, 0.5, 0.4), start=1):
        metrics = {selection: 0.0, "val/map_at_r": map_at_r}
        note_epoch(progress, metrics, selection)
        reporter.report(epoch, epoch, metrics | {"epoch/seconds": 1.0})
    found = history(folder, [selection, "val/map_at_r"])
    assert [standing["val/map_at_r"] for standing in found] == [0.2, 0.5, 0.5]
    assert progress.best_epoch == 2


def test_the_last_epoch_is_told_once_the_model_is_there(tmp_path: Path) -> None:
    folder, told = a_run(tmp_path), list[dict[str, Any]]()
    reporter = TrialReporter(asked(folder), told.append)
    assert reporter.restore() is None
    for epoch, value in enumerate([0.2, 0.5, 0.4], start=1):
        reporter.report(6 * epoch - 3, epoch, {"train/loss": 1.0})
        reporter.report(6 * epoch, epoch, {"epoch/seconds": 1.0, "val/map_at_r": value})
    assert [(t["epoch"], t["val/map_at_r"]) for t in told] == [(1, 0.2), (2, 0.5)]
    assert len(folder.series("trial/start_seconds")) == 1
    assert len(folder.series("trial/report_seconds")) == 3


def test_a_first_try_that_was_cut_off_leaves_no_trace(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    for _ in range(2):
        reporter = TrialReporter(asked(folder), lambda _: None)
        assert reporter.restore() is None
        reporter.report(2, 1, {"train/loss": 1.0})
    assert [r["step"] for r in folder.records()] == [0, 2]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DivergedError("the loss became nan at step 3."), "the loss became nan at step 3"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "out of memory"),
        (UserError("the training workers failed: CUDA out of memory."), "out of memory"),
        (MemoryError(), "out of memory"),
    ],
)
def test_a_failure_is_told_as_the_worst_value(
    error: Exception, reason: str, tmp_path: Path
) -> None:
    folder = a_run(tmp_path)
    pretend(folder, [0.7], done=False)

    def training() -> None:
        raise error

    found = outcome_of(folder, OBJECTIVES, training)
    assert found == {"epoch": 1, "images": 0, "val/map_at_r": 0.0, "failed": reason}


@pytest.mark.parametrize("error", [OSError(28, "No space left"), UserError("no RUN folder here.")])
def test_what_the_configuration_is_not_to_blame_for_is_a_fault(
    error: Exception, tmp_path: Path
) -> None:
    folder = a_run(tmp_path)

    def training() -> None:
        raise error

    found = outcome_of(folder, OBJECTIVES, training)
    assert found["fault"] is True and found["failed"] == str(error).rstrip(".")


def test_a_collapse_is_a_failure(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    pretend(folder, [0.3, 0.2, 0.1], done=True, spread=0.01)
    found = outcome_of(folder, OBJECTIVES, lambda: None)
    assert found["val/map_at_r"] == 0.0 and "collapsed" in found["failed"]
    assert "fault" not in found


def test_a_finished_trial_is_not_trained_again(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    pretend(folder, [0.2, 0.5, 0.4], done=True)

    def training() -> None:
        raise AssertionError("it is trained already")

    found = outcome_of(folder, OBJECTIVES, training)
    assert found == {"epoch": 3, "images": 216, "val/map_at_r": 0.5}
