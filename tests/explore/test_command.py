"""`flowerray explore`, start to end."""

import json
import re
import shutil
from pathlib import Path

import pytest

from flowerray.cli import dispatch
from flowerray.data.source import DataConfig
from flowerray.explore import command
from flowerray.explore.command import open_for_exploring
from flowerray.tracking import sync
from flowerray.tracking.state import State
from tests.data.pictures import class_folders
from tests.explore.planted import plant
from tests.small import OPTIONS

EMBEDDER = [
    word
    for name in ("embedder.backbone", "embedder.weights", "embedder.image-size")
    for word in (f"--{name}", str(OPTIONS[name]))
]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without MLflow, which takes seconds."""
    monkeypatch.setattr(sync, "log_folder", lambda *_: True)


def run(root: Path, out: Path, *more: str) -> int:
    return dispatch(["explore", str(root), "--out", str(out), *EMBEDDER, *more])


def test_a_rendered_set(small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root, out = tmp_path / "set", tmp_path / "out"
    shutil.copytree(small_set, root)
    planted = plant(root, 4, seed=1)
    touched = {name for both in planted for name in both}
    broken = next(p for p in sorted((root / "jpg").iterdir()) if f"jpg/{p.name}" not in touched)
    broken.write_bytes(broken.read_bytes()[:500])

    assert run(root, out, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == json.loads((out / "explore.json").read_text())
    assert facts["images"] == 143 and facts["note"] is None
    assert [u["image"] for u in facts["unreadable"]] == [f"jpg/{broken.name}"]
    assert any(broken.name in problem for problem in facts["problems"])
    assert facts["duplicates"]["across_splits"] >= 4
    pairs = (out / "duplicates.csv").read_text()
    assert all(a in pairs and b in pairs for a, b in planted)
    assert facts["recall_at_1"]["removed"] >= 4

    page = (out / "index.html").read_text()
    assert broken.name in page and "Near-duplicates" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "<script" not in page
    state = State.read(out)
    assert (
        state.run_id and {"index.html", "explore.json", "maps.png"} <= state.artifacts_sent.keys()
    )


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"a": 2, "b": 2}, "its smallest class, a, has 2 images"),
        ({"a": 3}, "it has 1 class folder of images"),
        ({"a": 1, "b": 1}, "has 1 images"),
        ({"a": 1}, "1 class folder"),
    ],
)
def test_tiny_folders(
    sizes: dict[str, int], says: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = class_folders(tmp_path / "set", sizes)
    assert run(root, tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert says in " ".join(text.split())
    assert all(len(line) <= 80 or str(tmp_path) in line for line in text.splitlines())
    assert "index.html" in text and (tmp_path / "out" / "index.html").exists()


@pytest.mark.usefixtures("offline")
def test_the_problems_of_a_flat_folder_are_its_broken_files(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set", {"a": 3}) / "a"
    (root / "broken.png").write_bytes(b"no picture")
    assert run(root, tmp_path / "out") == 0
    (problem,) = json.loads((tmp_path / "out" / "explore.json").read_text())["problems"]
    assert problem.startswith("broken.png is left out: ")


@pytest.mark.usefixtures("offline")
def test_a_trained_model(
    small_set: Path, small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["--run", str(small_run), "--protocol", "disjoint", "--max-images", "20"]
    assert run(small_set, tmp_path / "out", *words) == 0
    facts = json.loads((tmp_path / "out" / "explore.json").read_text())
    assert facts["model"].startswith("triplet model") and facts["protocol"] == "disjoint"
    assert facts["recall_at_1"]["gallery"] == "self"
    assert "20 of 144 images" in (tmp_path / "out" / "index.html").read_text()
    assert "R@1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("no folder", "is not a folder"),
        ("empty", "holds no images"),
        ("unreadable", "None of the 2 images"),
        ("inside", "lies in the data set"),
        ("in use", "exists already"),
    ],
)
def test_mistakes(change: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root, out = tmp_path / "set", tmp_path / "out"
    if change == "empty":
        root.mkdir()
    elif change != "no folder":
        class_folders(root, {"a": 1, "b": 1})
    if change == "unreadable":
        for path in root.glob("*/*"):
            path.write_bytes(b"nothing")
    if change == "inside":
        out = root / "out"
    if change == "in use":
        out.mkdir()
        (out / "mine.txt").write_text("kept")
    assert run(root, out) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("flowerray explore: ") and says in error


def test_a_set_is_split_where_it_can_be(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set", {"a": 4, "b": 6})
    dataset, note = open_for_exploring(DataConfig(root=root, train_per_class=2, val_per_class=1))
    assert note is None and len(dataset.splits["test"]) == 4
    dataset, note = open_for_exploring(DataConfig(root=root))
    assert note is not None and "a split of 10 to train" in note
    assert list(dataset.splits) == ["test"] and len(dataset.paths) == 10
    (root / "empty").mkdir()
    dataset, note = open_for_exploring(
        DataConfig(root=root, protocol="trainval", train_per_class=2, val_per_class=1)
    )
    assert note is not None and "its smallest class, empty, has 0 images" in note
    assert dataset.classes == ("a", "b")


@pytest.mark.usefixtures("offline")
def test_evil_names_and_a_second_try(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line breaks, escape sequences and formulas; a failure late in the work leaves no `--out`."""
    names = {"a\nb": 2, "=1+1": 2, "\x1b[31mred": 2}
    root, out = class_folders(tmp_path / "set", names), tmp_path / "out"
    (root / "=1+1" / "001.jpg").rename(root / "=1+1" / "x\n\x1b[2J.jpg")
    with monkeypatch.context() as patched:
        patched.setattr(command, "write_pictures", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(root, out)
    assert not out.exists()
    assert run(root, out) == 0
    shown = capsys.readouterr().out + (out / "index.html").read_text()
    assert "\x1b" not in shown and r"a\nb" in shown
    table = (out / "images.csv").read_text().splitlines()
    assert len(table) == 7 and r"'=1+1/x\n\x1b[2J.jpg,'=1+1,test" in "\n".join(table)
