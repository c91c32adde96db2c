"""A kill at any moment of a checkpoint's write leaves a RUN that goes on as if nothing had been."""

import shutil
from pathlib import Path

from flowerray.training.rundir import FolderReporter, RunDir, Save
from tests.killed import killed_at


def put(text: str) -> Save:
    """A checkpoint of two files."""

    def save(folder: Path) -> None:
        for name in ("state.pt", "run.json"):
            (folder / name).write_text(text)

    return save


def checkpoints(run: RunDir) -> dict[str, str]:
    """The text of the newest `last` and `best`; each of one kind."""
    found = {}
    for place in (run.last, run.best):
        newest = run.newest(place)
        assert newest is not None
        first, second = ((newest / name).read_text() for name in ("state.pt", "run.json"))
        assert first == second
        found[place.name] = first
    return found


def test_a_kill_at_any_moment_of_a_report(tmp_path: Path) -> None:
    base = RunDir(tmp_path / "run")
    base.create({"method": {"name": "triplet"}})
    begun = FolderReporter(base.path)
    begun.restore()
    begun.report(1, 1, {"a": 1.0}, put("1"), best=True)
    seen = []
    for event in range(1, 300):
        run = RunDir(shutil.copytree(base.path, tmp_path / f"run-{event}"))

        def work(run: RunDir = run) -> None:
            reporter = FolderReporter(run.path)
            reporter.restore()
            reporter.rewind(int(checkpoints(run)["last"]))
            if len(run.records()) < 2:
                reporter.report(2, 2, {"a": 2.0}, put("2"), best=True)

        killed = killed_at(event, run.path, work)
        seen.append(checkpoints(run))
        work()
        assert checkpoints(run) == {"last": "2", "best": "2"}, event
        assert [record["step"] for record in run.records()] == [1, 2]
        assert not killed or len(list((run.path / "checkpoints").iterdir())) == 2
        if not killed:
            break
    assert not killed
    states = [found["last"] + found["best"] for found in seen]
    assert states == sorted(states) and set(states) == {"11", "12", "22"}  # best is written first
    assert len(states) > 20
