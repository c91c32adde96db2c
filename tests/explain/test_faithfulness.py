"""Rankings, curves and ROAD's imputation against slow references."""

import numpy as np
import pytest
import torch
from scipy.sparse import lil_matrix
from scipy.sparse.linalg import spsolve

from flowerray.errors import UserError
from flowerray.explain.faithfulness import (
    FaithfulnessConfig,
    blurred,
    faithfulness,
    impute,
    ranking,
)
from tests.explain.cases import embed, embedder, images


@pytest.mark.parametrize(
    ("road", "said"), [((), "at least 1 item"), ((0.2, 1.5), "less than 1"), ((0.0,), "greater")]
)
def test_shares_that_cannot_be_removed(road: tuple[float, ...], said: str) -> None:
    with pytest.raises(UserError, match=rf"^`road.*{said}"):
        FaithfulnessConfig(road=road)


def test_ties_are_broken_at_random_and_alike_each_time() -> None:
    """A map that is 96 % zero: a percentile would take all of it at once."""
    map_HW = np.zeros((20, 20))
    map_HW[3, 4:20] = np.arange(16, 0, -1)
    order = ranking(map_HW, seed=1)
    assert sorted(order) == list(range(400)) and list(order[:16]) == list(range(64, 80))
    rows = order[16:100] // 20
    assert len(set(rows)) > 15, "ties in the order of memory would fill the first rows"
    assert np.array_equal(order, ranking(map_HW, seed=1))
    assert not np.array_equal(order, ranking(map_HW, seed=2))


def exact(image_CHW: np.ndarray, hole_HW: np.ndarray) -> np.ndarray:
    """The same linear system, pixel by pixel."""
    channels, height, width = image_CHW.shape
    index = {(y, x): n for n, (y, x) in enumerate(zip(*np.nonzero(hole_HW), strict=True))}
    system, right = lil_matrix((len(index), len(index))), np.zeros((len(index), channels))
    for (y, x), n in index.items():
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                there = (y + dy, x + dx)
                inside = 0 <= there[0] < height and 0 <= there[1] < width
                if (dy, dx) == (0, 0) or not inside:
                    continue
                weight = 1 / 6 if dy == 0 or dx == 0 else 1 / 12
                system[n, n] += weight
                if there in index:
                    system[n, index[there]] -= weight
                else:
                    right[n] += weight * image_CHW[:, there[0], there[1]]
    filled = image_CHW.copy()
    filled[:, hole_HW] = spsolve(system.tocsr(), right).reshape(len(index), channels).T
    return filled


def test_imputation_solves_roads_system() -> None:
    rng = np.random.default_rng(0)
    image = images(1, 24)[0]
    holes = np.stack([rng.random((24, 24)) < 0.3, np.zeros((24, 24), bool)])
    holes[1, 4:20, 0:18] = True  # a large one at the border
    found = impute(image, torch.from_numpy(holes), noise=0.0)
    for filled, hole in zip(found, holes, strict=True):
        np.testing.assert_allclose(filled, exact(image.double().numpy(), hole), atol=2e-3)


def test_imputation_is_seeded_and_leaves_known_pixels() -> None:
    image, hole = images(1, 16)[0], torch.rand(1, 16, 16) < 0.5
    one, two = (impute(image, hole, 0.02, seed=3) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, impute(image, hole, 0.02, seed=4))
    assert torch.equal(one[0][:, ~hole[0]], image[:, ~hole[0]])
    assert 0 <= one.min() and one.max() <= 1
    everything = impute(image, torch.ones(1, 16, 16, dtype=torch.bool), 0.0)
    assert everything.isfinite().all()


def test_blur_keeps_the_mean_colour_and_no_shape() -> None:
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    image[0] *= 0.2
    soft = blurred(image)
    torch.testing.assert_close(soft.mean((1, 2)), image.mean((1, 2)), rtol=0, atol=0.02)
    assert soft[1].std() < 0.15 * image[1].std()


class Patch(torch.nn.Module):
    """A model that looks at one corner only: the right explanation is known."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        size = images_BCHW.shape[-1] // 4
        corner_B = images_BCHW[:, :, :size, :size].mean((1, 2, 3))
        return torch.nn.functional.normalize(torch.stack([corner_B, 0.6 - corner_B], 1), dim=1)


def test_the_right_map_scores_better_than_the_wrong_one() -> None:
    model = Patch()
    image = torch.full((3, 32, 32), 0.1)
    image[:, :8, :8] = 0.9
    reference_D = embed(model, image[None])[0]  # type: ignore[arg-type]
    right, wrong = np.zeros((32, 32)), np.zeros((32, 32))
    right[:8, :8], wrong[16:, 16:] = 1, 1
    good, bad = faithfulness(
        model, image, reference_D, np.stack([right, wrong]), FaithfulnessConfig()  # type: ignore[arg-type]
    )  # fmt: skip
    assert good.deletion < bad.deletion - 0.05 and good.insertion > bad.insertion
    assert good.road_morf > bad.road_morf + 0.1 and good.road_lerf < bad.road_lerf
    assert good.road_morf > good.road_lerf + 0.3


def test_scores_are_those_of_a_plain_loop() -> None:
    model, image = embedder(), images(1)[0]
    reference_D = embed(model, images(1, seed=4))[0]
    map_HW = np.random.default_rng(0).random((64, 64))
    config = FaithfulnessConfig(steps=4)
    (found,) = faithfulness(model, image, reference_D, map_HW[None], config)
    order = np.argsort(-map_HW.ravel())
    deleted, inserted = [], []
    grey, soft = model.mean[0].expand_as(image), blurred(image)
    for share in (0, 0.25, 0.5, 0.75, 1):
        first = np.zeros(64 * 64, bool)
        first[order[: round(share * 64 * 64)]] = True
        mask = torch.from_numpy(first.reshape(64, 64))
        deleted.append(float(embed(model, torch.where(mask, grey, image)[None])[0] @ reference_D))
        inserted.append(float(embed(model, torch.where(mask, image, soft)[None])[0] @ reference_D))
    for curve, value in ((deleted, found.deletion), (inserted, found.insertion)):
        area = sum((a + b) / 2 / 4 for a, b in zip(curve[:-1], curve[1:], strict=True))
        assert value == pytest.approx(area, abs=1e-5)
    assert found == faithfulness(model, image, reference_D, map_HW[None], config)[0]


def test_without_road_the_other_scores_are_the_same() -> None:
    model, batch = embedder("test_resnet"), images(2)
    reference, maps = embed(model, batch[1:])[0], np.random.default_rng(0).random((2, 64, 64))
    config = FaithfulnessConfig(steps=3)
    whole = faithfulness(model, batch[0], reference, maps, config)
    short = faithfulness(model, batch[0], reference, maps, config, road=False)
    for one, two in zip(whole, short, strict=True):
        assert (one.deletion, one.insertion) == pytest.approx((two.deletion, two.insertion))
        assert np.isfinite(one.road_morf) and np.isnan([two.road_morf, two.road_lerf]).all()
