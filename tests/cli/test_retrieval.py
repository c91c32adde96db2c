"""The commands that measure: evaluate, similar, search, as a user types them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowerray.cli import dispatch
from flowerray.training.rundir import RunDir
from tests.ruined import ruin

Say = Callable[..., tuple[str, str]]


def test_evaluate(say: Say, run: Path) -> None:
    stdout, stderr = say("evaluate", run, "--split", "val")
    assert "60 val queries, gallery train of 60 images, protocol official" in stdout
    assert "R@1" in stdout and "mlflow ui" in stderr
    assert say("evaluate", "--split", "val", run)[0] == stdout  # RUN's options hold where it stands


def test_evaluate_json_is_one_object(say: Say, run: Path) -> None:
    found = json.loads(say("evaluate", run, "--json")[0])
    keys = {
        "recall_at_1", "recall_at_5", "recall_at_10", "r_precision", "map_at_r",
        "recall_at_1_per_class_mean", "num_queries", "num_queries_without_match", "num_gallery",
        "pair_auc", "pair_eer", "pair_accuracy", "protocol", "split", "run",
    }  # fmt: skip
    assert keys <= found.keys()
    assert (found["run"], found["split"], found["protocol"]) == (str(run), "test", "official")
    assert {"recall_at_1", "r_precision", "map_at_r", "tar_at_far_0.1"} <= found["intervals"].keys()
    assert found["reliability"].keys() == {"random", "hard"}
    for name, interval in found["intervals"].items():
        assert interval["mean"] == found[name]
        assert interval["low"] <= found[name] <= interval["high"]


def test_a_threshold_is_chosen_by_its_false_match_rate(
    say: Say, run: Path, small_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of before has none to choose by, and no probabilities."""
    a, b = (small_set / "jpg" / f"image_{n:05d}.jpg" for n in (1, 80))
    kept = json.loads((run / "thresholds.json").read_text())["calibration"]["false_match"]
    loose, strict = (
        json.loads(say("similar", run, a, b, "--far", far, "--json")[0]) for far in (0.5, 0.02)
    )
    assert loose["threshold"] == kept[0]["cosine"] < strict["threshold"]
    assert strict["far"]["low"] <= 0.02 <= strict["far"]["high"]
    rare = json.loads(say("similar", run, a, b, "--prior", 0.01, "--json")[0])
    assert rare["probability"] < loose["probability"] and rare["prior"] == 0.01
    assert "false-match rate of that threshold 0.5" in say("similar", run, a, b, "--far", 0.5)[0]
    own = json.loads(say("evaluate", run, "--json")[0])
    before = (run / "evaluation" / "test.json").read_text()
    lax = json.loads(say("evaluate", run, "--far", 0.5, "--json")[0])
    assert lax["far_at_threshold"] == pytest.approx(0.5, abs=0.1) != own["far_at_threshold"]
    assert (run / "evaluation" / "test.json").read_text() == before

    file = next(run.glob("*.pth"))
    content = torch.load(file, weights_only=True)
    facts = json.loads(content["run"])
    del facts["calibration"]
    torch.save({**content, "run": json.dumps(facts)}, file)
    found = json.loads(say("similar", run, a, b, "--json")[0])
    assert found["probability"] is None and found["similarity"] == loose["similarity"]
    assert "calibration_error" not in json.loads(say("evaluate", run, "--json")[0])
    for option in (["--far", "0.1"], ["--prior", "0.1"]):
        assert dispatch(["similar", str(run), str(a), str(b), *option]) == 2
        assert "has no calibration" in capsys.readouterr().err


