"""What a hardened training is watched by: adversarial R@1 on val, and its alarms."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

import flowerray
from flowerray.cluster.driver import train_run
from flowerray.cluster.worker import split_store
from flowerray.data.dataset import Dataset
from flowerray.data.source import open_dataset
from flowerray.data.store import Store
from flowerray.model.embedder import Embedder
from flowerray.retrieval.embed import embed
from flowerray.retrieval.search import retrieval_metrics
from flowerray.robustness import guard as guarding
from flowerray.robustness.guard import alarms, guard
from flowerray.training.harden import HardenConfig
from flowerray.training.rundir import RunDir
from tests.small import small, with_hardening


@pytest.fixture(scope="module")
def flowers(small_set: Path) -> tuple[Dataset, Store, Store]:
    """The rendered set, and its train and val store at 32 px."""
    dataset = open_dataset(small(small_set).data, progress=False)
    return dataset, split_store(dataset, "train", 32), split_store(dataset, "val", 32)


def guarded(
    embedder: Embedder, flowers: tuple[Dataset, Store, Store], own: bool = False, **fields: Any
) -> dict[str, float]:
    """`guard` on val."""
    dataset, train_store, val_store = flowers
    gallery = embed(embedder, train_store), dataset.split_labels("train")
    config = HardenConfig(kind="pgd", **fields)
    emb = embed(embedder, val_store)
    labels = dataset.split_labels("val")
    return guard(config, embedder, val_store, emb, labels, None if own else gallery)


def test_adversarial_recall_starts_at_the_clean_one_and_falls(
    small_run: Path, flowers: tuple[Dataset, Store, Store]
) -> None:
    dataset, train_store, val_store = flowers
    embedder = flowerray.load(small_run)
    modes = [m.training for m in embedder.modules()]
    clean = retrieval_metrics(
        embed(embedder, val_store), dataset.split_labels("val"),
        embed(embedder, train_store), dataset.split_labels("train"),
    )["recall_at_1"]  # fmt: skip
    key = "val/adversarial_recall_at_1"
    assert guarded(embedder, flowers, val_epsilon=1e-6)[key] == pytest.approx(clean)
    strong = guarded(embedder, flowers, val_epsilon=64.0)
    assert strong[key] < 0.2 < clean
    assert guarded(embedder, flowers, val_epsilon=64.0) == strong
    assert [m.training for m in embedder.modules()] == modes
    # Searched in itself, the attacked images are not among what they search.
    assert guarded(embedder, flowers, own=True, val_epsilon=64.0)[key] < 0.2


def test_what_cannot_be_measured_is_no_number(
    small_run: Path, flowers: tuple[Dataset, Store, Store]
) -> None:
    dataset, train_store, val_store = flowers
    embedder = flowerray.load(small_run)
    emb, labels = embed(embedder, val_store), dataset.split_labels("val")
    config = HardenConfig(kind="nfgsm", val_queries=4)
    other = np.full(len(labels), 99)  # the gallery lacks every class
    found = guard(config, embedder, val_store, emb, labels, (emb, other))
    assert set(found) == {"val/mean_cosine", "val/effective_rank", "alarm/collapse"}
    found = guard(config, embedder, val_store, emb[:1], labels[:1], None)
    assert found == {} and alarms(found) == []


def test_the_collapse_alarm_fires_on_a_constant_encoder(
    small_run: Path, flowers: tuple[Dataset, Store, Store]
) -> None:
    embedder = flowerray.load(small_run)
    healthy = {"mean_cosine": 0.3, "effective_rank": 20.0}
    assert alarms({f"val/{k}": v for k, v in healthy.items()} | {"alarm/collapse": 0.0}) == []
    # Whatever comes in, nearly one point comes out.
    embedder.register_forward_hook(lambda _, inputs, emb_BD: F.normalize(1 + 1e-3 * emb_BD))
    found = guarded(embedder, flowers, val_queries=6)
    assert found["alarm/collapse"] == 1.0 and found["val/mean_cosine"] > 0.95
    assert found["val/effective_rank"] < 1.1
    assert "has collapsed (mean cosine 1.00" in alarms(found)[0]


def test_the_overfitting_alarm_compares_one_step_with_ten(
    small_run: Path, flowers: tuple[Dataset, Store, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: a model whose one-step robustness is not real."""
    embedder = flowerray.load(small_run)
    dataset, train_store, val_store = flowers
    emb, labels = embed(embedder, val_store), dataset.split_labels("val")
    gallery = embed(embedder, train_store), dataset.split_labels("train")
    config = HardenConfig(kind="nfgsm", val_queries=12, probe_queries=6)
    honest = guard(config, embedder, val_store, emb, labels, gallery)
    assert honest["val/probe"] <= honest["val/probe_single_step"] + 0.2
    assert honest["alarm/overfitting"] == 0.0

    def recall(self: Any, chosen: NDArray[np.int64], epsilon: float, steps: int) -> float:
        return 0.05 if steps else 0.9

    monkeypatch.setattr(guarding._Target, "recall", recall)
    found = guard(config, embedder, val_store, emb, labels, gallery)
    assert found["alarm/overfitting"] == 1.0
    assert "R@1 0.90 under one step, 0.05 under 10" in alarms(found | {"alarm/collapse": 0.0})[0]
    for steps, probed in ((1, True), (2, False)):  # a single step of PGD is one-step training too
        config = HardenConfig(kind="pgd", steps=steps, val_queries=12)
        found = guard(config, embedder, val_store, emb, labels, gallery)
        assert ("alarm/overfitting" in found) == probed


def test_a_hardened_model_is_more_robust_than_its_standard_twin(
    small_set: Path,
    flowers: tuple[Dataset, Store, Store],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Started from it (--init), under the same attack at 1 and 2/255; exported as robust_model."""
    standard, robust = tmp_path / "standard", tmp_path / "robust"
    train_run(small(small_set, "center", epochs=10), standard, quiet=True)
    run = small(small_set, "center", epochs=8)
    options = {"kind": "trades", "epsilon": 8.0, "val_steps": 3}
    train_run(with_hardening(run, standard, **options), robust, quiet=True)
    assert (robust / "robust_model_center_loss.pth").exists()
    assert not list(robust.glob("best_model_*"))
    records = [r["metrics"] for r in RunDir(robust).records()]
    epochs = [m for m in records if "epoch/seconds" in m]
    values = [m["val/adversarial_recall_at_1"] for m in epochs]
    assert all({"val/map_at_r", "val/recall_at_1", "alarm/collapse"} <= m.keys() for m in epochs)
    state_file = RunDir(robust).best / "state.pt"
    best = torch.load(state_file, weights_only=True)["progress"]
    merits = [(m["val/adversarial_recall_at_1"], m["val/map_at_r"]) for m in epochs]
    assert best["best"] == max(values) and best["best_epoch"] == 1 + merits.index(max(merits))

    key = "val/adversarial_recall_at_1"
    before, after = (
        [guarded(flowerray.load(run), flowers, val_epsilon=eps)[key] for eps in (1.0, 2.0)]
        for run in (standard, robust)
    )
    assert sum(after) / 2 >= sum(before) / 2 + 0.03, (before, after)
