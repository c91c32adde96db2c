"""One training through Ray Train: 1 and 2 workers, a killed worker, a diverged loss, Ctrl-C.

`small_run` trained the same options in this process, without Ray.
"""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
import torch
from torch import Tensor

from flowerray.cluster.driver import check_run, cpus_of_a_worker, train_run
from flowerray.cluster.session import ray_session
from flowerray.cluster.trainer import innermost
from flowerray.cluster.watch import Watcher
from flowerray.errors import UserError
from flowerray.text import typed
from flowerray.training.checkpoint import load_export
from flowerray.training.run import ResourcesConfig, Run
from flowerray.training.rundir import FolderReporter, RunDir
from tests.small import small, words
from tests.tuning.heads import wait_for

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[2]
LONG = 20
"""Epochs of a training that is interrupted; 120 steps."""


def with_workers(run: Run, workers: int) -> Run:
    """The run on Ray; one thread a worker, as the tests' own process has."""
    resources = ResourcesConfig(workers=workers, cpus_per_worker=1)
    return run.model_copy(update={"resources": resources})


def weights(run_dir: Path, method: str = "triplet_loss") -> dict[str, Tensor]:
    """The exported embedder's."""
    state = load_export(run_dir / f"best_model_{method}.pth")["embedder"]
    assert isinstance(state, dict)
    return state


def last_weights(run_dir: Path) -> dict[str, Tensor]:
    """Those of the last step, which need not be the best."""
    state = torch.load(run_dir / "checkpoints" / "last" / "state.pt", weights_only=True)["method"]
    assert isinstance(state, dict)
    return state


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def steps_done(run_dir: Path) -> int:
    records = RunDir(run_dir).records()
    return int(records[-1]["step"]) if records else 0


def assert_whole_log(run_dir: Path, epochs: int) -> None:
    """A record every 2 of the 6 steps of an epoch, and each epoch's, all once and in order."""
    records = RunDir(run_dir).records()
    losses = [r["step"] for r in records if "train/loss" in r["metrics"]]
    assert losses == list(range(2, 6 * epochs + 1, 2))
    validated = [(r["epoch"], r["step"]) for r in records if "val/map_at_r" in r["metrics"]]
    assert validated == [(e, 6 * e) for e in range(1, epochs + 1)]


@pytest.fixture(scope="module")
def long_run(small_set: Path, small_run: Path) -> Path:
    """An uninterrupted training of LONG epochs, without Ray."""
    out = small_run.parent / "long"
    train_run(small(small_set, epochs=LONG), out, quiet=True)
    return out


@pytest.fixture(scope="module")
def ray_up() -> Iterator[None]:
    """One Ray for the tests of this process; `fit` joins it."""
    with ray_session(min_cpus=2):
        yield


@pytest.mark.ray
def test_one_worker_equals_a_training_without_ray(
    ray_up: None, small_set: Path, small_run: Path
) -> None:
    out = small_run.parent / "one"
    summary = train_run(with_workers(small(small_set), 1), out, quiet=True)
    assert_equal(weights(out), weights(small_run))
    assert_whole_log(out, 2)
    assert summary["steps"] == 12 and Path(summary["model"]).parent == out
    assert (out / "plots" / "training.png").stat().st_size > 1000
    mine, other = (json.loads((d / "thresholds.json").read_text()) for d in (out, small_run))
    assert mine.pop("training").keys() == other.pop("training").keys()
    assert mine == other
    assert (out / "pairs.json").read_bytes() == (small_run / "pairs.json").read_bytes()


@pytest.mark.ray
def test_two_workers_train_as_one_does(ray_up: None, small_set: Path, small_run: Path) -> None:
    """float32 sums in another order, over 12 steps of AdamW whose rate is 1e-3; the exact test in
    float64 is tests/training/test_loop.py.
    """
    out = small_run.parent / "two"
    train_run(with_workers(small(small_set), 2), out, quiet=True)
    assert_whole_log(out, 2)
    a, b = last_weights(out), last_weights(small_run)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-3, msg=name)
    for (_, mine), (_, other) in zip(
        RunDir(out).series("train/loss"), RunDir(small_run).series("train/loss"), strict=True
    ):
        assert mine == pytest.approx(other, abs=1e-3)


@pytest.mark.ray
def test_a_killed_worker_is_replaced(
    ray_up: None, small_set: Path, small_run: Path, long_run: Path
) -> None:
    """SIGKILL in mid-run; the new worker goes on from the last checkpoint, to the same bits."""
    out = small_run.parent / "killed"
    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: steps_done(out) >= 15, 400)
        for process in psutil.Process().children(recursive=True):
            if any("RayTrainWorker" in word for word in process.cmdline()):
                killed.append(process.pid)
                process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    train_run(with_workers(small(small_set, epochs=LONG), 1), out, quiet=True)
    killer.join()
    assert len(killed) == 1
    assert_whole_log(out, LONG)
    assert_equal(last_weights(out), last_weights(long_run))
    assert_equal(weights(out), weights(long_run))


