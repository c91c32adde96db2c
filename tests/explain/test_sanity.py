"""The checks pass for a map of the model and fail for one that ignores it."""

import copy

import numpy as np
import pytest
import torch

from flowerray.explain import baselines
from flowerray.explain.cam import Explainer
from flowerray.explain.faithfulness import FaithfulnessConfig
from flowerray.explain.sanity import LEVELS, cascade, randomised, sanity, spearman
from flowerray.model.embedder import Embedder
from tests.explain.cases import embed

FAST = FaithfulnessConfig(steps=2)


@pytest.fixture(scope="module")
def model() -> Embedder:
    """Trained weights: of a model of random ones nothing is lost by other random ones."""
    from flowerray.model.embedder import EmbedderConfig

    return Embedder(EmbedderConfig(image_size=96, dim=16)).eval()


def pictures(count: int) -> torch.Tensor:
    """A disc of some colour somewhere on a ground of another."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:96, :96] / 96
    found = []
    for _ in range(count):
        y, x = generator.uniform(0.25, 0.75, 2)
        disc = (rows - y) ** 2 + (columns - x) ** 2 < generator.uniform(0.02, 0.05)
        inside, outside = generator.random((2, 3))
        texture = 0.1 * generator.random((96, 96))
        found.append(np.where(disc, inside[:, None, None], outside[:, None, None]) + texture)
    return torch.from_numpy(np.stack(found)).float().clamp(0, 1)


@pytest.fixture(scope="module")
def batch() -> torch.Tensor:
    return pictures(6)


@pytest.fixture(scope="module")
def reference(model: Embedder, batch: torch.Tensor) -> torch.Tensor:
    return embed(model, batch).roll(1, 0)


def test_ours_passes(model: Embedder, batch: torch.Tensor, reference: torch.Tensor) -> None:
    found = sanity(model, Explainer("decomposition"), batch, reference, FAST)
    assert set(found) == {"randomised", "reference", "flip", "repeated", "order", "complete"}
    needed = ("randomised", "reference", "repeated", "complete", "order")
    assert all(found[name].passed for name in needed), found


def test_one_class_has_no_other_reference(
    model: Embedder, batch: torch.Tensor, reference: torch.Tensor
) -> None:
    same = reference[:1].expand(len(batch), -1)
    found = sanity(model, Explainer("decomposition"), batch, same, FAST, one_class=True)
    assert "reference" not in found and found["complete"].passed


def test_an_edge_detector_fails(
    model: Embedder, batch: torch.Tensor, reference: torch.Tensor
) -> None:
    found = sanity(model, baselines.edges, batch, reference, FAST)
    assert found["randomised"].value == pytest.approx(1) and not found["randomised"].passed
    assert found["reference"].value == 0 and not found["reference"].passed
    assert found["repeated"].passed and "complete" not in found


def test_a_map_that_changes_from_call_to_call_fails(
    model: Embedder, batch: torch.Tensor, reference: torch.Tensor
) -> None:
    rng = np.random.default_rng(0)

    def restless(_: Embedder, images_BCHW: torch.Tensor, __: torch.Tensor) -> np.ndarray:
        return rng.random((len(images_BCHW), 3, 3)).astype(np.float32)

    found = sanity(model, restless, batch, reference, FAST)
    assert not found["repeated"].passed and not found["flip"].passed


def test_randomising_goes_from_the_head_down_and_spares_the_model(model: Embedder) -> None:
    before = copy.deepcopy(model.state_dict())
    same = []
    for other in randomised(model):
        state = other.state_dict()
        same.append({name for name in before if torch.equal(before[name], state[name])})
        for name in ("projection.weight", "backbone.conv_stem.weight"):
            assert torch.equal(state[name].flatten().sort()[0], before[name].flatten().sort()[0])
    assert len(same) == LEVELS and "projection.weight" not in same[0]
    assert all(f"backbone.{n}" in same[0] for n in ("conv_head.weight", "conv_stem.weight"))
    assert "backbone.conv_head.weight" not in same[1] and "backbone.conv_stem.weight" in same[1]
    assert "backbone.conv_stem.weight" not in same[-1]
    assert all(later < earlier for earlier, later in zip(same[:-1], same[1:], strict=True))
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_the_cascade_ends_far_from_the_model(
    model: Embedder, batch: torch.Tensor, reference: torch.Tensor
) -> None:
    found = cascade(model, Explainer("layercam", "blocks.4", "held"), batch[:3], reference[:3])
    assert len(found) == LEVELS and all(-1 <= value <= 1 for value in found)
    assert found[-1] < 0.5


def test_spearman() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    one, two = rng.integers(0, 5, 30), rng.random(30)
    assert spearman(one, two) == pytest.approx(spearmanr(one, two).statistic)
    assert spearman(np.zeros(30), two) == 0
