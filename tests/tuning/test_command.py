"""Searches through Ray: a whole study, a killed driver, a lost node."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from flowerray.cli import dispatch
from flowerray.tracking.state import EXPERIMENT, run_id, tracking_uri
from flowerray.training.checkpoint import load_export
from flowerray.training.rundir import RunDir
from flowerray.tuning import command as module
from flowerray.tuning.command import TrialResources, ask_for_nodes
from flowerray.tuning.searcher import make_scheduler
from flowerray.tuning.study import Study
from tests.cluster.test_driver import steps_done
from tests.small import small
from tests.tuning.heads import free_ports, wait_for
from tests.tuning.studies import make_study, pretend, run_trial, tune_words

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]
LONG = 40
"""Epochs of a trial that is interrupted; 240 steps."""


@pytest.fixture
def studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of studies, whose MLflow database `models:/` is looked up in."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return tmp_path


def children(study: Path) -> dict[str, Any]:
    """The MLflow runs of a study's trials, by name."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri(study))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    parent = run_id(study)
    runs = client.search_runs(
        [experiment.experiment_id],
        f"tags.`mlflow.parentRunId` = '{parent}' and tags.kind = 'trial'",
    )
    return {run.info.run_name: run for run in runs}


def history_is_whole(study: Study, trials: int) -> list[Any]:
    """Optuna's trials that ended; none is left open, each has its RUN folder."""
    optuna_study = study.optuna
    ended = study.ended()
    assert len(ended) == trials
    assert {t.state.name for t in optuna_study.trials} <= {"COMPLETE", "PRUNED", "FAIL"}
    names = [study.trial_dir(t).path.name for t in ended]
    assert len(set(names)) == trials
    assert {p.name for p in (study.folder / "trials").iterdir()} == set(names)
    return ended


def assert_whole_trial(run_dir: Path, epochs: int) -> None:
    """Each epoch of six steps is there once, in order."""
    validated = [(r["epoch"], r["step"]) for r in RunDir(run_dir).records()
                 if "epoch/seconds" in r["metrics"]]  # fmt: skip
    assert validated == [(e, 6 * e) for e in range(1, epochs + 1)]


def start(out: Path, small_set: Path, env: dict[str, str], **options: Any) -> Any:
    """A driver in a process of its own."""
    words = tune_words(small_set, out=out, confirm_seeds=0, pruner="none", **options)
    return subprocess.Popen(
        [sys.executable, "-c", "from flowerray.cli import main; main()", "tune", "triplet", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **env},
    )  # fmt: skip


