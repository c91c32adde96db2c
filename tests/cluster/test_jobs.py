"""Each kind of job under `ray job submit`, on one head node.

A job's working directory is a copy that is deleted, so what it makes lies in FLOWERRAY_HOME.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flowerray.cluster.study import Study
from tests.cluster.heads import start_head, submit
from tests.cluster.studies import tune_words
from tests.cluster.test_fit import assert_whole_log
from tests.cluster.test_tune import children, history_is_whole
from tests.small import words

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


def test_train(job: Job, small_set: Path) -> None:
    options = words(small_set, resources__workers=1, resources__cpus_per_worker=1)
    run = job("train_triplet", *options)
    assert (run / "best_model_triplet_loss.pth").exists()
    assert_whole_log(run, 2)


def test_harden(job: Job, small_set: Path, small_run: Path) -> None:
    run = job("harden_triplet", *words(small_set, init=small_run, train__epochs=1))
    assert (run / "robust_model_triplet_loss.pth").exists()
    assert json.loads((run / "run.json").read_text())["harden"]["kind"] != "none"


def test_tune(job: Job, small_set: Path) -> None:
    """Four short trials, a champion."""
    study = job("tune_triplet", *tune_words(small_set, trials=4, confirm_seeds=1, max_concurrent=2))
    history_is_whole(Study.read(study), 4)
    assert len(children(study)) == 4
    assert json.loads((study / "result.json").read_text())["registered"]["version"] == "1"


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
