"""Class folders: names, suffixes, stratified splits, protocols, refusals."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flowerray.data.folder import read_all, read_folder
from flowerray.errors import UserError
from tests.data.pictures import class_folders, save_picture

SIZES = {"tulip": 9, "aster": 6, "rose": 12, "daisy": 7}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("flowers"), SIZES)


def test_sorted_classes_and_stratified_splits(root: Path) -> None:
    dataset = read_folder(root, train_per_class=2, val_per_class=3, seed=1)
    assert (dataset.kind, dataset.protocol, dataset.root) == ("folder", "official", root)
    assert dataset.classes == ("aster", "daisy", "rose", "tulip")
    assert [dataset.classes[c] for c in dataset.labels_N] == [p.parent.name for p in dataset.paths]
    assert list(dataset.paths) == sorted(dataset.paths)
    counts = {name: np.bincount(dataset.split_labels(name)).tolist() for name in dataset.splits}
    assert counts == {"train": [2, 2, 2, 2], "val": [3, 3, 3, 3], "test": [1, 2, 7, 4]}
    together = np.concatenate(list(dataset.splits.values()))
    assert sorted(together) == list(range(sum(SIZES.values())))
    assert all((np.diff(indices) > 0).all() for indices in dataset.splits.values())


def test_the_seed_decides_the_split(root: Path) -> None:
    def train(seed: int) -> list[int]:
        return read_folder(root, 2, 2, seed).splits["train"].tolist()

    assert train(0) == train(0)
    assert len({tuple(train(seed)) for seed in range(5)}) == 5


def test_suffixes_in_any_case_and_hidden_files(tmp_path: Path) -> None:
    for name in ("a.JPG", "b.jpeg", "c.PNG", "d.webp", "e.Bmp"):
        save_picture(tmp_path / "x" / name, 1)
        save_picture(tmp_path / "y" / name, 2)
    for other in (".a.jpg", "notes.txt", "clip.gif"):
        (tmp_path / "x" / other).write_bytes(b"")
    (tmp_path / "x" / "folder.jpg").mkdir()
    save_picture(tmp_path / ".cache" / "a.jpg", 3)
    save_picture(tmp_path / "loose.jpg", 4)
    dataset = read_folder(tmp_path, 1, 1)
    assert dataset.classes == ("x", "y")
    assert [path.name for path in dataset.paths] == [
        "a.JPG",
        "b.jpeg",
        "c.PNG",
        "d.webp",
        "e.Bmp",
    ] * 2


def test_protocols(root: Path, tmp_path: Path) -> None:
    official = read_folder(root, 2, 3)
    trainval = read_folder(root, 2, 3, protocol="trainval")
    assert trainval.splits.keys() == {"train", "test"}
    expected = np.union1d(official.splits["train"], official.splits["val"])
    assert np.array_equal(trainval.splits["train"], expected)
    assert np.array_equal(trainval.splits["test"], official.splits["test"])

    more = class_folders(tmp_path, {**SIZES, "violet": 3, "viola": 4, "yarrow": 3, "zinnia": 5})
    disjoint = read_folder(more, protocol="disjoint")  # sizes do not matter
    classes = {name: set(disjoint.split_labels(name)) for name in disjoint.splits}
    assert classes["test"] == {4, 5, 6, 7} and classes["train"] | classes["val"] == {0, 1, 2, 3}
    assert len(classes["val"]) == 2
    assert sum(map(len, disjoint.splits.values())) == len(disjoint.paths)
    with pytest.raises(UserError, match="notebooks"):
        read_folder(root, 2, 3, protocol="notebooks")


def test_refusals_are_sentences(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds 0"):
        read_folder(tmp_path)
    class_folders(tmp_path, {"rose": 5})
    with pytest.raises(UserError, match="at least two, and holds 1"):
        read_folder(tmp_path)
    with pytest.raises(
        UserError, match=r"at least 10 images .*aster \(6\), daisy \(7\), tulip \(9\);"
    ):
        read_folder(root, 5, 4)
    class_folders(tmp_path, {"tulip": 5})
    with pytest.raises(UserError, match="at least 4 classes"):
        read_folder(tmp_path, 1, 1, protocol="disjoint")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty \(0\)"):
        read_folder(tmp_path, 1, 1)
    class_folders(tmp_path, {name: 5 for name in ("iris", "lily", "lotus", "poppy", "violet")})
    with pytest.raises(UserError, match="hold no image: empty; remove them"):
        read_folder(tmp_path, 1, 1, protocol="disjoint")


@pytest.mark.parametrize("place", ["gr\udcfcn/001.jpg", "a/gr\udcfcn.jpg"])
def test_names_that_cannot_be_written_down_are_refused(tmp_path: Path, place: str) -> None:
    root = class_folders(tmp_path, {"a": 1, "b": 1})
    odd = root / place
    picture = next((root / "a").iterdir()).read_bytes()
    try:
        odd.parent.mkdir(exist_ok=True)
        odd.write_bytes(picture)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    for read in (read_folder, read_all):
        with pytest.raises(UserError, match=r"holds .*gr\?n.* is not UTF-8") as caught:
            read(root)
        str(caught.value).encode()


def test_a_locale_that_cannot_read_a_name_is_named(tmp_path: Path) -> None:
    root = class_folders(tmp_path, {"a": 1, "ros\u00e9": 1})
    program = (
        "import sys; from pathlib import Path; from flowerray.data.folder import class_files\n"
        "class_files(Path(sys.argv[1]))"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(root)], capture_output=True, text=True,
        env=os.environ | plain,
    )  # fmt: skip
    assert "ros??, whose name this locale cannot read: export LC_ALL=C.UTF-8." in done.stderr


def test_tags_follow_names_and_splits(root: Path, tmp_path: Path) -> None:
    tags = read_folder(root, 2, 3).tags
    assert tags["dataset/train"] == "8" and tags["dataset/classes"] == "4"
    prints = {read_folder(root, 2, 3, seed).tags["dataset/fingerprint"] for seed in (0, 0, 1)}
    assert len(prints) == 2 and tags["dataset/fingerprint"] in prints
    moved = class_folders(tmp_path / "elsewhere", SIZES)
    assert read_folder(moved, 2, 3).tags == tags
    (moved / "rose" / "000.jpg").rename(moved / "rose" / "zero.jpg")
    assert read_folder(moved, 2, 3).tags["dataset/fingerprint"] != tags["dataset/fingerprint"]


def test_read_all_takes_every_image(root: Path, tmp_path: Path) -> None:
    dataset = read_all(root)
    assert dataset.splits.keys() == {"test"}
    assert dataset.splits["test"].tolist() == list(range(34)) and len(dataset.paths) == 34
    assert dataset.classes == ("aster", "daisy", "rose", "tulip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images"):
        read_all(tmp_path)
    save_picture(tmp_path / "one.jpg", 0)
    flat = read_all(tmp_path)
    assert flat.classes == (tmp_path.name,) and [p.name for p in flat.paths] == ["one.jpg"]


def test_real_flowers() -> None:
    """12 species x 40 photographs, where FLOWERRAY_REAL_FLOWERS points to them."""
    if "FLOWERRAY_REAL_FLOWERS" not in os.environ:
        pytest.skip("FLOWERRAY_REAL_FLOWERS does not name a folder of 12 species x 40")
    dataset = read_folder(Path(os.environ["FLOWERRAY_REAL_FLOWERS"]))
    assert len(dataset.classes) == 12
    assert [len(dataset.splits[name]) for name in ("train", "val", "test")] == [120, 120, 240]


def test_train_valid_and_test_with_classes_inside_are_the_splits(tmp_path: Path) -> None:
    for part, sizes in (("train", (3, 4)), ("Valid", (1, 2)), ("test", (2, 2))):
        class_folders(tmp_path / part, dict(zip("ab", sizes, strict=True)))
    dataset = read_folder(tmp_path)
    assert dataset.classes == ("a", "b") and len(dataset.paths) == 14
    for name, part in (("train", "train"), ("val", "Valid"), ("test", "test")):
        paths = [dataset.paths[i] for i in dataset.splits[name]]
        assert paths == sorted((tmp_path / part).glob("*/*"))
        labels = [dataset.classes[label] for label in dataset.split_labels(name)]
        assert labels == [path.parent.name for path in paths]
    assert len(read_folder(tmp_path, protocol="trainval").splits["train"]) == 10
    assert read_all(tmp_path).splits["test"].tolist() == list(range(14))
    class_folders(tmp_path / "test", {"c": 1})
    with pytest.raises(UserError, match="train has no image of 1 classes .*: c; add some"):
        read_folder(tmp_path)


def test_classes_one_level_deeper_are_told(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": 3, "b": 3})
    class_folders(tmp_path / "test", {"a": 3, "b": 3})
    for read in (read_folder, read_all):
        with pytest.raises(UserError, match=r"lie one level deeper, in folders inside .*test\)"):
            read(tmp_path)
