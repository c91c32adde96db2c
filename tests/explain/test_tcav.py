"""Concepts by examples: found where they matter, not where they do not."""

from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowerray.errors import UserError
from flowerray.explain.layers import Layer
from flowerray.explain.tcav import ConceptScore, TcavConfig, measure, measure_random, p_value, tcav
from flowerray.model.embedder import Embedder


class RedIsAll(nn.Module):
    """Embeds the mean of the red channel against a constant; green and blue go nowhere."""

    dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False))
        self.backbone[0].weight.data = torch.eye(3).view(3, 3, 1, 1)
        self.projection = nn.Linear(3, 2)
        self.projection.weight.data = torch.tensor([[1.0, 0, 0], [0, 0, 0]])
        self.projection.bias.data = torch.tensor([0.0, 1.0])

    def forward(self, images_BCHW: Tensor) -> Tensor:
        raw_BD = self.projection(self.backbone(images_BCHW).mean((2, 3)))
        return nn.functional.normalize(raw_BD, dim=1)


def colours(count: int, seed: int, **raised: int) -> Tensor:
    """Random colours, one channel raised."""
    found = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    found = 0.4 * found + 0.3 * torch.rand(
        count, 3, 1, 1, generator=torch.Generator().manual_seed(seed + 100)
    )
    for channel in raised.values():
        found[:, channel] += 0.5
    return found.clamp(0, 1)


def scores(level: float = 0.05) -> dict[str, ConceptScore]:
    model = cast(Embedder, RedIsAll())
    concepts = {"red": colours(12, 1, up=0), "anything": colours(12, 3)}
    batch = colours(20, 4)
    reference = torch.nn.functional.normalize(torch.tensor([[1.0, 0.2]]), dim=1).expand(20, -1)
    config = TcavConfig(random_concepts=99, repetitions=3, level=level)
    found = tcav(
        model, Layer("0", 3, (4, 4)), concepts, colours(60, 5), batch, reference, config
    )  # fmt: skip
    return {score.name: score for score in found}


def test_a_concept_that_matters_is_found_and_a_random_one_is_not() -> None:
    found = scores()
    red, anything = found["red"], found["anything"]
    assert red.score == 1 and red.significant and red.accuracy > 0.9
    assert 0.1 < red.random < 0.9 and red.p_value < 0.05
    assert not anything.significant and anything.p_value > 0.05


def test_it_is_seeded() -> None:
    assert scores() == scores()


def test_a_random_concept_is_seldom_called_one() -> None:
    """At 5 %, of 60 concepts that are random themselves at most 8 are significant (all but 1 in 200
    times); Welch's test over repetitions calls more than half of them so.
    """
    rng = np.random.default_rng(0)
    slopes_BC, config = rng.normal(size=(20, 32)), TcavConfig(random_concepts=39, repetitions=1)
    found = []
    for _ in range(60):
        pool_NC, own_NC = rng.normal(size=(60, 32)), rng.normal(size=(12, 32))
        chance_R2 = measure_random(12, pool_NC, slopes_BC, config, rng)
        alignment = measure(own_NC, pool_NC, slopes_BC, config, rng)[1]
        found.append(p_value(alignment, chance_R2[:, 1]))
    assert sum(p <= 0.05 for p in found) <= 8
    assert 0.3 < np.mean(found) < 0.75


def test_the_p_value_counts_those_as_far_away() -> None:
    assert p_value(1.0, np.array([0.5, 0.4, 0.6])) == 0.25
    assert p_value(0.5, np.array([0.5, 0.5, 0.5])) == 1.0
    assert p_value(0.0, np.array([0.5, 1.0, 0.5])) == 0.5


def test_too_few_images() -> None:
    model, batch, layer = cast(Embedder, RedIsAll()), colours(2, 0), Layer("0", 3, (4, 4))
    ones, config = torch.ones(2, 2), TcavConfig()
    with pytest.raises(UserError, match="dots has 3 images: give at least four"):
        tcav(model, layer, {"dots": colours(3, 0)}, batch, batch, ones, config)
    with pytest.raises(UserError, match="7 random images are too few"):
        tcav(model, layer, {"dots": colours(4, 0)}, colours(7, 0), batch, ones, config)
    few = TcavConfig(random_concepts=19, repetitions=1)
    (found,) = tcav(model, layer, {"dots": colours(40, 0)}, colours(8, 0), batch, ones, few)
    assert 0 <= found.score <= 1, "of a large concept as many images as there are random ones"
