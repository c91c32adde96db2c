"""The smallest case of the search benchmark, by its own command."""

import json
from pathlib import Path

import pytest

from tests.benchmarks import search
from tests.tuning.studies import tune_words

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]


def test_both_searches_are_compared_at_equal_images_and_a_repeat_makes_nothing_again(
    small_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = tune_words(small_set, train__epochs=3)
    place = small.index("--data.root")
    command = ["search", "--out", str(tmp_path / "out"), "--root", str(small_set), "--trials", "2"]
    command += ["--seeds", "0", "--confirm", "1", *small[:place], *small[place + 2 :]]
    monkeypatch.setattr("sys.argv", command)
    search.main()
    found = json.loads((tmp_path / "out" / "search.json").read_text())
    (seed,) = found["seeds"]
    assert seed["budget_images"] == 2 * 3 * 72
    assert seed["random"]["trials"] == seed["random"]["complete"] == 2
    assert seed["tpe+asha"]["trials"] >= 2
    for side in ("random", "tpe+asha"):
        assert 0 < seed[side]["best"] <= 1 and 0 < seed[side]["confirmed"][0] <= 1
        assert 0 < seed[side]["median_ray_share"] < 1
    assert "gain of TPE + ASHA" in capsys.readouterr().out

    monkeypatch.setattr(search, "flowerray", lambda *a, **k: pytest.fail("trained again"))
    search.main()
    assert json.loads((tmp_path / "out" / "search.json").read_text())["seeds"] == [seed]