def test_evaluate_another_folder(say: Say, run: Path, small_set: Path, tmp_path: Path) -> None:
    pictures = sorted((small_set / "jpg").iterdir())
    for name in ("a", "b"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for k in range(6):
            shutil.copy(pictures[30 * (name == "b") + k], tmp_path / "own" / name)
    before = (run / "metrics.jsonl").read_bytes()
    whole = json.loads(say("evaluate", run, "--json", "--data.root", tmp_path / "own")[0])
    assert (whole["gallery"], whole["num_queries"], whole["num_gallery"]) == ("self", 12, 12)
    parted = json.loads(
        say(
            "evaluate", run, "--json", "--data.root", tmp_path / "own",
            "--data.train-per-class", 3, "--data.val-per-class", 1,
        )[0]
    )  # fmt: skip
    assert (parted["gallery"], parted["num_queries"], parted["num_gallery"]) == ("train", 4, 6)
    # The floor of these figures is of the same queries.
    for split, figures in (
        ([], whole),
        (["--data.train_per_class", 3, "--data.val_per_class=1"], parted),
    ):
        words = ["--frozen", "--json", "--data.root", tmp_path / "own", *split]
        frozen = json.loads(say("evaluate", run, *words)[0])
        for key in ("gallery", "num_queries", "num_gallery"):
            assert frozen[key] == figures[key]
    assert (run / "metrics.jsonl").read_bytes() == before


def test_the_runs_own_set_by_another_path_is_measured_as_its_own(
    say: Say, run: Path, small_set: Path, tmp_path: Path
) -> None:
    """Its training images must not become queries of "another" set."""
    (tmp_path / "link").symlink_to(small_set)
    shutil.copytree(small_set, tmp_path / "moved")
    own = json.loads(say("evaluate", run, "--json")[0])
    for name in ("link", "moved"):
        found = json.loads(say("evaluate", run, "--json", "--data.root", tmp_path / name)[0])
        for key in ("gallery", "num_queries", "num_gallery", "recall_at_1"):
            assert found[key] == own[key], (name, key)


def test_queries_that_were_trained_on_are_refused(
    say: Say, run: Path, small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other split options make them of the run's own set."""
    shutil.copytree(small_set, tmp_path / "copy")
    for words_ in (
        ["--data.protocol", "notebooks"],
        ["--data.protocol", "disjoint"],
        ["--data.root", str(tmp_path / "copy"), "--data.protocol", "notebooks"],
    ):
        assert dispatch(["evaluate", str(run), *words_]) == 2
        assert "test queries are images that" in capsys.readouterr().err
    export = next(run.glob("*.pth"))
    own = json.loads(say("evaluate", export, "--json")[0])
    found = say("evaluate", export, "--json", "--data.root", tmp_path / "copy")[0]
    assert json.loads(found)["num_queries"] == own["num_queries"]


def test_a_gallery_may_be_in_oxfords_layout(
    say: Say, run: Path, small_set: Path, tmp_path: Path
) -> None:
    """Its masks are no images, and its folder `jpg` is no class."""
    shutil.copytree(small_set, tmp_path / "set")
    found = json.loads(say("evaluate", run, "--json", "--gallery", tmp_path / "set")[0])
    assert found["num_gallery"] == 6 * 24 and found["num_queries_without_match"] == 0


def test_evaluate_frozen(say: Say, run: Path, small_set: Path) -> None:
    of_run = json.loads(say("evaluate", run, "--frozen", "--json")[0])
    options: list[Any] = ["--embedder.backbone", "test_efficientnet", "--embedder.weights", "none"]
    options += ["--embedder.image-size", 32, "--data.root", small_set]
    alone = json.loads(say("evaluate", "--frozen", "--json", *options)[0])
    assert of_run == alone and alone["run"] is None
    assert "test_efficientnet, frozen" in say("evaluate", "--frozen", *options)[0]


def test_similar_and_search(say: Say, run: Path, small_set: Path, tmp_path: Path) -> None:
    a, b = (small_set / "jpg" / f"image_{n:05d}.jpg" for n in (1, 80))
    assert "same class" in say("similar", run, a, a)[0]
    found = json.loads(say("similar", run, a, b, "--json")[0])
    assert found.keys() == {
        "schema_version", "similarity", "threshold", "same", "probability", "prior", "far",
    }  # fmt: skip
    assert 0 <= found["probability"] <= 1 and found["prior"] == 0.5 and found["far"] is None

    gallery = tmp_path / "flat"
    gallery.mkdir()
    for n in range(1, 140, 12):
        shutil.copy(small_set / "jpg" / f"image_{n:05d}.jpg", gallery)
    options = ["--gallery", gallery, "--sheet", tmp_path / "sheet.png"]
    stdout, _ = say("search", run, a, *options, "--top", 3)
    assert len(stdout.splitlines()) == 6 and "picture" in stdout.splitlines()[-1]
    assert (tmp_path / "sheet.png").exists()
    found = json.loads(say("search", run, a, *options, "--json")[0])
    assert len(found["neighbours"]) == 10
    assert found["neighbours"][0]["image"] == str(gallery / "image_00001.jpg")


def test_a_training_that_ruined_a_good_start_is_called_so(
    say: Say, run: Path, tmp_path: Path
) -> None:
    said = " ".join(say("evaluate", ruin(run, tmp_path))[0].split())
    assert f"{run} is worse than its frozen backbone: R@1 -0." in said
    found = json.loads(say("evaluate", run, "--json")[0])
    frozen, gain = found["frozen"], found["frozen"]["gain"]["recall_at_1"]
    assert gain["high"] < 0 and "is worse than its frozen backbone" in frozen["warning"]
    assert gain["mean"] == pytest.approx(found["recall_at_1"] - frozen["recall_at_1"])
    last = RunDir(run).records()[-1]["metrics"]
    assert last["test/gain_recall_at_1_high"] == gain["high"]
    assert last["test/frozen_map_at_r"] == frozen["map_at_r"]
    alone = json.loads(say("evaluate", run, "--frozen", "--json")[0])
    assert alone["frozen"] is None and alone["recall_at_1"] == frozen["recall_at_1"]


def test_a_start_from_random_weights_has_no_floor(say: Say, run: Path) -> None:
    stdout, stderr = say("evaluate", run, "--json")
    assert json.loads(stdout)["frozen"] is None
    assert "no frozen floor to compare with: its backbone began with random" in stderr
