"""What a user sees who got something wrong: exit status 2, one sentence, nothing left behind."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.io import loadmat, savemat

from flowerray.cli import dispatch
from flowerray.files import only_driver
from tests.small import words

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must fail, and gives its sentence."""

    def run(*command: object) -> str:
        capsys.readouterr()
        assert dispatch([str(word) for word in command]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        # A bar that decoded images before is no part of the message.
        lines = [line for line in captured.err.splitlines() if line and "img/s" not in line]
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("flowerray") and lines[0].endswith(".")
        assert "Traceback" not in lines[0] and not re.search(r"\w+Error\b", lines[0]), lines[0]
        return lines[0]

    return run


@pytest.fixture
def out(tmp_path: Path) -> Any:
    """Where a run would go that must not come to be."""
    path = tmp_path / "runs" / "never"
    yield path
    assert not path.exists()
    assert not (path.parent / "mlflow.db").exists()


@pytest.fixture
def copied_set(small_set: Path, tmp_path: Path) -> Path:
    """A copy of the small set, to be damaged."""
    return shutil.copytree(small_set, tmp_path / "set")


# --- data -----------------------------------------------------------------------------------------


def test_missing_data_root(refused: Refused, out: Path, tmp_path: Path) -> None:
    said = refused("train", "triplet", *words(tmp_path / "nowhere", out=out))
    assert f"{tmp_path / 'nowhere'} is not a folder; give" in said


def test_half_downloaded_set(refused: Refused, out: Path, copied_set: Path) -> None:
    for number in range(100, 145):
        (copied_set / "jpg" / f"image_{number:05d}.jpg").unlink()
    said = refused("train", "triplet", *words(copied_set, out=out))
    assert "lacks 45 of 144 images, the first image_00100.jpg" in said and "fetch" in said
    (copied_set / "setid.mat").unlink()
    assert "lacks setid.mat" in refused("train", "triplet", *words(copied_set, out=out))


def test_corrupt_jpegs_are_named(refused: Refused, out: Path, copied_set: Path) -> None:
    splits = loadmat(copied_set / "setid.mat")
    numbers = sorted(splits["trnid"].ravel()[[3, 7]])
    bad = [copied_set / "jpg" / f"image_{number:05d}.jpg" for number in numbers]
    bad[0].write_bytes(bad[0].read_bytes()[:300])
    bad[1].write_text("<html>404</html>")
    said = refused("train", "triplet", *words(copied_set, out=out))
    assert "2 of 60 images cannot be read" in said and "replace or remove" in said
    assert all(path.name in said for path in bad)


def test_wrong_labels(refused: Refused, out: Path, copied_set: Path) -> None:
    labels = loadmat(copied_set / "imagelabels.mat")["labels"]
    savemat(copied_set / "imagelabels.mat", {"labels": labels - 1})
    said = refused("train", "triplet", *words(copied_set, out=out))
    assert "imagelabels.mat holds labels 0..5 where the file counts 1.." in said


def test_one_image_in_a_class(refused: Refused, out: Path, small_set: Path, tmp_path: Path) -> None:
    for name, count in (("rose", 30), ("iris", 30), ("lily", 1)):
        (tmp_path / "own" / name).mkdir(parents=True)
        for number in range(count):
            shutil.copy(
                small_set / "jpg" / "image_00001.jpg", tmp_path / f"own/{name}/{number}.jpg"
            )
    said = refused("train", "triplet", *words(tmp_path / "own", out=out))
    assert "needs at least 21 images" in said and "lily (1)" in said
    assert "--data.train-per-class" in said


def test_batch_larger_than_the_set(refused: Refused, out: Path, small_set: Path) -> None:
    said = refused("train", "triplet", *words(small_set, train__classes_per_batch=7, out=out))
    assert "P = 7 classes cannot be formed from 6" in said
    assert "lower --train.classes-per-batch" in said
    said = refused(
        "train", "triplet",
        *words(small_set, train__classes_per_batch=6, train__images_per_class=11, out=out),
    )  # fmt: skip
    assert "6 x 11 = 66 images is larger than the training set of 60" in said


def test_batch_that_the_workers_cannot_share(refused: Refused, out: Path, small_set: Path) -> None:
    said = refused("train", "triplet", *words(small_set, resources__workers=5, out=out))
    assert "P x K = 12 images cannot be shared equally by 5 workers" in said


def test_a_val_split_of_one_class(refused: Refused, out: Path, small_set: Path) -> None:
    """In it MAP@R is 1 from the first epoch on, and no pair of two classes can be formed."""
    options = words(small_set, data__protocol="disjoint", train__classes_per_batch=2, out=out)
    said = refused("train", "triplet", *options)
    assert "the val split of" in said and "single class" in said and "(disjoint 8)" in said


def test_trainval_without_the_official_run(refused: Refused, out: Path, small_set: Path) -> None:
    options = words(small_set, data__protocol="trainval", out=out)
    said = refused("train", "triplet", *options)
    assert "trainval has no val split" in said and "--from RUN" in said
    said = refused("train", "triplet", *options, "--threshold", 0.5, "--train.patience", 3)
    assert "--train.patience watches val, and protocol trainval has no val split" in said


# --- the model ------------------------------------------------------------------------------------


def test_unknown_backbone_names_close_ones(refused: Refused, out: Path, small_set: Path) -> None:
    options = words(small_set, embedder__backbone="test_eficientnet", out=out)
    said = refused("train", "triplet", *options)
    assert "no timm model named 'test_eficientnet': did you mean test_efficientnet" in said


def test_hub_without_a_network(
    refused: Refused, out: Path, small_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = words(
        small_set, embedder__weights="hub", embedder__backbone="resnet10t.c3_in1k", out=out
    )
    said = refused("train", "triplet", *options)
    assert "resnet10t.c3_in1k are not in the local cache and cannot be downloaded (Off" in said
    assert "--embedder.weights bundled" in said


def test_device_cuda_without_a_gpu(
    refused: Refused, out: Path, small_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for workers in (0, 1):
        options = words(small_set, resources__device="cuda", resources__workers=workers, out=out)
        said = refused("train", "triplet", *options)
        assert "--resources.device cuda: this machine has 0 GPUs" in said and "choose cpu" in said


# --- the RUN folder -------------------------------------------------------------------------------


def test_unwritable_out(refused: Refused, small_set: Path, tmp_path: Path) -> None:
    """Below a regular file, where not even root can write."""
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    said = refused("train", "triplet", *words(small_set, out=out))
    assert f"{out} cannot be made, since {out.parent} is a file: choose another --out" in said


def test_existing_out(refused: Refused, small_set: Path, tmp_path: Path) -> None:
    said = refused("train", "triplet", *words(small_set, out=tmp_path))
    assert f"{tmp_path} exists already" in said and "--resume" not in said  # it holds no run
    assert list(tmp_path.iterdir()) == []


def test_resume_with_other_options_names_them(refused: Refused, small_run: Path) -> None:
    before = (small_run / "metrics.jsonl").read_bytes()
    said = refused(
        "train", "triplet", "--resume", small_run, "--train.lr", 0.01, "--method.margin", 0.3
    )
    assert "method.margin, train.lr differ from its run.json" in said
    assert (small_run / "metrics.jsonl").read_bytes() == before


def test_a_run_that_another_process_trains(refused: Refused, small_run: Path) -> None:
    before = {path: path.read_bytes() for path in small_run.rglob("*.json*")}
    with only_driver(small_run):
        said = refused("train", "triplet", "--resume", small_run)
    assert f"another process is at work on {small_run}" in said
    assert {path: path.read_bytes() for path in small_run.rglob("*.json*")} == before


def test_resume_of_another_method(refused: Refused, small_run: Path) -> None:
    said = refused("train", "center", "--resume", small_run)
    assert "is a run of triplet, not of center" in said


def test_resume_of_a_checkpoint_of_another_method(
    refused: Refused, small_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(small_run, tmp_path / "run")
    text = (run / "run.json").read_text()
    assert '"name": "triplet"' in text
    content = json.loads(text)
    content["method"] = {"name": "center"}
    (run / "run.json").write_text(json.dumps(content))
    (run / "mlflow.json").unlink()
    said = refused("train", "center", "--resume", run)
    assert "does not fit this run" in said and "run.json" in said


def test_a_folder_that_is_no_run(refused: Refused, small_set: Path, tmp_path: Path) -> None:
    assert "holds no exported model" in refused("evaluate", tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "run.json").write_text("{}")
    assert f"name one of the runs in it, such as {tmp_path}/one" in refused("evaluate", tmp_path)
    (tmp_path / "a.pth").write_text("text")
    assert "as a checkpoint (it is none, or was cut short)" in refused(
        "evaluate", tmp_path / "a.pth"
    )
    assert "there is no 'chek'; say what to do" in refused("data", "chek", tmp_path)
    assert "is not there: give a RUN folder" in refused("evaluate", tmp_path / "nowhere")
    for command in (
        ("train", "triplet", "--resume", tmp_path),
        ("train", "triplet", "--from", tmp_path),
        ("track", "sync", tmp_path),
    ):
        assert "is not a RUN folder: it has no run.json" in refused(*command)


def test_truncated_model(refused: Refused, small_run: Path, tmp_path: Path) -> None:
    whole = (small_run / "best_model_triplet_loss.pth").read_bytes()
    for length in (0, 100, len(whole) // 2):
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        assert "cut.pth cannot be read as a checkpoint" in refused("evaluate", tmp_path / "cut.pth")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pth")
    assert "is not a flowerray model" in refused("evaluate", tmp_path / "other.pth")


def test_synchronised_batchnorm_needs_gpus(refused: Refused, small_set: Path, out: Path) -> None:
    options = words(small_set, resources__workers=2, resources__device="cpu", out=out)
    said = refused("train", "triplet", *options, "--embedder.no-freeze-bn")
    assert "--embedder.freeze-bn off with several workers needs GPUs" in said


# --- words ----------------------------------------------------------------------------------------


def test_unknown_command_and_method(refused: Refused) -> None:
    assert "no command 'trian'; `flowerray --help` lists them" in refused("trian")
    assert "no method 'tripel'; choose one of: center, siamese" in refused("train", "tripel")
    assert "name a method first: center" in refused("train")
    assert "flowerray data synthesize | fetch | check" in refused("data", "verify")
    assert "name a RUN" in refused("evaluate")
    assert "flowerray track sync RUN" in refused("track")
    assert "--preset" in refused("train", "triplet", "--preset", "huge")
    assert "--from" in refused("train", "triplet", "--from")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--train.learning-rate", "3"), "--train.learning-rate"),
        (("--train.epochs", "many"), "--train.epochs"),
        (("--method.miner", "best"), "--method.miner"),
    ],
)
def test_unknown_options(
    option: tuple[str, str],
    said: str,
    out: Path,
    small_set: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """tyro's box instead of a sentence."""
    with pytest.raises(SystemExit) as stop:
        dispatch(["train", "triplet", *words(small_set, out=out), *option])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    assert said in " ".join(captured.err.split()) and "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--train.lr", "5"), "--train.lr = 5.0: input should be less than or equal to 1."),
        (("--embedder.image_size=16",), "--embedder.image-size = 16: input should be greater than"),
    ],
)
def test_out_of_bounds_options(
    refused: Refused, option: tuple[str, ...], said: str, out: Path, small_set: Path
) -> None:
    assert said in refused("train", "triplet", *words(small_set, out=out), *option)


