"""The siamese network against loops over pairs and against pytorch-metric-learning."""

import math

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import ContrastiveLoss
from torch import Tensor

from flowerray.methods.siamese import Siamese
from tests.methods.cases import build, labels_of, units


def siamese(**fields: object) -> Siamese:
    method = build("siamese", **fields)
    assert isinstance(method, Siamese)
    return method


def pairs(
    emb_BD: Tensor, labels_B: Tensor, negatives: str, method: Siamese
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The ordered positive and negative pairs that count, by plain loops."""
    num = len(labels_B)
    points = emb_BD.tolist()
    keys = torch.rand(num, num, generator=method.generator()).tolist()
    chosen: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for a in range(num):
        same = [j for j in range(num) if j != a and labels_B[j] == labels_B[a]]
        other = [j for j in range(num) if labels_B[j] != labels_B[a]]
        if negatives == "balanced":
            other = sorted(other, key=lambda j: keys[a][j])[: len(same)]
        elif negatives == "hard":
            other = sorted(other, key=lambda j: math.dist(points[a], points[j]))[: len(same)]
        chosen[0].extend((a, j) for j in same)
        chosen[1].extend((a, j) for j in other)
    return chosen


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("negatives", ["all", "balanced", "hard"])
@pytest.mark.parametrize("case", range(3))
def test_contrastive_equals_a_loop_over_pairs(case: int, negatives: str, power: int) -> None:
    raw_BD, labels_B = units(18, case), labels_of(18, case)
    near, far = 0.3 * case, 0.9 + 0.2 * case
    method = siamese(negatives=negatives, power=power, positive_margin=near, negative_margin=far)
    method.seed = (case, 0, 1)
    emb_BD = F.normalize(raw_BD)
    loss = method.loss(emb_BD, labels_B)
    same, other = pairs(emb_BD.detach(), labels_B, negatives, method)
    if negatives != "all":
        assert len(same) == len(other)
    sides = [
        [((emb_BD[a] - emb_BD[b]).norm() - near).clamp(min=0) ** power for a, b in same],
        [(far - (emb_BD[a] - emb_BD[b]).norm()).clamp(min=0) ** power for a, b in other],
    ]
    expected = sum(torch.stack([t for t in side if t > 0]).mean() for side in sides)
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(loss.total, expected, rtol=0, atol=1e-12)
    mine, theirs = (
        torch.autograd.grad(x, raw_BD, retain_graph=True)[0] for x in (loss.total, expected)
    )
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    terms = [term for side in sides for term in side]
    share = sum(t.item() > 0 for t in terms) / len(terms)
    assert loss.curves["active"].item() == pytest.approx(share)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("margins", [(0.0, 0.5), (0.0, 1.0), (0.3, 1.2)])
def test_equals_pytorch_metric_learning(margins: tuple[float, float], dtype: torch.dtype) -> None:
    near, far = margins
    for case in range(5):
        raw_BD, labels_B = units(48, case, dim=32, dtype=dtype), labels_of(48, case, 12)
        emb_BD = F.normalize(raw_BD)
        method = siamese(negatives="all", positive_margin=near, negative_margin=far)
        mine = method.loss(emb_BD, labels_B).total
        theirs = ContrastiveLoss(pos_margin=near, neg_margin=far)(emb_BD, labels_B)
        assert theirs > 0 and mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
        grads = [torch.autograd.grad(x, raw_BD, retain_graph=True)[0] for x in (mine, theirs)]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-5)


@pytest.mark.parametrize("negatives", ["all", "balanced", "hard"])
def test_bce_equals_a_loop_over_pairs(negatives: str) -> None:
    raw_BD, labels_B = units(14, 0), labels_of(14, 0, 3)
    method = siamese(head="bce", negatives=negatives)
    with torch.no_grad():
        method.log_weight_D.add_(torch.linspace(-1, 1, 8))
        method.offset.fill_(5.0)
    emb_BD = F.normalize(raw_BD)
    loss = method.loss(emb_BD, labels_B)
    same, other = pairs(emb_BD.detach(), labels_B, negatives, method)

    def chance(a: int, b: int) -> Tensor:
        weighted = (emb_BD[a] - emb_BD[b]).abs() * method.log_weight_D.exp()
        return torch.sigmoid(method.offset - weighted.sum())

    sides = [
        [-chance(*pair).log() for pair in same],
        [-(1 - chance(*pair)).log() for pair in other],
    ]
    expected = torch.stack(sides[0]).mean() + torch.stack(sides[1]).mean()
    torch.testing.assert_close(loss.total, expected, rtol=0, atol=1e-10)
    parameters = [raw_BD, method.log_weight_D, method.offset]
    for mine, theirs in zip(
        torch.autograd.grad(loss.total, parameters, retain_graph=True),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    terms = [term for side in sides for term in side]
    share = sum(t.item() > math.log(2) for t in terms) / len(terms)
    assert loss.curves["active"].item() == pytest.approx(share)


def test_the_bce_head_judges_by_a_metric() -> None:
    """Unlike the notebooks' head on a pair, offset - logit is a distance that an index can hold."""
    method = siamese(head="bce")
    with torch.no_grad():
        method.log_weight_D.add_(torch.linspace(-2, 1, 8))
    emb_BD = F.normalize(units(20, 3)).detach()
    away_BB = (method.offset - method.logits(emb_BD)).detach()
    assert torch.equal(away_BB, away_BB.T)
    assert (away_BB.diagonal() == 0).all()
    assert (away_BB + torch.eye(20) > 0).all()
    detour_BB = (away_BB[:, :, None] + away_BB[None, :, :]).amin(1)
    assert (detour_BB >= away_BB - 1e-12).all()


def test_the_bce_head_starts_undecided_at_distance_0_7() -> None:
    from flowerray.methods.siamese import Config
    from tests.methods.cases import StandIn

    embedder: object = StandIn(128)
    method = Siamese(Config(head="bce"), embedder, 5)  # type: ignore[arg-type]
    emb_BD = F.normalize(torch.randn(60, 128, generator=torch.Generator().manual_seed(0)) + 1.4)
    away_BB = torch.cdist(emb_BD, emb_BD)
    expected_BB = 10 * (0.7 - away_BB)
    off = ~torch.eye(60, dtype=torch.bool)
    torch.testing.assert_close(
        method.logits(emb_BD).detach()[off], expected_BB[off], atol=1.5, rtol=0
    )


def test_only_the_bce_head_has_parameters() -> None:
    def own(method: Siamese) -> set[str]:
        return {n for n, _ in method.named_parameters() if not n.startswith("embedder.")}

    assert own(siamese()) == set()
    assert own(siamese(head="bce")) == {"log_weight_D", "offset"}


def test_balanced_negatives_are_drawn_evenly_and_by_seed() -> None:
    method = siamese(negatives="balanced")
    labels_B = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    positive = (labels_B[:, None] == labels_B) & ~torch.eye(8, dtype=torch.bool)
    negative = labels_B[:, None] != labels_B
    counts = torch.zeros(8, 8)
    for step in range(600):
        method.seed = (0, 0, step)
        chosen = method.choose(torch.rand(8, 8), positive, negative)
        assert torch.equal(chosen.sum(1), positive.sum(1)) and not (chosen & ~negative).any()
        counts += chosen
    expected = negative * positive.sum(1, keepdim=True) / negative.sum(1, keepdim=True)
    torch.testing.assert_close(counts / 600, expected, atol=0.08, rtol=0)


def test_fewer_negatives_than_positives() -> None:
    labels_B = torch.tensor([0, 0, 0, 0, 1])
    loss = siamese(negatives="hard").loss(F.normalize(units(5, 0)), labels_B)
    assert loss.total.isfinite() and loss.curves["d_an"] > 0


def test_pairs_stay_together_under_attack() -> None:
    """The notebooks reordered one side of their pairs; here an attacked half keeps its labels."""
    method = siamese(negatives="all")
    raw_BD, labels_B = units(12, 0).detach(), torch.arange(12) // 3
    attacked = raw_BD.clone()
    attacked[:6] += 1e-9
    apart = method.loss(F.normalize(attacked), labels_B).total
    whole = method.loss(F.normalize(raw_BD), labels_B).total
    torch.testing.assert_close(apart, whole, rtol=0, atol=1e-6)
    swapped = attacked.roll(1, 0)
    assert abs(method.loss(F.normalize(swapped), labels_B).total - whole) > 1e-3
