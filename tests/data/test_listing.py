"""Tables of photographs: their splits, what they are refused for, by line, and where they go."""

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from flowerray.cli import dispatch
from flowerray.data.folder import read_folder
from flowerray.data.listing import is_listing, listed, read_listing
from flowerray.data.source import DataConfig, check_dataset, open_all, open_dataset
from flowerray.errors import UserError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a table above `images/`, which has empty files a0.jpg .. c9.jpg."""
    (tmp_path / "images").mkdir()
    for name in (f"{c}{n}" for c in "abc" for n in range(10)):
        (tmp_path / "images" / f"{name}.jpg").touch()

    def table(
        rows: Sequence[Sequence[str]], columns: str = "path,label", to: str = "t.csv"
    ) -> Path:
        names, file = columns.split(","), tmp_path / to
        if to.endswith(".parquet"):
            content = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
            parquet.write_table(pyarrow.table(content), file)
        else:
            with file.open("w", newline="") as text:
                csv.writer(text).writerows([names, *rows])
        return file

    return table


def rows(*more: Callable[[str, int], str]) -> list[list[str]]:
    return [[f"images/{c}{n}.jpg", c, *(f(c, n) for f in more)] for c in "abc" for n in range(10)]


def test_a_table_is_split_as_class_folders_are(write: Write, tmp_path: Path) -> None:
    for c in "abc":
        (tmp_path / "folders" / c).mkdir(parents=True)
        for n in range(10):
            (tmp_path / "folders" / c / f"{c}{n}.jpg").touch()
    folders = read_folder(tmp_path / "folders", 3, 2, seed=4)
    for name in ("t.csv", "t.parquet"):
        table = read_listing(write(rows(), to=name), 3, 2, seed=4)
        assert table.classes == folders.classes and table.kind == "table"
        assert [p.name for p in table.paths] == [p.name for p in folders.paths]
        for split, indices in folders.splits.items():
            assert table.splits[split].tolist() == indices.tolist(), split
    assert is_listing(tmp_path / "t.PARQUET") and not is_listing(tmp_path / "folders")


def test_groups_stay_whole(write: Write) -> None:
    """Plants of one to four photographs, which no split tears apart."""
    plants = [0, 0, 0, 0, 1, 2, 2, 3, 4, 4]
    file = write(rows(lambda c, n: f"{c}{plants[n]}"), "path,label,group")
    for seed in range(5):
        found = read_listing(file, 3, 2, seed=seed)
        where = {i: name for name, part in found.splits.items() for i in part.tolist()}
        assert len(where) == 30
        groups = {(p.name[0], plants[int(p.name[1])]): set[str]() for p in found.paths}
        for i, path in enumerate(found.paths):
            groups[path.name[0], plants[int(path.name[1])]].add(where[i])
        assert all(len(splits) == 1 for splits in groups.values())
        for label in range(3):
            assert (found.split_labels("train") == label).sum() >= 3
            assert (found.split_labels("val") == label).sum() >= 2
    with pytest.raises(UserError, match="t.csv has too few images .* of 3 classes .* first is a"):
        read_listing(file, 6, 4)


def test_given_splits_queries_and_a_gallery(write: Write) -> None:
    names = ["train"] * 4 + ["Valid", "val", "test", "query", "gallery", "gallery"]
    file = write(rows(lambda c, n: names[n]), "path,label,split")
    found = read_listing(file)
    assert {name: len(part) for name, part in found.splits.items()} == {
        "train": 12, "val": 6, "test": 6, "gallery": 6,
    }  # fmt: skip
    whole = open_all(file)
    assert {name: len(part) for name, part in whole.splits.items()} == {"test": 6, "gallery": 6}
    assert open_dataset(DataConfig(root=file, protocol="trainval")).splits.keys() == {
        "train", "test", "gallery",
    }  # fmt: skip
    with pytest.raises(UserError, match="has no image for val"):
        read_listing(write(rows(lambda c, n: "test" if n else "train"), "path,label,split"))


FAULTS = {
    "images/a1.jpg,": "line 3: label is empty",
    "images/gone.jpg,a": "line 3: images/gone.jpg is not there",
    "images,a": "line 3: images is no image by its name",
    "../other.jpg,a": r"line 3: ../other.jpg does not lie below the table",
    "/etc/a.jpg,a": "line 3: /etc/a.jpg does not lie below the table",
    "images/a0.jpg,b": "line 3: images/a0.jpg stands in line 2 already",
    "images/a1.jpg,a,extra": "line 3: 3 values for 2 columns",
    "images/a1.jpg,a\n\nimages/b0.jpg,": "line 5: label is empty",
}


@pytest.mark.parametrize("second", FAULTS)
def test_a_fault_is_named_with_its_line(second: str, write: Write) -> None:
    file = write([])
    file.write_text(f"path,label\nimages/a0.jpg,a\n{second}\nimages/zero.jpg,a\n")
    with pytest.raises(UserError, match=FAULTS[second]):
        read_listing(file)
    if "values" not in FAULTS[second]:
        assert len(listed(file)[1]) == 2
        with pytest.raises(UserError, match="and 1 more faults"):
            read_listing(file)


def test_columns_that_contradict_each_other(write: Write) -> None:
    def said(columns: str, *changes: tuple[int, int, str]) -> str:
        table = rows(*[lambda c, n: f"{c}{n}", lambda c, n: "train", lambda c, n: "x"])
        for line, column, value in changes:
            table[line][column] = value
        kept = [["path", "label", "group", "split", "parent"].index(c) for c in columns.split(",")]
        return "; ".join(listed(write([[row[k] for k in kept] for row in table], columns))[1])

    assert "line 3: group a0 is in another split than in line 2" in said(
        "path,label,group,split", (1, 2, "a0"), (1, 3, "val")
    )
    assert "line 12: group a0 is in another class than in line 2" in said(
        "path,label,group", (10, 2, "a0")
    )
    assert "line 4: label a has another parent than in line 2" in said(
        "path,label,parent", (2, 4, "y")
    )
    assert "line 5: split is missing, unlike in line 2" in said("path,label,split", (3, 3, ""))
    assert "line 2: split training is none of train, val" in said(
        "path,label,split", (0, 3, "training")
    )


def test_what_is_no_table(write: Write, tmp_path: Path) -> None:
    file = write([["images/a0.jpg", "a"]], "file,label")
    with pytest.raises(UserError, match="no column path; its first line names file, label"):
        read_listing(file)
    for name, content in (("t.csv", b"\xff\xfe\x00p"), ("t.parquet", b"PAR1 not so")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as a table"):
            read_listing(tmp_path / name)
    with pytest.raises(UserError, match="is not there; give a folder, a .csv or"):
        read_listing(tmp_path / "gone.csv")
    with pytest.raises(UserError, match="lists no image"):
        read_listing(write([]))


def test_a_table_is_measured_and_checked(
    small_set: Path, small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """R@1 by parent counts a neighbour of the query's genus."""
    shutil.copytree(small_set / "jpg", tmp_path / "jpg")
    images = sorted((tmp_path / "jpg").iterdir())
    table = tmp_path / "flowers.csv"
    with table.open("w", newline="") as text:
        out = csv.writer(text)
        out.writerow(["Path", "Label", "split", "parent"])
        for number, image in enumerate(images):
            label = number // 24
            split = "query" if number % 4 == 0 else "gallery"
            out.writerow([f"jpg/{image.name}", f"species {label}", split, f"genus {label // 2}"])
    assert dispatch(["evaluate", str(small_run), "--data.root", str(table), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gallery"], found["num_queries"], found["num_gallery"]) == ("gallery", 36, 108)
    assert found["recall_at_1"] <= found["recall_at_1_parent"] <= 1
    assert dispatch(["evaluate", str(small_run), "--data.root", str(table)]) == 0
    assert "R@1 by parent" in capsys.readouterr().out
    assert check_dataset(table, progress=False) == []
    images[3].write_bytes(b"broken")
    (problem,) = check_dataset(table, progress=False)
    assert problem.startswith("jpg/image_00004.jpg cannot be read as an image")
    whole = open_all(table)
    assert whole.parents == tuple(f"genus {n // 2}" for n in range(6)) and whole.given == table
    assert np.bincount(whole.labels_N).tolist() == [24] * 6
