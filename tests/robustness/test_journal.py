"""An attack that is interrupted goes on, and ends as if it had not been."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowerray.cli import INTERRUPTED, dispatch
from flowerray.errors import UserError
from flowerray.opening import Model
from flowerray.robustness.command import attack_model
from flowerray.robustness.config import AttackConfig
from flowerray.robustness.journal import FOLDER, Found, Journal, keeping, unfinished
from flowerray.training.rundir import RunDir

QUICK = AttackConfig(
    attacks=("fgsm", "square"), eps=(0, 32), steps=2, restarts=1, max_queries=12, max_pairs=9,
    batch_size=4, black_box_queries=9,
)  # fmt: skip
FACTS = {"model": "a"}


def plain(value: Any) -> Any:
    """A record without its times."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in ("time", "seconds")}
    return value


def interrupted_at(monkeypatch: pytest.MonkeyPatch, piece: int) -> list[str]:
    """Presses Ctrl-C before that piece is found; gives the names of those that are found anew."""
    found: list[str] = []
    real = Journal.once

    def once(self: Journal, name: str, compute: Callable[[], Found]) -> Found:
        def computed() -> Found:
            if len(found) == piece:
                raise KeyboardInterrupt
            found.append(f"{self.about} {name}")
            return compute()

        return real(self, name, computed)

    monkeypatch.setattr(Journal, "once", once)
    return found


@pytest.mark.parametrize(
    ("change", "more"),
    [
        ({"independent": True}, {"audit": True, "audit_queries": 8, "beside": True}),
        ({"perturb": "both"}, {"ers": True, "audit_queries": 8}),
    ],
)
def test_an_interrupted_attack_ends_as_one_left_alone(
    model: Model, run: RunDir, small_run: Path, change: Any, more: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("flowerray.robustness.score.NUM_STEPS", 2)
    config = QUICK.model_copy(update=change)
    more = {**more, "beside": str(small_run)} if "beside" in more else more
    pieces: list[str] = []
    for piece in (0, 1, 13, 10**6):
        with pytest.MonkeyPatch.context() as patch:
            found = interrupted_at(patch, piece)
            try:
                content = attack_model(model, config, quiet=True, resume=bool(pieces), **more)
            except KeyboardInterrupt:
                assert len(found) == piece
                assert (run.path / FOLDER).exists() == bool(pieces or found)
            pieces += found
    assert len(pieces) == len(set(pieces)) > 20  # none was found twice
    assert not (run.path / FOLDER).exists()
    (kept,) = json.loads((run.path / "robustness.json").read_text())["results"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "once", lambda _, __, compute: compute())
        alone = attack_model(model, config, quiet=True, **more)
    assert plain(content) == plain(alone)
    assert plain(kept) == plain(json.loads(json.dumps(alone)))


def test_the_command_says_how_to_go_on(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["attack", str(run.path), "--attacks", "fgsm", "--eps", "0,4", "--max-queries", "6"]
    words += ["--max-pairs", "0", "--independent"]
    resume = ["attack", "--resume", str(run.path)]
    assert dispatch(resume) == 2
    assert "holds no unfinished attack" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        interrupted_at(patch, 0)
        assert dispatch([*words, "--batch-size", "3"]) == INTERRUPTED
    assert "go on with" not in capsys.readouterr().err  # nothing was found yet
    with monkeypatch.context() as patch:
        interrupted_at(patch, 1)
        assert dispatch([*words, "--batch-size", "3"]) == INTERRUPTED
    assert f"go on with: flowerray {' '.join(resume)}" in capsys.readouterr().err
    assert dispatch([*resume, "--steps", "7", "--eps", "0,4", "--beside", "other"]) == 2
    assert "other options: steps, beside differ" in capsys.readouterr().err
    assert dispatch([*resume, "--preset", "notebooks"]) == 2
    assert "--preset: --resume goes on" in capsys.readouterr().err
    file = str(run.path / "best_model_triplet_loss.pth")
    assert dispatch(["attack", "--resume", file]) == 2
    assert "is none" in capsys.readouterr().err
    assert dispatch([*resume, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["batch_size"] == 3
    assert not (run.path / FOLDER).exists()


def found(value: float) -> Callable[[], Found]:
    return lambda: {"value": np.array(value)}


def test_what_has_changed_begins_anew(tmp_path: Path) -> None:
    def interrupted(facts: dict[str, str], value: float, resume: bool = False) -> float:
        with keeping(tmp_path, {"steps": 1}, facts, resume) as journal:
            seen = float(journal.once("a", found(value))["value"])
            raise KeyboardInterrupt
        return seen

    for facts, value in ((FACTS, 1.0), ({"model": "b"}, 2.0)):
        with pytest.raises(KeyboardInterrupt):
            interrupted(facts, value)
    assert unfinished(tmp_path) == {"steps": 1}
    with pytest.raises(UserError, match="begun with another model"):
        interrupted(FACTS, 3.0, resume=True)
    with keeping(tmp_path, {"steps": 1}, {"model": "b"}) as journal:
        assert journal.once("a", found(4.0))["value"] == 2.0
        assert journal.of("beside").once("a", found(4.0))["value"] == 4.0


def test_two_processes_at_one_attack(tmp_path: Path) -> None:
    with keeping(tmp_path, {"steps": 1}, FACTS) as journal:
        journal.once("a", found(1.0))
        with pytest.raises(UserError, match="another process is at work"):
            with keeping(tmp_path, {"steps": 1}, FACTS):
                pass
        with pytest.raises(UserError, match="another process is at work"):
            unfinished(tmp_path)
        with keeping(tmp_path, {"steps": 2}, FACTS):  # another attack
            pass


def test_a_damaged_or_unwritable_journal_stops_no_attack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt), keeping(tmp_path, {}, FACTS) as journal:
        journal.once("a", found(1.0))
        raise KeyboardInterrupt
    (file,) = (tmp_path / FOLDER).iterdir()
    file.write_bytes(b"not SQLite at all" * 100)
    with pytest.raises(UserError, match="damaged"):
        unfinished(tmp_path)
    with keeping(tmp_path, {}, FACTS) as journal:
        assert journal.once("a", found(2.0))["value"] == 2.0
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    with keeping(tmp_path, {}, FACTS) as journal:
        assert journal.once("a", found(3.0))["value"] == 3.0
    assert "cannot keep" in capsys.readouterr().err
