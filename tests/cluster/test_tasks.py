"""Several trainings at a time: skipped, continued, failed ones; in this process and on Ray."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowerray.cluster import tasks as many
from flowerray.cluster.session import ray_session
from flowerray.cluster.tasks import DivergedTrainingsError, reasons_of, run_tasks, train_many
from flowerray.errors import UserError
from flowerray.training.checkpoint import load_export
from flowerray.training.run import Run
from flowerray.training.rundir import FolderReporter, RunDir
from tests.small import small

LONG = 40
"""Epochs of a training that is interrupted; 240 steps."""


@pytest.fixture(autouse=True)
def one_database(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of `small_run`: a fresh one takes seconds to make."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{small_run.parent / 'mlflow.db'}")


def diverging(root: Path) -> Run:
    """A run whose loss becomes NaN after a few steps."""
    return small(
        root, "center", lr=1.0, grad_clip=0, head_lr_factor=1e4, weight_decay=100, epochs=4
    )


def weights(run_dir: Path) -> dict[str, Tensor]:
    state = load_export(next(run_dir.glob("*_model_*.pth")))["embedder"]
    assert isinstance(state, dict)
    return state


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def status(run_dir: Path) -> dict[str, Any]:
    content = json.loads((run_dir / "mlflow.json").read_text())
    assert isinstance(content, dict)
    return content


def test_trains_each_once_and_says_what_it_cost(
    small_set: Path, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [(small(small_set, seed=seed), tmp_path / f"seed{seed}") for seed in (0, 1)]
    first = train_many(runs, cpus=1, quiet=True, in_process=True, parent=tmp_path)
    assert [s["folder"] for s in first] == [str(path) for _, path in runs]
    assert first[0].keys() == {
        "folder", "model", "threshold", "best_epoch", "val_map_at_r", "epochs", "steps", "images",
        "seconds", "precision",
    }  # fmt: skip
    assert (first[0]["epochs"], first[0]["steps"], first[0]["images"]) == (2, 12, 12 * 3 * 4)
    assert first[0]["seconds"] > 0 and first[0]["val_map_at_r"] > 0
    assert_equal(weights(tmp_path / "seed0"), weights(small_run))
    assert first[0]["threshold"] != first[1]["threshold"]
    assert status(tmp_path / "seed1")["parent"] == str(tmp_path)
    assert status(tmp_path / "seed1")["finished"] == "FINISHED"

    # A driver that died between the export and MLflow; and nothing is trained again.
    note = tmp_path / "seed1" / "mlflow.json"
    note.write_text(json.dumps({**status(tmp_path / "seed1"), "finished": None}))
    monkeypatch.setattr(many, "run_tasks", None)
    assert train_many(runs, cpus=0.5, quiet=True, in_process=True, parent=tmp_path) == first
    assert status(tmp_path / "seed1")["finished"] == "FINISHED"


def test_an_interrupted_training_goes_on_where_it_stopped(
    small_set: Path, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting(FolderReporter):
        def report(self, step: int, *args: Any, **more: Any) -> None:
            super().report(step, *args, **more)
            if step == 8:
                raise KeyboardInterrupt

    runs = [(small(small_set), tmp_path / "a"), (small(small_set, seed=1), tmp_path / "b")]
    with monkeypatch.context() as patch:
        patch.setattr(many, "FolderReporter", Interrupting)
        with pytest.raises(KeyboardInterrupt):
            train_many(runs, cpus=1, quiet=True, in_process=True)
    assert status(tmp_path / "a")["finished"] == "KILLED"
    assert not (tmp_path / "b" / "metrics.jsonl").exists()
    train_many(runs, cpus=1, quiet=True, in_process=True)
    assert_equal(weights(tmp_path / "a"), weights(small_run))
    assert [s for s, _ in RunDir(tmp_path / "a").series("train/loss")] == list(range(2, 13, 2))


def test_a_failed_training_is_named_after_the_others_finished(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = tmp_path / "bad", tmp_path / "good"
    runs = [(diverging(small_set), bad), (small(small_set), good)]
    with pytest.raises(DivergedTrainingsError, match=r"^1 of 2 trainings failed.*nan") as caught:
        train_many(runs, cpus=1, in_process=True)
    assert "the loss became nan" in caught.value.reasons[bad]
    assert str(bad) in str(caught.value) and str(good) not in str(caught.value)
    assert str(caught.value).count("\n") == 0
    assert (good / "thresholds.json").exists() and not (bad / "thresholds.json").exists()
    assert status(bad)["finished"] == "FAILED"
    lines = capsys.readouterr().err.splitlines()
    assert "1 of 2  bad  failed: the loss became nan" in "\n".join(lines)
    assert lines[-1].startswith("2 of 2  good  loss ") and "val MAP@R" in lines[-1]


def test_a_reason_of_many_trainings_is_given_once() -> None:
    failures = {Path(f"/runs/{n}"): "no room." for n in range(40)} | {Path("/runs/x"): "nan"}
    assert reasons_of(failures) == "/runs/0 and 39 more (no room); /runs/x (nan)"


def test_a_folder_with_another_run_is_refused(small_set: Path, small_run: Path) -> None:
    with pytest.raises(UserError, match=r"other options \(train.lr differ\): choose another `out`"):
        train_many([(small(small_set, lr=1e-4), small_run)], cpus=1, quiet=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_too_few_gpus_are_refused(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would wait for them for ever; a cluster's may still be starting."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=r"^`gpus` 0.5: this machine has"):
        train_many([(small(small_set), tmp_path / "a")], cpus=1, gpus=0.5)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("cpus", "count", "address", "alone"),
    [(2, 3, None, True), (1, 3, None, False), (0.5, 1, None, True), (2, 1, "head:6379", False)],
)
def test_ray_is_started_only_where_it_helps(
    cpus: float,
    count: int,
    address: str | None,
    alone: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class StartedError(Exception):
        pass

    def start(*_: Any, **__: Any) -> Any:
        raise StartedError

    monkeypatch.setattr(many, "ray_session", start)
    monkeypatch.setattr(many, "cores", lambda: 2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    ended: list[tuple[int, Any]] = []
    calls = {n: (n,) for n in range(count)}
    with nullcontext() if alone else pytest.raises(StartedError):
        run_tasks(divmod, calls, lambda *found: ended.append(found), cpus=cpus)
    threads = max(1, int(cpus))
    assert ended == ([(n, divmod(n, threads)) for n in calls] if alone else [])


def test_a_call_that_fails_stops_no_other() -> None:
    ended: list[tuple[str, Any]] = []
    run_tasks(
        divmod, {"bad": ("x",), "good": (7,)}, lambda *found: ended.append(found), cpus=2,
        in_process=True,
    )  # fmt: skip
    assert [key for key, _ in ended] == ["bad", "good"]
    assert isinstance(ended[0][1], TypeError) and ended[1][1] == (3, 1)


@pytest.fixture(scope="module")
def ray_up() -> Iterator[None]:
    """One Ray for the tests of this process; `train_many` joins it."""
    with ray_session(min_cpus=2):
        yield


@pytest.mark.ray
def test_tasks_of_a_ray_train_what_this_process_would(
    ray_up: None,
    small_set: Path,
    small_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = [
        (small(small_set), tmp_path / "seed0"),
        (diverging(small_set), tmp_path / "bad"),
        (small(small_set, "center"), tmp_path / "center"),
        (small(small_set, classes_per_batch=40), tmp_path / "impossible"),
    ]
    with pytest.raises(UserError, match=r"^2 of 4 trainings failed") as caught:
        train_many(runs, cpus=1, parent=tmp_path)
    assert type(caught.value) is UserError, "not all of them diverged"
    with pytest.raises(DivergedTrainingsError):
        train_many(runs[:2], cpus=1, quiet=True)
    assert "the loss became nan" in str(caught.value) and "P = 40 classes" in str(caught.value)
    assert_equal(weights(tmp_path / "seed0"), weights(small_run))
    assert status(tmp_path / "seed0")["finished"] == "FINISHED"
    assert status(tmp_path / "bad")["finished"] == "FAILED"
    assert (tmp_path / "center" / "plots" / "training.png").stat().st_size > 1000
    lines = capsys.readouterr().err.splitlines()
    assert sum("of 3  seed0  loss " in line for line in lines) == 1, lines
    assert sum("of 3  bad  failed: the loss became nan" in line for line in lines) == 1, lines

    # What finished is not trained again: no Ray, same numbers.
    again = train_many([runs[0], runs[2]], cpus=1, quiet=True)
    assert [s["steps"] for s in again] == [12, 12]


@pytest.mark.ray
def test_ctrl_c_leaves_trainings_that_go_on(small_set: Path, tmp_path: Path) -> None:
    run = small(small_set, epochs=LONG)
    (tmp_path / "run.json").write_text(json.dumps(run.to_dict()))
    code = (
        "import json, signal, sys; from pathlib import Path\n"
        "from flowerray.training.run import Run\n"
        "from flowerray.cluster.tasks import train_many\n"
        # A shell that starts the tests in the background has the signal ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "out = Path(sys.argv[1])\n"
        "run = Run.from_dict(json.loads((out / 'run.json').read_text()))\n"
        "train_many([(run, out / 'a'), (run, out / 'b')], cpus=0.5)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE)
    folders = [tmp_path / "a", tmp_path / "b"]
    try:
        end = time.monotonic() + 300
        while any(len(RunDir(folder).records()) < 3 for folder in folders):
            assert process.poll() is None and time.monotonic() < end, "they did not start"
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert stderr.decode().splitlines()[-1] == "KeyboardInterrupt"
    steps = [RunDir(folder).records()[-1]["step"] for folder in folders]
    time.sleep(1)
    assert steps == [RunDir(folder).records()[-1]["step"] for folder in folders], "still training"
    for folder in folders:
        assert not (folder / "thresholds.json").exists()
        assert status(folder)["finished"] == "KILLED"
    train_many([(run, folders[0])], cpus=0.5, quiet=True)
    losses = [step for step, _ in RunDir(folders[0]).series("train/loss")]
    assert losses == list(range(2, 6 * LONG + 1, 2))
