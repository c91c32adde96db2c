"""The comparison: one budget for all, statistics against the functions that make them, resuming."""

import json
import os
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowerray.cli import dispatch
from flowerray.cluster import tasks as many
from flowerray.cluster.tasks import DivergedTrainingsError
from flowerray.comparison import command as command
from flowerray.comparison.command import compare, read_options
from flowerray.comparison.pictures import comparison_table
from flowerray.comparison.plan import CompareConfig, base_runs, plan
from flowerray.data.augment import AugmentConfig
from flowerray.data.source import DataConfig
from flowerray.errors import UserError
from flowerray.files import only_driver, read_json
from flowerray.model.embedder import EmbedderConfig
from flowerray.rendered.synthetic import SyntheticConfig, synthesize
from flowerray.show.interval import words
from flowerray.statistics import mean_interval, paired_difference
from flowerray.training.config import TrainConfig
from flowerray.training.harden import HardenConfig
from flowerray.training.run import Run, differences
from flowerray.training.rundir import RunDir
from tests.small import small

ROWS = ["cross-entropy", "center", "siamese", "triplet"]
TINY = EmbedderConfig(backbone="test_efficientnet", weights="none", image_size=32, dim=16)
BATCH = TrainConfig(classes_per_batch=2, images_per_class=4, precision="fp32")


def config(root: Path, **changes: Any) -> CompareConfig:
    """A comparison on `small_set`; 60 training images make 9 steps of 2 x 4 an epoch."""
    parts = {"data": DataConfig(root=root), "embedder": TINY, "train": BATCH, "images": 80}
    return CompareConfig(**{**parts, **changes})


