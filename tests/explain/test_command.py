"""`flowerray explain` on a pair, a split and concept folders."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowerray import cli
from flowerray.data.source import open_dataset
from flowerray.errors import UserError
from flowerray.explain import table
from flowerray.explain.command import ExplainConfig, explain_split
from flowerray.explain.concepts import ConceptsConfig
from flowerray.explain.examples import draw_images, make_subjects
from flowerray.explain.faithfulness import FaithfulnessConfig
from flowerray.explain.judge import faithful_positions
from flowerray.explain.named import explain_concepts
from flowerray.explain.pair import explain_pair
from flowerray.explain.pictures import _shown
from flowerray.files import read_json
from flowerray.opening import Model, embed, open_model
from flowerray.training.rundir import RunDir
from tests.explain.cases import embedder

FAST = ExplainConfig(
    max_images=6, choose_images=4, method="layercam",
    faithfulness=FaithfulnessConfig(images=2, steps=2, road=(0.5,)),
)  # fmt: skip
FEW = ConceptsConfig(count=3, images=20, crops=2)


@pytest.fixture
def model(small_run: Path) -> Iterator[Model]:
    """The small RUN's copy, with an embedder whose last map has more than one cell."""
    folder = small_run.with_name("explained")
    shutil.copytree(small_run, folder)
    opened = open_model(str(folder), torch.device("cpu"))
    yield replace(opened, embedder=embedder("test_resnet"))
    shutil.rmtree(folder)


@pytest.fixture
def pictures(small_set: Path) -> list[Path]:
    return sorted((small_set / "jpg").iterdir())


def folder_of(model: Model) -> RunDir:
    assert model.folder is not None
    return model.folder


def test_a_pair(model: Model, pictures: list[Path]) -> None:
    found = explain_pair(
        model, pictures[0], pictures[30], method=None, layer=None, concepts=FEW, out=None,
        quiet=True,
    )  # fmt: skip
    explanations = folder_of(model).path / "explanations"
    picture = explanations / f"pair-jpg_{pictures[0].stem}-jpg_{pictures[30].stem}.png"
    assert Path(found["picture"]) == picture and Image.open(picture).width > 800
    assert found["method"] == "decomposition" and found["notes"] == []
    assert found["same"] == (found["similarity"] >= model.threshold)
    assert 1 <= len(found["matches"]) <= 3
    assert len(found["concepts"]) == len({c["name"] for c in found["concepts"]}) == 3
    (kept,) = explanations.glob("concepts-*.npz")
    stamp = kept.stat().st_mtime_ns
    explain_pair(
        model, pictures[0], pictures[2], method="hirescam", layer="layer3", concepts=FEW, out=None,
        quiet=True,
    )  # fmt: skip
    assert kept.stat().st_mtime_ns == stamp, "concepts are fitted once"


def test_another_models_choice_is_not_taken(
    model: Model, pictures: list[Path], tmp_path: Path
) -> None:
    """`--out` may be shared; the layer there may not even exist here."""
    chosen = {"method": "gradcam", "layer": "layer4", "norm": "free"}
    (tmp_path / "faithfulness.json").write_text(json.dumps({"run": "another", "chosen": chosen}))
    found = explain_pair(
        model, pictures[0], pictures[30], method=None, layer=None, concepts=None, out=tmp_path,
        quiet=True,
    )  # fmt: skip
    assert found["method"] == "decomposition"


def test_a_head_that_is_not_additive(model: Model, pictures: list[Path], tmp_path: Path) -> None:
    other = replace(model, embedder=embedder("test_convnext"))
    found = explain_pair(
        other, pictures[0], pictures[30], method=None, layer=None, concepts=FEW, out=tmp_path,
        quiet=True,
    )  # fmt: skip
    assert found["method"].startswith("hirescam at stages.3") and found["matches"] == []
    assert [n.split(":")[0] for n in found["notes"]] == [
        "regions are not matched", "concepts are left out",
    ]  # fmt: skip
    printed = table.pair(found).splitlines()
    assert "note      regions are not matched" in "\n".join(printed)
    assert max(len(line) for line in printed if not line.startswith("picture")) <= 80
    with pytest.raises(UserError, match="does not average its last map"):
        explain_pair(
            other, pictures[0], pictures[1], method="decomposition", layer=None, concepts=None,
            out=tmp_path,
        )  # fmt: skip
    with pytest.raises(UserError, match="`layer` nowhere: .* has stages.3"):
        explain_pair(
            other, pictures[0], pictures[1], method="gradcam", layer="nowhere", concepts=None,
            out=tmp_path,
        )  # fmt: skip


