"""The RUN folder and the reporter that fills it."""

import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowerray.errors import UserError
from flowerray.files import previous
from flowerray.training import rundir
from flowerray.training.rundir import FolderReporter, NewRecords, Record, RunDir, Save


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A RUN as the driver leaves it before training."""
    run = RunDir(tmp_path / "run")
    run.create({"answer": 42})
    return run


def put(text: str) -> Save:
    """A `save` that writes one file."""

    def save(folder: Path) -> None:
        (folder / "state.pt").write_text(text)

    return save


def test_create_and_read(run: RunDir) -> None:
    assert run.read() == {"answer": 42}
    with pytest.raises(UserError, match="exists already"):
        run.create({})
    assert run.read() == {"answer": 42}


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunDir(Path("a")).run_json == tmp_path / "a" / "run.json"


def test_read_refuses_what_is_no_run(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a RUN folder"):
        RunDir(tmp_path / "other").read()
    run.run_json.write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        run.read()


def test_a_finished_run_says_what_came_out(run: RunDir) -> None:
    assert not run.finished
    with pytest.raises(UserError, match="has not finished: resume it first"):
        run.outcome()
    run.thresholds.write_text('{"threshold": 0.5, "best_epoch": 3}')
    assert run.finished and run.outcome() == {"threshold": 0.5, "best_epoch": 3}
    run.thresholds.write_text('{"threshold": "high"}')
    with pytest.raises(UserError, match="threshold: .* resume the run, which writes it again"):
        run.outcome()


def test_metrics_that_are_not_finite_are_json_and_come_back(run: RunDir) -> None:
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.5}
    run.append(1, 1, values)
    line = json.loads(run.metrics.read_text(), parse_constant=pytest.fail)
    assert line["metrics"] == {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 0.5}
    with run.metrics.open("a") as file:  # as 0.1.0 wrote it
        file.write(json.dumps({"step": 2, "epoch": 1, "time": 0, "metrics": values}) + "\n")
    for record in run.records():
        assert str(record["metrics"]) == str(values)


@pytest.mark.parametrize(
    "line",
    ["[]", "null", "7", "{}", '{"step": 1, "epoch": 1, "time": 1, "metrics": []}', "[" * 20_000,
     '{"step": 1, "epoch": 1, "time": 1, "metrics": {"a": "much"}}',
     '{"step": "x", "epoch": 1, "time": 1, "metrics": {}}'],
    ids=lambda line: line[:50],
)  # fmt: skip
def test_lines_that_are_no_records_are_left_out(run: RunDir, line: str) -> None:
    run.metrics.write_text(f"{line}\n")
    assert run.records() == [] == NewRecords(run)()
    run.note({"test/recall_at_1": 1.0})  # what was measured is kept all the same
    assert [(r["step"], r["metrics"]) for r in run.records()] == [(0, {"test/recall_at_1": 1.0})]


def test_only_new_records_are_read(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at all of them at each epoch took time by the square of its length."""
    starts: list[int] = []
    whole = rundir.read_records

    def watched(path: Path, start: int = 0) -> Iterator[tuple[Record, int]]:
        starts.append(start)
        return whole(path, start)

    monkeypatch.setattr(rundir, "read_records", watched)
    sizes = [0]
    for step in range(1, 5):
        run.append(step, 1, {"loss": 1 / step})
        sizes.append(run.metrics.stat().st_size)
        assert len(run.records()) == step == len(run.series("loss"))
    assert sorted(set(starts)) == sizes
    run.metrics.write_text(run.metrics.read_text().replace('"epoch": 1', '"epoch": 2'))
    assert {record["epoch"] for record in run.records()} == {2}, "rewritten at the same length"


