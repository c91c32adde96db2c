"""The Oxford layout: counting from 1, protocols, and the guard of the real set."""

import ast
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.io import loadmat, savemat

from flowerray.data.oxford import CLASSES, is_oxford, read_oxford
from flowerray.errors import UserError
from flowerray.rendered.synthetic import SyntheticConfig, class_sizes
from tests.data.pictures import numbered, write_tables

SIZES = {"train": 1020, "val": 1020, "test": 6149}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8,189 tiny JPEGs under Oxford's names."""
    return numbered(tmp_path_factory.mktemp("oxford") / "jpg", 8189)


def stand_in_tables() -> tuple[NDArray[np.int64], dict[str, NDArray[np.int64]]]:
    """Shuffled labels 1..102 of 8,189 images, and splits of 10 / 10 / rest a class."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(1, 103), class_sizes(SyntheticConfig())))
    parts: dict[str, list[NDArray[np.int64]]] = {"trnid": [], "valid": [], "tstid": []}
    for label in range(1, 103):
        ids = rng.permutation(np.flatnonzero(labels == label) + 1)
        for part, chosen in zip(parts.values(), np.split(ids, [10, 20]), strict=True):
            part.append(chosen)
    return labels, {key: rng.permutation(np.concatenate(part)) for key, part in parts.items()}


@pytest.fixture
def make(photographs: Path, tmp_path: Path) -> Callable[..., Path]:
    """A real-sized set in which single tables are replaced."""

    def build(labels: NDArray[np.int64] | None = None, **changed: NDArray[np.int64]) -> Path:
        own_labels, parts = stand_in_tables()
        (tmp_path / "jpg").symlink_to(photographs)
        write_tables(tmp_path, own_labels if labels is None else labels, {**parts, **changed})
        return tmp_path

    return build


def test_files_and_labels_count_from_one_on_disk(make: Callable[..., Path]) -> None:
    root = make()
    labels, parts = stand_in_tables()
    dataset = read_oxford(root)
    assert dataset.kind == "oxford" and dataset.classes == CLASSES and dataset.masks is None
    assert dataset.paths[0].name == "image_00001.jpg"
    assert dataset.paths[-1].name == "image_08189.jpg"
    assert (dataset.labels_N.min(), dataset.labels_N.max()) == (0, 101)
    for split, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
        expected = sorted(f"image_{number:05d}.jpg" for number in parts[key])
        assert [dataset.paths[i].name for i in dataset.splits[split]] == expected
    some = int(parts["trnid"][0])
    assert dataset.labels_N[some - 1] == labels[some - 1] - 1


def check_protocols(root: Path, disjoint_sizes: tuple[int, int] | None = None) -> None:
    """What holds for every real-sized set."""
    official = read_oxford(root)
    assert {name: len(ids) for name, ids in official.splits.items()} == SIZES
    assert (np.bincount(official.split_labels("train")) == 10).all()
    assert (np.bincount(official.split_labels("val")) == 10).all()
    counts = np.bincount(official.labels_N)
    assert (len(counts), counts.min(), counts.max()) == (102, 40, 258)

    trainval = read_oxford(root, "trainval")
    assert trainval.splits.keys() == {"train", "test"}
    assert (np.bincount(trainval.split_labels("train")) == 20).all()
    assert np.array_equal(trainval.splits["test"], official.splits["test"])

    notebooks = read_oxford(root, "notebooks")
    for ours, theirs in (("train", "test"), ("test", "train"), ("val", "val")):
        assert np.array_equal(notebooks.splits[ours], official.splits[theirs])

    disjoint = read_oxford(root, "disjoint", seed=3)
    classes = {name: set(disjoint.split_labels(name)) for name in disjoint.splits}
    assert classes["test"] == set(range(51, 102))
    assert len(classes["val"]) == 10 and len(classes["train"]) == 41
    assert classes["val"] | classes["train"] == set(range(51))
    trained = len(disjoint.splits["train"]) + len(disjoint.splits["val"])
    assert trained + len(disjoint.splits["test"]) == 8189
    if disjoint_sizes is not None:
        assert (trained, len(disjoint.splits["test"])) == disjoint_sizes
    assert np.array_equal(read_oxford(root, "disjoint", 3).splits["val"], disjoint.splits["val"])
    other = read_oxford(root, "disjoint", 4).splits["val"]
    assert not np.array_equal(other, disjoint.splits["val"])
    prints = {d.tags["dataset/fingerprint"] for d in (official, trainval, notebooks, disjoint)}
    assert len(prints) == 4


def test_protocols(make: Callable[..., Path]) -> None:
    check_protocols(make())


def check_refusals(root: Path) -> None:
    """The two mix-ups that other programs carry."""
    setid = loadmat(root / "setid.mat")
    labels = loadmat(root / "imagelabels.mat")["labels"].astype(int)
    keys = ("trnid", "valid", "tstid")
    swapped = dict(zip(keys, (setid["tstid"], setid["valid"], setid["trnid"]), strict=True))
    savemat(root / "setid.mat", swapped)
    with pytest.raises(UserError, match=r"setid\.mat has its splits swapped"):
        read_oxford(root)
    savemat(root / "setid.mat", {key: setid[key] for key in keys})
    for shift, found in ((-1, r"0\.\.101"), (1, r"2\.\.103")):
        savemat(root / "imagelabels.mat", {"labels": (labels + shift).astype(np.uint8)})
        with pytest.raises(UserError, match=rf"imagelabels\.mat holds labels {found} .*shifted"):
            read_oxford(root)


def test_swapped_splits_and_shifted_labels_are_refused(make: Callable[..., Path]) -> None:
    check_refusals(make())


def test_wrong_sizes_are_refused(make: Callable[..., Path]) -> None:
    parts = stand_in_tables()[1]
    root = make(trnid=parts["trnid"][:-1], tstid=np.append(parts["tstid"], parts["trnid"][-1]))
    with pytest.raises(UserError, match=r"1,019 / 1,020 / 6,150 .*1,020 / 1,020 / 6,149"):
        read_oxford(root)


def test_a_class_without_ten_training_images_is_refused(make: Callable[..., Path]) -> None:
    labels, parts = stand_in_tables()
    roses, thorns = (np.flatnonzero(labels == label) + 1 for label in (74, 75))
    one = np.intersect1d(roses, parts["trnid"])[0]
    other = np.intersect1d(thorns, parts["tstid"])[0]
    root = make(
        trnid=np.where(parts["trnid"] == one, other, parts["trnid"]),
        tstid=np.where(parts["tstid"] == other, one, parts["tstid"]),
    )
    with pytest.raises(UserError, match=r"Class 74 \(rose\) has 9 images in train"):
        read_oxford(root)


def test_overlapping_splits_and_foreign_numbers_are_refused(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    labels, parts = stand_in_tables()
    twice = parts["tstid"].copy()
    twice[0] = parts["trnid"][0]
    root = make(tstid=twice)
    with pytest.raises(UserError, match=r"1 images in both train and test, the first image_"):
        read_oxford(root)
    outside = parts["tstid"].copy()
    outside[0] = 8190
    write_tables(root, labels, {**parts, "tstid": outside})
    with pytest.raises(UserError, match=r"names image 8190 and the set has images 1\.\.8,189"):
        read_oxford(root)
    zero_based = {key: ids - 1 for key, ids in parts.items()}
    write_tables(root, labels, zero_based)
    with pytest.raises(UserError, match=r"names image 0 and"):
        read_oxford(root)


def test_half_downloaded_sets_are_refused_by_what_lacks(photographs: Path, tmp_path: Path) -> None:
    labels, parts = stand_in_tables()
    assert not is_oxford(tmp_path)
    (tmp_path / "jpg").mkdir()
    shutil.copy(photographs / "image_00001.jpg", tmp_path / "jpg")
    assert is_oxford(tmp_path)
    with pytest.raises(UserError, match=r"lacks imagelabels\.mat.*flowerray data fetch"):
        read_oxford(tmp_path)
    write_tables(tmp_path, labels, parts)
    with pytest.raises(UserError, match=r"jpg lacks 8,188 of 8,189 .*image_00002\.jpg"):
        read_oxford(tmp_path)
    (tmp_path / "setid.mat").unlink()
    with pytest.raises(UserError, match=r"lacks setid\.mat"):
        read_oxford(tmp_path)
    write_tables(tmp_path, labels, parts)
    content = (tmp_path / "setid.mat").read_bytes()
    (tmp_path / "setid.mat").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"setid\.mat cannot be read"):
        read_oxford(tmp_path)
    (tmp_path / "setid.mat").write_text("<html>404</html>")
    with pytest.raises(UserError, match=r"setid\.mat cannot be read"):
        read_oxford(tmp_path)


def rendered(root: Path, num_classes: int, per_class: int = 5) -> Path:
    """A synthetic set without its generator: 2 / 1 / rest a class."""
    numbered(root / "jpg", num_classes * per_class)
    labels = np.repeat(np.arange(1, num_classes + 1), per_class)
    place = np.tile(np.arange(per_class), num_classes)
    ids = np.arange(1, len(labels) + 1)
    parts = {"trnid": ids[place < 2], "valid": ids[place == 2], "tstid": ids[place > 2]}
    write_tables(root, labels, parts)
    (root / "synthetic.json").write_text("{}")
    return root


@pytest.mark.parametrize(
    ("classes", "held"), [(4, 1), (7, 1), (8, 2), (15, 2), (20, 2), (21, 2), (40, 4)]
)
def test_disjoint_halves_of_rendered_sets(tmp_path: Path, classes: int, held: int) -> None:
    dataset = read_oxford(rendered(tmp_path, classes), "disjoint")
    found = {name: sorted(set(dataset.split_labels(name))) for name in dataset.splits}
    assert found["test"] == list(range(classes // 2, classes))
    assert len(found["val"]) == held
    assert sorted(found["val"] + found["train"]) == list(range(classes // 2))
    assert sum(map(len, dataset.splits.values())) == 5 * classes


def test_rendered_sets_are_free_of_the_real_sizes_only(tmp_path: Path) -> None:
    root = rendered(tmp_path, 3)
    dataset = read_oxford(root)
    assert dataset.kind == "synthetic"
    assert dataset.classes == ("class_001", "class_002", "class_003")
    with pytest.raises(UserError, match="at least 4 classes"):
        read_oxford(root, "disjoint")
    (root / "synthetic.json").write_text('{"classes": ["a", "b", "c"], "config": {"seed": 4}}')
    named = read_oxford(root)
    assert named.classes == ("a", "b", "c")
    assert named.tags["dataset/synthetic"] == '{"seed": 4}'
    for number in range(1, 16):
        (root / "segmim").mkdir(exist_ok=True)
        (root / "segmim" / f"segmim_{number:05d}.jpg").write_bytes(b"")
    masks = read_oxford(root).masks
    assert masks is not None and masks[14].name == "segmim_00015.jpg"
    (root / "synthetic.json").write_text("{")
    with pytest.raises(UserError, match=r"synthetic\.json is not valid .* render the set again"):
        read_oxford(root)
    (root / "synthetic.json").unlink()
    with pytest.raises(UserError, match="1,020"):
        read_oxford(root)


def test_the_fingerprint_ignores_the_place_and_the_pixels(tmp_path: Path) -> None:
    first = read_oxford(rendered(tmp_path / "a", 4))
    again = rendered(tmp_path / "b", 4)
    content = bytearray((again / "setid.mat").read_bytes())
    content[60:64] = b"1999"  # of the time when it was written, which its header holds
    (again / "setid.mat").write_bytes(content)
    second = read_oxford(again)
    assert first.tags["dataset/setid_md5"] != second.tags["dataset/setid_md5"]
    assert first.tags["dataset/fingerprint"] == second.tags["dataset/fingerprint"]


def test_class_names_equal_torchvision() -> None:
    """Read from its source: importing torchvision takes longer than all these tests."""
    package = importlib.util.find_spec("torchvision")
    if package is None or package.origin is None:
        pytest.skip("torchvision is not installed")
    source = Path(package.origin).with_name("datasets") / "flowers102.py"
    lists = [
        ast.literal_eval(node.value)
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "classes"
    ]
    assert lists == [list(CLASSES)] and len(set(CLASSES)) == 102


def test_the_official_label_files(photographs: Path, tmp_path: Path) -> None:
    """Oxford's own imagelabels.mat and setid.mat over stand-in photographs."""
    if "FLOWERRAY_OXFORD_LABELS" not in os.environ:
        pytest.skip("FLOWERRAY_OXFORD_LABELS does not name a folder of Oxford's two .mat files")
    for name in ("imagelabels.mat", "setid.mat"):
        shutil.copyfile(Path(os.environ["FLOWERRAY_OXFORD_LABELS"]) / name, tmp_path / name)
    (tmp_path / "jpg").symlink_to(photographs)
    check_protocols(tmp_path, disjoint_sizes=(3493, 4696))
    assert read_oxford(tmp_path).tags["dataset/setid_md5"] == "a5357ecc9cb78c4bef273ce3793fc85c"
    check_refusals(tmp_path)