def test_a_split_with_another_model_beside(model: Model) -> None:
    beside = replace(model, name="other", embedder=embedder("test_resnet", seed=1))
    before = len(folder_of(model).records())
    found = explain_split(model, FAST, None, beside, quiet=True)
    explanations = folder_of(model).path / "explanations"
    assert read_json(explanations / "faithfulness.json") == found
    for name in ("faithfulness", "maps", "beside"):
        assert Image.open(explanations / f"{name}_test.png").width > 400
    assert found["chosen"]["method"] == "layercam" and found["chosen"]["on"] == "val"
    assert found["images"] == 6 and found["chosen"]["images"] == 4
    assert set(found["scores"]) == {
        "chosen", "decomposition", "EigenCAM", "centre Gaussian", "mean mask", "edges", "random",
    }  # fmt: skip
    assert set(found["gain_over"]) == set(found["scores"]) - {"chosen"}
    own, other = (f["scores"]["chosen"]["energy"]["mean"] for f in (found, found["beside"]))
    gain = found["beside"]["gain_over_run"]["energy"]["mean"]
    assert gain == pytest.approx(other - own) and other != own
    assert set(found["beside"]["gain_over_run"]) == {"energy", "pointing", "iou"}
    assert found["scores"]["chosen"]["deletion"]["n"] == 2 < found["images"]
    assert "(deletion, insertion and ROAD on 2 of the images)" in table.split(found)
    assert not found["sanity"]["edges"]["randomised"]["passed"]
    (record,) = folder_of(model).records()[before:]
    assert record["metrics"]["explain_test/energy"] == own


def test_a_layer_of_ones_own_is_judged_beside_the_exact_map(model: Model, tmp_path: Path) -> None:
    config = FAST.model_copy(update={"layer": "layer2"})
    found = explain_split(model, config, tmp_path, None, quiet=True)
    assert found["chosen"]["layer"] == "layer2" and found["chosen"]["candidates"] == 2
    assert "decomposition" in found["scores"]


def test_the_choice_serves_the_pairs_that_follow(model: Model, pictures: list[Path]) -> None:
    chosen = explain_split(model, FAST, None, None, quiet=True)["chosen"]
    found = explain_pair(
        model, pictures[0], pictures[30], method=None, layer=None, concepts=None, out=None
    )
    assert found["method"] == "decomposition", "a map that --method forced was not chosen"
    file = folder_of(model).path / "explanations" / "faithfulness.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"chosen": {**content["chosen"], "free": True}}))
    found = explain_pair(
        model, pictures[0], pictures[30], method=None, layer=None, concepts=None, out=None
    )
    assert found["method"].startswith(f"layercam at {chosen['layer']}")


def test_a_model_of_other_data_is_not_judged_beside(model: Model, tmp_path: Path) -> None:
    data = model.run.data.model_copy(update={"protocol": "disjoint"})
    run = model.run.model_copy(update={"data": data})
    other = replace(model, name="other", run=run, dataset=None)
    with pytest.raises(UserError, match="`beside` other was trained on other data"):
        explain_split(model, FAST, tmp_path, other, quiet=True)


def test_the_rows_of_a_sheet_are_the_images_whose_scores_they_show() -> None:
    """Without masks they go by insertion, which 100 of 300 images have."""
    tested = faithful_positions(300, 100)
    values = np.random.default_rng(0).random(300)
    judged: Any = SimpleNamespace(
        scores={"chosen": {"insertion": values[tested]}}, subjects=range(300), key="insertion"
    )
    places, rows = _shown(judged)
    assert np.array_equal(values[rows], values[tested][places])
    best = tested[np.argsort(-values[tested])[:3]]
    assert np.array_equal(rows[:3], best) and len(set(rows)) == 9


def test_images_are_chosen_on_and_judged_on_without_overlap(model: Model) -> None:
    dataset = open_dataset(model.run.data, progress=False)
    chosen, judged = draw_images(dataset, "val", 1000, 1000, seed=0)
    assert chosen is not None and len(chosen) == len(judged) == len(dataset.splits["val"]) // 2
    assert not set(chosen) & set(judged)
    chosen, judged = draw_images(dataset, "test", 5, 7, seed=0)
    assert chosen is not None and (len(chosen), len(judged)) == (7, 5)
    again = draw_images(dataset, "test", 5, 7, seed=0)
    assert np.array_equal(again[1], judged)
    assert not np.array_equal(draw_images(dataset, "test", 5, 7, seed=1)[1], judged)
    with pytest.raises(UserError, match="has no val images to explain"):
        draw_images(replace(dataset, splits={"train": dataset.splits["train"]}), "val", 5, 7, 0)


