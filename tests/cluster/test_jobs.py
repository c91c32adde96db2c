"""Each kind of job under `ray job submit`, on one head node.

A job's working directory is a copy that is deleted, so what it makes lies in FLOWERRAY_HOME.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flowerray.cli import dispatch
from flowerray.tuning.study import Study
from tests.cluster.test_driver import assert_whole_log
from tests.small import words
from tests.tuning.heads import start_head, submit
from tests.tuning.studies import tune_words
from tests.tuning.test_command import children, history_is_whole

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
Job = Callable[..., Path]


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    with start_head() as address:
        yield address


@pytest.fixture
def job(head: str, flowerray_home: Path) -> Job:
    """Submits a job and gives the one folder that it made."""

    def run(name: str, *words: object) -> Path:
        before = set((flowerray_home / "runs").glob("*/"))
        submit(head, flowerray_home, name, *words)
        made = set((flowerray_home / "runs").glob("*/")) - before
        (folder,) = (path for path in made if path.name != "mlartifacts")
        return folder

    return run


def test_harden(job: Job, small_set: Path, small_run: Path) -> None:
    """A hardened training on a worker of Ray Train's."""
    workers = {"resources__workers": 1, "resources__cpus_per_worker": 1}
    run = job("harden_triplet", *words(small_set, init=small_run, **workers))
    assert (run / "robust_model_triplet_loss.pth").exists()
    assert json.loads((run / "run.json").read_text())["harden"]["kind"] != "none"
    assert_whole_log(run, 2)


def test_a_study_ends_with_a_champion_that_can_be_evaluated(
    head: str,
    flowerray_home: Path,
    small_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Four short trials, two at a time."""
    out = tmp_path / "study"
    search = {"trials": 4, "confirm_seeds": 2, "max_concurrent": 2, "method__margin": 0.3}
    log = submit(head, flowerray_home, "tune_triplet", *tune_words(small_set, out=out, **search))
    said = log[log.index("starting") :].splitlines()
    paths = ("champion", "next", "review")
    told = [line for line in said if " cli.py" not in line and not line.startswith(paths)]
    assert len(told) > 12 and max(map(len, told)) <= 80
    assert "4 trials" in log and "View detailed results" not in log

    study = Study.read(out)
    assert "method.margin" not in study.knobs and "train.lr" not in study.knobs
    ended = history_is_whole(study, 4)
    runs = children(out)
    assert set(runs) == {f"trial-000{i}" for i in range(4)}
    for trial in ended:
        run = runs[f"trial-{study.trial_dir(trial).path.name}"]
        assert run.info.status == ("FINISHED" if trial.state.name == "COMPLETE" else "KILLED")
        assert run.data.metrics["val/map_at_r"] > 0 and "trial/start_seconds" in run.data.metrics
        assert run.data.params["method.miner"] == trial.params["method.miner"]
        assert not (study.trial_dir(trial).path / "checkpoints").exists()
    result = json.loads((out / "result.json").read_text())
    best = [name for name, run in runs.items() if run.data.tags.get("flowerray.best") == "true"]
    assert best == [f"trial-{result['best_trial']}"]
    assert {p.name for p in (out / "plots").iterdir()} >= {"history.png", "slice.png"}

    assert result["registered"]["version"] == "1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert dispatch(["evaluate", "models:/flowerray-triplet@champion", "--json"]) == 0
    champion = json.loads(capsys.readouterr().out)
    assert dispatch(["evaluate", result["champion"], "--json"]) == 0
    same = json.loads(capsys.readouterr().out)
    assert champion["map_at_r"] == same["map_at_r"] and champion["num_queries"] == 24


def test_explore(job: Job, small_set: Path) -> None:
    backbone = ["--embedder.backbone", "test_efficientnet", "--embedder.weights", "none"]
    out = job("explore", small_set, *backbone, "--embedder.image-size", 32)
    assert (out / "index.html").exists() and (out / "duplicates.csv").exists()


def test_backbones(job: Job, small_set: Path) -> None:
    models = ["--models", "test_resnet", "test_vit", "--random-weights", "--image-size", 32]
    out = job("backbones", *models, "--rounds", 1, "--cpus", 1, "--data.root", small_set)
    rows = json.loads((out / "backbones.json").read_text())["models"]
    assert {row["weights"] for row in rows} == {"random"} and (out / "pareto.png").exists()


def test_explain_and_report(
    job: Job, head: str, flowerray_home: Path, small_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(small_run, tmp_path / "run")
    submit(head, flowerray_home, "explain", run, "--max-images", 8, "--choose-images", 6)
    assert (run / "explanations" / "faithfulness.json").exists()
    out = job("report", run)
    assert "explanations" in (out / "report.html").read_text().lower()
