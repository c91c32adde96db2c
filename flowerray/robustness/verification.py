"""Verification under attack: one photograph of each pair is changed so that the verdict turns.

Letters: N images of a split, Q attacked queries, P pairs, D embedding dimensions.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from flowerray.attacks.objectives import pair_flip
from flowerray.model.modes import full_precision
from flowerray.retrieval.pairs import KINDS, Pairs, pair_metrics
from flowerray.robustness.victim import Victim


def pairs_of_queries(pairs: Pairs, chosen_Q: NDArray, number: int, seed: int) -> Pairs:
    """Up to `number` pairs with at least one attacked query, as many of each kind as there are.

    Returns:
        Pairs whose first column is the side that is attacked: the pair's first attacked query.
    """
    first_P, second_P = np.isin(pairs.index, chosen_Q).T
    rng = np.random.default_rng((seed, 3))
    kinds = [k for k in range(len(KINDS)) if (pairs.kind == k).any()]
    rows = []
    for kind in kinds:
        own = np.flatnonzero((pairs.kind == kind) & (first_P | second_P))
        rows.append(np.sort(rng.permutation(own)[: number // len(kinds)]))
    row_P = np.concatenate(rows)
    index_P2 = pairs.index[row_P]
    swapped_P = ~first_P[row_P]
    index_P2[swapped_P] = index_P2[swapped_P, ::-1]
    return Pairs(index_P2, pairs.kind[row_P])


def sides_metrics(
    attacked_PD: NDArray, other_PD: NDArray, pairs: Pairs, threshold: float
) -> dict[str, float]:
    """`pair_accuracy` and `pair_auc` of pairs whose two sides are embedded apart."""
    row_P = np.arange(len(attacked_PD))
    apart = Pairs(np.stack([row_P, row_P + len(row_P)], axis=1), pairs.kind)
    metrics = pair_metrics(np.concatenate([attacked_PD, other_PD]), apart, threshold)
    return {name: metrics[name] for name in ("pair_accuracy", "pair_auc")}


def query_pair_accuracy(victim: Victim, pairs: Pairs) -> Callable[[NDArray[np.float32]], float]:
    """Pair accuracy as a function of the attacked queries' embeddings (Q, D); the other side of
    each pair is clean. For attacks that aim at retrieval, not at the pair.
    """
    other_PD = embed_positions(victim, pairs.index[:, 1])
    row_P = np.searchsorted(victim.chosen_Q, pairs.index[:, 0])
    threshold = victim.model.threshold

    def accuracy(emb_QD: NDArray[np.float32]) -> float:
        return sides_metrics(emb_QD[row_P], other_PD, pairs, threshold)["pair_accuracy"]

    return accuracy


@full_precision()
def embed_positions(victim: Victim, positions_P: NDArray) -> NDArray[np.float32]:
    """(P, D) embeddings of photographs of the split, each one embedded once."""
    unique, back_P = np.unique(positions_P, return_inverse=True)
    parts = [victim.embed(victim.images(batch)) for batch in victim.batches(unique)]
    return np.concatenate(parts)[back_P]


@full_precision()
def attack_pairs(
    victim: Victim, pairs: Pairs, progress: Callable[[int], object] | None = None
) -> dict[float, dict[str, float]]:
    """Pair accuracy and AUC at each radius, the threshold as it was fitted on clean val pairs.

    The attacked side is moved by PGD away from its partner where the pair is of one class, towards
    it where it is not. What was found at a smaller radius also counts at a larger one. The other
    side is a clean photograph that the attacker knows.

    Args:
        pairs: from `pairs_of_queries`, of both sorts.
        progress: called with a number of pairs done; (radii > 0) x P in all.

    Returns:
        radius in 1/255 -> `pair_accuracy`, `pair_auc`, `num_pairs`.
    """
    other_PD = embed_positions(victim, pairs.index[:, 1])
    attacked_PD = embed_positions(victim, pairs.index[:, 0])
    other, same = (torch.from_numpy(a).to(victim.device) for a in (other_PD, pairs.same))
    objective, config = pair_flip(victim.embedder, other, same), victim.config
    sign_P = np.where(pairs.same, -1.0, 1.0)
    result = {}
    for eps in config.eps:
        if eps > 0:
            value_P = sign_P * (attacked_PD * other_PD).sum(1)
            turned_PD = victim.moved(
                f"pairs {eps:g}",
                objective,
                lambda rows: victim.images(pairs.index[rows, 0]),
                config.pgd(config.norm, eps),
                progress=progress,
            )
            better_P = sign_P * (turned_PD * other_PD).sum(1) > value_P
            attacked_PD = np.where(better_P[:, None], turned_PD, attacked_PD)
        metrics = sides_metrics(attacked_PD, other_PD, pairs, victim.model.threshold)
        result[eps] = metrics | {"num_pairs": len(pairs.index)}
    return result
