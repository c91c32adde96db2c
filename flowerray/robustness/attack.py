"""Adversarial retrieval: how many queries stay right when an attacker may change their pixels.

A query counts as right at a budget only if its own photograph and every adversarial one that was
found within the budget, by any of the attacks, have a nearest gallery image of their class.

Letters: N images of a split, Q attacked queries, M queries of one batch, B images, C channels (or
classes), H W pixels, G gallery images, D embedding dimensions, P pairs.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from flowerray.attacks import bank
from flowerray.attacks.logits import refuse_own_images
from flowerray.attacks.objectives import margin
from flowerray.model.modes import full_precision
from flowerray.retrieval.pairs import Pairs
from flowerray.robustness.verification import attack_pairs, query_pair_accuracy
from flowerray.robustness.victim import Victim
from flowerray.statistics import mean_interval

EXAMPLES = 6
"""Fallen queries whose pictures are kept at each budget."""
COLLAPSED_COSINE = 0.95
COLLAPSED_RANK = 5.0
"""Mean cosine above which, or effective rank below which, an embedding is called collapsed."""


@dataclass(frozen=True)
class Score:
    """What each query scores."""

    hit_Q: NDArray[np.bool_]
    """The nearest gallery image is of the query's class."""
    average_precision_Q: NDArray[np.float64]
    """At R, as in MAP@R."""

    @property
    def recall_at_1(self) -> float:
        """The share of hits."""
        return float(self.hit_Q.mean())

    def worst(self, other: "Score") -> "Score":
        """The worse of the two, query by query."""
        return Score(
            self.hit_Q & other.hit_Q,
            np.minimum(self.average_precision_Q, other.average_precision_Q),
        )

    def to_dict(self) -> dict[str, Any]:
        """R@1 with its 95 % interval over queries, MAP@R and n."""
        return {
            **_interval(self.hit_Q.astype(float)),
            "map_at_r": float(self.average_precision_Q.mean()),
            "n": len(self.hit_Q),
        }


@dataclass(frozen=True)
class Example:
    """One query that an attack turned, for the contact sheet."""

    query: int
    """Position among the Q queries."""
    attack: str
    clean_CHW: Tensor
    adversarial_CHW: Tensor
    after_K: NDArray[np.int64]
    """Gallery indices of its neighbours then, nearest first."""
    margin: float
    """Cosine to the nearest image of the class less that to the nearest other, before."""