@pytest.mark.ray
def test_a_diverged_loss_reaches_the_user_without_retries(
    ray_up: None, small_set: Path, small_run: Path
) -> None:
    out = small_run.parent / "diverged"
    run = small(
        small_set, "center", lr=1.0, grad_clip=0, head_lr_factor=1e4, epochs=4, weight_decay=100
    )
    with pytest.raises(UserError, match=r"^the loss became nan at step \d+ \(epoch 1\): .*\.$"):
        train_run(with_workers(run, 1), out, quiet=True)
    state = json.loads((out / "mlflow.json").read_text())
    assert state["finished"] == "FAILED" and "became nan" in state["reason"]
    assert not list(out.glob("*.pth"))


@pytest.mark.ray
def test_ctrl_c_leaves_a_run_that_resumes_bit_equal(
    small_set: Path, small_run: Path, long_run: Path
) -> None:
    out = small_run.parent / "interrupted"
    options = words(
        small_set, out=out, train__epochs=LONG,
        resources__workers=1, resources__cpus_per_worker=1,
    )  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", "from flowerray.cli import main; main()", "train", "triplet"]
        + options,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: process.poll() is not None or steps_done(out) >= 15, 180)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert stdout == "" and "Traceback" not in stderr, stderr
    again = f"go on with: {typed(f'flowerray train triplet --resume {out}')}"
    assert stderr.splitlines()[-1] == f"flowerray train: interrupted; {again}"
    assert 15 <= steps_done(out) < 6 * LONG
    assert not list(out.glob("*.pth"))
    assert json.loads((out / "mlflow.json").read_text())["finished"] == "KILLED"

    train_run(small(small_set, epochs=LONG), out, resume=True, quiet=True)
    assert_whole_log(out, LONG)
    assert_equal(last_weights(out), last_weights(long_run))


def test_alarms_are_shown_wherever_the_workers_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in the metrics; what a worker prints stays in Ray's logs."""
    folder = RunDir(tmp_path / "run")
    folder.create({})
    metrics = {"alarm/collapse": 1.0, "val/mean_cosine": 0.99, "val/effective_rank": 1.5}
    monkeypatch.setattr("flowerray.cluster.watch.sync", Mock())
    with Watcher(quiet=True) as watcher, watcher.running(folder, {}, {}, steps=4):
        FolderReporter(folder.path).report(2, 1, metrics)
    said = capsys.readouterr().err
    assert "warning: the embedding has collapsed (mean cosine 0.99" in said


def test_the_first_line_of_a_workers_error_is_told() -> None:
    """Ray hands over the traceback as the message, and the last line of many errors is a hint."""

    class FailedError(Exception):
        worker_failures = {
            1: RuntimeError("Traceback ...\n  File x, line 1\nRuntimeError: Connection closed"),
            0: RuntimeError(
                "Traceback (most recent call last):\n"
                '  File "train.py", line 3, in step\n    loss.backward()\n    ^^^^^^^^^^^^^\n'
                "torch.AcceleratorError: CUDA error: device-side assert triggered\n"
                "Search for it in the documentation.\nCompile with TORCH_USE_CUDA_DSA.\n"
            ),
        }

    said = innermost(FailedError())
    assert said == "torch.AcceleratorError: CUDA error: device-side assert triggered"
    assert innermost(ValueError("a\nb")) == "a" and innermost(AssertionError()) == "AssertionError"


def test_an_out_that_cannot_be_written_is_found_before_the_work(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowerray.cluster.driver.check_run", lambda *_: pytest.fail("prepared"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        train_run(small(small_set), tmp_path / "file" / "run", quiet=True)


def test_no_worker_spans_two_nodes() -> None:
    two = [{"CPU": 8.0}, {"CPU": 8.0}]
    assert [cpus_of_a_worker(two, n, use_gpu=False) for n in (1, 2, 3, 16)] == [8, 8, 4, 1]
    gpus = [{"CPU": 4.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 6.0, "GPU": 1.0}]
    assert [cpus_of_a_worker(gpus, n, use_gpu=True) for n in (1, 2)] == [8, 6]
    for nodes, workers in ((two, 17), ([], 1), ([{"GPU": 1.0}], 1)):
        with pytest.raises(UserError, match="no room for .*`resources.cpus_per_worker` N"):
            cpus_of_a_worker(nodes, workers, use_gpu=False)
    with pytest.raises(UserError, match="with a GPU each"):
        cpus_of_a_worker(gpus, 3, use_gpu=True)


def test_synchronised_batchnorm_needs_gpus_that_may_be_a_clusters(
    small_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small(small_set)
    several = run.resources.model_copy(update={"workers": 2, "device": "auto"})
    embedder = run.embedder.model_copy(update={"freeze_bn": False})
    run = run.model_copy(update={"resources": several, "embedder": embedder})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "")  # which names none
    with pytest.raises(UserError, match="needs GPUs"):
        check_run(run, quiet=True)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")  # its driver's machine has none
    assert check_run(run, quiet=True)[1] > 0
