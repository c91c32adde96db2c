"""Heat maps against grad-cam's own runs, and their references."""

import numpy as np
import pytest
import torch

from flowerray.errors import UserError
from flowerray.explain.cam import CAMS, Explainer, cam_maps, prototypes, upsample
from flowerray.explain.layers import Captured, capture, find_layers
from flowerray.model.embedder import Embedder, EmbedderConfig
from tests.explain.cases import embed, embedder, images


@pytest.mark.parametrize("method", [method for method in CAMS if method != "gradcam++"])
def test_maps_are_grad_cams(method: str) -> None:
    """grad-cam's own pass, up to what it does to a map afterwards (ReLU, each image's range)."""
    import pytorch_grad_cam as library

    names = {
        "gradcam": "GradCAM", "hirescam": "HiResCAM", "xgradcam": "XGradCAM",
        "layercam": "LayerCAM", "eigencam": "EigenCAM", "eigengradcam": "EigenGradCAM",
    }  # fmt: skip
    model, batch = embedder("test_resnet"), images(3)
    reference_BD = embed(model, batch).roll(1, 0)
    ours = Explainer(method, "layer3")(model, batch, reference_BD)  # type: ignore[arg-type]
    targets = [lambda emb_D, r=r: emb_D @ r for r in reference_BD]
    layer = dict(model.backbone.named_modules())["layer3"]
    with getattr(library, names[method])(model, [layer]) as cam:
        theirs = cam(batch, targets)
    shown = [_shown(m) for m in (ours, -ours)]
    close = [[np.abs(s[i] - theirs[i]).max() < 1e-3 for s in shown] for i in range(3)]
    # The sign of a principal component is arbitrary in grad-cam.
    assert all(any(c) if method.startswith("eigen") else c[0] for c in close)


def test_gradcam_plus_plus_is_equation_19_at_any_size_of_gradients() -> None:
    """grad-cam's own is it only where the squared gradients are far above its 1e-6."""
    import pytorch_grad_cam as library

    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 5, 3, 3, generator=generator)
    grads = torch.randn(2, 5, 3, 3, generator=generator)
    grads[0, 0, 1, 1] = 0
    peer = library.GradCAMPlusPlus(torch.nn.Linear(1, 1), [])
    theirs = peer.get_cam_image(None, None, None, maps.numpy(), grads.numpy(), False)
    np.testing.assert_allclose(cam_maps("gradcam++", Captured(maps, grads)), theirs, rtol=1e-3)
    small = grads.double() * 1e-5  # of the size of a cosine's
    expected = np.zeros((2, 3, 3))
    for b in range(2):
        for c in range(5):
            weight, total = 0.0, float(maps[b, c].double().sum())
            for g in small[b, c].flatten().tolist():
                alpha = g**2 / (2 * g**2 + total * g**3) if g else 0.0
                weight += alpha * max(g, 0.0)
            expected[b] += weight * maps[b, c].double().numpy()
    found = cam_maps("gradcam++", Captured(maps, small.float()))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def _shown(maps: np.ndarray) -> np.ndarray:
    import cv2

    def scaled(m: np.ndarray) -> np.ndarray:
        m = m - m.min()
        return m / (1e-7 + m.max())

    large = [cv2.resize(scaled(np.maximum(m, 0)), (64, 64)) for m in maps]
    return np.stack([scaled(m) for m in large])


