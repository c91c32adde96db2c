"""One budget for all: what a comparison trains, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowerray.cluster.tasks import DivergedTrainingsError
from flowerray.comparison import command as command
from flowerray.comparison.command import compare
from flowerray.comparison.plan import CompareConfig, base_runs, plan
from flowerray.data.augment import AugmentConfig
from flowerray.data.source import DataConfig
from flowerray.errors import UserError
from flowerray.training.config import TrainConfig
from flowerray.training.harden import HardenConfig
from flowerray.training.run import Run, differences
from flowerray.training.rundir import RunDir
from tests.comparison.compared import BATCH, ROWS, TINY, config
from tests.small import small


def study(folder: Path, best: Run, trials: int = 16) -> Path:
    """What `flowerray tune` leaves; it was moved since."""
    RunDir(folder / "confirm" / "trial-0003-seed-1000").create(best.to_dict())
    result = {
        "champion": "/elsewhere/study/confirm/trial-0003-seed-1000",
        "trials": {"complete": trials - 3, "stopped": 2, "failed": 1},
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


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
