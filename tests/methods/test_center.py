"""The center loss against loops over images and classes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flowerray.methods._base import Loss, Output
from flowerray.methods.center import Center
from tests.methods.cases import CLASSES, DIM, build, images_of, labels_of, units


def center(**fields: object) -> Center:
    """With centers that have moved: as they start, their pull on unit vectors is a constant."""
    method = build("center", **fields)
    assert isinstance(method, Center)
    generator = torch.Generator().manual_seed(9)
    method.centers_CD.copy_(torch.randn(CLASSES, DIM, generator=generator) * 0.3)
    return method


def output_of(emb_BD: Tensor, labels_B: Tensor) -> Output:
    return Output(Loss(emb_BD.sum(), {}), emb_BD.detach(), labels_B)


@pytest.mark.parametrize("weight", [0.0, 0.01, 2.0])
@pytest.mark.parametrize("case", range(3))
def test_equals_a_loop_over_images(case: int, weight: float) -> None:
    method = center(center_weight=weight, scale=7.0)
    raw_BD, labels_B = units(12, case), labels_of(12, case)
    emb_BD = F.normalize(raw_BD)
    loss = method.loss(emb_BD, labels_B)

    entropy, pull, hits, unsure, apart = [], [], 0, 0, 0.0
    for x, y in zip(emb_BD, labels_B.tolist(), strict=True):
        logits = [7.0 * (x @ w) / w.norm() for w in method.weight_CD]
        odds = logits[y].exp() / sum(value.exp() for value in logits)
        entropy.append(-odds.log())
        pull.append(((x - method.centers_CD[y]) ** 2).sum() / 2)
        hits += int(max(range(CLASSES), key=lambda c: logits[c].item()) == y)
        unsure += int(odds < 0.5)
        apart += math.dist(x.tolist(), method.centers_CD[y].tolist())
    expected = torch.stack(entropy).mean() + weight * torch.stack(pull).mean()
    torch.testing.assert_close(loss.total, expected, rtol=0, atol=1e-12)
    parameters = [raw_BD, method.weight_CD]
    for mine, theirs in zip(
        torch.autograd.grad(loss.total, parameters, retain_graph=True),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    assert loss.curves["accuracy"].item() == pytest.approx(hits / 12)
    assert loss.curves["active"].item() == pytest.approx(unsure / 12)
    assert loss.curves["d_center"].item() == pytest.approx(apart / 12)


def test_lambda_0_is_plain_cross_entropy_to_the_bit() -> None:
    method = center(center_weight=0.0).float()
    raw_BD, labels_B = units(16, 0, dtype=torch.float32), labels_of(16, 0)
    emb_BD = F.normalize(raw_BD)
    plain = F.cross_entropy(8.0 * F.linear(emb_BD, F.normalize(method.weight_CD)), labels_B)
    total = method.loss(emb_BD, labels_B).total
    assert torch.equal(total, plain)
    grads = [
        torch.autograd.grad(x, [raw_BD, method.weight_CD], retain_graph=True)
        for x in (total, plain)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_centers_move_by_the_papers_rule(rate: float) -> None:
    method = center(center_rate=rate)
    before = method.centers_CD.clone()
    emb_BD, labels_B = F.normalize(units(14, 1)).detach(), labels_of(14, 1, CLASSES - 1)
    method.after_step(output_of(emb_BD, labels_B))
    for j in range(CLASSES):
        mine = [x for x, y in zip(emb_BD, labels_B, strict=True) if y == j]
        delta = sum((before[j] - x for x in mine), torch.zeros(DIM)) / (1 + len(mine))
        torch.testing.assert_close(method.centers_CD[j], before[j] - rate * delta)
    absent = CLASSES - 1
    assert torch.equal(method.centers_CD[absent], before[absent])


def test_centers_converge_to_the_mean_of_their_class() -> None:
    method = build("center")
    assert isinstance(method, Center) and (method.centers_CD == 0).all()
    emb_BD = F.normalize(units(20, 2)).detach()
    labels_B = torch.arange(20) % CLASSES
    for _ in range(60):
        method.after_step(output_of(emb_BD, labels_B))
    means_CD = torch.stack([emb_BD[labels_B == c].mean(0) for c in range(CLASSES)])
    torch.testing.assert_close(method.centers_CD, means_CD, rtol=0, atol=1e-6)


def test_unseen_centers_turn_no_embedding() -> None:
    """At 0, where they start, a center is equally far from every unit vector."""
    method = build("center", center_weight=5.0)
    plain = build("center", center_weight=0.0)
    raw_BD, labels_B = units(12, 3), labels_of(12, 3)
    grads = [
        torch.autograd.grad(m.loss(F.normalize(raw_BD), labels_B).total, raw_BD)[0]
        for m in (method, plain)
    ]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_attack_steps_leave_the_centers() -> None:
    method = center()
    before = method.centers_CD.clone()
    labels_B = labels_of(8, 0)
    for seed in range(3):
        images = images_of(labels_B, seed).requires_grad_()
        output = method(images, labels_B)
        torch.autograd.grad(output.loss.total, images)
    assert torch.equal(method.centers_CD, before)
    method.after_step(output)
    assert not torch.equal(method.centers_CD, before)


def test_centers_are_state_and_not_parameters() -> None:
    method = center()
    assert {n for n, _ in method.named_parameters() if "embedder" not in n} == {"weight_CD"}
    assert "centers_CD" in method.state_dict()
    torch.testing.assert_close(method.weight_CD.norm(dim=1).detach(), torch.ones(CLASSES).double())


def test_half_precision_embeddings_move_centers_in_full_precision() -> None:
    """2,048 images of a class: bfloat16 sums would stop growing at 256."""
    method = build("center", center_rate=1.0).float()
    assert isinstance(method, Center)
    emb_BD = F.normalize(torch.ones(2048, DIM)).bfloat16()
    output = output_of(emb_BD, torch.zeros(2048, dtype=torch.int64))
    method.after_step(output)
    expected = emb_BD[0].float() * 2048 / 2049
    torch.testing.assert_close(method.centers_CD[0], expected, rtol=1e-5, atol=0)
