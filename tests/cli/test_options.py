"""Options of the command line: presets, folders, and runs that follow others."""

import json
from pathlib import Path

import pytest

from flowerray.cli import dispatch, options
from flowerray.cli.options import follow, parse_run
from flowerray.errors import UserError
from flowerray.files import read_json
from flowerray.training.rundir import RunDir
from tests.small import small, words


def test_presets_and_options(small_set: Path) -> None:
    options, run = parse_run("train triplet", "triplet", words(small_set, method__margin=0.3))
    assert run.method.margin == 0.3 and run.train.epochs == 2 and options.preset == "laptop"  # type: ignore[attr-defined]
    assert run == small(small_set).model_copy(update={"method": run.method})
    _, run = parse_run("train triplet", "triplet", ["--preset", "gpu", "--train.epochs", "3"])
    assert (run.embedder.image_size, run.embedder.dim, run.train.epochs) == (224, 512, 3)
    _, run = parse_run("demo", "triplet", [], default_preset="demo")
    assert run.embedder.image_size == 96


def test_relative_roots_become_absolute(small_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's working directory is another one."""
    monkeypatch.chdir(small_set.parent)
    _, run = parse_run("train triplet", "triplet", words(Path("small")))
    assert run.data.root == small_set


def test_where_runs_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWERRAY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert options.default_out("triplet").parent == tmp_path / "runs"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert options.default_out("triplet").parent == tmp_path / "home" / "runs"
    assert options.default_out("triplet").name.startswith("triplet-20")


def test_trainval_follows_its_official_run(small_run: Path, tmp_path: Path) -> None:
    found = json.loads((small_run / "thresholds.json").read_text())
    _, run = parse_run("train triplet", "triplet", ["--from", str(small_run)])
    assert run.data.protocol == "trainval" and run.train.patience == 0
    assert run.train.epochs == found["best_epoch"] and run.threshold == found["threshold"]
    out = tmp_path / "trainval"
    assert dispatch(["train", "triplet", "--from", str(small_run), "--out", str(out)]) == 0
    noted = read_json(out / "thresholds.json")
    assert noted["fitted_on"] == "given"
    assert all(noted[key] == found[key] for key in ("threshold", "best_epoch"))
    with pytest.raises(UserError, match="has to be an official run of center"):
        follow(RunDir(small_run), "center")
    (tmp_path / "run.json").write_text((small_run / "run.json").read_text())
    with pytest.raises(UserError, match="has not finished"):
        follow(RunDir(tmp_path), "triplet")
