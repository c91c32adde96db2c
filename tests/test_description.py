"""How a run is described."""

import subprocess
from pathlib import Path

import pytest

from flowerray import description
from flowerray.description import commit, flatten


def test_flatten() -> None:
    nested = {"a": {"b": {"c": 1}, "d": [1]}, "e": None}
    assert flatten(nested) == {"a.b.c": 1, "a.d": [1], "e": None}


def test_a_checkout_that_differs_from_its_commit_is_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        own = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.check_output(["git", *own, *words], cwd=tmp_path, text=True).strip()

    module = tmp_path / "flowerray" / "description.py"
    module.parent.mkdir()
    module.write_text("first")
    monkeypatch.setattr(description, "__file__", str(module))
    assert commit() is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    git("tag", "v1")  # no name but the commit's own
    assert commit() == git("rev-parse", "HEAD")
    module.write_text("second")
    assert commit() == f"{git('rev-parse', 'HEAD')}-dirty"
