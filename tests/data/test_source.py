"""Opening by configuration, and the check that lists a set's problems by file."""

import os
from pathlib import Path

import numpy as np
import pytest

from flowerray.data import source
from flowerray.data.download import md5_of
from flowerray.data.source import DataConfig, check_dataset, open_all, open_dataset
from flowerray.errors import UserError
from flowerray.files import home
from flowerray.rendered.synthetic import SyntheticConfig, synthesize
from tests.data.pictures import class_folders, save_picture

TINY = SyntheticConfig(classes=2, scale=0.01, size=32)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("set") / "set", TINY, progress=False, processes=1)


def check(root: Path) -> list[str]:
    return check_dataset(root, progress=False)


def test_without_a_root_the_synthetic_set_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # new processes would take longer than the set
    config = DataConfig(synthetic=TINY.model_copy(update={"seed": 5}))
    dataset = open_dataset(config, progress=False)
    assert dataset.kind == "synthetic" and dataset.root.parent == home() / "synthetic"
    stamp = dataset.paths[0].stat().st_mtime_ns
    again = open_dataset(config, progress=False)
    assert again.tags == dataset.tags and dataset.paths[0].stat().st_mtime_ns == stamp
    other = DataConfig(synthetic=TINY.model_copy(update={"seed": 6}))
    assert open_dataset(other, progress=False).root != dataset.root


def test_the_layout_decides_the_reader(rendered: Path, tmp_path: Path) -> None:
    assert open_dataset(DataConfig(root=rendered)).kind == "synthetic"
    class_folders(tmp_path, {"a": 4, "b": 5})
    dataset = open_dataset(DataConfig(root=tmp_path, train_per_class=2, val_per_class=1, seed=3))
    assert dataset.kind == "folder" and len(dataset.splits["train"]) == 4
    with pytest.raises(UserError, match="not a folder"):
        open_dataset(DataConfig(root=tmp_path / "nowhere"))


def test_open_all_takes_every_image_of_either_layout(rendered: Path, tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 1, "b": 2})
    for root in (rendered, tmp_path):
        dataset = open_all(root)
        assert dataset.splits.keys() == {"test"}
        assert dataset.splits["test"].tolist() == list(range(len(dataset.paths)))


def test_config_bounds() -> None:
    for wrong in ({"train_per_class": 0}, {"protocol": "swapped"}, {"seed": -1}, {"rot": 1}):
        with pytest.raises(UserError):
            DataConfig(**wrong)


def test_a_sound_set_has_no_problems(rendered: Path, tmp_path: Path) -> None:
    assert check(rendered) == []
    assert check(class_folders(tmp_path / "own", {"a": 3, "b": 4})) == []


def test_problems_of_class_folders_are_named(tmp_path: Path) -> None:
    root = class_folders(tmp_path, {"aster": 5, "rose": 5, "tulip": 1, "empty": 0})
    cut = root / "aster" / "001.jpg"
    cut.write_bytes(cut.read_bytes()[:-100])
    (root / "rose" / "002.jpg").write_text("not an image")
    twin = (root / "aster" / "003.jpg").read_bytes()
    (root / "rose" / "004.jpg").write_bytes(twin)
    (root / "aster" / "copy.jpg").write_bytes(twin)
    (root / "rose" / "new.webp").symlink_to(tmp_path / "gone.webp")
    (root / "rose" / "old.tiff").write_bytes(twin)
    (root / "rose" / "notes.txt").write_text("no photograph")
    (root / "loose.jpg").write_bytes(twin)
    (root / "rose" / "more").mkdir()
    (root / "rose" / "more" / "inner.jpg").write_bytes(twin)
    problems = check(root)
    for expected in (
        "empty has no image",
        "tulip has a single image",
        "aster/001.jpg cannot be read as an image (",
        "rose/002.jpg cannot be read as an image (no known image format",
        "rose/004.jpg is the same file as aster/003.jpg and labelled rose against aster",
        "aster/copy.jpg is the same file as aster/003.jpg, and one may train where the other",
        "rose/new.webp is a link to a file that is not there",
        "rose: 1 .tiff file left out: accepted are .jpg",
        "loose.jpg is left out: it lies beside the class folders",
        "rose/more is left out with its 1 images: a class is one folder",
    ):
        assert sum(problem.startswith(expected) for problem in problems) == 1, expected
    assert len(problems) == 10
    assert any(
        "at least two" in problem for problem in check(class_folders(tmp_path / "p", {"a": 2}))
    )


