"""What is kept in FLOWERRAY_HOME: listed, and pruned by age and size."""

import json
import os
import time
from pathlib import Path

import pytest

from flowerray.cache import items, prune
from flowerray.cli import dispatch

DAY = 86_400
LAID = {  # by days since the last use
    "stores/aa/pixels.bin": 50,
    "synthetic/v1/jpg/image_00001.jpg": 20,
    "mlflow/models_flowers/best_model_x.pth": 10,
    "frozen/cc.json": 5,
    "stores/bb/pixels.bin": 0,
}


@pytest.fixture(autouse=True)
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a megabyte in each item, and a RUN."""
    monkeypatch.setenv("FLOWERRAY_HOME", str(tmp_path))
    for name in (*LAID, "runs/mine/best_model_x.pth", "stores/known/note", "stores/aa.lock"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(10**6))
    for name, days in LAID.items():
        for path in (tmp_path / name, *(tmp_path / name).parents):
            if path != tmp_path and path.is_relative_to(tmp_path):
                os.utime(path, (time.time() - days * DAY,) * 2)
    return tmp_path


def names(found: list) -> list[str]:
    return [item.path.name for item in found]


def test_items_are_listed_by_their_last_use_without_runs() -> None:
    assert names(items()) == ["aa", "v1", "models_flowers", "cc.json", "bb"]
    assert [item.kind for item in items()] == ["store", "rendered", "model", "frozen", "store"]
    assert all(10**6 <= item.bytes < 1.1 * 10**6 for item in items())
    assert [round((time.time() - item.used) / DAY) for item in items()] == [50, 20, 10, 5, 0]


@pytest.mark.parametrize(
    ("days", "megabytes", "gone"),
    [
        (30, 100, ["aa"]),
        (7, 100, ["aa", "v1", "models_flowers"]),
        (100, 3.5, ["aa", "v1"]),
        (0, 0, ["aa", "v1", "models_flowers", "cc.json"]),  # the last one is in use
    ],
)
def test_the_longest_unused_goes_first(
    days: float, megabytes: float, gone: list[str], filled: Path
) -> None:
    assert names(prune(days, megabytes * 1e6, dry=True)) == gone and len(items()) == 5
    assert names(prune(days, megabytes * 1e6)) == gone
    assert names(items()) == ["aa", "v1", "models_flowers", "cc.json", "bb"][len(gone) :]
    assert (filled / "runs" / "mine" / "best_model_x.pth").exists()
    assert not (filled / "stores" / "aa.lock").exists()


def test_the_command(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["cache", "list"]) == 0
    shown = capsys.readouterr().out
    assert "store        1.0 MB   50.0 days" in shown and "kept 5: 5.0 MB" in shown
    assert dispatch(["cache", "prune", "--days", "15", "--dry-run"]) == 0
    assert "would be removed 2: 2.0 MB" in capsys.readouterr().out and len(items()) == 5
    assert dispatch(["cache", "prune", "--days", "15", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [Path(item["path"]).name for item in found["items"]] == ["aa", "v1"]
    assert dispatch(["cache"]) == 2
    assert "flowerray cache list" in capsys.readouterr().err
