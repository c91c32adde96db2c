"""Which layer a map comes from, over timm's families, and that nothing is left on the model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from flowerray.errors import UserError
from flowerray.explain import layers
from flowerray.explain.cam import CAMS, Explainer
from flowerray.explain.layers import capture, find_layers
from tests.explain.cases import embed, embedder, images

FAMILIES = {
    "test_efficientnet": ("bn2", True),
    "test_resnet": ("layer4", True),
    "test_convnext": ("stages.3", False),
    "test_vit": ("blocks.5.norm1", False),  # class token
    "test_vit4": ("norm", False),  # mean of the tokens, then a norm
    "regnetx_002": ("final_conv", True),
    "swin_tiny_patch4_window7_224": ("norm", True),  # channels last
    "deit_tiny_distilled_patch16_224": ("blocks.11.norm1", False),  # two prefix tokens
    "pvt_v2_b0": ("stages.3", True),
    "mobilenetv3_small_050": ("blocks.5", False),  # a convolution after pooling
    "xcit_nano_12_p16_224": ("blocks.11.norm1", False),  # no grid_size
}
"""timm model: its default layer, and whether its head is additive."""


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_a_map(family: str) -> None:
    model, batch = embedder(family), images(2)
    found = find_layers(model)
    assert found[0].name == FAMILIES[family][0]
    reference_BD = embed(model, batch).flip(0)
    for name in CAMS:
        maps = Explainer(name, found[0].name, "held")(model, batch, reference_BD)
        assert maps.shape == (2, *found[0].grid) and np.isfinite(maps).all()
        assert all(np.abs(m).max() > 0 for m in maps), name


def test_layers_behind_the_last_attention_of_a_class_token_are_refused() -> None:
    model = embedder("test_vit")
    names = [layer.name for layer in find_layers(model)]
    assert "norm" in layers.candidates(model.backbone) and "norm" not in names
    assert "blocks.5" in layers.candidates(model.backbone) and "blocks.5" not in names


def test_a_backbone_without_any_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedder()
    monkeypatch.setattr(layers, "candidates", lambda backbone: ["global_pool"])
    with pytest.raises(UserError, match=r"no layer with a map .* \(tried: global_pool\)"):
        find_layers(model)


def test_captured_maps_are_what_the_layer_gives_and_its_gradient() -> None:
    """Also behind in-place activations: the gradient predicts what a small change does."""
    model, batch = embedder(), images(2)
    model.double()
    batch = batch.double()
    reference_BD = embed(model, batch).flip(0)
    for name in ("bn2", "blocks.2"):
        (found,) = capture(model, batch, [name], reference_BD)
        assert found is not None
        step = 1e-8 * torch.randn(found.maps_BCHW.shape, generator=torch.Generator().manual_seed(1))
        module = dict(model.backbone.named_modules())[name]
        seen: list[torch.Tensor] = []

        def change(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
            seen.append(output.clone())  # noqa: B023 (called within this turn of the loop)
            return output + step  # noqa: B023

        handle = module.register_forward_hook(change)
        moved = (embed(model, batch) * reference_BD).sum(1)
        handle.remove()
        torch.testing.assert_close(found.maps_BCHW, seen[0].float())
        plain = (embed(model, batch) * reference_BD).sum(1)
        expected = (found.grads_BCHW * step).sum((1, 2, 3)).double()
        torch.testing.assert_close(moved - plain, expected, rtol=1e-3, atol=1e-11)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_nothing_is_left_behind(frozen: bool, around: type) -> None:
    model, batch = embedder(), images(2)
    model.train()
    dict(model.backbone.named_modules())["bn1"].train()  # a mode of its own
    if frozen:
        model.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    with around():
        reference_BD = model(batch).flip(0)
        maps = Explainer("gradcam", "bn2")(model, batch, reference_BD)
    assert np.abs(maps).max() > 0
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_also_after_an_error() -> None:
    model, batch = embedder(), images(2)
    model.train()

    with pytest.raises(RuntimeError, match="size of tensor"):
        capture(model, batch, ["bn2"], torch.zeros(3, 5))
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_what_is_no_map() -> None:
    backbone = embedder().backbone
    assert layers.to_map(backbone, torch.zeros(2, 8)) is None
    assert layers.to_map(backbone, [torch.zeros(2, 8, 3, 3)]) is None
    assert layers.to_map(backbone, torch.zeros(2, 17, 8)) is None
    # NesT and VOLO keep channels last and do not say so.
    assert layers.to_map(backbone, torch.zeros(2, 7, 7, 12)) is None
    hiera = SimpleNamespace(tokens_spatial_shape_final=[2, 2])  # unrolled before the last stage
    assert layers.to_map(hiera, torch.zeros(2, 16, 8)) is None  # type: ignore[arg-type]
    assert layers.to_map(hiera, torch.zeros(2, 4, 8)) is not None  # type: ignore[arg-type]
    vit = embedder("test_vit").backbone
    tokens = torch.arange(2 * 17 * 4.0).view(2, 17, 4)
    found = layers.to_map(vit, tokens)
    assert found is not None and found.shape == (2, 4, 4, 4)
    assert torch.equal(found[1, :, 2, 3], tokens[1, 1 + 2 * 4 + 3])
