"""The additive decomposition is exact where the head allows it, and refused elsewhere."""

import numpy as np
import pytest
import torch

from flowerray.errors import UserError
from flowerray.explain import decompose
from flowerray.explain.decompose import ablation, contributions, pairwise, parts
from tests.explain.cases import embed, embedder, images
from tests.explain.test_layers import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_completeness(family: str) -> None:
    """To 1e-5 against the model's own cosine, or a clear refusal."""
    model, batch = embedder(family), images(3)
    reference_BD = embed(model, batch).roll(1, 0)
    if not FAMILIES[family][1]:
        with pytest.raises(UserError, match="does not average its last map"):
            contributions(model, batch, reference_BD)
        return
    cosine_B = (embed(model, batch) * reference_BD).sum(1).numpy()
    maps = contributions(model, batch, reference_BD)
    np.testing.assert_allclose(maps.sum((1, 2)), cosine_B, atol=1e-5)
    assert maps.std((1, 2)).min() > 0


def test_pairs_of_regions_sum_to_the_cosine_and_to_both_maps() -> None:
    model, batch = embedder(), images(2)
    emb_2D = embed(model, batch)
    found = parts(model, batch)
    shares = pairwise(*found.parts_BPD)
    assert shares.shape == (4, 4)
    assert shares.sum() == pytest.approx(float(emb_2D[0] @ emb_2D[1]), abs=1e-5)
    maps = contributions(model, batch, emb_2D.flip(0)).reshape(2, -1)
    np.testing.assert_allclose(shares.sum(1), maps[0], atol=1e-5)
    np.testing.assert_allclose(shares.sum(0), maps[1], atol=1e-5)


def test_ablation_is_what_setting_a_channel_to_zero_does() -> None:
    model, batch = embedder(), images(2)
    reference_BD = embed(model, batch).flip(0)
    found = ablation(model, batch, reference_BD)
    maps_BFHW = model.feature_map(batch).detach()
    cosine_B = (embed(model, batch) * reference_BD).sum(1)
    expected = torch.zeros(2, 2, 2)
    for channel in range(maps_BFHW.shape[1]):
        without = maps_BFHW.clone()
        without[:, channel] = 0
        emb_BD = torch.nn.functional.normalize(model.projection(without.mean((2, 3))), dim=1)
        drop_B = cosine_B - (emb_BD * reference_BD).sum(1)
        expected += (drop_B[:, None, None] * maps_BFHW[:, channel]).detach()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_one_reference_serves_all_images() -> None:
    model, batch = embedder(), images(2)
    one = embed(model, images(1, seed=7))
    np.testing.assert_allclose(
        contributions(model, batch, one), contributions(model, batch, one.repeat(2, 1))
    )


def test_a_map_that_is_not_quite_pooled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = embedder(), images(2)
    features = model.features
    monkeypatch.setattr(model, "features", lambda x: features(x) * 1.001)
    with pytest.raises(UserError, match="no sum over positions"):
        decompose.parts(model, batch)
