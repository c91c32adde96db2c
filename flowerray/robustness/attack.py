"""Adversarial retrieval: how many queries stay right when an attacker may change their pixels.

A query counts as right at a budget only if its own photograph and every adversarial one that was
found within the budget, by any of the attacks, have a nearest gallery image of their class.

Letters: N images of a split, Q attacked queries, M queries of one batch, B images, C channels (or
classes), H W pixels, G gallery images, D embedding dimensions, P pairs.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from flowerray.attacks import bank
from flowerray.attacks.logits import refuse_own_images
from flowerray.model.precision import full_precision
from flowerray.robustness.config import AttackConfig
from flowerray.robustness.subject import Arena, embed_images, rank
from flowerray.statistics import bootstrap_interval

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
        """R@1 with its 95 % bootstrap interval over queries, MAP@R and n."""
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
    before_K: NDArray[np.int64]
    """Gallery indices of the photograph's neighbours, nearest first."""
    after_K: NDArray[np.int64]
    margin: float
    """Cosine to the nearest image of the class less that to the nearest other, before."""


@dataclass
class Robustness:
    """All that an attack on one model found."""

    config: AttackConfig
    clean: Score
    attacks: dict[str, dict[float, Score]] = field(default_factory=dict)
    """Attack -> radius -> score; cumulative unless `config.independent`."""
    alone: dict[float, Score] = field(default_factory=dict)
    """The worst case over the attacks, from this radius alone: what the audit looks at."""
    worst: dict[float, Score] = field(default_factory=dict)
    """The same, with what fell at a smaller radius, which is allowed at a larger one."""
    pairs: dict[float, dict[str, float]] = field(default_factory=dict)
    """Pair metrics under `pair_attack`, by radius."""
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
            "rows": "independent" if self.config.independent else "cumulative",
            "worst_case": worst,
            "expected_robustness": {**_interval(self.expected()), "eps": list(self.worst)},
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
    """A mean with its 95 % bootstrap interval; no bounds (None) for a single value."""
    interval = bootstrap_interval(values_Q, resamples=2000)
    bounds = [None if np.isnan(bound) else bound for bound in (interval.low, interval.high)]
    return {"recall_at_1": interval.mean, "ci": bounds}


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
    arena: Arena, name: str, rows_M: NDArray, epsilon: float, config: AttackConfig
) -> tuple[Tensor, Tensor]:
    """Some of the queries under one attack.

    Args:
        rows_M: places among the Q queries.
        epsilon: radius in 1/255.

    Returns:
        The photographs and the adversarial images MCHW. Where an attack left the budget
        (minimum-norm attacks do), the photograph stands in: it did not succeed.
    """
    clean_MCHW = arena.images(arena.chosen_Q[rows_M])
    labels_M = torch.from_numpy(arena.labels_Q[rows_M]).to(arena.device)
    other_MCHW = bank.run(
        name, arena.embedder, clean_MCHW, labels_M, *arena.gallery(), norm=config.norm,
        epsilon=epsilon, budget=config, seed=config.seed, positions=rows_M.tolist(),
        own_images_refused=False,
    )  # fmt: skip
    allowed_M = bank.admissible(clean_MCHW, other_MCHW, config.norm, epsilon / 255)
    return clean_MCHW, torch.where(allowed_M[:, None, None, None], other_MCHW, clean_MCHW)


