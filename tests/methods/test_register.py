"""Methods from outside the package."""

import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import flowerray as fr
from flowerray import methods
from flowerray.training.run import PRESETS, Run
from tests.methods.test_contract import FOURTH


@pytest.fixture
def npair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "somebodys").mkdir()
    (tmp_path / "somebodys" / "npair.py").write_text(FOURTH)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(methods, "_registered", {})
    for name in [name for name in sys.modules if name.startswith("somebodys")]:
        monkeypatch.delitem(sys.modules, name)
    import somebodys.npair  # type: ignore[import-not-found]

    module: ModuleType = somebodys.npair
    return module


def test_a_registered_method_makes_a_run_that_can_be_read(npair: ModuleType) -> None:
    with pytest.raises(fr.UserError, match="no method 'npair'"):
        methods.get("npair")
    file = methods.register(npair)
    assert file.summary.startswith("N-pair loss") and "npair" in methods.names()
    run = PRESETS["laptop"](file.config(scale=5.0))  # type: ignore[call-arg]
    assert run.method_name == "npair" and Run.from_dict(run.to_dict()) == run
    assert methods.register(npair, "sohn").name == "sohn" and "sohn" in methods.names()


def test_a_taken_name_or_half_a_method_is_refused(npair: ModuleType) -> None:
    with pytest.raises(fr.UserError, match="a method 'triplet' already"):
        methods.register(npair, "triplet")
    del npair.NPair
    with pytest.raises(fr.UserError, match="is no method: .*it has 0"):
        methods.register(npair)


def test_an_entry_point_is_found_where_nothing_registers(
    npair: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def entries(group: str, **chosen: Any) -> EntryPoints:
        known = [
            EntryPoint("npair", "somebodys.npair", methods.GROUP),
            EntryPoint("broken", "somebodys.gone", methods.GROUP),
        ]
        return EntryPoints(known).select(group=group, **chosen)

    monkeypatch.setattr(methods, "entry_points", entries)
    assert methods.names() == ["broken", "center", "npair", "siamese", "triplet"]
    assert methods.get("npair").export_name == "n_pair_loss"
    with pytest.raises(fr.UserError, match=r"'broken' comes from somebodys\.gone, which cannot"):
        methods.get("broken")