def test_metrics_are_read_back_without_a_torn_last_line(run: RunDir) -> None:
    reporter = FolderReporter(run.path)
    assert run.records() == []
    reporter.report(2, 1, {"train/loss": 0.5})
    reporter.report(4, 1, {"train/loss": 0.25, "train/lr": 0.1})
    reporter.report(4, 1, {"val/map_at_r": 0.75})
    with run.metrics.open("a") as file:
        file.write('{"step": 5, "epo')
    assert [(r["step"], r["epoch"]) for r in run.records()] == [(2, 1), (4, 1), (4, 1)]
    assert run.series("train/loss") == [(2, 0.5), (4, 0.25)]
    assert run.series("val/map_at_r") == [(4, 0.75)] and run.series("nothing") == []
    assert all(r["time"] > 1.7e9 for r in run.records())


def test_a_record_that_a_full_disk_cut_costs_itself_alone(run: RunDir) -> None:
    reporter = FolderReporter(run.path)
    reporter.report(2, 1, {"train/loss": 0.5})
    with run.metrics.open("a") as file:
        file.write('{"step": 3, "epo')
    reporter.report(4, 1, {"train/loss": 0.25})
    assert run.series("train/loss") == [(2, 0.5), (4, 0.25)]
    assert [record["step"] for record in NewRecords(run)()] == [2, 4]


def test_rewind_drops_what_came_after_the_checkpoint(run: RunDir) -> None:
    reporter = FolderReporter(run.path)
    for step in (1, 2, 3, 4):
        reporter.report(step, 1, {"train/loss": 1 / step})
    FolderReporter(run.path, rank=1, world=2).rewind(0)
    assert len(run.records()) == 4
    reporter.rewind(2)
    assert [r["step"] for r in run.records()] == [1, 2]
    with run.metrics.open("a") as file:
        file.write('{"half')
    reporter.rewind(2)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2]


def test_checkpoints_and_their_fallback(run: RunDir) -> None:
    reporter = FolderReporter(run.path)
    assert reporter.restore() is None
    reporter.report(1, 1, {}, put("one"), best=True)
    assert not run.metrics.exists()
    reporter.report(2, 1, {"a": 1.0}, put("two"))
    assert reporter.restore() == run.last
    assert (run.last / "state.pt").read_text() == "two"
    assert (run.best / "state.pt").read_text() == "one"
    run.last.rename(previous(run.last))  # a kill between the two renames
    folder = reporter.restore()
    assert folder is not None and (folder / "state.pt").read_text() == "two"


def test_a_failing_save_keeps_the_last_checkpoint(run: RunDir) -> None:
    reporter = FolderReporter(run.path)
    reporter.report(1, 1, {}, put("one"))

    def fails(folder: Path) -> None:
        (folder / "state.pt").write_text("half")
        raise OSError("disk full")

    with pytest.raises(UserError, match="no longer be written .disk full.: make room there"):
        reporter.report(2, 1, {}, fails)
    assert (run.last / "state.pt").read_text() == "one"
    assert [folder.name for folder in run.last.parent.iterdir()] == ["last"]


def test_what_a_killed_save_left_is_removed_and_the_previous_one_is_found(run: RunDir) -> None:
    reporter = FolderReporter(run.path)
    reporter.report(1, 1, {}, put("one"), best=True)
    (run.last.parent / ".last.abc").mkdir()
    (run.last.parent / ".best.abc").mkdir()
    run.best.rename(previous(run.best))  # killed between the two renames
    reporter.rewind(1)
    left = sorted(folder.name for folder in run.last.parent.iterdir())
    assert left == [".best.previous", "last"]
    assert run.newest(run.best) == previous(run.best)
    assert run.newest(run.last) == run.checkpoint() == run.last


def test_only_rank_0_writes(run: RunDir) -> None:
    FolderReporter(run.path, rank=1, world=2).report(1, 1, {"a": 1.0}, put("x"), best=True)
    assert [file.name for file in run.path.iterdir()] == ["run.json"]


def test_a_worker_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="worker 3 does not see .* all nodes share"):
        FolderReporter(tmp_path / "elsewhere", rank=3, world=4).restore()