def test_equal_files_of_the_published_set_are_no_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = synthesize(tmp_path / "set", TINY, progress=False, processes=1)
    dataset = open_dataset(DataConfig(root=root))
    train, test = sorted(dataset.splits[name][0] for name in ("train", "test"))
    dataset.paths[test].write_bytes(dataset.paths[train].read_bytes())
    (root / "synthetic.json").unlink()

    def same() -> list[str]:
        return [problem for problem in check(root) if "the same file" in problem]

    numbers = tuple(int(dataset.paths[i].stem[-5:]) for i in (train, test))
    monkeypatch.setattr("flowerray.data.oxford.TWINS", (numbers,))
    assert len(same()) == 1 and source.remarks(root) == []  # whoever's set this is, not Oxford's
    files = ("imagelabels.mat", "setid.mat")
    monkeypatch.setattr("flowerray.data.oxford.MD5", {n: md5_of(root / n) for n in files})
    assert same() == []
    (remark,) = source.remarks(root)
    assert f"{dataset.paths[train].stem} (" in remark and "nothing is to be done" in remark
    dataset.paths[test].write_bytes(dataset.paths[dataset.splits["val"][0]].read_bytes())
    assert len(same()) == 1


def test_problems_of_the_oxford_layout_are_named(tmp_path: Path) -> None:
    root = synthesize(tmp_path / "set", TINY, progress=False, processes=1)
    dataset = open_dataset(DataConfig(root=root))
    train, test = dataset.splits["train"][0], dataset.splits["test"][0]
    assert dataset.labels_N[train] == dataset.labels_N[test]
    dataset.paths[test].write_bytes(dataset.paths[train].read_bytes())
    broken = dataset.paths[dataset.splits["val"][0]]
    broken.write_bytes(broken.read_bytes()[:300])
    gone = dataset.paths[dataset.splits["val"][1]]
    gone.unlink()
    (root / "segmim" / "segmim_00002.jpg").unlink()
    problems = check(root)
    assert len(problems) == 4
    for words in (
        (gone.name, "lacks 1 of"),
        ("segmim_00002.jpg", "lacks 1 masks"),
        (f"jpg/{broken.name}", "cannot be read"),
        (dataset.paths[test].name, "the same file", "in test against train"),
    ):
        assert any(all(word in problem for word in words) for problem in problems), words
    with pytest.raises(UserError, match=gone.name):
        open_dataset(DataConfig(root=root))


def test_nothing_to_check_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder"):
        check(tmp_path / "nowhere")
    save_picture(tmp_path / "jpg" / "image_00001.jpg", 0)
    with pytest.raises(UserError, match=r"lacks imagelabels\.mat"):
        check(tmp_path)


def test_tags_of_a_rendered_set(rendered: Path) -> None:
    tags = open_dataset(DataConfig(root=rendered)).tags
    assert '"classes": 2' in tags["dataset/synthetic"]
    assert len(tags["dataset/setid_md5"]) == 32
    assert int(tags["dataset/images"]) == np.sum(
        [int(tags[f"dataset/{s}"]) for s in ("train", "val", "test")]
    )


def test_what_is_no_photograph_is_named(tmp_path: Path) -> None:
    """Pipes and folders named like images; other formats and files without extension, a line a
    class and suffix.
    """
    class_folders(tmp_path, {"a": 2, "b": 2})
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    (tmp_path / "a" / "folder.jpg").mkdir()
    for name in ("1.CR2", "2.cr2", "3.nef", "4", "5", "notes.txt"):
        (tmp_path / "b" / name).write_bytes(b"raw")
    assert [line.partition(": accepted")[0] for line in check(tmp_path)] == [
        "a/folder.jpg is left out: it is a folder",
        "a/pipe.jpg is left out: it is a named pipe",
        "b: 2 files without extension left out",
        "b: 2 .cr2 files left out",
        "b: 1 .nef file left out",
    ]


def test_given_splits_are_checked_as_splits(tmp_path: Path) -> None:
    for k, part in enumerate(("train", "val", "test")):
        class_folders(tmp_path / part, {"a": 2, "b": 2 + k})
    for k, path in enumerate(tmp_path.glob("*/*/*")):
        save_picture(path, k)
    copy = tmp_path / "test" / "a" / "000.jpg"
    copy.write_bytes((tmp_path / "train" / "a" / "000.jpg").read_bytes())
    (problem,) = check(tmp_path)
    assert problem.startswith("t") and "a/000.jpg is the same file as" in problem
    assert "and in test against train" in problem or "and in train against test" in problem


def test_files_that_were_examined_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_folders(tmp_path, {"a": 2, "b": 2})
    paths = sorted(tmp_path.glob("*/*"))
    known: dict[Path, tuple[str, str | None]] = {path: (str(path), None) for path in paths[1:]}
    known[paths[2]] = ("", "it is broken")
    read: list[Path] = []
    examine = source.examine

    def watched(path: Path) -> tuple[str, str | None]:
        read.append(path)
        return examine(path)

    monkeypatch.setattr(source, "examine", watched)
    (problem,) = check_dataset(tmp_path, False, known)
    assert read == paths[:1] and problem == "b/000.jpg cannot be read as an image (it is broken)"
