"""What an attack's measurement counts, and that planted faults do not pass for robustness."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from flowerray.attacks import bank
from flowerray.attacks.pgd import pgd
from flowerray.errors import UserError
from flowerray.retrieval.pairs import Pairs, make_pairs, pair_metrics
from flowerray.retrieval.search import retrieval_metrics
from flowerray.robustness.attack import (
    Robustness,
    Score,
    attack,
    attack_gallery,
    bits,
    collapse,
    images_to_attack,
    perturb,
)
from flowerray.robustness.audit import Auditor
from flowerray.robustness.config import AttackConfig
from flowerray.robustness.score import ers
from flowerray.robustness.verification import attack_pairs, pairs_of_queries, query_pair_accuracy
from flowerray.robustness.victim import choose_queries
from tests.robustness.fakes import store_of
from tests.robustness.victim import Colours, Constant, pictures, victim_of

QUICK = AttackConfig(
    attacks=("fgsm", "margin", "apgd-ce"), eps=(0, 8, 16, 64), steps=5, restarts=2, max_pairs=30
)


def test_queries_are_spread_over_the_classes() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [3, 9, 9, 20, 40]))
    chosen = choose_queries(labels, 20, seed=1)
    assert np.array_equal(chosen, np.unique(chosen)) and len(chosen) == 20
    assert sorted(np.bincount(labels[chosen])) == [3, 4, 4, 4, 5]
    assert np.array_equal(chosen, choose_queries(labels, 20, seed=1))
    assert not np.array_equal(chosen, choose_queries(labels, 20, seed=2))
    half = choose_queries(labels, 1000, seed=0, share=0.5)
    assert list(np.bincount(labels[half])) == [1, 4, 4, 10, 20]


def test_collapse_by_hand() -> None:
    emb = np.random.default_rng(0).normal(size=(20, 6))
    unit = emb / np.linalg.norm(emb, axis=1, keepdims=True)
    cosines = [unit[i] @ unit[j] for i in range(20) for j in range(20) if i != j]
    assert collapse(emb, 20)["mean_cosine"] == pytest.approx(np.mean(cosines))
    assert collapse(np.tile(np.eye(7), (3, 1)), 20)["effective_rank"] == pytest.approx(7)
    found = collapse(np.ones((9, 4)), 20)
    assert found["collapsed"] and found["mean_cosine"] == pytest.approx(1)
    assert found["effective_rank"] == pytest.approx(1)
    assert collapse(np.tile(np.eye(3), (5, 1)), 20)["collapsed"]  # rank 3 cannot hold 20 classes
    assert not collapse(np.tile(np.eye(3), (5, 1)), 3)["collapsed"]


def test_the_curve() -> None:
    victim = victim_of(config=QUICK)
    done: list[int] = []
    result = attack(victim, progress=done.append)
    reference = retrieval_metrics(
        victim.emb_QD, victim.labels_Q, victim.gallery_GD, victim.gallery_labels_G
    )
    assert result.clean.recall_at_1 == reference["recall_at_1"] > 0.8
    assert result.clean.average_precision_Q.mean() == pytest.approx(reference["map_at_r"])
    curve = [score.recall_at_1 for score in result.worst.values()]
    assert curve == sorted(curve, reverse=True) and curve[-1] < 0.1 < curve[0]
    for eps in (8, 16, 64):
        rows = [result.attacks[name][eps].recall_at_1 for name in QUICK.attacks]
        assert rows == sorted(rows, reverse=True)  # each one gets what the one before left
        assert result.alone[eps].recall_at_1 == rows[-1]
    assert sum(done) == 3 * 3 * 24 == images_to_attack(victim)
    # Survivors only: the second attack gets what the first left.
    left = sum(int(result.attacks["fgsm"][eps].hit_Q.sum()) for eps in (8, 16, 64))
    assert result.images["margin"] == left < result.images["fgsm"]
    content = result.to_dict()
    assert content["worst_case"]["8"]["right"] == bits(result.worst[8].hit_Q)
    for name in ("mean", "recall_at_1"):  # its own name, and that of 0.1.0
        assert content["expected_robustness"][name] == pytest.approx(np.mean(curve))
    assert content["worst_case"]["8"]["retention"] == pytest.approx(curve[1] / curve[0])
    low, high = content["worst_case"]["8"]["ci"]
    assert low <= curve[1] <= high


def test_what_fell_at_a_smaller_radius_stays_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attack that works at 8/255 only: the worst case keeps it, the audit's curve does not."""
    real = bank.run

    def run(*given: Any, epsilon: float, **options: Any) -> torch.Tensor:
        return real(*given, epsilon=64 if epsilon == 64 else 0, **options)

    monkeypatch.setattr(bank, "run", run)
    result = attack(victim_of(config=QUICK.model_copy(update={"eps": (0.0, 64.0, 200.0)})))
    assert result.worst[200].recall_at_1 == result.worst[64].recall_at_1 < 0.1
    assert result.alone[200].recall_at_1 == result.clean.recall_at_1


