"""`flowerray report` from RUN folders to a page."""

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flowerray import methods
from flowerray.cli import dispatch
from flowerray.cli.options import parse_run
from flowerray.data.source import DataConfig
from flowerray.errors import UserError
from flowerray.model.embedder import EmbedderConfig
from flowerray.opening import open_model
from flowerray.report.command import PAGE, resolve, words, write_report
from flowerray.retrieval import command as measuring
from flowerray.retrieval.measure import EvaluateConfig
from flowerray.training.config import TrainConfig
from flowerray.training.run import PRESETS, Run, from_preset
from tests.report.runs import make_run
from tests.ruined import ruin
from tests.show.test_page import check_page

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(small_run: Path) -> Iterator[Path]:
    """A folder with two evaluated seeds of a ruined RUN (the second one by name alone)."""
    folder = small_run.with_name("to-report")
    first = folder / "seed0"
    ruin(shutil.copytree(small_run, first), folder.with_name("photographs"))
    model = open_model(str(first), CPU)
    measuring.evaluate_model(model, model.run.data, False, EvaluateConfig(), quiet=True)
    shutil.copytree(first, folder / "seed1")
    text = (first / "run.json").read_text()
    start = text.index('"seed": 0', text.index('"train"'))
    (folder / "seed1" / "run.json").write_text(
        text[:start] + text[start:].replace('"seed": 0', '"seed": 1', 1)
    )
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def out(small_run: Path) -> Iterator[Path]:
    """The report's folder, beside the small RUN: they share one MLflow database."""
    folder = small_run.with_name("report")
    yield folder
    shutil.rmtree(folder)


def test_a_folder_of_runs_becomes_a_page(runs: Path, out: Path) -> None:
    facts = write_report([str(runs)], out, "Two seeds", True, CPU, quiet=True)
    page = out / PAGE
    assert facts == {
        "page": str(page), "bytes": page.stat().st_size, "runs": 2, "variants": 1, "settings": 1,
    }  # fmt: skip
    text = " ".join(check_page(page.read_text()).text.split())
    for words_of_page in (
        "Two seeds", "2 runs on photographs: ", "32 test queries, 32 gallery images",
        "triplet, on test, is worse than its frozen backbone: R@1 -0.",
        "frozen features", "No run has been attacked", "retrieval test", "torch",
        "flowerray train triplet --data.root",
    ):  # fmt: skip
        assert words_of_page in text, words_of_page
    note = json.loads((out / "mlflow.json").read_text())
    assert note["finished"] == "FINISHED" and note["closed"]
    assert PAGE in note["artifacts_sent"]

    assert write_report([str(runs)], out, "Two seeds", True, CPU, quiet=True)["runs"] == 2


def test_frozen_features_of_older_evaluations_are_measured(runs: Path, tmp_path: Path) -> None:
    """Of 0.1.0, which kept none beside a model's."""
    from flowerray.report.command import with_frozen
    from flowerray.report.gather import group, read_run

    setting = group([read_run(path) for path in resolve([str(runs)])])[0]
    kept = with_frozen(setting, CPU, quiet=True)
    for stored in setting.runs:
        del stored.evaluations["test"]["frozen"]
    again = with_frozen(setting, CPU, quiet=True)
    ((key, measured),) = again.frozen.items()
    assert measured["metrics"] == kept.frozen[key]["metrics"] and again.notes == ()
    assert measured["per_query"]["hit"] == kept.frozen[key]["per_query"]["hit"]


def test_data_that_is_gone_costs_the_frozen_row_only(tmp_path: Path, out: Path) -> None:
    run = make_run(tmp_path / "a", hits=0.5, root=tmp_path / "gone")
    write_report([str(run)], out, "t", True, CPU, quiet=True)
    text = check_page((out / PAGE).read_text()).text
    assert "could not be measured" in text and "0.500" in text


def test_settings_become_chapters(tmp_path: Path, out: Path) -> None:
    for name in ("one", "two"):
        make_run(tmp_path / "runs" / name, hits=0.5, fingerprint=name)
    assert write_report([str(tmp_path / "runs")], out, "t", False, CPU)["settings"] == 2
    reader = check_page((out / PAGE).read_text())
    assert len(reader.all("h2")) == 2 and len(reader.all("h3")) == 20


def test_what_cannot_be_reported(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(UserError, match="choose another `out`"):
        write_report([str(runs)], tmp_path / "mine", "t", False, CPU)
    with pytest.raises(UserError, match="is not there"):
        resolve(["nowhere"])
    with pytest.raises(UserError, match="RUN folder"):
        resolve([str(runs / "seed0" / "best_model_triplet_loss.pth")])


def test_the_command_line(runs: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["report", str(runs), "--out", str(out), "--no-frozen", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["runs"] == 2 and "mlflow ui" in printed.err
    assert dispatch(["report"]) == 2
    assert "name RUN folders" in capsys.readouterr().err


def test_the_runs_of_an_experiment(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flowerray.tracking.registry import experiment_runs
    from flowerray.tracking.state import tracking_uri

    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(small_run))
    assert str(small_run) in experiment_runs("flowerray")
    with pytest.raises(UserError, match="no MLflow here"):
        experiment_runs("another")


@pytest.mark.parametrize("method", methods.names())
def test_the_command_of_a_run_makes_the_run_again(method: str, tmp_path: Path) -> None:
    config = methods.get(method).config
    changed = [from_preset(name, config()) for name in PRESETS]
    changed.append(
        Run(
            method=config(),
            data=DataConfig(root=tmp_path / "my flowers", protocol="disjoint", seed=3),
            embedder=EmbedderConfig(freeze_bn=False, image_size=64),
            train=TrainConfig(seed=7, lr=3e-5, compile=True),
            threshold=0.25,
        )
    )
    for run in changed:
        options = shlex.split(" ".join(words(run)))
        _, again = parse_run("train", method, options)
        assert again.to_dict() == run.to_dict(), options
    assert words(changed[0]) == ["--preset", "demo"]
    assert words(changed[1]) == []
