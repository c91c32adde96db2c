"""Which learning rate and which decay each parameter has."""

import pytest

from flowerray import methods
from flowerray.errors import UserError
from flowerray.methods._base import Method
from flowerray.model.embedder import Embedder, EmbedderConfig, Head
from flowerray.training.config import TrainConfig
from flowerray.training.optimizer import layer_shares, make_optimizer


def center(backbone: str) -> Method:
    config = EmbedderConfig(backbone=backbone, dim=16, image_size=32, weights="none")
    file = methods.get("center")
    return file.method(file.config(), Embedder(config), 10)


def rates(method: Method, **options: float) -> dict[str, tuple[float, float]]:
    """Peak learning rate and decay of each parameter, by name."""
    optimizer = make_optimizer(TrainConfig(lr=1e-4, weight_decay=0.1, **options), method)
    found = [
        (id(p), (g["peak_lr"], g["weight_decay"]))
        for g in optimizer.param_groups
        for p in g["params"]
    ]
    assert len(found) == len(dict(found)) == len(list(method.parameters())), "each once"
    return {name: dict(found)[id(p)] for name, p in method.named_parameters()}


def test_optimizer_groups() -> None:
    """Head and loss parameters learn faster; no decay on vectors."""
    method = center("test_efficientnet")
    parameters, found = dict(method.named_parameters()), rates(method, head_lr_factor=10)
    for name, (rate, decay) in found.items():
        of_backbone = name.startswith("embedder.backbone.")
        assert rate == pytest.approx(1e-4 if of_backbone else 1e-3), name
        assert decay == (0.1 if parameters[name].ndim > 1 else 0.0), name


def test_layers_learn_the_slower_the_earlier_they_are() -> None:
    """test_vit: its patches, then six blocks, the last with its norm; 0.5 from each to the next."""
    method = center("test_vit")
    plain, found = rates(method), rates(method, layer_decay=0.5)
    shares = {name: found[name][0] / plain[name][0] for name in plain}
    prefix = "embedder.backbone."
    for number in range(6):
        name = f"{prefix}blocks.{number}.attn.qkv.weight"
        assert shares[name] == pytest.approx(0.5 ** (5 - number)), name
    assert shares[f"{prefix}patch_embed.proj.weight"] == pytest.approx(0.5**6)
    assert shares[f"{prefix}cls_token"] == pytest.approx(0.5**6)
    assert shares[f"{prefix}norm.weight"] == 1
    assert shares["embedder.projection.weight"] == 1
    assert all(found[name][1] == plain[name][1] for name in plain)


def test_layers_that_cannot_decay_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = center("test_vit").embedder
    assert isinstance(embedder, Embedder)
    with pytest.raises(UserError, match="`embedder.train` head trains none"):
        layer_shares(Head(embedder), 0.5)
    monkeypatch.delattr(type(embedder.backbone), "group_matcher")
    with pytest.raises(UserError, match="which order test_vit has its layers"):
        layer_shares(embedder, 0.5)
