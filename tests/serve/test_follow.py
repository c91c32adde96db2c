"""An INDEX is built again when the alias of its model moves, on a real registry."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowerray.cli import dispatch
from flowerray.cluster.driver import train_run
from flowerray.errors import UserError
from flowerray.index import command
from flowerray.index.contents import read_manifest
from flowerray.opening import open_model
from flowerray.serve import follow
from flowerray.serve.service import Service
from flowerray.tracking import sync
from flowerray.tracking.state import tracking_uri
from tests.serve.conftest import CPU
from tests.small import small

ALIAS = "models:/flowers@champion"


@pytest.fixture
def runs(small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two models of one registry."""
    found = [tmp_path / "runs" / name for name in ("first", "second")]
    for seed, run in enumerate(found):
        made = small(small_set, "center", epochs=1)
        train = made.train.model_copy(update={"seed": seed})
        train_run(made.model_copy(update={"train": train}), run, quiet=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(found[0]))
    return found


def test_the_alias_is_followed(
    runs: list[Path], photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = tmp_path / "index"
    assert sync.register(runs[0], "flowers", "champion") == "1"
    command.build(open_model(ALIAS, CPU), photographs, index, quiet=True)
    assert follow.versions([index]) == {index: "1"}
    assert follow.take_over(index, "") == "1" and capsys.readouterr().out == ""
    service, before = Service(index, CPU), read_manifest(index)
    assert sync.register(runs[1], "flowers", "champion") == "2"
    assert follow.take_over(index, "1") == "2"
    assert capsys.readouterr().out == f"rebuilt   12 photographs by version 2 of {ALIAS}\n"
    after = read_manifest(index)
    assert after["model"]["name"] == ALIAS
    assert after["model"]["fingerprint"] != before["model"]["fingerprint"]
    old = service.now
    service.refresh()
    assert service.now.index.manifest == after and old.index.manifest == before


def test_an_index_of_a_run_has_no_alias(
    served: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is no alias that could move"):
        follow.versions([served])
    shutil.copytree(served, tmp_path / "index")
    assert dispatch(["serve", str(tmp_path / "index"), "--follow", "--port", "8131"]) == 2
    assert "is no alias that could move" in capsys.readouterr().err


def test_what_fails_is_said_once_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: Iterator[Any] = iter(
        [UserError("MLflow is away."), UserError("MLflow is away."), "2", "3"]
    )
    asked: list[str] = []

    def take_over(folder: Path, known: str) -> str:
        asked.append(known)
        if isinstance(answer := next(answers, KeyboardInterrupt()), BaseException):
            raise answer
        return str(answer)

    monkeypatch.setattr(follow, "take_over", take_over)
    monkeypatch.setattr(follow, "SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        follow.follow({Path("index"): "1"})
    assert asked == ["1", "1", "1", "2", "3"]
    assert capsys.readouterr().err == "warning: MLflow is away.\n"