@dataclass
class Robustness:
    """All that an attack on one model found."""

    independent: bool
    """Whether each attack's row stands for it alone."""
    clean: Score
    nearest_QK: NDArray[np.int64]
    """Gallery indices of each photograph's neighbours, nearest first."""
    attacks: dict[str, dict[float, Score]] = field(default_factory=dict)
    """Attack -> radius -> score; cumulative unless `independent`."""
    alone: dict[float, Score] = field(default_factory=dict)
    """The worst case over the attacks, from this radius alone: what the audit looks at."""
    worst: dict[float, Score] = field(default_factory=dict)
    """The same, with what fell at a smaller radius, which is allowed at a larger one."""
    pairs: dict[float, dict[str, float]] = field(default_factory=dict)
    """Pair metrics under `attack_pairs`, by radius."""
    attack_pairs: dict[str, dict[float, float]] = field(default_factory=dict)
    """Pair accuracy where the attacked side is each attack's query image (`independent` only)."""
    collapse: dict[str, Any] = field(default_factory=dict)
    examples: dict[float, list[Example]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """Attack -> time over all radii."""
    images: dict[str, int] = field(default_factory=dict)
    """Attack -> images attacked over all radii."""

    def expected(self) -> NDArray[np.float64]:
        """(Q,): the share of the radii at which each query is right; its mean is the expected
        robustness (the mean of the curve, as in arXiv:2509.23325).
        """
        return np.mean([score.hit_Q for score in self.worst.values()], axis=0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; see `record.record` for the keys."""
        clean = self.clean.recall_at_1
        expected = {**_interval(self.expected()), "eps": list(self.worst)}
        worst = {}
        for eps, score in self.worst.items():
            worst[key(eps)] = {
                **score.to_dict(),
                "recall_at_1_this_eps_alone": self.alone[eps].recall_at_1,
                "retention": score.recall_at_1 / clean if clean else None,
                **self.pairs.get(eps, {}),
                "right": bits(score.hit_Q),
            }
        attacks: dict[str, Any] = {}
        for name, scores in self.attacks.items():
            attacks[name] = {key(eps): score.to_dict() for eps, score in scores.items()}
            for eps, accuracy in self.attack_pairs.get(name, {}).items():
                attacks[name][key(eps)]["pair_accuracy"] = accuracy
        return {
            "clean": {**self.clean.to_dict(), **self.pairs.get(0.0, {})},
            "attacks": attacks,
            "rows": "independent" if self.independent else "cumulative",
            "worst_case": worst,
            "expected_robustness": {"mean": expected["recall_at_1"], **expected},
            "collapse": self.collapse,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "images_attacked": self.images,
        }


def key(eps: float) -> str:
    """A radius as a key of JSON and of metrics: "0.5", "2"."""
    return f"{eps:g}"


def bits(hit_Q: NDArray[np.bool_]) -> str:
    """One character a query, 1 = right, so that a later test can pair two runs."""
    return "".join("01"[int(hit)] for hit in hit_Q)


def _interval(values_Q: NDArray) -> dict[str, Any]:
    """A mean with its 95 % interval; no bounds (None) for a single value."""
    found = mean_interval(values_Q).to_dict()
    return {"recall_at_1": found["mean"], "ci": [found["low"], found["high"]]}


def collapse(emb_ND: ArrayLike, num_classes: int) -> dict[str, Any]:
    """Whether an embedding still tells images apart.

    Returns:
        `mean_cosine` over all pairs of different rows; `effective_rank`: exp of the entropy of the
        normalised singular values (Roy and Vetterli 2007), not centred, so that a constant has 1;
        `collapsed`: mean cosine above 0.95, or effective rank below 5 (below half the number of
        classes, where that is less); a single row tells nothing of it.
    """
    emb = np.asarray(emb_ND, np.float64)
    emb = emb / np.maximum(np.linalg.norm(emb, axis=1, keepdims=True), 1e-12)
    n = len(emb)
    sum_D = emb.sum(0)
    cosine = float((sum_D @ sum_D - (emb * emb).sum()) / (n * (n - 1))) if n > 1 else 1.0
    values = np.linalg.svd(emb, compute_uv=False)
    share = values[values > 0] / max(values.sum(), 1e-12)
    rank = float(np.exp(-(share * np.log(share)).sum()))
    least = min(COLLAPSED_RANK, num_classes / 2)
    return {
        "mean_cosine": cosine,
        "effective_rank": rank,
        "collapsed": n > 1 and (cosine > COLLAPSED_COSINE or rank < least),
    }


def perturb(
    victim: Victim,
    name: str,
    rows_M: NDArray,
    epsilon: float,
    budget: bank.BankConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Some of the queries under one attack.

    Args:
        rows_M: places among the Q queries.
        epsilon: radius in 1/255.
        budget: instead of the configuration's.

    Returns:
        The photographs and the adversarial images MCHW, see `bank.run`.
    """
    config = victim.config
    clean_MCHW, labels_M = victim.queries(rows_M)
    return clean_MCHW, bank.run(
        name, victim.embedder, clean_MCHW, labels_M, *victim.gallery(), norm=config.norm,
        epsilon=epsilon, budget=budget or config, seed=config.seed, positions=rows_M.tolist(),
        own_images_refused=False,
    )  # fmt: skip


@full_precision()
def attack_gallery(
    victim: Victim, eps: float, progress: Callable[[int], object] | None = None
) -> NDArray[np.float32]:
    """(G, D): embeddings of the gallery's images after PGD; each one is pushed out of its class.

    The attacker does not know the queries. He raises, for each image, the largest cosine to the
    mean embedding of another class less that to its own class's mean; the means are of the clean
    gallery, so that no image stands against itself. This is one attack, not the worst case over
    several: robustness against an attacked gallery is at most what is reported.

    Args:
        eps: radius in 1/255.
        progress: called with a number of images that are done, G in all.
    """
    gallery_GD, labels_G = victim.gallery()
    classes_C, class_G = labels_G.unique(return_inverse=True)
    sum_CD = gallery_GD.new_zeros(len(classes_C), gallery_GD.shape[1])
    means_CD = F.normalize(sum_CD.index_add_(0, class_G, gallery_GD), dim=1)
    return victim.moved(
        f"gallery {eps:g}",
        margin(victim.embedder, means_CD, classes_C, labels_G),
        lambda rows: victim.images(rows, victim.gallery_store),
        victim.config.pgd(victim.config.norm, eps),
        stream=(1,),
        progress=progress,
    )


def images_to_attack(victim: Victim, pairs: Pairs | None = None) -> int:
    """What `attack` reports as progress in all."""
    config = victim.config
    images = 0 if config.perturb == "gallery" else len(config.attacks) * len(victim.chosen_Q)
    images += 0 if config.perturb == "query" else len(victim.gallery_GD)
    images += 0 if pairs is None else len(pairs.index)
    return images * sum(eps > 0 for eps in config.eps)


@full_precision()
def attack(
    victim: Victim, pairs: Pairs | None = None, progress: Callable[[int], object] | None = None
) -> Robustness:
    """Runs the attacks at every radius.

    Args:
        victim: each query's class has to be in its gallery.
        pairs: also attacked, from `pairs_of_queries`.
        progress: called with a number of images that are dealt with; see `images_to_attack`.

    Raises:
        UserError: a gallery that holds the queries; pixels outside [0,1].
    """
    config, progress = victim.config, progress or (lambda _: None)
    refuse_own_images(torch.from_numpy(victim.emb_QD), torch.from_numpy(victim.gallery_GD))
    ranked = victim.rank(victim.emb_QD, victim.labels_Q)
    assert (ranked["num_relevant"] > 0).all(), "a query without an image of its class to find"
    clean = Score(ranked["hit"], ranked["average_precision"])
    result = Robustness(
        config.independent,
        clean,
        ranked["nearest"],
        attacks={name: {} for name in config.attacks},
        collapse=collapse(victim.emb_QD, len(np.unique(victim.labels_Q))),
        seconds=dict.fromkeys(config.attacks, 0.0),
        images=dict.fromkeys(config.attacks, 0),
    )
    accuracy = None
    if pairs is not None and config.independent:
        accuracy = query_pair_accuracy(victim, pairs)
    before = clean
    for eps in config.eps:
        own, alone = victim, clean
        if config.perturb != "query" and eps > 0:
            own = replace(victim, gallery_GD=attack_gallery(victim, eps, progress))
            changed = own.rank(own.emb_QD, own.labels_Q)
            alone = clean.worst(Score(changed["hit"], changed["average_precision"]))
        if config.perturb != "gallery" and eps > 0:
            alone = _at_radius(own, eps, alone, result, accuracy, progress)
        before = before.worst(alone)
        result.alone[eps], result.worst[eps] = alone, before
    if pairs is not None:
        result.pairs = attack_pairs(victim, pairs, progress)
    return result


def _at_radius(
    victim: Victim,
    eps: float,
    start: Score,
    result: Robustness,
    pair_accuracy: Callable[[NDArray[np.float32]], float] | None,
    progress: Callable[[int], object],
) -> Score:
    """The worst case over the attacks at one radius; notes each attack's score in `result`."""
    config, alone = victim.config, start
    examples: list[Example] = []
    for name in config.attacks:
        rows = np.arange(len(start.hit_Q)) if config.independent else np.flatnonzero(alone.hit_Q)
        hit_Q, precision_Q = start.hit_Q.copy(), start.average_precision_Q.copy()
        emb_QD = victim.emb_QD.copy()
        for batch in victim.batches(rows):
            found = victim.journal.once(
                f"{name} {eps:g} {batch[0]}",
                partial(_outcome, victim, name, batch, eps, start, examples),
            )
            hit_Q[batch] &= found["hit"]
            precision_Q[batch] = np.minimum(precision_Q[batch], found["average_precision"])
            emb_QD[batch] = found["emb"]
            result.seconds[name] += float(found["seconds"])
            examples += _examples(victim, name, batch, found)
            examples = sorted(examples, key=lambda e: -e.margin)[:EXAMPLES]
            progress(len(batch))
        progress(len(start.hit_Q) - len(rows))
        score = Score(hit_Q, precision_Q)
        alone = alone.worst(score)
        result.attacks[name][eps] = score if config.independent else alone
        if pair_accuracy is not None:
            result.attack_pairs.setdefault(name, {})[eps] = pair_accuracy(emb_QD)
        result.images[name] += len(rows)
    result.examples[eps] = examples
    return alone


def _outcome(
    victim: Victim,
    name: str,
    batch: NDArray,
    eps: float,
    start: Score,
    examples: Sequence[Example],
) -> dict[str, NDArray]:
    """What one attack makes of a batch of queries.

    Returns:
        `hit`, `average_precision`, `emb` of the batch; `seconds`; and of those that were right,
        are not any more, and belong among the surest `EXAMPLES` so far: `fallen` (places in the
        batch), `margin`, `after` (neighbours), `adversarial` (images).
    """
    began = time.perf_counter()
    adversarial_MCHW = perturb(victim, name, batch, eps)[1]
    emb_MD = victim.embed(adversarial_MCHW)
    ranked = victim.rank(emb_MD, victim.labels_Q[batch])
    fallen = np.flatnonzero(start.hit_Q[batch] & ~ranked["hit"])
    fallen = fallen[~np.isin(batch[fallen], [example.query for example in examples])]
    cosine_FG = victim.emb_QD[batch[fallen]] @ victim.gallery_GD.T
    own_FG = victim.gallery_labels_G == victim.labels_Q[batch[fallen], None]
    right_F = np.where(own_FG, cosine_FG, -np.inf).max(1, initial=-np.inf)
    margin_F = right_F - np.where(own_FG, -1.0, cosine_FG).max(1, initial=-1.0)
    least = examples[-1].margin if len(examples) == EXAMPLES else -np.inf
    surest = np.argsort(margin_F)[::-1][:EXAMPLES]
    surest = surest[margin_F[surest] > least]
    fallen = fallen[surest]
    return {
        "hit": ranked["hit"],
        "average_precision": ranked["average_precision"],
        "emb": emb_MD,
        "fallen": fallen,
        "margin": margin_F[surest],
        "after": ranked["nearest"][fallen],
        "adversarial": adversarial_MCHW[torch.from_numpy(fallen)].cpu().numpy(),
        "seconds": np.array(time.perf_counter() - began),
    }


def _examples(
    victim: Victim, name: str, batch: NDArray, found: dict[str, NDArray]
) -> list[Example]:
    clean = victim.queries(batch[found["fallen"]])[0].cpu() if len(found["fallen"]) else ()
    return [
        Example(
            int(batch[row]),
            name,
            image,
            torch.from_numpy(found["adversarial"][i]),
            found["after"][i],
            float(found["margin"][i]),
        )
        for i, (row, image) in enumerate(zip(found["fallen"], clean, strict=True))
    ]
