"""Writes that a kill cannot leave half done."""

import json
import math
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import TypedDict

import flowerray
from flowerray.errors import UserError
from flowerray.files import (
    as_json,
    atomic_file,
    atomic_folder,
    home,
    locked,
    read_json,
    read_kept,
    write_json,
)


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


def test_a_file_and_its_new_name_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("x")
    assert synced == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]


def test_what_a_kill_left_long_ago_is_removed(tmp_path: Path) -> None:
    old, new, other = (tmp_path / f".{name}" for name in ("a[1].png.0123abcd", "a[1].png.89abcdef",
                                                          "b.png.0123abcd"))  # fmt: skip
    for left in (old, new, other):
        left.touch()
    for left in (old, other):
        os.utime(left, (time.time() - 7200,) * 2)
    with atomic_file(tmp_path / "a[1].png") as file:
        file.write_text("whole")
    assert {f.name for f in tmp_path.iterdir()} == {"a[1].png", new.name, other.name}


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


def test_rights_are_found_without_touching_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread's file would be open to all for that moment."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
    with atomic_file(tmp_path / "file"), atomic_folder(tmp_path / "folder"):
        pass


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
    assert json.loads(text) == {"schema_version": 1, **value}
    assert text.endswith("\n") and "\n  " in text
    assert read_json(tmp_path / "value.json") == value


def strict(text: str) -> Any:
    """As JSON is everywhere else: NaN and Infinity are none."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_json_has_no_nan_however_deep(tmp_path: Path) -> None:
    content = {"a": math.nan, "b": 0.5, "c": "x", "d": [1, (math.inf, {"e": -math.inf})]}
    clean = {"a": None, "b": 0.5, "c": "x", "d": [1, [None, {"e": None}]]}
    assert strict(as_json(content)) == {"schema_version": 1, **clean}
    write_json(tmp_path / "file.json", content)
    assert read_json(tmp_path / "file.json") == clean


def test_all_json_is_written_here() -> None:
    """So that no file has NaN or lacks its version: elsewhere `json` only makes keys, texts for
    other programs, and lines of metrics.jsonl (tests/training/test_rundir.py).
    """
    package = Path(flowerray.__file__).parent
    dumps = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "json.dump" in path.read_text()
    }
    assert dumps <= {
        "files.py", "data/oxford.py", "data/splits.py", "report/attacked.py", "report/command.py",
        "cluster/embedding.py", "export/card.py", "export/portable.py",
        "robustness/audit.py", "robustness/journal.py",
        "report/gather.py", "tracking/server.py", "training/checkpoint.py", "training/rundir.py",
    }  # fmt: skip


class Shape(TypedDict):
    """A file with a list of lists of numbers."""

    rows: list[list[float]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not valid JSON, or was cut short"),
        ('{"rows": [[1', "is not valid JSON, or was cut short"),
        ("\x00\udcff", "is not valid JSON, or was cut short"),
        ("[" * 20_000 + "]" * 20_000, "is not valid JSON|is nested too deep"),
        ('{"a":' * 500 + "1" + "}" * 500, "is nested too deep"),
        ("[]", "is not the JSON that belongs there .input should be a valid dictionary"),
        ("null", "is not the JSON that belongs there"),
        ('"text"', "is not the JSON that belongs there"),
        ("{}", "is not the JSON that belongs there .rows: field required"),
        (
            '{"rows": [[1, "a"]]}',
            "is not the JSON that belongs there .rows.0.1: input should be a valid number",
        ),
        ('{"schema_version": 99, "rows": []}', "a newer flowerray .schema 99, known is 1"),
    ],
)
def test_a_file_of_another_shape_is_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=said) as caught:
        read_json(file, Shape, advice="make it again")
    assert str(file) in str(caught.value) and len(str(caught.value)) < 300


def test_what_a_shape_does_not_name_stays_and_older_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text('{"rows": [[NaN, 2]], "more": 1}')  # as 0.1.0 wrote it
    found = read_json(file, Shape)
    assert math.isnan(found["rows"][0][0]) and found["more"] == 1
    with pytest.raises(UserError, match="^no file, no work.$"):
        read_json(tmp_path / "other", missing="no file, no work.")


def test_what_can_be_made_again_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.json"
    assert read_kept(file) is None and capsys.readouterr().err == ""
    file.write_text("[")
    assert read_kept(file) is None and file.exists()
    assert capsys.readouterr().err.endswith("was cut short: made again.\n")
    assert read_kept(file, aside=True) is None and not file.exists()
    assert (tmp_path / "file.json.damaged").read_text() == "["


def test_a_locked_file_loses_no_change(tmp_path: Path) -> None:
    file = tmp_path / "count.json"
    write_json(file, {"count": 0})

    def count(_: int) -> None:
        with locked(file):
            write_json(file, {"count": read_json(file)["count"] + 1})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(40)))
    assert read_json(file) == {"count": 40}


def test_a_name_as_long_as_names_may_be_is_written(tmp_path: Path) -> None:
    file = tmp_path / ("ä" * 127)
    write_json(file, {})
    assert read_json(file) == {}
