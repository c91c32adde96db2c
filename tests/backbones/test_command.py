"""`flowerray backbones`: its files, marks, resume and refusals, without Ray and with it."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flowerray.backbones import command as backbones
from flowerray.backbones import remote as survey
from flowerray.backbones.bench import BackbonesConfig
from flowerray.backbones.command import survey_backbones
from flowerray.backbones.pictures import backbones_table
from flowerray.data.source import DataConfig
from flowerray.errors import UserError
from flowerray.files import read_json
from flowerray.model.embedder import Embedder, EmbedderConfig
from flowerray.pool import cores

RANDOM = BackbonesConfig(image_size=32, random_weights=True, batch_size=2, rounds=1)
TRAINED = RANDOM.model_copy(update={"random_weights": False})


@pytest.fixture(autouse=True)
def setting(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and the database of `small_run`: a fresh one takes seconds to make."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{small_run.parent / 'mlflow.db'}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("flowerray.model.weights.HUB_TIMEOUT_S", 0.01)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def measure(root: Path, out: Path, *models: str, config: BackbonesConfig = RANDOM, **more: Any
            ) -> dict[str, Any]:  # fmt: skip
    return survey_backbones(
        models, config, DataConfig(root=root), out, quiet=True, **{"cpus": cores(), **more}
    )


def test_random_weights_are_marked_and_kept_from_front_and_choice(
    small_set: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    models = ("tf_efficientnet_lite0", "test_resnet", "test_vit")
    content = measure(small_set, out, *models)
    assert read_json(out / "backbones.json") == content
    weights = {row["model"]: row["weights"] for row in content["models"]}
    assert weights == dict(zip(models, ("bundled", "random", "random"), strict=True))
    assert content["random_weights"] == 2
    assert content["recommended"]["model"] == "tf_efficientnet_lite0"
    fronts = {row["model"] for row in content["models"] if row["front_latency"]}
    assert fronts == {"tf_efficientnet_lite0"}
    with (out / "backbones.csv").open() as opened:
        lines = list(csv.DictReader(opened))
    assert [line["weights"] for line in lines] == ["bundled", "random", "random"]
    assert float(lines[0]["recall_at_1_low"]) <= float(lines[0]["recall_at_1"])
    table = backbones_table(content)
    assert max(map(len, table.splitlines())) <= 80
    marked = [line for line in table.splitlines() if " RANDOM " in line and "test_" in line]
    assert len(marked) == 2
    assert (out / "pareto.png").stat().st_size > 10_000
    logged = json.loads((out / "metrics.jsonl").read_text())["metrics"]
    assert "backbones/random_weights/test_vit/recall_at_1" in logged
    assert "backbones/test_vit/recall_at_1" not in logged


def test_says_who_was_skipped_and_why(small_set: Path, tmp_path: Path) -> None:
    content = measure(
        small_set, tmp_path / "out", "tf_efficientnet_lite0", "test_resnet", config=TRAINED
    )
    assert [row["model"] for row in content["models"]] == ["tf_efficientnet_lite0"]
    (skipped,) = content["skipped"]
    assert skipped["model"] == "test_resnet"
    assert "not in the local cache" in skipped["why"]
    text = " ".join(backbones_table(content).split())
    assert "skipped 1 test_resnet: The weights of the model are not in the local cache" in text


def test_no_weights_at_all_is_one_sentence(small_set: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="None of 2 models could be measured .*`random_weights`"):
        measure(small_set, tmp_path / "out", "test_resnet", "test_vit", config=TRAINED)
    assert not (tmp_path / "out").exists()


def test_a_second_call_measures_only_what_is_missing(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = measure(small_set, out, "test_resnet")
    assessed: list[str] = []
    timed: list[list[str]] = []
    assess, time = survey.assess_one, backbones.time_alone

    def noted_assess(name: str, *work: Any) -> dict[str, Any]:
        assessed.append(name)
        return assess(name, *work)

    def noted_time(names: list[str], *work: Any, **more: Any) -> dict[str, Any]:
        timed.append(list(names))
        return time(names, *work, **more)

    monkeypatch.setattr(survey, "assess_one", noted_assess)
    monkeypatch.setattr(backbones, "time_alone", noted_time)
    assert measure(small_set, out, "test_resnet") == first
    assert (assessed, timed) == ([], [])
    second = measure(small_set, out, "test_resnet", "test_convnext")
    assert assessed == ["test_convnext"]
    assert timed == [["test_resnet", "test_convnext"]]  # speeds are of one run
    assert second["models"][0]["recall_at_1"] == first["models"][0]["recall_at_1"]
    with pytest.raises(UserError, match="None of 1 models"):  # random ones are not kept for this
        measure(small_set, out, "test_resnet", config=TRAINED)


def test_a_new_file_of_weights_is_measured(small_set: Path, tmp_path: Path) -> None:
    """Also where a row of random weights, or of the file before, is there; without --files what
    is there stays.
    """
    out, files = tmp_path / "out", tmp_path / "files"
    files.mkdir()
    assert measure(small_set, out, "test_resnet")["models"][0]["weights"] == "random"
    found = []
    config = RANDOM.model_copy(update={"files": files})
    for seed in (1, 2):
        embedder = Embedder(EmbedderConfig(backbone="test_resnet", weights="none"), seed)
        torch.save(embedder.backbone.state_dict(), files / "test_resnet.pth")
        row = measure(small_set, out, "test_resnet", config=config)["models"][0]
        found.append((row["weights"], row["weight_file"][2]))
    again = measure(small_set, out, "test_resnet")["models"][0]
    assert found[0][0] == found[1][0] == "file"
    assert found[0][1] < found[1][1] == again["weight_file"][2], (
        "without --files what is there stays"
    )


def test_refuses_a_folder_of_something_else(small_set: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no table of backbones"):
        measure(small_set, tmp_path, "test_resnet")
    out = tmp_path / "out"
    measure(small_set, out, "test_resnet")
    other = RANDOM.model_copy(update={"image_size": 64})
    with pytest.raises(UserError, match=r"\(image_size differ\)"):
        measure(small_set, out, "test_resnet", config=other)


def test_a_model_that_cannot_be_built_is_skipped(small_set: Path, tmp_path: Path) -> None:
    config = RANDOM.model_copy(update={"image_size": 33})
    content = measure(small_set, tmp_path / "out", "test_resnet", "test_vit", config=config)
    assert [row["model"] for row in content["skipped"]] == ["test_vit"]


def test_published_top1_and_budget_are_in_the_result(small_set: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    results.write_text("model,top1\ntf_efficientnet_lite0.in1k,74.8\n")
    content = measure(
        small_set, tmp_path / "out", "tf_efficientnet_lite0", results=results, max_params=1.0
    )
    assert content["models"][0]["imagenet_top1"] == 74.8
    assert content["recommended"]["model"] is None
    assert "at most 1 M parameters" in " ".join(backbones_table(content).split())

    config = RANDOM.model_copy(update={"split": "test"})
    content = measure(small_set, tmp_path / "test", "tf_efficientnet_lite0", config=config)
    assert content["recommended"]["model"] is None
    assert "chosen on test would not be tested" in " ".join(backbones_table(content).split())


@pytest.mark.ray
def test_on_ray_the_accuracy_is_the_same(small_set: Path, tmp_path: Path) -> None:
    models = ("test_resnet", "test_vit", "tf_efficientnet_lite0")
    here = measure(small_set, tmp_path / "here", *models)
    there = measure(small_set, tmp_path / "there", *models, cpus=0.5)
    for a, b in zip(here["models"], there["models"], strict=True):
        assert (a["model"], a["weights"], a["flops"]) == (b["model"], b["weights"], b["flops"])
        assert a["recall_at_1"] == b["recall_at_1"]
