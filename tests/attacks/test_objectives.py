"""Each objective against its definition, written out by hand."""

import pytest
import torch
import torch.nn.functional as F

from flowerray.attacks import objectives
from flowerray.attacks.logits import MaxSimLogits
from flowerray.attacks.pgd import Objective, PGDConfig, pgd, quiet
from flowerray.errors import UserError
from tests.attacks.batch import Batch, Linear, batch, eval_copy


@pytest.fixture
def made() -> Batch:
    return batch(Linear(), side=8, queries=24)


def values(objective: Objective, made: Batch) -> torch.Tensor:
    with quiet(made.embedder), torch.no_grad():
        return objective(made.images_QCHW)


def embed(made: Batch) -> torch.Tensor:
    with torch.no_grad():
        return eval_copy(made.embedder)(made.images_QCHW)


def test_margin_is_wrong_minus_right(made: Batch) -> None:
    labels_Q = made.labels_Q.roll(1)
    objective = objectives.margin(made.embedder, made.gallery_GD, made.gallery_labels_G, labels_Q)
    for value, emb, label in zip(values(objective, made), embed(made), labels_Q, strict=True):
        cosine_G = made.gallery_GD @ emb
        own_G = made.gallery_labels_G == label
        expected = cosine_G[~own_G].max() - cosine_G[own_G].max()
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
    wrong_Q = ~made._replace(labels_Q=labels_Q).right(made.images_QCHW)
    assert torch.equal(values(objective, made) > 0, wrong_Q) and 0 < wrong_Q.sum() < len(wrong_Q)
    with pytest.raises(UserError, match=f"no image of class {labels_Q[0] + 77}"):
        objectives.margin(made.embedder, made.gallery_GD, made.gallery_labels_G, labels_Q + 77)


def test_shift_is_the_squared_distance(made: Batch) -> None:
    objective = objectives.shift(made.embedder, embed(made))
    assert objective.needs_random_start
    assert values(objective, made).abs().max() < 1e-12
    moved = made._replace(images_QCHW=made.images_QCHW.flip(0))
    expected = (embed(moved) - embed(made)).norm(dim=1) ** 2
    torch.testing.assert_close(values(objective, moved), expected)


def test_match_is_the_cosine(made: Batch) -> None:
    target_QD = made.gallery_GD[: len(made.labels_Q)]
    objective = objectives.match(made.embedder, target_QD)
    expected = F.cosine_similarity(embed(made), target_QD)
    torch.testing.assert_close(values(objective, made), expected)
    attacked = pgd(objective, made.images_QCHW, PGDConfig(epsilon=16, steps=10))
    assert (attacked.value_B > expected + 0.05).all()


def test_pair_flip_turns_both_kinds_of_pair(made: Batch) -> None:
    other_QD = embed(made).roll(1, 0)
    same_Q = made.labels_Q == made.labels_Q.roll(1)
    same_Q[0] = True
    cosine_Q = F.cosine_similarity(embed(made), other_QD)
    objective = objectives.pair_flip(made.embedder, other_QD, same_Q, threshold=0.3)
    expected = torch.where(same_Q, 0.3 - cosine_Q, cosine_Q - 0.3)
    torch.testing.assert_close(values(objective, made), expected)
    attacked = pgd(objective, made.images_QCHW, PGDConfig(epsilon=16, steps=10)).images_BCHW
    after_Q = F.cosine_similarity(embed(made._replace(images_QCHW=attacked)), other_QD)
    assert (after_Q < cosine_Q)[same_Q].all() and (after_Q > cosine_Q)[~same_Q].all()


def test_cross_entropy_and_its_wrong_decisions(made: Batch) -> None:
    logits = MaxSimLogits(made.embedder, made.gallery_GD, made.gallery_labels_G)
    labels_Q = made.labels_Q.roll(1)
    plain_Q = values(objectives.cross_entropy(logits, labels_Q), made)
    with quiet(logits), torch.no_grad():
        chances_QC = logits(made.images_QCHW).softmax(1)
    own_Q = chances_QC[torch.arange(len(labels_Q)), labels_Q]
    torch.testing.assert_close(plain_Q, -own_Q.log())
    first_Q = values(objectives.cross_entropy(logits, labels_Q, wrong_first=True), made)
    wrong_Q = ~made._replace(labels_Q=labels_Q).right(made.images_QCHW)
    torch.testing.assert_close(first_Q, plain_Q + objectives.WRONG * wrong_Q)
    assert first_Q[wrong_Q].min() > objectives.WRONG / 2 > first_Q[~wrong_Q].max()


def test_values_are_float32_under_autocast(made: Batch) -> None:
    logits = MaxSimLogits(made.embedder, made.gallery_GD, made.gallery_labels_G)
    for objective in (
        objectives.cross_entropy(logits, made.labels_Q),
        objectives.shift(made.embedder, embed(made)),
        objectives.margin(made.embedder, made.gallery_GD, made.gallery_labels_G, made.labels_Q),
        objectives.match(made.embedder, embed(made)),
        objectives.pair_flip(made.embedder, embed(made), made.labels_Q == 0),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            assert values(objective, made).dtype == torch.float32
        part = objective.take(torch.tensor([3, 1]))
        with quiet(made.embedder), torch.no_grad():
            torch.testing.assert_close(
                part(made.images_QCHW[[3, 1]]), values(objective, made)[[3, 1]]
            )
