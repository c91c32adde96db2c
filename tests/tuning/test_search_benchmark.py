"""The search benchmark's books, on searches that were never trained."""

import json
from pathlib import Path
from typing import Any

import pytest

from flowerray.tuning.study import Study
from tests.benchmarks import search
from tests.tuning.studies import make_study, run_trial

EPOCH = 6 * 12
"""Images of an epoch of `pretend`: 6 steps of 3 x 4."""
CURVES = {
    "random": [[0.2, 0.3, 0.4, 0.5], [0.3, 0.4, 0.5, 0.6]],
    "tpe": [[0.1], [0.3, 0.4, 0.5, 0.65], [0.2], [0.1], [0.3, 0.5, 0.7, 0.8]],
}
"""Val MAP@R of each trial after each epoch; ASHA stops those of one."""


def test_both_searches_are_compared_at_equal_images_and_a_repeat_makes_nothing_again(
    small_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def tuned(command: list[str], _: Path) -> None:
        given = dict(zip(command[2::2], command[3::2], strict=True))
        if "--resume" in given:
            study = Study.read(Path(given["--resume"]))
        else:
            config: dict[str, Any] = {"sampler": given["--sampler"], "pruner": given["--pruner"]}
            study = make_study(Path(given["--out"]), small_set, **config)
        for number in range(len(study.ended()), int(given["--trials"])):
            curve = CURVES[study.config.sampler][number]
            run_trial(study, curve, done=len(curve) == 4)
            folder = study.trial_dir(study.ended()[-1])
            first, last = (json.dumps(cost(seconds)) + "\n" for seconds in (0.0, 30.0))
            folder.metrics.write_text(first + folder.metrics.read_text() + last)

    def cost(seconds: float) -> dict[str, Any]:
        name = "report" if seconds else "start"
        return {"step": 24, "epoch": 4, "time": seconds, "metrics": {f"trial/{name}_seconds": 5.0}}

    monkeypatch.setattr(search, "flowerray", tuned)
    monkeypatch.setattr(search, "confirmed", lambda study, number, seeds: [0.1 * number] * seeds)
    command = ["search", "--out", str(tmp_path), "--root", str(small_set), "--trials", "2"]
    monkeypatch.setattr("sys.argv", [*command, "--seeds", "0", "--confirm", "1"])
    search.main()
    found = json.loads((tmp_path / "search.json").read_text())
    (seed,) = found["seeds"]
    random, guided = seed["random"], seed["tpe+asha"]
    assert seed["budget_images"] == 2 * 4 * EPOCH
    assert (random["trials"], random["complete"], random["best"]) == (2, 2, 0.6)
    # Four trials take 7 of the 8 epochs; the fifth, the best of all, would go beyond them.
    assert (guided["trials"], guided["complete"], guided["best"]) == (4, 1, 0.65)
    assert guided["best_number"] == 1 and guided["confirmed"] == [0.1]
    assert seed["share_of_images_to_reach_random"] == 5 / 8
    assert random["median_start_seconds"] == 5 and random["median_ray_share"] == 10 / 35
    assert "gain of TPE + ASHA" in capsys.readouterr().out

    monkeypatch.setattr(search, "flowerray", lambda *a: pytest.fail("searched again"))
    search.main()
    assert json.loads((tmp_path / "search.json").read_text())["seeds"] == [seed]
