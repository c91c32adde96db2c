"""AdamW over a method's parameters: which learning rate and which decay each of them has."""

from typing import Any

import torch
from timm.models import group_parameters
from torch import nn

from flowerray.errors import UserError
from flowerray.methods._base import Method
from flowerray.model.embedder import Embedder, Head
from flowerray.training.config import TrainConfig


def make_optimizer(config: TrainConfig, method: Method) -> torch.optim.Optimizer:
    """AdamW in four groups: backbone and head (with the loss parameters), each with and without
    weight decay; with `layer_decay` the backbone's by layer.

    Raises:
        UserError: a backbone whose layers have no order, or that is not trained.
    """
    backbone = {id(p) for p in method.embedder.backbone_parameters()}
    shares = layer_shares(method.embedder, config.layer_decay)
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for parameter in method.parameters():
        if parameter.requires_grad:
            key = (id(parameter) in backbone, parameter.ndim > 1, shares.get(id(parameter), 1.0))
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "peak_lr": config.lr * (share if is_backbone else config.head_lr_factor),
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (is_backbone, decays, share), parameters in sorted(groups.items())
        ],
        lr=config.lr,
        fused=True,
    )


def layer_shares(embedder: Embedder | Head, decay: float) -> dict[int, float]:
    """The share of the learning rate of each of the backbone's parameters, by their `id`: 1 in the
    last layer, `decay` times the next layer's in each before it (Bao et al. 2022, BEiT, A.). Empty
    where all have the same.

    Raises:
        UserError: see `make_optimizer`.
    """
    if decay == 1:
        return {}
    if isinstance(embedder, Head):
        raise UserError(
            "`train.layer_decay` is of a backbone's layers, and `embedder.train` head trains none "
            "of them: leave it out."
        )
    if not hasattr(embedder.backbone, "group_matcher"):
        raise UserError(
            f"timm does not say in which order {embedder.config.backbone} has its layers: leave "
            "`train.layer_decay` out."
        )
    matcher: Any = embedder.backbone.group_matcher
    layers = group_parameters(embedder.backbone, matcher(), reverse=True)
    last = max(layers.values())
    named = embedder.backbone.named_parameters()
    return {id(parameter): decay ** (last - layers[name]) for name, parameter in named}
