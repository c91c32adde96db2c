"""Lines for a terminal."""

import os
import shutil
import subprocess
import sys

import pytest

from flowerray.text import cell, counted, file_name, labelled, typed, visible


def test_a_label_and_a_folded_text() -> None:
    path = "/a/" + "very-long-" * 9 + "path"
    text = labelled("note", f"{'a word or two ' * 8}{path} and more")
    lines = text.splitlines()
    assert lines[0].startswith("note      a word") and len(lines) == 4
    assert all(line.startswith(" " * 10) for line in lines[1:])
    assert [line for line in lines if len(line) > 80] == [" " * 10 + path]


def test_a_command_stands_as_it_has_to_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert typed("flowerray demo") == "flowerray demo"
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    assert typed("flowerray demo") == "uv run flowerray demo"


@pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv")
def test_uv_run_is_recognised() -> None:
    """uv sets the variable that `typed` looks at."""
    code = "from flowerray.text import typed; print(typed('x'))"
    environment = {k: v for k, v in os.environ.items() if k != "UV_RUN_RECURSION_DEPTH"}
    done = subprocess.run(
        ["uv", "run", "--no-sync", "--offline", sys.executable, "-c", code],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "uv run x"


def test_counted() -> None:
    assert [counted(n, "run") for n in (0, 1, 1234)] == ["0 runs", "1 run", "1,234 runs"]


@pytest.mark.parametrize("text", ["a" * 300, "ü" * 200, "\N{BLOSSOM}" * 90, "tulip\n/1" * 40])
def test_a_files_name_is_bounded_and_told_apart(text: str) -> None:
    name = file_name(text)
    assert len(name.encode()) <= 100 and name.isprintable() and "/" not in name
    assert name != file_name(text + "b") and name == file_name(text)


def test_a_short_name_stays_as_it_is() -> None:
    assert file_name("tulip_12 (é)") == "tulip_12 (é)"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("abc\u202egpj", r"abc\u202egpj"),
        ("gr\udcfcn", r"gr\udcfcn"),
        ("Gänseblümchen 雛菊 \u06cc\u200c", "Gänseblümchen 雛菊 \u06cc\u200c"),
    ],
)
def test_foreign_text_does_nothing(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert labelled("note", text).split(maxsplit=1)[1] == shown


def test_cells_are_no_formulas() -> None:
    formulas = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"]
    assert [cell(text) for text in formulas] == ["'=1+1", "'+1", "'-1", "'@SUM(A1)", r"\t=1"]
    assert [cell(value) for value in (-1.5, 3, "a-b")] == [-1.5, 3, "a-b"]
