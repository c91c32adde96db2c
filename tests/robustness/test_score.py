"""The Empirical Robustness Score: its terms by hand, and the trap that it is known for."""

import numpy as np
import pytest
import torch

from flowerray.robustness import score as module
from flowerray.robustness.attack import collapse
from flowerray.robustness.score import ers
from tests.robustness.victim import Constant, victim_of

TERMS = ["CA+", "CA-", "QA+", "QA-", "TMA", "ES:D", "ES:R", "LTM", "GTM", "GTT"]


def test_the_terms_and_their_mean() -> None:
    done: list[int] = []
    found = ers(victim_of(), progress=done.append)
    assert list(found["terms"]) == TERMS and len(done) == 9
    assert found["ers"] == pytest.approx(np.mean(list(found["terms"].values())))
    assert all(-1e-3 <= value <= 200 for value in found["terms"].values())
    raw = found["raw"]
    assert found["terms"]["CA-"] == pytest.approx(100 - raw["CA-"])
    assert found["terms"]["QA+"] == pytest.approx(min(100, 2 * raw["QA+"]))
    assert found["terms"]["TMA"] == pytest.approx(100 * (1 - raw["TMA"]))
    assert found["terms"]["ES:D"] == pytest.approx(50 * (2 - raw["ES:D"]))
    assert found["num_queries"] == 24 and found["eps"] == 8


def test_a_stronger_attacker_scores_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    weak = ers(victim_of())
    monkeypatch.setattr(module, "EPSILON", 64.0)
    monkeypatch.setattr(module, "ALPHA", 24.0)
    strong = ers(victim_of())
    for name in TERMS:
        assert strong["terms"][name] <= weak["terms"][name] + 1e-3, name
    assert strong["ers"] < weak["ers"] - 10


def test_no_attack_gives_what_a_clean_model_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """At radius 0 the ranks, recalls and shifts are those of the photographs."""
    monkeypatch.setattr(module, "EPSILON", 1e-9)
    monkeypatch.setattr(module, "ALPHA", 1e-9)
    victim = victim_of()
    raw = ers(victim)["raw"]
    cosine_QG = victim.emb_QD @ victim.gallery_GD.T
    hit = victim.gallery_labels_G[cosine_QG.argmax(1)] == victim.labels_Q
    for name in ("ES:R", "LTM", "GTM"):
        assert raw[name] == pytest.approx(100 * hit.mean())
    assert raw["GTT"] == 100 and raw["ES:D"] == pytest.approx(0, abs=1e-3)
    lifted = np.random.default_rng((0, 5)).integers(30, size=24)  # the first draw
    ranks = [(cosine_QG[q] > cosine_QG[q, g]).mean() for q, g in enumerate(lifted)]
    lowered_first = [raw["QA+"], raw["CA+"]]
    assert lowered_first == pytest.approx([100 * np.mean(ranks)] * 2, abs=0.2)
    assert raw["QA-"] == raw["CA-"] == pytest.approx(0, abs=0.2)  # it begins with the nearest


def test_a_collapsed_encoder_scores_high_and_is_found_out() -> None:
    """Published as a trap: a constant embedding cannot be moved."""
    victim = victim_of(Constant())
    found = ers(victim)
    assert found["terms"]["ES:D"] > 99.9
    assert collapse(victim.emb_QD, 6)["collapsed"]
    assert torch.isfinite(torch.tensor(list(found["terms"].values()))).all()
