"""One dictionary of concepts for many images, and what removing one does."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowerray.errors import UserError
from flowerray.explain.concepts import (
    Concepts,
    ConceptsConfig,
    concept_maps,
    fit_concepts,
    from_last_map,
    last_map,
    shared,
    without_each,
)
from flowerray.model.embedder import Embedder
from tests.explain.cases import embed, embedder, images

CONFIG = ConceptsConfig(count=4, images=20, crops=2)


class Memory:
    """Images in memory as a store."""

    def __init__(self, images_NCHW: Tensor) -> None:
        self.images = (images_NCHW * 255).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def centre(self, indices: NDArray[np.int64], size: int) -> Tensor:
        assert size == self.images.shape[-1]
        return self.images[torch.from_numpy(np.asarray(indices))]


@pytest.fixture(scope="module")
def model() -> Embedder:
    return embedder("test_resnet")


@pytest.fixture(scope="module")
def concepts(model: Embedder) -> Concepts:
    return fit_concepts(model, Memory(images(24)), CONFIG)


def test_concepts_hold_the_maps(concepts: Concepts, model: Embedder) -> None:
    assert concepts.basis_KF.shape == (4, 96) and concepts.basis_KF.min() >= 0
    np.testing.assert_allclose(np.linalg.norm(concepts.basis_KF, axis=1), 1, rtol=1e-4)
    assert 0.5 < concepts.explained <= 1
    assert concepts.crops_KMPP3.shape == (4, 2, 64, 64, 3)
    maps = last_map(model, images(24))
    coef = concept_maps(concepts, maps)
    again = np.einsum("bkhw,kf->bfhw", coef, concepts.basis_KF)
    error = np.square(maps.numpy() - again).sum() / np.square(maps.numpy()).sum()
    assert 1 - error == pytest.approx(concepts.explained, abs=0.05)


def test_the_fit_is_seeded_and_its_subset_too(model: Embedder, concepts: Concepts) -> None:
    again = fit_concepts(model, Memory(images(24)), CONFIG)
    np.testing.assert_allclose(again.basis_KF, concepts.basis_KF, atol=1e-6)
    other = fit_concepts(model, Memory(images(24)), CONFIG.model_copy(update={"seed": 1}))
    assert not np.allclose(other.basis_KF, concepts.basis_KF)


def test_crops_show_the_images_with_most_of_a_concept() -> None:
    """On a map of 8 x 8 cells a crop is less than the image, and around the cell."""
    from flowerray.explain.concepts import _crops

    pixels = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    coef = np.random.default_rng(0).random((5, 8, 8))
    coef[3, 6, 1], coef[1, 0, 7] = 9, 5
    store = Memory(pixels)
    found = _crops(store, np.arange(5), coef, 64, 2)
    assert found.shape == (2, 20, 20, 3)
    best = store.images[3].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found[0], best[42:62, 2:22])
    corner = store.images[1].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found[1], corner[0:20, 44:64])


@pytest.mark.parametrize(
    "family", ["test_resnet", "test_efficientnet", "swin_tiny_patch4_window7_224", "test_convnext"]
)
def test_the_map_goes_through_the_models_own_head(family: str) -> None:
    from flowerray.explain.layers import to_map

    tested, batch = embedder(family), images(2)
    with torch.no_grad():
        maps = to_map(tested.backbone, tested.feature_map(batch))
    assert maps is not None
    torch.testing.assert_close(from_last_map(tested, maps), embed(tested, batch))


def test_a_concept_is_taken_out_of_the_last_map(model: Embedder, concepts: Concepts) -> None:
    maps = last_map(model, images(3, seed=9))
    coef = concept_maps(concepts, maps)
    found = without_each(model, concepts, maps, coef)
    for k in range(4):
        part = np.einsum("bhw,f->bfhw", coef[:, k], concepts.basis_KF[k])
        left = (maps - torch.from_numpy(part)).clamp_min(0)
        raw = model.projection(left.mean((2, 3))).detach()
        torch.testing.assert_close(found[k], torch.nn.functional.normalize(raw, dim=1))
    assert float((found - from_last_map(model, maps)).abs().max()) > 1e-3


def test_what_a_pair_shares(model: Embedder, concepts: Concepts) -> None:
    pair = images(2, seed=5)
    found = shared(model, concepts, pair)
    assert found.coef_2KHW.shape == (2, 4, 2, 2)
    np.testing.assert_allclose(found.shares.sum(1), 1)
    without = without_each(model, concepts, last_map(model, pair), found.coef_2KHW)
    emb_2D = embed(model, pair)
    for k in range(4):
        drop = emb_2D[0] @ emb_2D[1] - without[k, 0] @ without[k, 1]
        assert found.drop_K[k] == pytest.approx(float(drop), abs=1e-5)


@pytest.mark.parametrize(
    ("family", "message"),
    [("test_convnext", "negative to a good part"), ("test_vit", "no last map that its head pools")],
)
def test_maps_that_have_no_parts(family: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        last_map(embedder(family), images(2))


def test_more_concepts_than_positions(model: Embedder) -> None:
    with pytest.raises(UserError, match="20 concepts cannot be told apart in 8 positions"):
        fit_concepts(model, Memory(images(2)), ConceptsConfig(count=20))
