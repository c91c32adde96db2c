"""MaxSimLogits is the 1-NN decision, on clean images, adversarial ones and ties."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowerray.attacks import logits as module
from flowerray.attacks.logits import TEMPERATURE, MaxSimLogits, refuse_own_images
from flowerray.attacks.objectives import cross_entropy
from flowerray.attacks.pgd import PGDConfig, pgd, quiet
from flowerray.errors import UserError
from flowerray.retrieval.search import nearest
from tests.attacks.batch import Linear, batch, tiny


class Given(nn.Module):
    """The images are the embeddings."""

    def forward(self, emb_BD: Tensor) -> Tensor:
        return emb_BD


def one_nn(query_QD: Tensor, gallery_GD: Tensor, labels_G: Tensor) -> Tensor:
    found_Q = nearest(query_QD.numpy(), gallery_GD.numpy(), k=1)[:, 0]
    return labels_G[torch.from_numpy(found_Q)]


@pytest.mark.parametrize("seed", range(3))
def test_arg_max_is_the_nearest_neighbour_with_ties(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gallery_GD = F.normalize(torch.randn(40, 3, generator=generator), dim=1)
    # Each item twice, in an order of its own: every decision is a tie, often between classes.
    twice = torch.cat([torch.randperm(40, generator=generator) for _ in range(2)])
    gallery_GD = gallery_GD[twice]
    labels_G = 7 * torch.randint(5, (80,), generator=generator) - 3
    query_QD = F.normalize(torch.randn(300, 3, generator=generator), dim=1)
    query_QD[:40] = gallery_GD[:40]
    logits = MaxSimLogits(Given(), gallery_GD, labels_G)
    logits_QC = logits(query_QD)
    assert logits_QC.dtype == torch.float32 and logits.classes_C.tolist() == [-3, 4, 11, 18, 25]
    expected_Q = one_nn(query_QD, gallery_GD, labels_G)
    assert torch.equal(logits.classes_C[logits_QC.argmax(1)], expected_Q)
    assert torch.equal(logits.places(expected_Q), logits_QC.argmax(1))
    # The plain maximum of float32 products decides some ties otherwise.
    plain_QG = query_QD @ gallery_GD.T
    plain_QC = torch.stack(
        [plain_QG[:, labels_G == c].amax(1) for c in logits.classes_C.tolist()], dim=1
    )
    assert not torch.equal(logits.classes_C[plain_QC.argmax(1)], expected_Q)
    # And the logits are the cosines times the temperature.
    torch.testing.assert_close(logits_QC, TEMPERATURE * plain_QC, atol=1e-4, rtol=0)


def test_near_ties_that_float32_logits_cannot_tell_apart() -> None:
    query_QD = torch.tensor([[1.0, 0.0]])
    angles_G = torch.tensor([0.1 + 3e-8, 0.1, 0.7])
    gallery_GD = torch.stack([angles_G.cos(), angles_G.sin()], dim=1)
    labels_G = torch.tensor([0, 1, 2])
    logits_QC = MaxSimLogits(Given(), gallery_GD, labels_G)(query_QD)
    assert logits_QC[0, 0] != logits_QC[0, 1]
    assert logits_QC.argmax(1) == one_nn(query_QD, gallery_GD, labels_G)


def test_arg_max_is_the_nearest_neighbour_after_an_attack() -> None:
    made = batch(tiny(), side=32)
    logits = MaxSimLogits(made.embedder, made.gallery_GD, made.gallery_labels_G)
    objective = cross_entropy(logits, logits.places(made.labels_Q))
    for epsilon in (0.0, 1.0, 8.0):
        config = PGDConfig(epsilon=epsilon, steps=4)
        images = pgd(objective, made.images_QCHW, config).images_BCHW
        with quiet(logits), torch.inference_mode():
            decision_Q = logits.classes_C[logits(images).argmax(1)]
        assert torch.equal(decision_Q == made.labels_Q, made.right(images))


def test_classes_of_unequal_size_by_hand() -> None:
    gallery_GD = torch.eye(4)
    logits = MaxSimLogits(Given(), gallery_GD, torch.tensor([2, 0, 2, 2]), temperature=2.0)
    query = torch.tensor([[0.1, 0.5, -0.2, 0.7]], requires_grad=True)
    logits_BC = logits(query)
    torch.testing.assert_close(logits_BC, torch.tensor([[1.0, 1.4]]))
    logits_BC.sum().backward()
    assert query.grad is not None
    torch.testing.assert_close(query.grad, torch.tensor([[0.0, 2.0, 0.0, 2.0]]))


def test_one_large_class_does_not_fill_the_memory() -> None:
    """The tables grow with the gallery, not with classes x the largest class."""
    gallery_GD = F.normalize(torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)))
    labels_G = torch.cat([torch.arange(300), torch.full((700,), 300)])
    logits = MaxSimLogits(Given(), gallery_GD, labels_G)
    held = sum(buffer.numel() * buffer.element_size() for buffer in logits.buffers())
    assert held <= 4 * gallery_GD.numel() * gallery_GD.element_size()
    expected_Q = one_nn(gallery_GD[::7] + 0.01, gallery_GD, labels_G)
    assert torch.equal(logits.classes_C[logits(gallery_GD[::7] + 0.01).argmax(1)], expected_Q)


def test_double_embedders_keep_their_precision() -> None:
    made = batch(Linear(), side=8)
    embedder = Linear().double().eval()
    gallery_GD = embedder(made.images_QCHW.double()).detach()
    logits = MaxSimLogits(embedder, gallery_GD, made.labels_Q)
    assert logits(made.images_QCHW.double()).dtype == torch.float64


@pytest.mark.parametrize(("temperature", "masked"), [(TEMPERATURE, False), (1000.0, True)])
def test_share_of_gradients_that_are_exactly_zero(temperature: float, masked: bool) -> None:
    made = batch(Linear(), side=8, queries=64)
    logits = MaxSimLogits(made.embedder, made.gallery_GD, made.gallery_labels_G, temperature)
    with quiet(logits):
        images = made.images_QCHW.clone().requires_grad_()
        value_B = cross_entropy(logits, logits.places(made.labels_Q))(images)
        grad = torch.autograd.grad(value_B.sum(), images)[0]
    zero = float((grad == 0).all(dim=(1, 2, 3)).float().mean())
    assert zero > 0.5 if masked else zero < 0.01
    # And what it leads to: the same attack no longer succeeds.
    objective = cross_entropy(logits, logits.places(made.labels_Q), wrong_first=True)
    config = PGDConfig(epsilon=16, steps=10, random_start=False)
    recall = made.recall(pgd(objective, made.images_QCHW, config).images_BCHW)
    assert recall > 0.5 if masked else recall < 0.1


def test_what_a_gallery_must_hold() -> None:
    gallery_GD = torch.eye(4)
    with pytest.raises(UserError, match="single class"):
        MaxSimLogits(Given(), gallery_GD, torch.zeros(4, dtype=torch.int64))
    logits = MaxSimLogits(Given(), gallery_GD, torch.tensor([1, 1, 5, 5]))
    for missing in (0, 3, 9):
        with pytest.raises(UserError, match=f"no image of class {missing}"):
            logits.places(torch.tensor([1, missing]))


@pytest.mark.parametrize("block", [1, 2**24])
def test_queries_in_the_gallery_are_refused(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    rng = np.random.default_rng(0)
    emb = F.normalize(torch.from_numpy(rng.normal(size=(30, 8))).float(), dim=1)
    with pytest.raises(UserError, match="10 of 10 attacked images are in the gallery"):
        refuse_own_images(emb[:10], emb)
    refuse_own_images(emb[:10], emb[10:])
    refuse_own_images(torch.cat([emb[:10], emb[15:16]]), emb[10:])  # one double photograph
    refuse_own_images(emb[:1].expand(10, 8), emb[:1].expand(30, 8))  # a collapsed model


def test_a_large_gallery_ranks_by_distance_and_equal_distances_by_index() -> None:
    """The last of a million items is nearer by less than ties once took from it."""
    angle_G = torch.full((1_000_000,), 1.0)
    labels_G = torch.zeros(len(angle_G), dtype=torch.int64)
    angle_G[5], angle_G[-1], labels_G[-1] = 3e-4, 1e-5, 1
    gallery_GD = torch.stack([angle_G.cos(), angle_G.sin()], 1)
    logits = MaxSimLogits(nn.Flatten(), gallery_GD, labels_G)
    query = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    assert logits(query).argmax() == 1
    assert nearest(query.flatten(1), gallery_GD, k=1).item() == len(angle_G) - 1
    gallery_GD[5] = gallery_GD[-1]
    assert MaxSimLogits(nn.Flatten(), gallery_GD, labels_G)(query).argmax() == 0
    with pytest.raises(UserError, match="holds 1,000,001 items"):
        MaxSimLogits(nn.Flatten(), gallery_GD[[*range(1), *range(1_000_000)]], labels_G)