# --- pictures -------------------------------------------------------------------------------------


def test_options_that_would_do_nothing(
    refused: Refused, small_run: Path, small_set: Path, tmp_path: Path
) -> None:
    said = refused("evaluate", small_run, "--embedder.image_size=64", "--embedder.dim", 8)
    assert "--embedder: a RUN has its own embedder" in said
    pair = sorted((small_set / "jpg").iterdir())[:2]
    explain = ["explain", small_run, "--out", tmp_path]
    said = refused(*explain, *pair, "--beside", small_run, "--max_images", 20)
    assert "--beside, --max-images: they belong to a whole split" in said
    said = refused(*explain, *pair, "--faithfulness.steps", 20)
    assert "--faithfulness: they belong" in said
    assert "--concepts: it belongs to two photographs" in refused(*explain, "--concepts", 3)
    assert "--concept-class: it belongs to --concept-folders" in refused(
        *explain, "--concept-class", "1"
    )
    said = refused(*explain, "--method", "decomposition", "--layer", "blocks.0")
    assert "--layer: decomposition has no layer to choose" in said
    said = refused("train", "triplet", "--resume", small_run, "--out", tmp_path / "new")
    assert "--out: --resume goes on in its own folder with its own options" in said
    said = refused("train", "triplet", "--from", small_run, "--preset", "gpu")
    assert "--preset: --from takes the options of the run" in said
    for command in (["tune", "triplet"], ["compare"]):
        said = refused(*command, "--resume", tmp_path, "--out", tmp_path / "new")
        assert "--out: --resume goes on in its own folder" in said
    assert "methods takes no options: leave --json out" in refused("methods", "--json")
    said = refused("backbones", "--files", tmp_path / "nowhere")
    assert f"--files {tmp_path / 'nowhere'} is no folder" in said
    said = refused(*explain, "--concept-folders", tmp_path, "--method", "gradcam", "--concepts", 3)
    assert "--concepts, --method: --concept-folders tests concepts, not maps" in said


