"""Writes that a kill cannot leave half done."""

import json
import math
import os
import stat
from pathlib import Path

import pytest

from flowerray.files import as_json, atomic_file, atomic_folder, home, write_json


def test_home_follows_its_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWERRAY_HOME", "here")
    assert home() == tmp_path / "here"
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    for unset in ("~/own", ""):
        monkeypatch.setenv("FLOWERRAY_HOME", unset)
        expected = "own" if unset else ".cache/flowerray"
        assert home() == tmp_path / "user" / expected


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_has_the_usual_rights(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "file") as temporary:
            temporary.write_text("x")
        with atomic_folder(tmp_path / "folder"):
            pass
    finally:
        assert os.umask(before) == 0o027
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_a_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("first", "second"):
        with atomic_folder(path) as temporary:
            (temporary / content).write_text(content)
    assert [file.name for file in path.iterdir()] == ["second"]
    with pytest.raises(RuntimeError), atomic_folder(path) as temporary:
        (temporary / "third").write_text("half")
        raise RuntimeError
    assert [file.name for file in path.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_indented_and_ends_with_a_newline(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "b": {"c": "d"}}
    write_json(tmp_path / "value.json", value)
    text = (tmp_path / "value.json").read_text()
    assert json.loads(text) == value and text.endswith("\n") and "\n  " in text


def test_json_has_no_nan() -> None:
    text = as_json({"a": math.nan, "b": 0.5, "c": "x", "d": [1]})
    assert json.loads(text) == {"a": None, "b": 0.5, "c": "x", "d": [1]}
