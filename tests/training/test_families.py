"""timm's families, by a small member of each: trained whole, and as a head, from random weights."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from flowerray.model.embedder import Embedder, EmbedderConfig
from flowerray.training.rundir import RunDir
from tests.train_process import make_run, train_small

FAMILIES = [
    "test_vit", "test_convnext", "levit_128s", "mobilenetv4_conv_small_050", "mobilevit_xxs",
]  # fmt: skip
SLOW = [
    "resnet18", "regnety_002", "efficientnet_b0", "mobilenetv3_small_050", "convnext_atto",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "maxvit_pico_rw_256",
    "hiera_tiny_224", "vit_tiny_patch16_224", "vit_wee_patch16_reg1_gap_256",
    "vit_small_patch16_dinov3", "deit3_small_patch16_224", "eva02_tiny_patch14_224",
    "beit_base_patch16_224", "fastvit_t8",
]  # fmt: skip


@pytest.mark.parametrize(
    "backbone", [*FAMILIES, *(pytest.param(b, marks=pytest.mark.slow) for b in SLOW)]
)
def test_a_family_is_trained_whole_and_as_a_head(
    backbone: str, job: dict[str, Any], tmp_path: Path
) -> None:
    config = EmbedderConfig(backbone=backbone, dim=16, image_size=32, weights="none")
    start = {f"embedder.{name}": value for name, value in Embedder(config).state_dict().items()}
    for head in (False, True):
        make_run(out := tmp_path / f"head-{head}")
        options = {"images": 16, "classes_per_batch": 4, "images_per_class": 2, "lr": 1e-3}
        options["layer_decay"] = 1.0 if head else 0.7
        more = {"backbone": backbone, "method": "center", "head": head}
        trained = train_small({**job, **more, "train": options, "out": str(out)})
        losses = [loss for _, loss in RunDir(out).series("train/loss")]
        assert len(losses) == 2 and all(map(math.isfinite, losses))
        names = [name for name, _ in trained.embedder.named_parameters(prefix="embedder")]
        state = trained.state_dict()
        assert all(state[name].isfinite().all() for name in names)
        moved = [not torch.equal(state[name], start[name]) for name in names]
        assert moved[0] and moved[-1] and len(moved) == (1 if head else len(moved))