@pytest.fixture(scope="module")
def eight_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many as `disjoint` trains on."""
    config = SyntheticConfig(classes=8, scale=0.01, size=48)
    out = tmp_path_factory.mktemp("data") / "eight"
    return synthesize(out, config, progress=False, processes=1)


def study(folder: Path, best: Run, trials: int = 16) -> Path:
    """What `flowerray tune` leaves; it was moved since."""
    RunDir(folder / "confirm" / "trial-0003-seed-1000").create(best.to_dict())
    result = {
        "champion": "/elsewhere/study/confirm/trial-0003-seed-1000",
        "trials": {"complete": trials - 3, "stopped": 2, "failed": 1},
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


# --- one budget -----------------------------------------------------------------------------------


def test_every_row_gets_the_same(small_set: Path) -> None:
    entries, trials, notes = plan(config(small_set, seeds=2))
    assert trials == 0 and notes == ["2 seeds are few: intervals are wide below 5."]
    names = [entry.name for entry in entries]
    both = ("official", "disjoint")
    assert names == [f"{p}-{row}-seed{s}" for p in both for row in ROWS for s in (0, 1)]
    for entry in entries:
        assert entry.run.embedder == TINY and entry.run.augment == AugmentConfig()
        assert entry.run.data.protocol == entry.protocol and entry.run.data.root == small_set
        assert entry.run.train.patience == 0
    assert {entry.run.train.images for entry in entries} == {80}
    runs = {entry.name: entry.run for entry in entries}
    first, second = runs["official-cross-entropy-seed0"], runs["official-center-seed0"]
    assert differences(first, second) == ["method.center_weight"]
    assert first.method.center_weight == 0 < second.method.center_weight  # type: ignore[attr-defined]
    a, b = runs["official-triplet-seed0"], runs["official-triplet-seed1"]
    assert differences(a, b) == ["train.seed"]


def test_tuned_configurations_come_from_the_studies(small_set: Path, tmp_path: Path) -> None:
    center, siamese, triplet = (small(small_set, m) for m in ("center", "siamese", "triplet"))
    center = center.model_copy(update={"method": center.method.model_copy(update={"scale": 12.0})})
    triplet = triplet.model_copy(
        update={
            "train": triplet.train.model_copy(update={"lr": 0.003, "epochs": 9, "patience": 2}),
            "embedder": triplet.embedder.model_copy(update={"dim": 64}),
        }
    )
    folders = {
        run.method_name: study(tmp_path / run.method_name, run)
        for run in (center, siamese, triplet)
    }
    whole = config(small_set, train=TrainConfig(), seeds=5, protocols=("official",), **folders)
    entries, trials, notes = plan(whole)
    assert trials == 16
    assert notes == ["triplet: its study's embedder.dim gave way to what all share."]
    base_runs(whole.model_copy(update={"protocols": ("disjoint",)}), notes)
    told = [note for note in notes if "was tuned on official, whose train and val hold" in note]
    assert len(told) == 3
    runs = {entry.row: entry.run for entry in entries}
    assert runs["triplet"].train.lr == 0.003 and runs["triplet"].train.images == 80
    assert runs["triplet"].train.patience == 0
    assert {run.embedder.dim for run in runs.values()} == {16}
    for row in ("center", "cross-entropy"):
        assert runs[row].method.scale == 12.0  # type: ignore[attr-defined]


def refused(small_set: Path, folder: Path) -> dict[str, Callable[[], CompareConfig]]:
    """What is no fair comparison, by a word of the sentence that says so."""
    runs = {name: small(small_set, name) for name in ("center", "siamese", "triplet")}
    counts = {"center": 16, "siamese": 16, "triplet": 20}
    good = {name: study(folder / name, run, counts[name]) for name, run in runs.items()}
    plain = {"train": TrainConfig()}

    def make(**changes: Any) -> Callable[[], CompareConfig]:
        return lambda: config(small_set, **changes)

    epochs = BATCH.model_copy(update={"epochs": 3})
    hard = runs["center"].model_copy(update={"harden": HardenConfig(kind="pgd")})
    later = runs["center"].model_copy(update={"init": folder / "before"})
    for name, run in (("hard", hard), ("later", later)):
        study(folder / name, run)
    even = {**good, "triplet": study(folder / "even", runs["triplet"])}
    return {
        "of `center` hardens": make(**{**even, "center": folder / "hard"}, **plain),
        "trained all and this": make(
            **even, embedder=TINY.model_copy(update={"train": "head"}), **plain
        ),
        "goes on from another": make(**{**even, "center": folder / "later"}, **plain),
        "`images`": make(train=epochs),
        "`protocols`: name|leave `data.protocol`": make(
            data=DataConfig(root=small_set, protocol="disjoint")
        ),
        "each protocol once": make(protocols=("official", "official")),
        "`siamese`, `triplet` too": make(center=good["center"], **plain),
        "unequal trials .*triplet 20": make(**good, **plain),
        "leave `train` options out": make(**good),
        "is a study of siamese": make(**{**good, "triplet": good["siamese"]}, **plain),
        "finished study: `flowerray tune center`": make(**{**good, "center": folder}, **plain),
    }


def test_unequal_budgets_are_refused(small_set: Path, tmp_path: Path) -> None:
    for sentence, make in refused(small_set, tmp_path).items():
        with pytest.raises(UserError, match=sentence) as caught:
            plan(make())
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError):
            compare(make(), tmp_path / "out", quiet=True)
        assert not (tmp_path / "out").exists()


def test_tuned_configurations_get_seeds_that_no_search_used(
    small_set: Path, tmp_path: Path
) -> None:
    def seeds(**studies: Path) -> list[int]:
        train = TrainConfig() if studies else BATCH
        made = config(small_set, seeds=2, protocols=["official"], train=train, **studies)
        entries, _, _ = plan(made)
        return sorted({entry.run.train.seed for entry in entries})

    studies = {
        name: study(tmp_path / name, small(small_set, name, classes_per_batch=2))
        for name in ("center", "siamese", "triplet")
    }
    assert seeds() == [0, 1]
    assert seeds(**studies) == [2000, 2001]
    chosen = RunDir(studies["siamese"] / "confirm" / "trial-0003-seed-1000")
    for seed, confirmed in ((2001, []), (1000, [2000, 2001])):
        run = small(small_set, "siamese", classes_per_batch=2, seed=seed)
        chosen.run_json.write_text(json.dumps(run.to_dict()))
        result = json.loads((studies["siamese"] / "result.json").read_text())
        result["confirmed"] = {"seeds": confirmed}
        (studies["siamese"] / "result.json").write_text(json.dumps(result))
        with pytest.raises(UserError, match=r"^the study of `siamese` chose by seed 200"):
            seeds(**studies)


def test_a_seed_that_diverges_is_left_out_for_every_row(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(small_set, seeds=3, protocols=["official"])
    entries, _, _ = plan(made)
    nan = {tmp_path / "runs" / "official-siamese-seed1"}

    def train_many(runs: Any, **_: Any) -> list[dict[str, Any]]:
        if bad := nan & {path for _, path in runs}:
            raise DivergedTrainingsError("some diverged", dict.fromkeys(bad, "nan"))
        return [{"folder": path} for _, path in runs]

    monkeypatch.setattr(command, "train_many", train_many)
    kept, costs, notes = command.train(made, tmp_path, entries, quiet=True)
    assert {entry.run.train.seed for entry in kept} == {0, 2} and len(kept) == 8
    assert [cost["folder"].name for cost in costs] == [entry.name for entry in kept]
    assert notes == ["official: seed 1 is left out for every row, since the training of siamese "
                     "diverged."]  # fmt: skip

    nan |= {tmp_path / "runs" / f"official-center-seed{seed}" for seed in (0, 2)}
    with pytest.raises(DivergedTrainingsError):
        command.train(made, tmp_path, entries, quiet=True)


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