@pytest.mark.parametrize("command", [["train", "center"], ["tune", "center"], ["compare"]])
def test_resume_of_nothing_named(refused: Refused, command: list[str]) -> None:
    assert "argument --resume: expected one argument" in refused(*command, "--resume")


def test_compare_finds_what_cannot_train_before_it_makes_anything(
    refused: Refused, small_set: Path, out: Path
) -> None:
    said = refused(
        "compare", "--data.root", small_set, "--out", out, "--protocols", "official",
        "--train.classes-per-batch", 2, "--embedder.backbone", "resnet18",
    )  # fmt: skip
    assert "Bundled weights exist for tf_efficientnet_lite0, " in said
    assert "--embedder.weights hub" in said


def test_similar_with_a_missing_or_broken_picture(
    refused: Refused, small_run: Path, small_set: Path, tmp_path: Path
) -> None:
    good = small_set / "jpg" / "image_00001.jpg"
    assert "gone.jpg is not there: give the path of a photograph" in refused(
        "similar", small_run, good, tmp_path / "gone.jpg"
    )
    (tmp_path / "text.jpg").write_text("no picture")
    assert "text.jpg cannot be read as an image (no known image format)" in refused(
        "similar", small_run, tmp_path / "text.jpg", good
    )


def test_search_without_a_gallery(
    refused: Refused, small_run: Path, small_set: Path, tmp_path: Path
) -> None:
    query, empty, sheet = small_set / "jpg" / "image_00001.jpg", tmp_path / "empty", tmp_path / "s"
    empty.mkdir()
    for gallery, said in (
        (empty, "holds no images"),
        (tmp_path / "gone", "is neither a folder nor a table"),
    ):
        options = ["--gallery", gallery, "--sheet", sheet]
        assert said in refused("search", small_run, query, *options)
    good = tmp_path / "good"
    good.mkdir()
    shutil.copy(query, good)
    said = refused("search", small_run, tmp_path / "no.jpg", "--gallery", good, "--sheet", sheet)
    assert "no.jpg is not there: give the path of a photograph" in said
    assert not sheet.exists()


def test_a_file_where_a_folder_is_wanted(
    refused: Refused, small_run: Path, small_set: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    a, b = (small_set / "jpg" / f"image_{n:05d}.jpg" for n in (1, 2))
    for inside in (file, file / "below" / "it"):
        kept = f"{inside} cannot be made, since {file} is a file: choose another --out"
        assert kept in refused("explain", small_run, a, b, "--concepts", 0, "--out", inside)
    below = file / "below"
    for command in (["explore", small_set], ["report", small_run], ["explain", small_run]):
        said = refused(*command, "--out", below)
        assert f"{below} cannot be made, since {file} is a file: choose another --out" in said
    assert file.read_text() == "mine"