def test_an_image_that_is_alone_in_its_class_is_left_out(model: Model) -> None:
    data = model.run.data.model_copy(update={"protocol": "disjoint"})
    dataset = open_dataset(data, progress=False)
    rows = dataset.splits["test"]
    alone = 4
    others = rows[dataset.labels_N[rows] == dataset.labels_N[rows[alone]]]
    cut = np.setdiff1d(rows, np.setdiff1d(others, rows[alone]))
    dataset = replace(dataset, splits={**dataset.splits, "test": cut})
    place = int(np.flatnonzero(cut == rows[alone])[0])
    _, judged = draw_images(dataset, "test", 1000, 7, seed=0)
    assert len(judged) == len(cut) - 1 and place not in judged
    make_subjects(model, dataset, "test", judged, True)
    none = replace(dataset, splits={**dataset.splits, "test": cut[[place]]})
    with pytest.raises(UserError, match="two of a class"):
        draw_images(none, "test", 5, 7, seed=0)


def test_where_classes_are_disjoint_an_image_is_not_in_its_prototype(model: Model) -> None:
    data = model.run.data.model_copy(update={"protocol": "disjoint"})
    dataset = open_dataset(data, progress=False)
    positions = np.array([0, 5])
    found = make_subjects(model, dataset, "test", positions, True)
    emb_ND = embed(model.embedder, [dataset.paths[i] for i in dataset.splits["test"]]).numpy()
    labels = dataset.split_labels("test")
    for row, p in enumerate(positions):
        members = (labels == labels[p]) & (np.arange(len(labels)) != p)
        mean = emb_ND[members].mean(0)
        np.testing.assert_allclose(found.reference_ND[row], mean / np.linalg.norm(mean), rtol=1e-4)


def test_trainval_has_nothing_to_choose_on(model: Model, tmp_path: Path) -> None:
    data = model.run.data.model_copy(update={"protocol": "trainval"})
    run = model.run.model_copy(update={"data": data})
    other = replace(model, run=run, dataset=None)
    with pytest.raises(UserError, match="has no val images to choose a map on"):
        explain_split(other, FAST, tmp_path, None, quiet=True)
    config = FAST.model_copy(update={"method": "decomposition"})
    found = explain_split(other, config, tmp_path, None, quiet=True)
    assert found["chosen"]["on"] is None and found["sanity"]["chosen"]["complete"]["passed"]


def test_concept_folders(model: Model, pictures: list[Path], tmp_path: Path) -> None:
    for n, name in enumerate(("one", "two")):
        (tmp_path / "named" / name).mkdir(parents=True)
        for picture in pictures[n * 24 : n * 24 + 5]:
            shutil.copy(picture, tmp_path / "named" / name)
    dataset = open_dataset(model.run.data, progress=False)
    found = explain_concepts(
        model, tmp_path / "named", class_name=dataset.classes[2], layer="layer3", split="test",
        max_images=3, seed=0, out=None, quiet=True,
    )  # fmt: skip
    assert [c["name"] for c in found["concepts"]] == ["one", "two"] and found["images"] == 3
    kept = folder_of(model).path / "explanations" / "tcav.json"
    assert read_json(kept) == found
    with pytest.raises(UserError, match="`concept_class` rose is no class"):
        explain_concepts(
            model, tmp_path / "named", class_name="rose", layer=None, split="test", max_images=3,
            seed=0, out=None, quiet=True,
        )  # fmt: skip


def test_the_command_line(
    small_run: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["explain", str(small_run), str(pictures[0]), str(pictures[30])]
    export = str(small_run / "best_model_triplet_loss.pth")
    assert cli.dispatch([*words, "--out", str(tmp_path), "--concepts", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # At 32 px the last map has one cell, so that it cannot be split.
    assert found["method"].startswith("hirescam") and Path(found["picture"]).exists()
    assert cli.dispatch(["explain", export, *words[2:], "--concepts", "0"]) == 2
    assert "is no RUN folder: say with --out" in capsys.readouterr().err
    assert cli.dispatch(words[:3]) == 2
    assert "name two photographs, or none" in capsys.readouterr().err
    assert cli.dispatch([*words, "--concept-folders", str(tmp_path)]) == 2
    assert "leave the photographs out" in capsys.readouterr().err