def test_independent_rows_stand_alone_and_share_the_worst_case() -> None:
    config = QUICK.model_copy(update={"independent": True, "attacks": ("margin", "fgsm")})
    result = attack(victim_of(config=config))
    assert result.attacks["fgsm"][16].recall_at_1 >= result.attacks["margin"][16].recall_at_1
    assert result.images == {"margin": 72, "fgsm": 72}
    both = result.attacks["margin"][16].worst(result.attacks["fgsm"][16])
    assert np.array_equal(result.alone[16].hit_Q, both.hit_Q)
    cumulative = attack(victim_of(config=config.model_copy(update={"independent": False})))
    assert np.array_equal(cumulative.alone[16].hit_Q, both.hit_Q)


def test_batches_do_not_change_the_outcome() -> None:
    config = QUICK.model_copy(update={"attacks": ("fgsm", "pgd", "margin"), "eps": (0.0, 16.0)})
    a = attack(victim_of(config=config.model_copy(update={"batch_size": 1})))
    b = attack(victim_of(config=config.model_copy(update={"batch_size": 32})))
    assert bits(a.worst[16].hit_Q) == bits(b.worst[16].hit_Q)


def test_only_what_lies_within_the_budget_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = torch.full((5, 3, 4, 4), 0.5)
    other = clean.clone()
    other[0] += 4 / 255
    other[1] += 4.1 / 255
    other[2, 0, 0, 0] = 1.5
    other[3, 0, 0, 0] = torch.nan
    inside = [bank.admissible(clean, other, norm, 4 / 255).tolist() for norm in ("linf", "l2")]
    assert inside == [[True, False, False, False, True], [False, False, False, False, True]]

    for name in QUICK.attacks:
        monkeypatch.setitem(bank._ATTACKS, name, lambda batch: 1 - batch.images_BCHW)
    result = attack(victim_of(config=QUICK))
    assert result.worst[16].recall_at_1 == result.clean.recall_at_1


def test_one_double_photograph_stops_no_attack_and_a_gallery_of_queries_does() -> None:
    """Batches hold survivors, and a query whose double is in the gallery survives longest."""
    victim = victim_of(config=QUICK.model_copy(update={"batch_size": 1}))
    gallery_GD, labels_G = victim.gallery_GD.copy(), victim.gallery_labels_G
    gallery_GD[np.flatnonzero(labels_G == victim.labels_Q[0])[0]] = victim.emb_QD[0]
    result = attack(replace(victim, gallery_GD=gallery_GD))
    assert 0 < result.worst[16].recall_at_1 < 1
    own = replace(victim, gallery_GD=victim.emb_QD, gallery_labels_G=victim.labels_Q)
    with pytest.raises(UserError, match="24 of 24 attacked images are in the gallery"):
        attack(own)


