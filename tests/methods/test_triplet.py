"""The triplet loss against loops over triplets and against pytorch-metric-learning."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import miners
from pytorch_metric_learning.losses import TripletMarginLoss
from torch import Tensor

from flowerray.methods._base import Loss
from flowerray.methods.triplet import Triplet, distance_weights, draw_columns
from tests.methods.cases import build, labels_of, units

MINERS = ["random", "all", "semi-hard", "batch-hard", "distance-weighted"]


def loss_and_gradient(raw_BD: Tensor, labels_B: Tensor, **fields: object) -> tuple[Loss, Tensor]:
    loss = build("triplet", **fields).loss(F.normalize(raw_BD), labels_B)
    (gradient,) = torch.autograd.grad(loss.total, raw_BD)
    return loss, gradient


def triplets(
    emb_BD: Tensor, labels_B: Tensor, miner: str, margin: float, method: Triplet
) -> Iterator[tuple[int, int, int]]:
    """(anchor, positive, negative) as the miner's definition gives them, by plain loops."""
    num = len(labels_B)
    points = emb_BD.tolist()
    d = [[math.dist(a, b) for b in points] for a in points]
    uniforms = torch.rand(num, num, generator=method.generator(), dtype=torch.float64).tolist()
    for a in range(num):
        positives = [p for p in range(num) if p != a and labels_B[p] == labels_B[a]]
        negatives = [n for n in range(num) if labels_B[n] != labels_B[a]]
        if not positives or not negatives:
            continue
        if miner == "batch-hard":
            yield (
                a,
                max(positives, key=lambda p: d[a][p]),
                min(negatives, key=lambda n: d[a][n]),
            )
            continue
        if miner == "distance-weighted":
            negatives = [n for n in negatives if d[a][n] < 1.4]
        for p in positives:
            if miner == "all":
                yield from ((a, p, n) for n in negatives)
            elif miner == "semi-hard":
                band = [n for n in negatives if d[a][p] < d[a][n] < d[a][p] + margin]
                yield from ((a, p, n) for n in band)
            else:
                weights = [1.0] * len(negatives)
                if miner == "distance-weighted":
                    dim = len(points[0])
                    near = [max(d[a][n], 0.5) for n in negatives]
                    weights = [x ** (2 - dim) * (1 - x * x / 4) ** ((3 - dim) / 2) for x in near]
                sums = list(itertools.accumulate(weights))
                if sums:
                    reached = [s > uniforms[a][p] * sums[-1] for s in sums]
                    yield a, p, negatives[reached.index(True)]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("case", range(4))
def test_equals_a_loop_over_triplets(case: int, miner: str, soft: bool) -> None:
    raw_BD, labels_B = units(18, case), labels_of(18, case)
    margin = 0.1 + 0.2 * case
    method = build("triplet", miner=miner, margin=margin, soft=soft)
    assert isinstance(method, Triplet)
    method.seed = (case, 1, 2)
    emb_BD = F.normalize(raw_BD)
    loss = method.loss(emb_BD, labels_B)
    found = list(triplets(emb_BD.detach(), labels_B, miner, margin, method))
    assert len(found) > 5

    terms = []
    for a, p, n in found:
        gap = (emb_BD[a] - emb_BD[p]).norm() - (emb_BD[a] - emb_BD[n]).norm()
        terms.append((1 + gap.exp()).log() if soft else (gap + margin).clamp(min=0))
    kept = [term for term in terms if term > 0]
    expected = torch.stack(kept).mean() if kept else emb_BD.sum() * 0
    torch.testing.assert_close(loss.total, expected, rtol=0, atol=1e-12)
    mine, theirs = (
        torch.autograd.grad(x, raw_BD, retain_graph=True)[0] for x in (loss.total, expected)
    )
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)

    bar = math.log(2) if soft else 0.0
    share = sum(term.item() > bar for term in terms) / len(terms)
    assert loss.curves["active"].item() == pytest.approx(share)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("margin", [0.05, 0.2, 0.7])
@pytest.mark.parametrize("miner", ["all", "semi-hard", "batch-hard", "soft"])
def test_equals_pytorch_metric_learning(miner: str, margin: float, dtype: torch.dtype) -> None:
    oracles = {
        "all": lambda: miners.TripletMarginMiner(margin, "all"),
        "semi-hard": lambda: miners.TripletMarginMiner(margin, "semihard"),
        "batch-hard": miners.BatchHardMiner,
        "soft": miners.BatchHardMiner,
    }
    for case in range(5):
        raw_BD, labels_B = units(48, case, dim=32, dtype=dtype), labels_of(48, case, 12)
        soft = miner == "soft"
        fields = {"miner": "batch-hard" if soft else miner, "margin": margin, "soft": soft}
        loss, mine = loss_and_gradient(raw_BD, labels_B, **fields)
        emb_BD = F.normalize(raw_BD)
        oracle = TripletMarginLoss(margin=0.0 if soft else margin, smooth_loss=soft)
        theirs = oracle(emb_BD, labels_B, oracles[miner]()(emb_BD, labels_B))
        (gradient,) = torch.autograd.grad(theirs, raw_BD)
        assert theirs > 0 and loss.total.dtype == dtype
        torch.testing.assert_close(loss.total, theirs, rtol=0, atol=1e-5)
        torch.testing.assert_close(mine, gradient, rtol=0, atol=1e-5)


