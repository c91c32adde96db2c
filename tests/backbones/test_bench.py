"""Backbones: FLOPs by hand, speeds, weights and their marks, published results, the choice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from flowerray.backbones import bench as backbones
from flowerray.backbones.bench import (
    BackbonesConfig,
    assess,
    count_flops,
    find_models,
    linear_probe,
    open_backbone,
    published_top1,
    read_published,
    recommend,
    time_models,
)
from flowerray.data.source import DataConfig, open_dataset
from flowerray.data.store import Store, build_store, resize_side
from flowerray.errors import UserError
from flowerray.model.embedder import Embedder, EmbedderConfig

CPU = torch.device("cpu")
TINY = BackbonesConfig(image_size=32, random_weights=True, batch_size=2, rounds=2)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("flowerray.model.weights.HUB_TIMEOUT_S", 0.01)


def store(paths: Any) -> Store:
    return build_store(paths, resize_side(32), progress=False, processes=1)


def test_flops_of_a_small_net_are_those_counted_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),  # 16 x 16 positions
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),  # each output reads one channel
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()
    by_hand = 2 * (16 * 16 * 8 * 3 * 9 + 16 * 16 * 8 * 1 * 9 + 8 * 5)
    assert count_flops(net, 32) == by_hand


def test_flops_count_attention() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=1).eval()
    tokens, dim = 5, 192  # 2 x 2 patches and the class token
    patches = 4 * 3 * 16 * 16 * dim
    layers = tokens * (dim * 3 * dim + dim * dim + 2 * dim * 4 * dim)
    attention = 2 * tokens * tokens * dim
    assert count_flops(vit, 32) == 2 * (patches + layers + attention)


def test_finds_names_and_patterns_once() -> None:
    assert find_models(["test_resnet", "test_res*"]) == ["test_resnet"]
    assert "resnet18.a1_in1k" in find_models(["resnet18.*"])


@pytest.mark.parametrize("pattern", ["no_such_*", "no_such_model", "resnet18.no_such_tag"])
def test_unknown_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(UserError, match=f"`models` '{pattern.replace('*', '.')}"):
        find_models([pattern])


def test_no_pattern_is_refused() -> None:
    with pytest.raises(UserError, match="`models` is empty"):
        find_models([])


def test_weights_are_random_only_when_asked_for() -> None:
    with pytest.raises(UserError, match="test_resnet are not in the local cache"):
        open_backbone("test_resnet", BackbonesConfig(image_size=32))
    embedder, source = open_backbone("test_resnet", TINY)
    assert source == "random"
    assert open_backbone("tf_efficientnet_lite0", TINY)[1] == "bundled"


def test_a_weight_file_comes_first(tmp_path: Path) -> None:
    other = Embedder(EmbedderConfig(backbone="test_resnet", image_size=32, weights="none"), seed=7)
    torch.save(other.backbone.state_dict(), tmp_path / "test_resnet.pth")
    config = TINY.model_copy(update={"files": tmp_path})
    embedder, source = open_backbone("test_resnet", config)
    assert source == "file"
    first, second = embedder.backbone.state_dict(), other.backbone.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in second)
    torch.save({"a": torch.zeros(1)}, tmp_path / "test_vit.pth")
    with pytest.raises(UserError, match="does not fit test_vit"):  # not random instead
        open_backbone("test_vit", config)


def test_a_row_says_size_weights_and_accuracy(small_set: Path) -> None:
    dataset = open_dataset(DataConfig(root=small_set), progress=False)
    row = assess("test_vit", dataset, store, TINY, CPU)
    model = timm.create_model("test_vit", num_classes=0)
    assert row["params"] > 0.9 * sum(p.numel() for p in model.parameters())
    assert (row["weights"], row["family"], row["gallery"]) == (
        "random",
        "vision_transformer",
        "train",
    )
    assert row["queries"] == len(dataset.splits["val"])
    for key in ("recall_at_1", "map_at_r", "linear"):
        found = row[key]
        assert 0 <= found["low"] <= found["mean"] <= found["high"] <= 1


def test_no_linear_probe_where_train_has_other_classes(small_set: Path) -> None:
    dataset = open_dataset(DataConfig(root=small_set, protocol="disjoint"), progress=False)
    row = assess("test_resnet", dataset, store, TINY, CPU)
    assert (row["linear"], row["gallery"]) == (None, "self")


def test_linear_probe_finds_separable_classes_and_ignores_scale() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([4, 9, 2], 20)
    centres = rng.normal(size=(10, 6)) * 5
    train, query = (centres[labels] + rng.normal(size=(60, 6)) for _ in range(2))
    found = linear_probe(train, labels, query, 0.1)
    assert (found == labels).mean() > 0.95
    scale = 10.0 ** np.arange(-3, 3)
    assert (linear_probe(train * scale, labels, query * scale, 0.1) == found).all()


def test_speeds_are_medians_of_interleaved_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    speeds = {"a": iter([1.0, 9.0, 2.0]), "b": iter([4.0, 4.0, 40.0])}

    def visit(name: str, config: BackbonesConfig, device: torch.device) -> dict[str, float]:
        seen.append(name)
        value = next(speeds[name])
        return {"latency_ms": value, "inference_img_s": value, "training_img_s": 10 - value / 8}

    monkeypatch.setattr(backbones, "visit", visit)
    done: list[int] = []
    found = time_models(["a", "b"], BackbonesConfig(rounds=3), CPU, done.append)
    assert seen == ["a", "b", "a", "b", "b", "a"]
    assert sum(done) == 6
    assert (found["a"]["inference_img_s"], found["b"]["inference_img_s"]) == (2, 4)
    assert (found["a"]["inference_ratio"], found["b"]["inference_ratio"]) == (0.5, 1)
    assert found["a"]["training_ratio"] == 1 > found["b"]["training_ratio"]
    assert len(found["a"]["rounds"]) == 3


def test_a_visit_measures_all_three() -> None:
    found = backbones.visit("test_convnext", TINY, CPU)
    assert set(found) == {"latency_ms", "inference_img_s", "training_img_s"}
    assert min(found.values()) > 0
    assert found["training_img_s"] < found["inference_img_s"]


def test_published_results_are_joined_by_name_tag_or_default_tag(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    file.write_text(
        "model,img_size,top1,top5\nresnet18.a1_in1k,288,73.2,91.0\nresnet18.tv_in1k,224,69.8,89.1\n"
    )
    published = read_published(file)
    assert published_top1("resnet18.tv_in1k", published) == 69.8
    assert published_top1("resnet18", published) == 73.2  # a1_in1k is timm's default
    assert published_top1("resnet50", published) is None
    assert published_top1("resnet18", {"resnet18": 69.7}) == 69.7  # a table from before tags
    file.write_text("name,top1\nresnet18,70\n")
    with pytest.raises(UserError, match="^`results` .* has no column model"):
        read_published(file)
    file.write_text("model,top1\nresnet18,seventy\n")
    with pytest.raises(UserError, match="cannot be read"):
        read_published(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_published(tmp_path / "absent.csv")


def row(name: str, recall: float, ms: float, params: float, weights: str = "hub") -> dict[str, Any]:
    return {
        "model": name, "weights": weights, "latency_ms": ms, "params": params * 1e6,
        "recall_at_1": {"mean": recall}, "map_at_r": {"mean": recall / 2},
    }  # fmt: skip


def test_recommends_the_most_accurate_within_the_budget() -> None:
    rows = [row("big", 0.9, 50, 80), row("slow", 0.8, 40, 5), row("small", 0.7, 5, 3)]
    rows.append(row("lucky", 0.99, 1, 1, "random"))
    assert recommend(rows, None, None)["model"] == "big"
    assert recommend(rows, 45, None)["model"] == "slow"
    assert recommend(rows, None, 4)["model"] == "small"
    assert recommend(rows, 5, 3)["model"] == "small"  # the budget itself is within
    nothing = recommend(rows, 4, None)
    assert nothing["model"] is None and "at most 4 ms" in nothing["why"]
    nothing = recommend(rows[3:], None, None)
    assert nothing["model"] is None and "random weights" in nothing["why"]


def test_equal_accuracy_is_decided_by_latency() -> None:
    rows = [row("slow", 0.8, 40, 5), row("fast", 0.8, 5, 30)]
    assert recommend(rows, None, None)["model"] == "fast"