def test_every_attack_computes_in_full_precision() -> None:
    class Spy(Colours):
        def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            seen.add((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return super().forward(images_BCHW)

    seen: set[tuple[bool, bool]] = set()
    config = QUICK.model_copy(update={"eps": (0.0, 16.0), "black_box_queries": 5})
    victim = victim_of(Spy(), config)
    labels = pictures(6, 1)[1]
    pairs = make_pairs(labels, 0, 60, np.eye(6)[labels] + 0.01 * np.arange(36)[:, None])
    chosen = pairs_of_queries(pairs, victim.chosen_Q, 60, 0)
    result = attack(victim)
    parts: dict[str, Any] = {
        "attack": lambda: attack(victim),
        "pairs": lambda: attack_pairs(victim, chosen),
        "gallery": lambda: attack_gallery(victim, 16.0),
        "audit": lambda: Auditor(victim, result).run(),
        "ers": lambda: ers(victim),
    }
    assert torch.backends.cudnn.allow_tf32, "torch's own default, which has to be turned off"
    for name, part in parts.items():
        seen.clear()
        part()
        assert seen == {(False, False)}, name


def test_the_step_size_adapts_wherever_robustness_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`alpha_ratio` is of the attack `pgd` alone."""
    taken: dict[str, set[float | None]] = {}

    def spy(module: str, *given: Any, **options: Any) -> Any:
        taken.setdefault(module, set()).add(given[2].alpha_ratio)
        return pgd(*given, **options)

    for module in ("robustness.victim", "robustness.audit"):
        monkeypatch.setattr(f"flowerray.{module}.pgd", partial(spy, module))
    config = QUICK.model_copy(update={"alpha_ratio": 1.5, "eps": (0.0, 16.0)})
    victim, _, pairs = pairs_here(config)
    attack_pairs(victim, pairs)
    attack_gallery(victim, 16.0)
    Auditor(victim, attack(victim)).huge()
    assert list(taken.values()) == 2 * [{None}]
    for name, ratio in (("margin", None), ("shift", None), ("pgd", 1.5)):
        monkeypatch.setattr("flowerray.attacks.bank.pgd", partial(spy, name))
        perturb(victim, name, np.arange(4), 16.0)
        assert taken[name] == {ratio}


def test_pixels_that_are_no_pixels_are_refused() -> None:
    """The planted fault: images that were normalised (or scaled) before they came."""
    images, _ = pictures(6, 1)
    victim = replace(victim_of(), store=store_of(images.astype(np.int64) * 2 - 200))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"\[0,1\]"):
        perturb(victim, "fgsm", np.arange(4), 4.0)


def test_a_constant_encoder_is_called_collapsed() -> None:
    assert attack(victim_of(Constant(), QUICK)).collapse["collapsed"]
    assert not attack(victim_of(Colours(), QUICK)).collapse["collapsed"]


def test_examples_are_queries_that_fell() -> None:
    victim = victim_of(config=QUICK)
    result = attack(victim)
    examples = result.examples[64]
    assert 0 < len(examples) <= 6 and len({e.query for e in examples}) == len(examples)
    for example in examples:
        label = victim.labels_Q[example.query]
        assert victim.gallery_labels_G[result.nearest_QK[example.query, 0]] == label
        assert victim.gallery_labels_G[example.after_K[0]] != label and example.margin > 0
        change = (example.adversarial_CHW - example.clean_CHW).abs().max()
        assert 0 < change <= 64 / 255 + 1e-6


def test_scores() -> None:
    a = Score(np.array([True, True, False]), np.array([0.5, 0.2, 0.1]))
    b = Score(np.array([True, False, True]), np.array([0.4, 0.3, 0.1]))
    worst = a.worst(b)
    assert worst.hit_Q.tolist() == [True, False, False]
    assert worst.average_precision_Q.tolist() == [0.4, 0.2, 0.1]
    one = Score(np.array([True]), np.array([1.0])).to_dict()
    assert one["ci"] == [None, None]  # JSON has no NaN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attacks": ("fgsm", "nonsense")}, "no attack nonsense"),
        ({"attacks": ()}, "none given"),
        ({"eps": (-1,)}, "0 or more"),
        ({"eps": ()}, "0 or more"),
        ({"eps": (float("inf"),), "norm": "l2"}, "finite number"),
        ({"eps": (256,)}, "more than 255"),
        ({"norm": "l1"}, "norm"),
    ],
)
def test_bad_options(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AttackConfig(**change)
    assert AttackConfig(norm="l2", eps=(510, 255)).eps == (
        255,
        510,
    )  # longer than one pixel's range


# --- pairs ----------------------------------------------------------------------------------------


def pairs_here(config: AttackConfig = QUICK, number: int = 60) -> tuple[Any, Pairs, Pairs]:
    """The victim, pairs of its whole split, and those with an attacked query."""
    victim = victim_of(config=config, queries=12)
    _, labels = pictures(6, 1)
    everything = make_pairs(labels, 0, 60, np.eye(6)[labels] + 0.01 * np.arange(36)[:, None])
    return victim, everything, pairs_of_queries(everything, victim.chosen_Q, number, 0)


def test_the_attacked_side_is_a_query() -> None:
    victim, everything, chosen = pairs_here()
    known = {(*sorted(p), k) for p, k in zip(everything.index.tolist(), everything.kind,
                                             strict=True)}  # fmt: skip
    assert np.isin(chosen.index[:, 0], victim.chosen_Q).all()
    assert not np.isin(chosen.index[:, 1], victim.chosen_Q).all()
    for pair, kind in zip(chosen.index.tolist(), chosen.kind, strict=True):
        assert (*sorted(pair), kind) in known  # still one of the pairs, with its own kind
    assert np.array_equal(np.bincount(chosen.kind), [20, 20, 20])


def test_pairs_under_attack() -> None:
    victim, _, chosen = pairs_here(QUICK.model_copy(update={"eps": (0.0, 8.0, 64.0)}))
    found = attack_pairs(victim, chosen)
    emb_ND = victim.embed(victim.images(np.arange(36)))
    clean = pair_metrics(emb_ND, chosen, 0.9)
    # The planted fault: pairs whose kinds are misaligned with their images.
    misaligned = Pairs(chosen.index, np.roll(chosen.kind, 20))
    clean_only = replace(victim, config=QUICK.model_copy(update={"eps": (0.0,)}))
    wrong = attack_pairs(clean_only, misaligned)
    for name in ("pair_accuracy", "pair_auc"):
        assert found[0.0][name] == pytest.approx(clean[name])
        assert found[0.0][name] >= found[8.0][name] >= found[64.0][name]
        assert abs(wrong[0.0][name] - clean[name]) > 0.2
    assert found[64.0]["pair_accuracy"] < 0.3 < 0.6 < found[0.0]["pair_accuracy"]
    query_emb = emb_ND[victim.chosen_Q]
    accuracy = query_pair_accuracy(victim, chosen)
    assert accuracy(query_emb) == pytest.approx(clean["pair_accuracy"])
    assert accuracy(-query_emb) < clean["pair_accuracy"]


# --- the gallery ----------------------------------------------------------------------------------


def test_an_attacked_gallery() -> None:
    def perturbed(side: str) -> Robustness:
        return attack(victim_of(config=QUICK.model_copy(update={"perturb": side})))

    alone, both, query = map(perturbed, ("gallery", "both", "query"))
    assert alone.worst[64].recall_at_1 < 0.5 < alone.worst[0].recall_at_1
    assert alone.images == {"fgsm": 0, "margin": 0, "apgd-ce": 0}
    assert both.worst[8].recall_at_1 <= min(alone.worst[8].recall_at_1, query.worst[0].recall_at_1)