def test_the_margin_matters_and_solved_triplets_do_not() -> None:
    """Two tight classes at right angles: d_ap about 0, d_an about 1.41."""
    emb_BD = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 1]].requires_grad_()
    labels_B = torch.tensor([0, 0, 1, 1])
    assert build("triplet", miner="batch-hard", margin=1.4).loss(emb_BD, labels_B).total == 0
    beyond = build("triplet", miner="batch-hard", margin=1.5).loss(emb_BD, labels_B).total.item()
    assert beyond == pytest.approx(1.5 - math.sqrt(2))


def test_solved_triplets_do_not_dilute_the_mean() -> None:
    angles = torch.tensor([0.0, 0.5, 0.7, 2.4], dtype=torch.float64)
    emb_BD = torch.stack([angles.cos(), angles.sin()], 1)
    labels_B = torch.tensor([0, 0, 1, 1])
    loss = build("triplet", miner="batch-hard", margin=0.05).loss(emb_BD, labels_B)

    def chord(i: int, j: int) -> float:
        return 2 * math.sin(abs(angles[i] - angles[j]).item() / 2)

    gaps = [
        chord(0, 1) - chord(0, 2),
        chord(1, 0) - chord(1, 2),
        chord(2, 3) - chord(2, 1),
        chord(3, 2) - chord(3, 1),
    ]
    terms = [max(0.0, gap + 0.05) for gap in gaps]
    active = [term for term in terms if term > 0]
    assert 0 < len(active) < 4
    assert loss.total.item() == pytest.approx(sum(active) / len(active))
    assert loss.curves["active"].item() == len(active) / 4


def test_identical_images_pull_nothing() -> None:
    """Positives at distance 0: the gradient is finite and only the negative moves."""
    raw_BD = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.9, 0.2]], dtype=torch.float64)
    raw_BD.requires_grad_()
    for miner in MINERS:
        loss, gradient = loss_and_gradient(raw_BD, torch.tensor([0, 0, 1]), miner=miner, margin=0.5)
        assert gradient.isfinite().all() and gradient[2].norm() > 0.1
        assert loss.total.item() == pytest.approx(0.5 - loss.curves["d_an"].item())


def test_draws_follow_the_weights() -> None:
    weights_BB = torch.tensor([[0.0, 1.0, 3.0, 0.0]] * 4).repeat_interleave(1000, 1).double()
    columns, found = draw_columns(weights_BB, torch.Generator().manual_seed(0))
    assert found.all()
    share = torch.bincount(columns.flatten() // 1000, minlength=4) / columns.numel()
    torch.testing.assert_close(share, torch.tensor([0, 0.25, 0.75, 0.0]), atol=0.02, rtol=0)
    _, found = draw_columns(torch.zeros(3, 3), torch.Generator())
    assert not found.any()


def test_distance_weights_undo_the_density_of_the_sphere() -> None:
    """Points uniform on the sphere, drawn by weight, are uniform in distance."""
    dim = 10
    points = F.normalize(torch.randn(200_000, dim, generator=torch.Generator().manual_seed(0)))
    d = (points[1:] - points[0]).norm(dim=1).double()
    weights = distance_weights(d[None], torch.ones(1, len(d), dtype=torch.bool), dim)[0]
    assert weights.max() == 1
    assert (weights[d >= 1.4] == 0).all()
    inside = (d > 0.6) & (d < 1.4)
    total = torch.histc(d[inside], 4, 0.6, 1.4)
    edges = torch.linspace(0.6, 1.4, 5, dtype=torch.float64)
    mass = torch.stack(
        [weights[(d >= a) & (d < b)].sum() for a, b in itertools.pairwise(edges.tolist())]
    )
    assert total.max() / total.min() > 10, "the points themselves are far from uniform in distance"
    assert mass.max() / mass.min() < 1.3


@pytest.mark.parametrize("miner", ["random", "distance-weighted"])
def test_drawn_negatives_change_with_the_seed(miner: str) -> None:
    emb_BD, labels_B = F.normalize(units(24, 0)), labels_of(24, 0)
    method = build("triplet", miner=miner, margin=1.0)
    totals = set()
    for step in range(6):
        method.seed = (0, 0, step)
        totals.add(method.loss(emb_BD, labels_B).total.item())
    assert len(totals) == 6


def test_training_on_triplets_and_not_on_pairs() -> None:
    """The notebooks trained their "robust triplet" with a pair classifier. Here no head exists, and
    both distances growing by the same leaves the violation as it is."""
    method = build("triplet", miner="batch-hard")
    assert {name.split(".")[0] for name, _ in method.named_parameters()} == {"embedder"}
    labels_B = torch.tensor([0, 0, 1])
    totals = []
    for shift in (0.0, 0.2):
        d_ap, d_an = 0.5 + shift, 0.6 + shift
        a, p, n = 0.0, 2 * math.asin(d_ap / 2), -2 * math.asin(d_an / 2)
        angles = torch.tensor([a, p, n], dtype=torch.float64)
        emb_BD = torch.stack([angles.cos(), angles.sin()], 1)
        d_a, d_n, valid = method.mine(torch.cdist(emb_BD, emb_BD), labels_B, 2)  # type: ignore[operator]
        totals.append((d_a - d_n)[0].item())
    assert totals[0] == pytest.approx(totals[1])