def test_maps_keep_their_sign_and_size() -> None:
    """Each image's own range would make a weak map look like a strong one."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 5, 3, 3, generator=generator)
    grads = torch.randn(2, 5, 3, 3, generator=generator)
    grads[1] *= 1e-3
    found = cam_maps("hirescam", Captured(maps, grads))
    np.testing.assert_allclose(found, (maps * grads).sum(1), rtol=1e-5)
    assert found.min() < 0 and np.abs(found[0]).max() > 50 * np.abs(found[1]).max()


@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (2, 20, 3, 3)])
def test_eigencam_is_the_first_principal_component(shape: tuple[int, ...]) -> None:
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = cam_maps("eigencam", Captured(maps, torch.zeros(shape)))
    for m, one in zip(maps.double().numpy(), found, strict=True):
        rows = m.reshape(shape[1], -1).T
        rows = rows - rows.mean(0)
        _, _, directions = np.linalg.svd(rows)
        expected = (rows @ directions[0]).reshape(one.shape)
        active = np.linalg.norm(m, axis=0)
        if (expected * (active - active.mean())).sum() < 0:
            expected = -expected
        np.testing.assert_allclose(one, expected, atol=1e-5)


def test_hirescam_of_a_cosine_sums_to_zero_where_the_head_is_additive() -> None:
    """A cosine does not change with the length of the embedding (Euler): so the gradient times the
    map cancels, and only with the length held does the map add up to the cosine.
    """
    model, batch = embedder(), images(2)
    reference_BD = embed(model, batch).flip(0)
    cosine_B = (embed(model, batch) * reference_BD).sum(1).numpy()
    free = Explainer("hirescam", "bn2", "free")(model, batch, reference_BD)
    held = Explainer("hirescam", "bn2", "held")(model, batch, reference_BD)
    np.testing.assert_allclose(free.sum((1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(held.sum((1, 2)), cosine_B, atol=1e-5)


def test_a_map_leaves_a_model_in_training_mode_as_it_was() -> None:
    config = EmbedderConfig(
        backbone="test_resnet", weights="none", image_size=32, dim=16, freeze_bn=False
    )
    model = Embedder(config, 0).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    reference = torch.nn.functional.normalize(torch.rand(2, model.dim), dim=1)
    layer = find_layers(model)[0].name
    Explainer("gradcam", layer)(model, images(2, 32), reference)
    assert model.training
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_an_image_is_not_explained_by_itself() -> None:
    model, batch = embedder(), images(2)
    with pytest.raises(UserError, match="cannot be explained by itself"):
        Explainer("gradcam", "bn2")(model, batch, embed(model, batch))


def test_each_image_needs_its_reference() -> None:
    """grad-cam would give the images without one an empty map."""
    model, batch = embedder(), images(3)
    with pytest.raises(UserError, match="3 images and 2 references"):
        Explainer("gradcam", "bn2")(model, batch, embed(model, batch)[:2])
    with pytest.raises(UserError, match="no method 'cam'"):
        cam_maps("cam", Captured(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)))


def test_a_batch_changes_nothing() -> None:
    model, batch = embedder(), images(3)
    reference_BD = embed(model, batch).roll(1, 0)
    explainer = Explainer("layercam", "blocks.2", "held")
    alone = [explainer(model, batch[i : i + 1], reference_BD[i : i + 1])[0] for i in range(3)]
    np.testing.assert_allclose(explainer(model, batch, reference_BD), alone, atol=1e-6)


def test_prototypes_leave_the_image_out() -> None:
    rng = np.random.default_rng(0)
    gallery = rng.normal(size=(5, 4))
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    labels = np.array([0, 0, 1, 0, 1])
    found = prototypes(gallery, labels, [0, 1, 0], [1, None, None])
    for row, members in zip(found, ([0, 3], [2, 4], [0, 1, 3]), strict=True):
        mean = gallery[members].mean(0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), rtol=1e-5)
    with pytest.raises(UserError, match="Class 1 has no image"):
        prototypes(gallery[:3], labels[:3], [1], [2])


def test_captured_gradients_need_no_batch_of_targets() -> None:
    model, batch = embedder(), images(2)
    one = embed(model, images(1, seed=5))
    (both,) = capture(model, batch, ["bn2"], one)
    (first,) = capture(model, batch[:1], ["bn2"], one)
    assert both is not None and first is not None
    torch.testing.assert_close(both.grads_BCHW[:1], first.grads_BCHW, rtol=1e-4, atol=1e-8)


def test_upsample_keeps_the_mean() -> None:
    maps = np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float32)
    large = upsample(maps, 32)
    assert large.shape == (2, 32, 32) and large.min() >= maps.min() and large.max() <= maps.max()
    centres = large.reshape(2, 4, 8, 4, 8)[:, :, 3:5, :, 3:5].mean((2, 4))
    assert np.corrcoef(centres.ravel(), maps.ravel())[0, 1] > 0.99
