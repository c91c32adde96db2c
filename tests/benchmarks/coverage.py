"""How often the intervals hold the truth, and how often a test sees what is not there.

    uv run python -m tests.benchmarks.coverage [--trials 300] [--again 3000] [--seed 0]

Of every cell of a grid (queries, seeds, spread between seeds, rate) so many data sets are drawn;
where the interval holds the truth in fewer than 0.93 or more than 0.98 of them, `--again` new ones,
which alone count: of hundreds of cells some leave these bounds by chance.
Whether a model is right on a query is a normal number below the quantile of its seed's rate; the
number is half the query's, a fifth the model's on this query, and the rest of the seed on this
query. The rates of the seeds are normal around the cell's, with the spread as standard deviation
(at most a third of the rate of hits and of misses). MAP@R is 1 for a hit, else uniform in 0..1.
"""

import argparse
from collections.abc import Callable
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from flowerray.show.columns import columns
from flowerray.statistics import Interval, PairedTest, mean_interval, paired_difference

QUERIES = (10, 100, 1000, 6000)
SEEDS = (1, 2, 3, 5, 10)
SPREADS = (0.0, 0.01, 0.03)
RATES = (0.01, 0.1, 0.5, 0.9, 0.99)
FEW = 10
"""Queries of the rarer outcome, expected of a seed, below which a cell counts as rare."""
LEAST, MOST = 0.93, 0.98
"""Coverage that is asked for; rare cells may have more."""

Pair = tuple[NDArray[np.float64], NDArray[np.float64]]


def draw(
    rng: np.random.Generator, seeds: int, queries: int, spread: float, *rates: float
) -> list[NDArray[np.float64]]:
    """Hits (S, Q) of as many models as there are rates, on the same queries."""
    shared_Q = np.sqrt(0.5) * rng.normal(size=queries)
    models = []
    for rate in rates:
        width = min(spread, rate / 3, (1 - rate) / 3)
        rates_S1 = np.clip(rng.normal(rate, width, (seeds, 1)), 1e-9, 1 - 1e-9)
        own_Q = np.sqrt(0.2) * rng.normal(size=queries)
        noise_SQ = np.sqrt(0.3) * rng.normal(size=(seeds, queries))
        models.append((shared_Q + own_Q + noise_SQ < ndtri(rates_S1)).astype(float))
    return models


def precision(rng: np.random.Generator, hits_SQ: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores of nearly all ones, as MAP@R's are; the mean of rate r is (1 + r) / 2."""
    return np.where(hits_SQ > 0, 1.0, rng.random(hits_SQ.shape))


def recall(rng: np.random.Generator, s: int, q: int, spread: float, rate: float) -> list[bool]:
    (hits_SQ,) = draw(rng, s, q, spread, rate)
    return [_holds(mean_interval(hits_SQ), rate)]


def map_at_r(rng: np.random.Generator, s: int, q: int, spread: float, rate: float) -> list[bool]:
    (hits_SQ,) = draw(rng, s, q, spread, rate)
    return [_holds(mean_interval(precision(rng, hits_SQ)), (1 + rate) / 2)]


def difference(rng: np.random.Generator, s: int, q: int, spread: float, rate: float) -> list[bool]:
    """Of two models with the same rate; also whether p is below 0.05."""
    test = paired_difference(*draw(rng, s, q, spread, rate, rate))
    return [_holds(test, 0.0), test.p_value < 0.05]


def gain(rng: np.random.Generator, s: int, q: int, spread: float, rate: float) -> list[bool]:
    """In MAP@R, over a model whose rate is four fifths."""
    first, second = draw(rng, s, q, spread, rate, 0.8 * rate)
    test = paired_difference(precision(rng, first), precision(rng, second))
    return [_holds(test, 0.1 * rate)]


KINDS: dict[str, Callable[..., list[bool]]] = {
    "R@1": recall,
    "MAP@R": map_at_r,
    "difference in R@1": difference,
    "gain in MAP@R": gain,
}


def _holds(found: Interval | PairedTest, truth: float) -> bool:
    return found.low <= truth <= found.high


def main() -> None:
    """Draws, counts, prints a row a kind and number of seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=300, help="of each cell")
    parser.add_argument("--again", type=int, default=3000, help="where these leave the bounds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    head = ["", "seeds", *(f"Q = {q:,}" for q in QUERIES)]
    common, rare, false = [head], [head], [head]
    for (name, kind), seeds in product(KINDS.items(), SEEDS):
        rows: list[list[str]] = [[], [], []]
        for queries in QUERIES:
            cells: list[list[float]] = [[], [], []]
            for spread, rate in product(SPREADS if seeds > 1 else SPREADS[:1], RATES):
                is_rare = min(rate, 1 - rate) * queries < FEW
                for number in (options.trials, options.again):
                    trials = [kind(rng, seeds, queries, spread, rate) for _ in range(number)]
                    share, *p_value = np.mean(trials, axis=0).tolist()
                    if LEAST <= share <= (1 if is_rare else MOST):
                        break
                cells[is_rare].append(share)
                cells[2].extend(p_value)
            for row, shares in zip(rows, cells, strict=True):
                row.append(f"{min(shares):.3f} - {max(shares):.3f}" if shares else "")
        for table, row in zip((common, rare, false), rows, strict=True):
            if any(row):
                table.append([name, str(seeds), *row])
        print(f"{name}, {seeds} seeds", flush=True)
    for title, table in (
        (f"Coverage, {FEW} or more of the rarer outcome", common),
        (f"Coverage, fewer than {FEW}", rare),
        ("Share of p < 0.05 where nothing differs", false),
    ):
        print("", title, "", *columns(table, "<>" + ">" * len(QUERIES)), sep="\n")


if __name__ == "__main__":
    main()
