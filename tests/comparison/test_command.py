"""The comparison: one budget for all, statistics against the functions that make them, resuming."""

import json
import os
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowerray.cli import dispatch
from flowerray.cluster import tasks as many
from flowerray.comparison import command as command
from flowerray.comparison.command import compare, read_options
from flowerray.comparison.pictures import comparison_table
from flowerray.comparison.plan import CompareConfig
from flowerray.data.source import DataConfig
from flowerray.errors import UserError
from flowerray.files import only_driver, read_json
from flowerray.rendered.synthetic import SyntheticConfig, synthesize
from flowerray.show.interval import words
from flowerray.statistics import mean_interval, paired_difference
from tests.comparison.compared import ROWS, config


@pytest.fixture(scope="module")
def eight_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many as `disjoint` trains on."""
    config = SyntheticConfig(classes=8, scale=0.01, size=48)
    out = tmp_path_factory.mktemp("data") / "eight"
    return synthesize(out, config, progress=False, processes=1)


# --- statistics -----------------------------------------------------------------------------------


def fake(rng: np.random.Generator, recall: float) -> dict[str, Any]:
    """The record of an evaluation with 300 queries, and 3 with nothing to find."""
    hit = rng.random(303) < recall
    return {
        "metrics": {"num_queries": 300},
        "gallery": "train",
        "queries": [str(q) for q in range(303)],
        "per_query": {
            "hit": hit.astype(int).tolist(),
            "average_precision": (rng.random(303) * hit).tolist(),
            "num_relevant": [0] * 3 + [10] * 300,
        },
    }


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Trainings and evaluations are made up; gives the record of each name."""
    rng = np.random.default_rng(0)
    recall = {"cross": 0.8, "center": 0.8, "siamese": 0.85, "triplet": 0.9}
    found: dict[str, dict[str, Any]] = {}

    def trained(folder: Path, *more: Any) -> dict[str, Any]:
        return found.setdefault(folder.name, fake(rng, recall[folder.name.split("-")[1]]))

    def frozen(record: dict[str, Any], *more: Any) -> dict[str, Any]:
        return found.setdefault(f"{record['protocol']}-frozen", record)

    def evaluate(_: Any, data: DataConfig, *more: Any) -> dict[str, Any]:
        return {**fake(rng, 0.5), "protocol": data.protocol}

    monkeypatch.setattr(command, "evaluate_frozen", evaluate)
    monkeypatch.setattr(command, "as_record", frozen)
    monkeypatch.setattr(command, "record_of", trained)
    cost = {"images": 12_240, "seconds": 130.4, "epochs": 12}
    monkeypatch.setattr(command, "train_many", lambda runs, **_: [cost] * len(runs))
    monkeypatch.setattr(command.sync, "send", lambda *_: True)
    return found


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What MLflow would get at the end."""
    calls: list[Any] = []
    monkeypatch.setattr(command.sync, "log_folder", lambda *words: calls.append(words))
    return calls


def test_the_results_are_those_of_the_statistics(
    measured: dict[str, dict[str, Any]],
    eight_classes: Path,
    tmp_path: Path,
    logged: list[Any],
) -> None:
    out = tmp_path / "out"
    content = compare(config(eight_classes, seeds=5), out, quiet=True)
    assert read_json(out / "compare.json") == content
    assert (out / "compare.png").exists()
    assert content["notes"] == [] and content["budget"]["images"] == 80
    for protocol in ("official", "disjoint"):
        found = content["protocols"][protocol]
        assert list(found["rows"]) == ["frozen", *ROWS] and found["queries"] == 300

        def scores(row: str, name: str, protocol: str = protocol) -> np.ndarray:
            keys = [f"{protocol}-frozen"] if row == "frozen" else [
                f"{protocol}-{row}-seed{s}" for s in range(5)
            ]  # fmt: skip
            return np.stack([measured[key]["per_query"][name][3:] for key in keys]).astype(float)

        row = found["rows"]["siamese"]
        ci = mean_interval(scores("siamese", "hit"))
        assert (row["recall_at_1"]["mean"], row["recall_at_1"]["low"]) == (ci.mean, ci.low)
        ci = mean_interval(scores("frozen", "average_precision")[0])
        assert found["rows"]["frozen"]["map_at_r"]["high"] == ci.high
        assert (row["images"], row["seconds"]) == (12_240, 130.4)

        names = [(pair["second"], pair["first"]) for pair in found["pairs"]]
        assert names == list(combinations(["frozen", *ROWS], 2))
        for pair in (found["pairs"][0], found["pairs"][-1]):
            test = paired_difference(scores(pair["first"], "hit"), scores(pair["second"], "hit"))
            assert pair["recall_at_1"]["mean"] == test.mean > 0
            assert pair["recall_at_1"]["p_value"] == test.p_value
        p = {(q["first"], q["second"]): q["recall_at_1"] for q in found["pairs"]}
        assert all(q["p_holm"] >= q["p_value"] for q in p.values())
        assert p["triplet", "frozen"]["p_holm"] < 0.05 < p["center", "cross-entropy"]["p_holm"]

    ((folder, _, metrics),) = logged
    mean = content["protocols"]["disjoint"]["rows"]["triplet"]["map_at_r"]["mean"]
    assert folder == out and metrics["disjoint/triplet/map_at_r"] == mean
    assert len(metrics) == 2 * 5 * 2


def test_the_table_fits_and_shows_every_number(
    measured: dict[str, dict[str, Any]], eight_classes: Path, tmp_path: Path, logged: list[Any]
) -> None:
    content = compare(config(eight_classes, seeds=1), tmp_path / "out", quiet=True)
    text = comparison_table(content)
    assert (tmp_path / "out" / "compare.txt").read_text() == text + "\n"
    assert max(map(len, text.splitlines())) <= 80
    assert "disjoint: 300 test queries, gallery train" in text
    lines = text.splitlines()
    row = content["protocols"]["official"]["rows"]["triplet"]
    assert json.dumps(content, allow_nan=False)
    line = next(found for found in lines if found.startswith("triplet  "))
    assert words(row["recall_at_1"]) in line and words(row["map_at_r"]) in line
    assert line.split()[-2:] == ["12,240", "130"]
    pair = content["protocols"]["official"]["pairs"][-1]["recall_at_1"]
    shown = next(line for line in lines if line.startswith("triplet - siamese")).split()
    assert shown[3] == f"{pair['mean']:+.3f}" and shown[-1] == f"{pair['p_holm']:.2g}"
    assert lines[-1].startswith("note      1 seeds are few")


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["all", "head"])
def test_an_interrupted_comparison_is_resumed(
    trained: str,
    small_set: Path,
    small_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    words = f"""--data.root {small_set} --embedder.backbone test_efficientnet
        --embedder.weights none --embedder.image-size 32 --embedder.dim 16
        --train.classes-per-batch 2 --train.images-per-class 4 --train.precision fp32
        --images 40 --seeds 1 --protocols official --cpus {os.cpu_count()}
        --embedder.train {trained} --data.views 2""".split()

    # A fresh database and four logged models would take most of the test's time.
    database = small_run.parent / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    monkeypatch.setattr("flowerray.tracking.registry.log_model", lambda *_: "models:/none")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "evaluate_frozen", interrupted)
        assert dispatch(["compare", *words, "--out", str(out), "--json"]) == 130
    assert json.loads((out / "mlflow.json").read_text())["finished"] == "KILLED"
    assert len(list(out.glob("runs/*/thresholds.json"))) == 4
    capsys.readouterr()
    assert dispatch(["compare", *words, "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert dispatch(["compare", "--resume", str(out), "--images", "90"]) == 2
    assert "other options: images differ" in capsys.readouterr().err

    monkeypatch.setattr(many, "train_one", None)  # nothing is trained again
    assert read_options(out).cpus == os.cpu_count(), "a resuming command need not say it again"
    resumed = ["compare", "--resume", str(out), "--json"]
    with only_driver(out):
        assert dispatch(resumed) == 2
    assert "another process is at work" in capsys.readouterr().err
    assert dispatch(resumed) == 0
    shown = capsys.readouterr()
    content = json.loads(shown.out)
    assert json.loads((out / "compare.json").read_text()) == content
    rows = content["protocols"]["official"]["rows"]
    assert {row: values["images"] for row, values in rows.items()} == {
        "frozen": 0, **dict.fromkeys(ROWS, 40)
    }  # fmt: skip
    assert 0 < rows["triplet"]["recall_at_1"]["mean"] <= 1
    assert str(database) in shown.err.splitlines()[-1]

    from mlflow import MlflowClient

    state = json.loads((out / "mlflow.json").read_text())
    client = MlflowClient(state["tracking_uri"])
    study_run = client.get_run(state["run_id"])
    assert study_run.info.status == "FINISHED"
    assert "official/triplet/recall_at_1" in study_run.data.metrics
    names = {file.path for file in client.list_artifacts(state["run_id"])}
    assert {"compare.json", "compare.png", "options.json"} <= names
    child = json.loads((out / "runs" / "official-triplet-seed0" / "mlflow.json").read_text())
    run = client.get_run(child["run_id"])
    assert run.data.tags["mlflow.parentRunId"] == state["run_id"]
    assert run.data.metrics["test/recall_at_1"] == rows["triplet"]["recall_at_1"]["mean"]


def test_a_folder_without_a_comparison_cannot_be_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dispatch(["compare", "--resume", str(tmp_path)]) == 2
    assert "holds no comparison to resume" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_one_sentence(
    eight_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "out")
    words = ["compare", "--data.root", str(eight_classes), "--train.classes-per-batch", "2"]
    assert dispatch([*words, "--out", out]) == 2
    said = capsys.readouterr().err
    assert f"{out} cannot be written" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("said", "gpus", "images"),
    [([], 1.0, 12_000), (["--gpus", "0"], 0.0, 12_000), (["--embedder.train", "head"], 1, 48_000)],
)
def test_the_budget_follows_the_machine_and_what_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], gpus: float, images: int
) -> None:
    taken: list[tuple[float, int]] = []

    def stop(config: CompareConfig, *_: object, **__: object) -> None:
        taken.append((config.gpus, config.images))
        raise UserError("enough")

    monkeypatch.setattr("flowerray.comparison.command.compare", stop)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert dispatch(["compare", "--out", str(tmp_path / "out"), *said]) == 2
    assert taken == [(gpus, images)]
