"""Features of views: what they are of, how they are kept, which one a step takes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flowerray.data.augment import AugmentConfig, augment, draw
from flowerray.data.batches import Batch
from flowerray.data.store import Store
from flowerray.model.embedder import Embedder, EmbedderConfig
from flowerray.retrieval.embed import kept_embeddings
from flowerray.retrieval.views import VIEW_SEED, Views, kept_views

SIZE = 32


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder(EmbedderConfig(backbone="test_efficientnet", weights="none", image_size=SIZE))


@pytest.fixture(scope="module")
def store(job: dict[str, str]) -> Store:
    return Store(Path(job["store"]))


def test_each_view_is_that_of_its_own_numbers(embedder: Embedder, store: Store) -> None:
    config, before = AugmentConfig(), {k: v.clone() for k, v in embedder.state_dict().items()}
    embedder.train()
    features_NVF = kept_views(embedder, store, config, 3)
    assert features_NVF.shape == (len(store), 4, embedder.num_features) and embedder.training
    assert all(torch.equal(before[k], v) for k, v in embedder.state_dict().items())
    np.testing.assert_array_equal(features_NVF[:, 0], kept_embeddings(embedder, store, frozen=True))
    embedder.eval()
    for image, view in ((0, 0), (17, 2), (49, 1)):
        pixels, sizes = store.padded([image])
        row = draw(VIEW_SEED, view, 0, len(store))[image : image + 1]
        with torch.no_grad():
            found = F.normalize(embedder.features(augment(pixels, sizes, row, SIZE, config)))
        np.testing.assert_allclose(features_NVF[image, view + 1], found[0], atol=2e-6)
    flat = features_NVF[:, 1:].reshape(len(store), -1)
    assert len(np.unique(flat[:, 0])) == len(store), "every image has views of its own"
    assert np.abs(features_NVF[:, 1] - features_NVF[:, 2]).max() > 1e-3


def test_what_is_kept_is_taken_again_and_only_for_the_same(
    embedder: Embedder, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = kept_views(embedder, store, AugmentConfig(), 2)
    asked: list[int] = []

    def count(images: torch.Tensor) -> torch.Tensor:
        asked.append(len(images))
        return Embedder.features(embedder, images)

    monkeypatch.setattr(embedder, "features", count)
    done: list[int] = []
    np.testing.assert_array_equal(
        kept_views(embedder, store, AugmentConfig(), 2, progress=done.append), first
    )
    assert not asked and sum(done) == 3 * len(store)
    other = Embedder(embedder.config, seed=1)  # another random backbone
    monkeypatch.setattr(other, "features", count)
    for model, config, views in (
        (embedder, AugmentConfig(area_min=0.5), 2),
        (embedder, AugmentConfig(), 1),
        (other, AugmentConfig(), 2),
    ):
        asked.clear()
        kept_views(model, store, config, views)
        assert sum(asked) == (1 + views) * len(store)


def test_a_step_takes_the_view_that_is_drawn() -> None:
    rng = np.random.default_rng(0)
    features_NVF = rng.random((6, 4, 5), dtype=np.float32)
    features_NVF.flags.writeable = False  # as Ray's store gives them
    views = Views(features_NVF)

    def taken(images: list[int], uniforms_bU: torch.Tensor) -> torch.Tensor:
        indices_b, sizes_b2 = views.padded(np.array(images))
        assert sizes_b2.shape == (len(images), 2)
        return views.view(Batch(0, indices_b, sizes_b2, indices_b, uniforms_bU))

    three = taken([5, 0, 3], torch.tensor([[0.0, 0.9], [0.51, 0.1], [0.9999, 0.3]]))
    for row, (image, view) in enumerate(((5, 0), (0, 2), (3, 3))):
        np.testing.assert_array_equal(three[row], features_NVF[image, view])
    many = taken([5] * 400, torch.from_numpy(rng.random((400, 2))))
    shares = [(many.numpy() == features_NVF[5, v]).all(1).mean() for v in range(4)]
    assert all(0.15 < share < 0.35 for share in shares)
