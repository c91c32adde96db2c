"""Exported models: the same embeddings, from a file that other programs read, with a card."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowerray.cli import dispatch
from flowerray.errors import UserError
from flowerray.export import portable
from flowerray.export.card import card, figures, licence
from flowerray.export.command import export, some_pixels
from flowerray.opening import Model, embed
from flowerray.training.rundir import RunDir
from tests.opened import model as model
from tests.opened import run as run


@pytest.fixture
def cpu(model: Model) -> Model:
    model.embedder.eval()
    return model


@pytest.mark.parametrize("kind", ["onnx", "torch", "safetensors"])
def test_a_file_embeds_as_the_model_does(
    kind: portable.Format, cpu: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    facts = export(cpu, kind, tmp_path / "out")
    assert facts["least_cosine"] > 0.99999 and facts["photographs"] == 32
    names = {"README.md", "model.json", portable.FILES[kind]}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    pixels = some_pixels(cpu, None)
    paths = cpu.own_dataset(quiet=True).paths
    chosen = np.unique(np.linspace(0, len(paths) - 1, 32).astype(int))
    own = embed(cpu.embedder, [paths[i] for i in chosen]).numpy()
    found = portable.opened(tmp_path / "out" / portable.FILES[kind], kind)
    for size in (1, 5, 32):
        np.testing.assert_allclose(found(pixels[:size]), own[:size], atol=1e-4)
    monkeypatch.chdir(tmp_path / "out")
    shutil.copy(paths[0], "photo.jpg")
    found_there: dict[str, Any] = {}
    (block,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    exec(block, found_there)  # as it stands in the card
    embedding = torch.as_tensor(found_there["embedding"]).detach().numpy()
    np.testing.assert_allclose(embedding[0], own[0], atol=1e-2)
    assert embedding[0] @ own[0] > 0.9999
    kept = json.loads(Path("model.json").read_text())
    assert kept["threshold"] == cpu.threshold and len(kept["classes"]) == 6
    assert cpu.calibration and kept["calibration"]["a"] == cpu.calibration.a
    with pytest.raises(UserError, match="exists already"):
        export(cpu, kind, tmp_path / "out")


def test_a_file_that_computes_something_else_is_refused_and_removed(
    cpu: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: object) -> object:
        return lambda pixels: np.full((len(pixels), 16), 0.25, np.float32)

    monkeypatch.setattr(portable, "opened", damaged)
    with pytest.raises(UserError, match="gives other embeddings than the model"):
        export(cpu, "safetensors", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_card_is_what_the_hub_reads(cpu: Model, run: RunDir, tmp_path: Path) -> None:
    """Every key of its front matter is YAML by being JSON; figures are those of the evaluation."""
    text = card(cpu, "onnx", None, 32)
    assert "has not been evaluated yet" in text and "model-index" not in text
    assert dispatch(["evaluate", str(run.path)]) == 0
    record = json.loads((run.path / "evaluation" / "test.json").read_text())
    text = card(cpu, "onnx", record, 32)
    head = re.fullmatch(r"---\n(.*?)\n---\n.*", text, re.DOTALL)
    assert head is not None
    facts = {
        key: json.loads(value)
        for key, _, value in (line.partition(": ") for line in head[1].splitlines())
    }
    (result,) = facts["model-index"][0]["results"]
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert values["recall_at_1"] == round(record["metrics"]["recall_at_1"], 4)
    assert {"map_at_r", "tar_at_far_0.1", "calibration_error"} <= values.keys()
    assert "license" not in facts, "weights that began at random are nobody's"
    assert f"{cpu.threshold:.4f}" in text and "| 0.1 |" in text
    told = figures(record)["tar_at_far_0.1"]
    assert not isinstance(told, float) and told.low < told.mean < told.high
    for kind in ("onnx", "torch", "safetensors"):
        code = re.search(r"```python\n(.*?)```", card(cpu, kind, None, 1), re.DOTALL)
        assert code is not None and portable.FILES[kind] in code[1]
        compile(code[1], kind, "exec")


def test_the_backbones_licence_is_timms(cpu: Model) -> None:
    parts = {"backbone": "tf_efficientnet_lite0", "weights": "bundled"}
    config = cpu.run.embedder.model_copy(update=parts)
    bundled = cpu.run.model_copy(update={"embedder": config})
    assert licence(cpu) is None
    assert licence(Model("m", None, bundled, cpu.embedder, 0.5)) == "apache-2.0"


def test_photographs_are_needed(
    cpu: Model, tmp_path: Path, small_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = next(cpu.folder.path.glob("*.pth")) if cpu.folder else None
    assert file is not None
    content = torch.load(file, weights_only=True)
    facts = json.loads(content["run"])
    facts["data"]["root"] = str(tmp_path / "gone")
    torch.save({**content, "run": json.dumps(facts)}, tmp_path / "moved.pth")
    words = ["export", str(tmp_path / "moved.pth"), "--format", "safetensors"]
    assert dispatch([*words, "--out", str(tmp_path / "out")]) == 2
    assert "name others with --photographs" in capsys.readouterr().err
    given = ["--photographs", str(small_set / "jpg"), "--out", str(tmp_path / "out")]
    assert dispatch([*words, *given]) == 0
    assert "32 photographs, least cosine 1.0000" in capsys.readouterr().out