@full_precision()
def attack(
    arena: Arena,
    config: AttackConfig,
    *,
    arena_at: Callable[[float], Arena] | None = None,
    pair_accuracy: Callable[[NDArray[np.float32]], float] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Robustness:
    """Runs the attacks at every radius.

    Args:
        arena: see `Arena`; each query's class has to be in the gallery.
        config: the attacks.
        arena_at: the arena with the gallery that a radius allows, where the gallery is attacked.
        pair_accuracy: of the pairs whose attacked side has these embeddings (Q, D); asked of each
            attack where they are independent.
        progress: called with a number of queries that are dealt with; attacks x radii x Q in all.

    Returns:
        Scores; `pairs` is left to `pair_attack`.

    Raises:
        UserError: a gallery that holds the queries; pixels outside [0,1].
    """
    refuse_own_images(torch.from_numpy(arena.emb_QD), torch.from_numpy(arena.gallery_GD))
    ranked = rank(arena, arena.emb_QD, arena.labels_Q)
    assert (ranked["num_relevant"] > 0).all(), "a query without an image of its class to find"
    clean = Score(ranked["hit"], ranked["average_precision"])
    result = Robustness(config, clean, {name: {} for name in config.attacks})
    result.collapse = collapse(arena.emb_QD, len(np.unique(arena.labels_Q)))
    result.seconds = dict.fromkeys(config.attacks, 0.0)
    result.images = dict.fromkeys(config.attacks, 0)
    before = clean
    for eps in config.eps:
        own = arena if arena_at is None else arena_at(eps)
        if own is arena:
            alone = clean
        else:
            changed = rank(own, arena.emb_QD, own.labels_Q)
            alone = clean.worst(Score(changed["hit"], changed["average_precision"]))
        if eps > 0 and config.perturb != "gallery":
            nearest_QK = ranked["nearest"]
            alone = _at_radius(own, config, eps, alone, nearest_QK, result, pair_accuracy, progress)
        before = before.worst(alone)
        result.alone[eps], result.worst[eps] = alone, before
    return result


def _at_radius(
    arena: Arena,
    config: AttackConfig,
    eps: float,
    start: Score,
    nearest_QK: NDArray,
    result: Robustness,
    pair_accuracy: Callable[[NDArray[np.float32]], float] | None,
    progress: Callable[[int], object] | None,
) -> Score:
    """The worst case over the attacks at one radius; notes each attack's score in `result`."""
    alone = start
    examples: list[Example] = []
    for name in config.attacks:
        began = time.perf_counter()
        rows = np.arange(len(start.hit_Q)) if config.independent else np.flatnonzero(alone.hit_Q)
        hit_Q, precision_Q = start.hit_Q.copy(), start.average_precision_Q.copy()
        emb_QD = arena.emb_QD.copy()
        for first in range(0, len(rows), config.batch_size):
            batch = rows[first : first + config.batch_size]
            images = perturb(arena, name, batch, eps, config)
            emb_MD = embed_images(arena, images[1])
            ranked = rank(arena, emb_MD, arena.labels_Q[batch])
            hit_Q[batch] &= ranked["hit"]
            precision_Q[batch] = np.minimum(precision_Q[batch], ranked["average_precision"])
            emb_QD[batch] = emb_MD
            examples += _fallen(arena, name, batch, images, nearest_QK, ranked, start)
            first_only = {e.query: e for e in reversed(examples)}
            examples = sorted(first_only.values(), key=lambda e: -e.margin)[:EXAMPLES]
            if progress is not None:
                progress(len(batch))
        if progress is not None:
            progress(len(start.hit_Q) - len(rows))
        score = Score(hit_Q, precision_Q)
        alone = alone.worst(score)
        result.attacks[name][eps] = score if config.independent else alone
        if config.independent and pair_accuracy is not None:
            result.attack_pairs.setdefault(name, {})[eps] = pair_accuracy(emb_QD)
        result.seconds[name] += time.perf_counter() - began
        result.images[name] += len(rows)
    result.examples[eps] = examples
    return alone


def _fallen(
    arena: Arena,
    name: str,
    batch: NDArray,
    images: tuple[Tensor, Tensor],
    nearest_QK: NDArray,
    ranked: dict[str, NDArray],
    start: Score,
) -> list[Example]:
    """The queries of a batch that were right and are not any more; the surest ones only."""
    rows = np.flatnonzero(start.hit_Q[batch] & ~ranked["hit"])
    margins = []
    for query in batch[rows]:
        cosine_G = arena.gallery_GD @ arena.emb_QD[query]
        own_G = arena.gallery_labels_G == arena.labels_Q[query]
        margins.append(float(cosine_G[own_G].max() - cosine_G[~own_G].max(initial=-1.0)))
    surest = np.argsort(margins)[::-1][:EXAMPLES]
    return [
        Example(
            int(batch[rows[i]]),
            name,
            images[0][rows[i]].cpu().clone(),
            images[1][rows[i]].cpu().clone(),
            nearest_QK[batch[rows[i]]],
            ranked["nearest"][rows[i]],
            margins[i],
        )
        for i in surest
    ]
