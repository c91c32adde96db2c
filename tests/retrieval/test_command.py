"""What the commands do with a finished model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowerray.cli import dispatch
from flowerray.cluster.driver import train_run
from flowerray.data.images import eval_image
from flowerray.data.source import DataConfig, open_dataset
from flowerray.errors import UserError
from flowerray.opening import Model, embed, open_model
from flowerray.retrieval import command as measuring
from flowerray.retrieval import embed as embedding
from flowerray.retrieval.measure import EvaluateConfig
from flowerray.tracking.state import State
from flowerray.training.rundir import RunDir
from tests.small import small
from tests.tracking.tracked import client

CPU = torch.device("cpu")


@pytest.fixture
def pictures(small_set: Path) -> list[Path]:
    return sorted((small_set / "jpg").iterdir())


def test_pairs_are_compared_in_full_precision(model: Model, small_set: Path) -> None:
    """The gallery and the threshold are; TF32 would round one side."""
    allowed: list[tuple[bool, bool]] = []
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    hook = model.embedder.register_forward_hook(
        lambda *_: allowed.append((flags[0].allow_tf32, flags[1].allow_tf32))
    )
    before = flags[0].allow_tf32
    picture = next((small_set / "jpg").iterdir())
    try:
        embed(model.embedder, [picture, picture])
    finally:
        hook.remove()
    assert allowed == [(False, False)] and flags[0].allow_tf32 == before


def test_open_model(model: Model, run: RunDir, tmp_path: Path) -> None:
    assert model.folder is not None and model.folder.path == run.path
    assert model.run.method_name == "triplet" and -1 <= model.threshold <= 1
    file = shutil.copy(run.path / "best_model_triplet_loss.pth", tmp_path)
    alone = open_model(str(file), CPU)
    assert alone.folder is None and alone.threshold == model.threshold
    for a, b in zip(alone.embedder.parameters(), model.embedder.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_evaluation_of_the_runs_own_data_is_kept(model: Model, run: RunDir) -> None:
    before = len(run.records())
    result = measuring.evaluate_model(model, model.run.data, False, EvaluateConfig(), quiet=True)
    assert result.metrics["num_queries"] == 24 and result.metrics["num_gallery"] == 60
    assert {"pair_auc", "pair_eer", "pair_accuracy"} <= result.metrics.keys()
    (record,) = run.records()[before:]
    assert record["step"] == 12
    assert record["metrics"]["test/recall_at_1"] == result.metrics["recall_at_1"]
    assert (run.plots / "retrieval_test.png").exists()
    kept = json.loads((run.path / "evaluation" / "test.json").read_text())
    assert kept["metrics"] == result.metrics and kept["seconds"] > 0
    assert [Path(kept["root"]) / name for name in kept["queries"]] == list(result.query_paths)
    per_query = kept["per_query"]
    assert per_query["hit"] == result.per_query["hit"].tolist()
    assert {len(values) for values in per_query.values()} == {24}
    same = [a == b for a, b in zip(per_query["class"], per_query["nearest_class"], strict=True)]
    assert same == per_query["hit"]
    cosine_QG = result.query_emb.astype(float) @ result.gallery_emb.T.astype(float)
    assert per_query["similarity"] == pytest.approx(cosine_QG.max(1), abs=1e-5)
    pairs = run.pairs.read_bytes()
    again = measuring.evaluate_model(model, model.run.data, False, EvaluateConfig(), quiet=True)
    assert again.metrics == result.metrics and run.pairs.read_bytes() == pairs
    records = len(run.records())
    best = client(run.path).search_logged_models(
        [str(State.read(run.path).experiment_id)],
        order_by=[{"field_name": "metrics.test/recall_at_1", "ascending": False}],
    )[0]
    told = {m.key: m for m in best.metrics or ()}["test/recall_at_1"]
    assert told.value == result.metrics["recall_at_1"] and told.dataset_digest == model.dataset
    config = EvaluateConfig(gallery="self")
    other = measuring.evaluate_model(model, model.run.data, False, config, quiet=True)
    assert other.metrics["num_gallery"] == 24
    now = json.loads((run.path / "evaluation" / "test.json").read_text())
    assert now["metrics"] == kept["metrics"] and len(run.records()) == records


def test_val_is_measured_as_it_was_in_training(model: Model, run: RunDir) -> None:
    config = EvaluateConfig(split="val")
    result = measuring.evaluate_model(model, model.run.data, False, config, quiet=True)
    best = max(value for _, value in run.series("val/map_at_r"))
    assert result.metrics["map_at_r"] == pytest.approx(best, abs=1e-6)


def test_another_set_is_measured_whole_and_not_kept(
    model: Model,
    run: RunDir,
    pictures: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for n, name in enumerate(("a", "b", "b")):
        (tmp_path / name).mkdir(exist_ok=True)
        for k in range(3):
            shutil.copy(pictures[20 * n + k], tmp_path / name / f"{n}{k}.jpg")
    before = run.metrics.read_bytes()
    result = measuring.evaluate_model(
        model, DataConfig(root=tmp_path), True, EvaluateConfig(), quiet=True
    )
    assert result.metrics["gallery"] == "self" and result.metrics["num_queries"] == 9
    assert run.metrics.read_bytes() == before
    for frozen in (True, False):  # Oxford's jpg/ in place of its parent, say
        flat = ["--data.root", str(pictures[0].parent), *["--frozen"] * frozen]
        assert dispatch(["evaluate", str(run.path), *flat]) == 2
        assert "any neighbour would be right" in capsys.readouterr().err
    with pytest.raises(UserError, match="has no val split"):
        measuring.evaluate_model(
            model, DataConfig(root=tmp_path), True, EvaluateConfig(split="val"), quiet=True
        )


def test_frozen_features_do_not_depend_on_the_training(model: Model) -> None:
    config = model.run.embedder
    result = measuring.evaluate_frozen(config, model.run.data, EvaluateConfig(), CPU, quiet=True)
    assert result.query_emb.shape == (24, model.embedder.num_features)
    assert "pair_auc" not in result.metrics


def test_an_export_whose_first_weights_are_gone_is_measured_without_pairs(
    run: RunDir, small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(run.path / "best_model_triplet_loss.pth", weights_only=True)
    run_options = json.loads(content["run"])
    run_options["embedder"]["weights"] = str(tmp_path / "gone.safetensors")
    content["run"] = json.dumps(run_options)
    torch.save(content, tmp_path / "moved.pth")
    assert dispatch(["evaluate", str(tmp_path / "moved.pth"), "--json"]) == 0
    shown = capsys.readouterr()
    metrics = json.loads(shown.out)
    assert metrics["num_queries"] == 24 and "pair_auc" not in metrics
    assert shown.err.count("no pair metrics") == 1 and "gone.safetensors" in shown.err


def test_similar(model: Model, pictures: list[Path]) -> None:
    same = measuring.similar(model, pictures[0], pictures[0])
    assert same["similarity"] == pytest.approx(1.0, abs=1e-6) and same["same"]
    there = measuring.similar(model, pictures[0], pictures[-1])
    back = measuring.similar(model, pictures[-1], pictures[0])
    assert there["similarity"] == pytest.approx(back["similarity"], abs=1e-6)
    assert there["same"] == (there["similarity"] >= model.threshold)


def by_hand(model: Model, query: Path, files: list[Path]) -> list[Path]:
    """The files by their cosine with the query, one at a time."""

    def emb(path: Path) -> np.ndarray:
        image = torch.as_tensor(eval_image(path, 32))[None].float() / 255
        with torch.no_grad():
            return model.embedder(image)[0].double().numpy()

    return sorted((f for f in files if f != query), key=lambda f: -float(emb(f) @ emb(query)))


def test_search_in_each_kind_of_gallery(
    model: Model, pictures: list[Path], small_set: Path, tmp_path: Path
) -> None:
    flat, classes = tmp_path / "flat", tmp_path / "classes"
    for n, picture in enumerate(pictures[::10]):
        for folder in (flat, classes / f"class{n % 3}"):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, folder)
    query = flat / pictures[0].name
    found = measuring.search(model, query, flat, 5, quiet=True)
    assert [n.path for n in found] == by_hand(model, query, sorted(flat.iterdir()))[:5]
    assert {n.class_name for n in found} == {"flat"}
    (flat / "edited").mkdir()
    shutil.move(flat / pictures[10].name, flat / "edited")
    both = measuring.search(model, query, flat, 100, quiet=True)  # beside folders, and in them
    assert len(both) == len(pictures[::10]) - 1
    assert {n.class_name for n in both} == {"flat", "edited"}

    found = measuring.search(model, query, classes, 100, quiet=True)
    assert len(found) == len(pictures[::10])  # the copy of the query counts
    assert found[0].path.name == query.name
    assert all(n.class_name == n.path.parent.name for n in found)

    found = measuring.search(model, pictures[3], small_set, 2, quiet=True)
    assert len(found) == 2 and pictures[3] not in [n.path for n in found]


def test_a_gallery_has_to_be_a_folder_with_images(model: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no images"):
        measuring.gallery_of(tmp_path)
    with pytest.raises(UserError, match="is neither a folder nor a table"):
        measuring.gallery_of(tmp_path / "none")


def test_a_gallery_is_embedded_once(
    model: Model, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for picture in pictures[:4]:
        shutil.copy(picture, tmp_path)
    first = measuring.search(model, pictures[5], tmp_path, 4, quiet=True)
    before = embedding.embed
    monkeypatch.setattr(embedding, "embed", lambda *_, **__: pytest.fail("embedded again"))
    assert measuring.search(model, pictures[5], tmp_path, 4, quiet=True) == first
    monkeypatch.setattr(embedding, "embed", before)
    with torch.no_grad():  # another model asks anew
        model.embedder.projection.weight.mul_(-1)
    assert measuring.search(model, pictures[6], tmp_path, 4, quiet=True) != first


def test_neighbours_are_told_where_no_picture_can_be_written(
    run: RunDir, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = ["search", str(run.path), str(pictures[0]), "--gallery", str(pictures[0].parent)]
    assert dispatch([*words, "--sheet", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert pictures[1].suffix in shown.out and "Traceback" not in shown.err
    assert f"no picture, since {tmp_path} cannot be written" in shown.err
    assert dispatch([*words, "--json"]) == 0 and not list(tmp_path.iterdir())
    assert dispatch([*words, "--top", "80"]) == 0
    assert Image.open("search.png").width < 10_000


def test_an_evaluation_that_cannot_be_kept_is_told_all_the_same(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's RUN, or a full disk."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(measuring, "save_pairs", full)
    monkeypatch.setattr(measuring, "write_json", full)
    run.pairs.unlink()
    assert dispatch(["evaluate", str(run.path), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["num_queries"] == 24
    assert "measured, but not kept" in shown.err and "No space left" in shown.err
    assert "--resume" not in shown.err


def test_a_lone_export_knows_what_it_was_trained_on(
    run: RunDir, small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On another machine, where its data lie elsewhere."""
    content = torch.load(run.path / "best_model_triplet_loss.pth", weights_only=True)
    options = json.loads(content["run"])
    options["data"]["root"] = str(tmp_path / "gone")
    torch.save({**content, "run": json.dumps(options)}, file := tmp_path / "alone.pth")
    there = shutil.copytree(small_set, tmp_path / "there")
    words = ["evaluate", str(file), "--json", "--data.root", str(there)]
    for split, queries in (("test", 24), ("val", 60)):
        assert dispatch([*words, "--split", split]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["split"], found["gallery"]) == (split, "train")
        assert found["num_queries"] == queries
    assert dispatch([*words, "--data.protocol", "notebooks"]) == 2
    assert "was trained or chosen on" in capsys.readouterr().err
    another = tmp_path / "another"
    for n, picture in enumerate(sorted((small_set / "jpg").iterdir())[::7]):
        (another / f"class{n % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, another / f"class{n % 2}")
    assert dispatch([*words[:-1], str(another)]) == 0
    assert json.loads(capsys.readouterr().out)["gallery"] == "self"


def test_a_set_that_has_changed_since_the_training_is_refused(
    model: Model, small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A photograph more, and the splits of class folders are drawn anew; another one under an old
    name is told of.
    """
    root = tmp_path / "flowers"
    labels = open_dataset(DataConfig(root=small_set), progress=False)
    for path, label in zip(labels.paths, labels.labels_N, strict=True):
        (root / f"c{label}").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / f"c{label}")
    run = small(small_set, epochs=1)
    data = DataConfig(root=root, train_per_class=8, val_per_class=4)
    out = tmp_path / "run"
    train_run(run.model_copy(update={"data": data}), out, quiet=True)
    later = run.model_copy(
        update={"data": data, "train": run.train.model_copy(update={"epochs": 2})}
    )
    train_run(later, tmp_path / "later", quiet=True)
    evaluated = open_model(str(out), CPU), data, False, EvaluateConfig()
    capsys.readouterr()
    measuring.evaluate_model(*evaluated, quiet=True)
    train_run(later, tmp_path / "later", resume=True, quiet=True)
    assert "replaced under their old names" not in capsys.readouterr().err
    own = open_dataset(data, progress=False)
    shutil.copy(labels.paths[-1], own.paths[own.splits["train"][3]])
    measuring.evaluate_model(*evaluated, quiet=True)
    assert "1 of the " in (said := capsys.readouterr().err) and "under their old names" in said
    train_run(later, tmp_path / "later", resume=True, quiet=True)
    assert f"photographs in {root} were replaced under their old names" in capsys.readouterr().err
    shutil.copy(labels.paths[0], root / "c0" / "0.jpg")
    with pytest.raises(UserError, match="other files, classes or splits than when"):
        measuring.evaluate_model(
            open_model(str(out), CPU), data, False, EvaluateConfig(), quiet=True
        )
    with pytest.raises(UserError, match="images that trained would now validate or test"):
        train_run(later, tmp_path / "later", resume=True, quiet=True)
    otherwise = data.model_copy(update={"train_per_class": 9})  # drawn anew, it would overlap
    with pytest.raises(UserError, match="other files, classes or splits than when"):
        measuring.evaluate_model(
            open_model(str(out), CPU), otherwise, False, EvaluateConfig(), quiet=True
        )


def test_a_copy_of_the_set_is_measured_and_not_kept(
    model: Model, run: RunDir, small_set: Path, tmp_path: Path
) -> None:
    """Blurred ones under the same names, say: the RUN's own figures stay."""
    before = run.metrics.read_bytes()
    copy = shutil.copytree(small_set, tmp_path / "copy")
    data = model.run.data.model_copy(update={"root": copy})
    found = measuring.evaluate_model(model, data, False, EvaluateConfig(), quiet=True)
    assert found.metrics["gallery"] == "train" and run.metrics.read_bytes() == before


def test_images_of_the_training_are_known_in_any_set(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Moved, renamed, and among others that are new."""
    own, moved = model.own_dataset(quiet=True), tmp_path / "moved"
    chosen = {name: own.splits[name][:n] for name, n in (("train", 12), ("val", 8), ("test", 20))}
    for n, i in enumerate(np.concatenate(list(chosen.values()))):
        (moved / f"c{n % 3}").mkdir(parents=True, exist_ok=True)
        shutil.copy(own.paths[i], moved / f"c{n % 3}" / f"new-{n}.jpg")
    data, config = DataConfig(root=moved), EvaluateConfig()
    found = measuring.evaluate_model(model, data, True, config, quiet=True).metrics
    assert (found["queries_seen_in_training"], found["num_queries"]) == (20, 40)
    assert "20 of the 40 queries are images that" in capsys.readouterr().err
    shutil.rmtree(moved / "c0")
    older = replace(model, seen=None)
    assert (
        "queries_seen_in_training"
        not in measuring.evaluate_model(older, data, True, config, quiet=True).metrics
    )


def test_what_mlflow_holds_is_no_folder_to_keep_results_in(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is fetched anew by each command."""
    monkeypatch.setattr("flowerray.opening.resolve", lambda name: run.path)
    fetched = open_model("runs:/abc", CPU)
    assert fetched.folder is None and fetched.dataset == open_model(str(run.path), CPU).dataset


def test_a_model_that_does_not_say_what_it_was_trained_on(
    model: Model, small_set: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(small_set, tmp_path / "copy")
    silent = replace(model, dataset=None)
    assert not measuring.is_another_set(silent, copy)  # its mlflow.json does
    alone = replace(silent, folder=None)
    assert not measuring.is_another_set(alone, copy)  # its set is still there
    rendered = alone.run.data.model_copy(update={"root": None})
    default = replace(alone, run=alone.run.model_copy(update={"data": rendered}))
    photographs = tmp_path / "photographs"
    for n, picture in enumerate(sorted((small_set / "jpg").iterdir())[:60]):
        (photographs / f"c{n % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, photographs / f"c{n % 2}")
    assert measuring.is_another_set(default, photographs)
    assert not measuring.is_another_set(default, copy)  # a rendered one, so perhaps its own
