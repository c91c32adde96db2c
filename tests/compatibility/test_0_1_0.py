"""Files that users have from 0.1.0 go on being read, to the numbers that 0.1.0 read in them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flowerray
from tests.compatibility import archive, readings

EXPECTED: dict[str, Any] = json.loads(archive.EXPECTED.read_text())


CHANGED = ("ci", "low", "high", "n", "gain", "p", "p_holm", "p_value", "notes")
"""Intervals hold at small numbers since 0.2.0, and count queries."""
DECIDED = ("attacks", "worst_case")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of 0.1.0."""
    return archive.unpack(tmp_path_factory.mktemp("made"))


@pytest.fixture(autouse=True)
def here(unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of every test here."""
    monkeypatch.chdir(unpacked)
    monkeypatch.setenv("FLOWERRAY_HOME", str(unpacked / "home"))
    return unpacked


@pytest.fixture(scope="module")
def equal_bits() -> bool:
    """Whether this machine computes as the one did on which 0.1.0 read the files."""
    return readings.equal_bits()


@pytest.fixture
def same(equal_bits: bool) -> Callable[[Any, Any], None]:
    """Compares with what 0.1.0 read; there may be more by now, and intervals have changed. On
    another machine a neighbour or two may change places.
    """
    tolerance = 1e-6 if equal_bits else 0.1

    def compare(found: Any, expected: Any, place: str = "") -> None:
        if isinstance(expected, dict):
            assert expected.keys() <= found.keys(), place
            for key, value in expected.items():
                if key not in CHANGED:
                    compare(found[key], value, f"{place}/{key}")
        elif isinstance(expected, list):
            assert len(found) == len(expected), place
            for i, value in enumerate(expected):
                compare(found[i], value, f"{place}/{i}")
        elif isinstance(expected, float):
            assert found == pytest.approx(expected, abs=tolerance), place
        elif equal_bits or not isinstance(expected, str | bool):
            assert found == expected, place

    return compare


Same = Callable[[Any, Any], None]


@pytest.mark.parametrize("run", readings.RUNS)
def test_a_model_is_loaded_to_the_same_embeddings(run: str) -> None:
    file = f"runs/{run}/{readings.EXPORTS[run]}.pth"
    for source in (f"runs/{run}", file):
        found = torch.tensor(readings.embeddings(source))
        torch.testing.assert_close(
            found, torch.tensor(EXPECTED["embeddings"][run]), atol=1e-5, rtol=0
        )


def test_mlflow_has_the_models(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the logged code of 0.1.0, which imports from this version."""
    note = json.loads((here / "runs/triplet/mlflow.json").read_text())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", note["tracking_uri"])
    expected = torch.tensor(EXPECTED["served"])
    by_run = f"runs:/{note['run_id']}/{readings.EXPORTS['triplet']}"
    for address in (note["model_uri"], by_run):
        found = torch.tensor(readings.served(address), dtype=torch.float32)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for address in (note["model_uri"], f"runs:/{note['run_id']}"):
        found = torch.tensor(readings.embeddings(address))
        torch.testing.assert_close(
            found, torch.tensor(EXPECTED["embeddings"]["triplet"]), atol=1e-5, rtol=0
        )
    assert flowerray.load("models:/flowerray-siamese@champion").dim == 16


@pytest.mark.parametrize("run", readings.RUNS)
def test_two_photographs_and_the_nearest_ones(run: str, same: Same) -> None:
    same(readings.similar(run), EXPECTED["similar"][run])
    same(readings.searched(run), EXPECTED["searched"][run])


@pytest.mark.parametrize("run", readings.RUNS)
def test_a_run_is_evaluated(run: str, same: Same) -> None:
    same(readings.evaluated(run), EXPECTED["evaluated"][run])


@pytest.mark.parametrize("run", readings.ATTACKED)
def test_a_run_is_attacked(run: str, same: Same) -> None:
    """The robust one with the standard one that it started from; without what the margin attack
    decides, whose step size adapts since 0.2.0.
    """
    found, expected = readings.attacked(run), EXPECTED["attacked"][run]
    for side, old in expected.items():
        new = found[side]
        assert new.keys() >= old.keys()
        if old:
            assert new["attacks"].keys() == old["attacks"].keys()
            same(new["attacks"]["fgsm"], old["attacks"]["fgsm"])
        same(*({k: v for k, v in part.items() if k not in DECIDED} for part in (new, old)))


def test_a_training_starts_from_a_finished_one(same: Same) -> None:
    same(readings.continued(), EXPECTED["continued"])


@pytest.mark.parametrize("run", readings.UNFINISHED)
def test_an_unfinished_training_is_resumed(run: str, same: Same, equal_bits: bool) -> None:
    """To the bits of 0.1.0's own end, where the machine is the same."""
    found, expected = readings.resumed(run), EXPECTED["resumed"][run]
    if equal_bits:
        assert found["tensors"] == expected["tensors"]
        assert found["state"] == expected["state"]
    same(found, expected)


def test_a_finished_study_and_a_finished_comparison_are_read(same: Same) -> None:
    same(readings.tuned(), EXPECTED["tuned"])
    same(readings.compared(), EXPECTED["compared"])


def test_the_report_shows_every_run(here: Path, same: Same) -> None:
    same(readings.reported(), EXPECTED["reported"])
    page = (here / "runs/report/report.html").read_text()
    folders = (here / "runs").glob("**/run.json")
    names = {f.parent.name for f in folders if f.parent.name not in ("last", "best", "artifacts")}
    assert len(names) >= 13
    names -= {*readings.UNFINISHED, "continued"}
    assert [name for name in names if name not in page] == []


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its books hold three trials; a fourth is asked for."""
    folder = archive.unpack(tmp_path)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FLOWERRAY_HOME", str(folder / "home"))
    words = ("tune", "siamese", "--resume", "runs/study", "--trials", 4, "--max-concurrent", 1)
    trials = readings.told(*words)["trials"]
    assert sum(trials.values()) == 4 and trials["complete"] >= 2
    assert (folder / "runs/study/trials/0003/run.json").exists()