def test_a_killed_driver_loses_nothing(
    studies: Path, small_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL while the second trial trains; --resume goes on from its checkpoint."""
    out = studies / "study"
    options = {"trials": 2, "train__epochs": LONG, "max_concurrent": 1}
    process = start(out, small_set, {}, **options)
    try:
        second = out / "trials" / "0001"
        wait_for(lambda: process.poll() is not None or steps_done(second) >= 15, 540)
        assert process.poll() is None, process.communicate()
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        _, left = psutil.wait_procs(family, timeout=20)
        for one in left:
            one.kill()
    finally:
        process.kill()
    before = {p: p.stat().st_mtime_ns for p in (out / "trials" / "0000").glob("*.pth")}
    assert before
    first_line = (second / "metrics.jsonl").read_text().splitlines()[0]
    reached = json.loads((second / "checkpoints/last/run.json").read_text())
    assert reached["train"]["epochs"] == LONG

    asked: list[int] = []

    def ask(resources: TrialResources, trials: int) -> None:
        asked.append(trials)
        ask_for_nodes(resources, trials)

    monkeypatch.setattr(module, "ask_for_nodes", ask)
    assert dispatch(["tune", "triplet", "--resume", str(out), "--max-concurrent", "1"]) == 0
    assert asked == [1, 0, 0], "at the start, when the last trial ended, at the end"
    study = Study.read(out)
    ended = history_is_whole(study, 2)
    assert [t.state.name for t in study.optuna.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert {p: p.stat().st_mtime_ns for p in before} == before, "a finished trial stays"
    assert (second / "metrics.jsonl").read_text().splitlines()[0] == first_line
    assert_whole_trial(second, LONG)
    assert load_export(next(second.glob("*.pth")))["run"]["train"]["epochs"] == LONG
    assert len(ended) == len(children(out)) == 2
    assert all(run.info.status == "FINISHED" for run in children(out).values())


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs, on ports of its own."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")
    agent, dashboard = free_ports(2)
    found = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": True,
            "dashboard_port": dashboard,
            "dashboard_agent_listen_port": agent,
            "object_store_memory": 100 * 2**20,
        },
    )
    yield found
    found.shutdown()


def test_a_lost_node_loses_nothing(cluster: Any, studies: Path, small_set: Path) -> None:
    """The trial's node dies in mid-trial; the trial goes on elsewhere, from its checkpoint."""
    out = studies / "study"

    def add() -> Any:
        (port,) = free_ports(1)
        return cluster.add_node(
            num_cpus=1, dashboard_agent_listen_port=port, object_store_memory=100 * 2**20
        )

    first = add()
    options = {"trials": 1, "train__epochs": LONG, "max_concurrent": 1}
    process = start(out, small_set, {"RAY_ADDRESS": cluster.address}, **options)
    try:
        trial = out / "trials" / "0000"
        wait_for(lambda: process.poll() is not None or steps_done(trial) >= 15, 540)
        assert process.poll() is None, process.communicate()
        add()
        cluster.remove_node(first, allow_graceful=False)
        stdout, stderr = process.communicate(timeout=540)
    finally:
        process.kill()
    assert process.returncode == 0, stderr
    assert "1 trials (1 complete" in stdout
    history_is_whole(Study.read(out), 1)
    assert_whole_trial(trial, LONG)
    assert len(RunDir(trial).series("trial/start_seconds")) == 1, "it went on, not anew"


def test_asha_knows_the_trials_of_an_earlier_sitting(tmp_path: Path) -> None:
    """No cluster: after two good trials a third, bad at the rung, is stopped at once."""
    study = make_study(tmp_path / "study", tmp_path, epochs=9)
    for _ in range(2):
        run_trial(study, [0.2, 0.5, 0.6])
    fresh = make_study(tmp_path / "fresh", tmp_path, epochs=9)
    for one, decision in ((study, "STOP"), (fresh, "CONTINUE")):
        scheduler = make_scheduler(one)
        trial = begun(scheduler, tmp_path / f"new-{decision}")
        assert scheduler.on_trial_result(None, trial, standing(1, 0.1)) == "CONTINUE"
        assert scheduler.on_trial_result(None, trial, standing(2, 0.1)) == decision


def begun(scheduler: Any, folder: Path) -> Any:
    """A trial with a RUN folder that the scheduler knows."""
    if not folder.exists():
        RunDir(folder).create(small(folder, epochs=9).to_dict())
    trial = SimpleNamespace(trial_id=folder.name, config={"folder": str(folder)})
    scheduler.on_trial_add(None, trial)
    return trial


def standing(epoch: int, value: float, **more: Any) -> dict[str, Any]:
    """What a trial reports after so many epochs of 6 steps of 12 images."""
    return {"epoch": epoch, "images": 72 * epoch, "val/map_at_r": value, **more}


def reaches(scheduler: Any, folder: Path, value: float) -> str:
    """What is decided on another trial with this value at the first rung, epoch 2."""
    trial = begun(scheduler, folder / str(value))
    decision: str = scheduler.on_trial_result(None, trial, standing(2, value))
    return decision


def test_asha_goes_by_both_objectives(tmp_path: Path) -> None:
    """No cluster: of two trials the robust one goes on, though the other is the cleaner one."""
    study = make_study(tmp_path / "study", tmp_path, epochs=9, objective="pareto")
    scheduler = make_scheduler(study)
    told = {
        "clean": [(0.6, 0.0), (0.61, 0.0), (0.62, 0.01)],
        "robust": [(0.5, 0.3)],
    }
    decisions = {}
    for name, standings in told.items():
        for number, (clean, attacked) in enumerate(standings):
            trial = begun(scheduler, tmp_path / f"{name}-{number}")
            result = standing(2, clean, **{"val/adversarial_recall_at_1": attacked})
            decisions[name] = scheduler.on_trial_result(None, trial, result)
            scheduler.on_trial_complete(None, trial, result)
    assert decisions["robust"] == "CONTINUE"


def test_asha_knows_what_a_trial_reached_that_was_cut_off(tmp_path: Path) -> None:
    """No cluster: it enters the rung with its value there, not with the first after the resume."""
    study = make_study(tmp_path / "study", tmp_path, epochs=9)
    folder = study.open_trial()[1]
    pretend(folder, [0.1, 0.2, 0.4, 0.45], done=False)
    scheduler = make_scheduler(study)
    trial = SimpleNamespace(trial_id="cut-off", config={"folder": str(folder.path)})
    scheduler.on_trial_add(None, trial)
    scheduler.on_trial_result(None, trial, standing(5, 0.5))
    assert [reaches(scheduler, tmp_path, value) for value in (0.15, 0.3)] == ["STOP", "CONTINUE"]


def test_asha_learns_nothing_from_a_fault(tmp_path: Path) -> None:
    """No cluster: a full disk is no value of the configuration."""
    scheduler = make_scheduler(make_study(tmp_path / "study", tmp_path, epochs=9))
    trial = begun(scheduler, tmp_path / "fault")
    result = standing(2, 0.0, failed="No space left", fault=True)
    assert scheduler.on_trial_result(None, trial, result) == "CONTINUE"
    scheduler.on_trial_complete(None, trial, result)
    assert [reaches(scheduler, tmp_path, value) for value in (0.3, 0.2)] == ["CONTINUE", "STOP"]