def test_an_attempt_that_was_replaced_writes_nothing_more(run: RunDir) -> None:
    """A paused machine goes on after its work was given to another."""
    first = FolderReporter(run.path)
    assert first.restore() is None
    first.report(1, 1, {"a": 1.0}, put("x"), best=True)
    second = FolderReporter(run.path)
    assert second.restore() == run.last
    second.report(2, 1, {"a": 2.0}, put("y"), best=True)

    def everything() -> dict[str, bytes]:
        return {str(f): f.read_bytes() for f in run.path.rglob("*") if f.is_file()}

    before = everything()
    for write in (
        lambda: first.report(3, 1, {"a": 3.0}),
        lambda: first.report(3, 1, {}, put("z")),
        lambda: first.rewind(1),
    ):
        with pytest.raises(UserError, match="goes on in another worker"):
            write()
    assert everything() == before
    second.report(3, 1, {"a": 3.0}, put("z"))
    assert [r["step"] for r in run.records()] == [1, 2, 3]


def test_an_attempt_that_is_replaced_while_it_saves_leaves_the_other_s_checkpoint(
    run: RunDir,
) -> None:
    first, second = FolderReporter(run.path), FolderReporter(run.path)
    first.restore()

    def slowly(folder: Path) -> None:
        second.restore()
        second.report(5, 1, {}, put("new"), best=True)
        put("old")(folder)

    for best in (False, True):
        with pytest.raises(UserError, match="goes on in another worker"):
            first.report(4, 1, {}, slowly, best=best)
        for kept in (run.last, run.best):
            assert (kept / "state.pt").read_text() == "new"
        first, second = second, FolderReporter(run.path)


def test_new_records_are_read_once_and_whole(run: RunDir) -> None:
    reporter, new = FolderReporter(run.path), NewRecords(run)

    def steps() -> list[int]:
        return [record["step"] for record in new()]

    assert steps() == []
    for step in (1, 2, 3):
        reporter.report(step, 1, {"train/loss": 1 / step})
    whole = run.metrics.read_text()
    assert steps() == [1, 2, 3] and steps() == []
    run.metrics.write_text(whole + '{"step": 4, "epoch": 1, ')
    assert steps() == []
    with run.metrics.open("a") as file:
        file.write('"metrics": {}}\n')
    assert steps() == [4] and steps() == []
    run.metrics.write_text(whole.splitlines(keepends=True)[0])  # a resume cut it
    assert steps() == []
    reporter.report(2, 1, {"train/loss": 0.25})
    assert steps() == [2]
    reporter.report(5, 1, {"a_longer_name_of_a_metric": 0.123456789})
    run.metrics.write_text(whole + whole)  # cut and grown again between two looks
    assert steps()[-1] == 3


def test_a_checkpoint_may_be_written_beside_the_training(run: RunDir) -> None:
    """While one is written, a newer one takes the place of those that wait; the best stays."""
    reporter, go_on, order = FolderReporter(run.path), threading.Event(), list[str]()

    def named(name: str) -> Save:
        def save(folder: Path) -> None:
            assert go_on.wait(10)
            order.append(name)
            put(name)(folder)

        return save

    for step, (name, best) in enumerate(
        [("first", True), ("old", False), ("better", True), ("best", True), ("last", False)], 1
    ):
        reporter.report(step, 1, {"a": 1.0}, named(name), best, beside=True)
        if step == 1:
            while reporter._behind.last is not None:  # until it is being written
                time.sleep(0.001)
    assert run.records()[-1]["step"] == 5 and run.checkpoint() is None
    go_on.set()
    reporter.wait()
    assert order == ["first", "best", "last"]
    assert (run.best / "state.pt").read_text() == "best"
    assert (run.last / "state.pt").read_text() == "last"


def test_what_cannot_be_written_beside_is_said(run: RunDir) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    reporter = FolderReporter(run.path)
    reporter.report(1, 1, {}, full, beside=True)
    with pytest.raises(UserError, match="can no longer be written"):
        reporter.wait()
    reporter.report(2, 1, {}, put("x"), best=True, beside=True)
    reporter.wait()
    assert (run.last / "state.pt").read_text() == (run.best / "state.pt").read_text() == "x"
