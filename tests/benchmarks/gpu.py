"""What a GPU makes of flowerray: training, embedding, search and attack at 224 px.

    python -m tests.benchmarks.gpu --out gpu.json

By backbone, in batches of P x 4 images and bf16 (random weights: speed does not depend on them):
`pipeline`, the training loop from decoded photographs to written checkpoints; `compute`, the same
model, loss and optimizer on one batch that lies in the device's memory, also compiled; `peer`, the
loop of peer.py (pytorch-metric-learning, timm, a DataLoader). Times are of whole windows between
two synchronisations, after a warm-up. The share of the peak counts three forward passes of FLOPs a
training step. What did not fit `--seconds` is named. The file is written after each figure;
`--quick` shows on a CPU that everything runs.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from flowerray.attacks.objectives import margin
from flowerray.attacks.pgd import PGDConfig, pgd
from flowerray.backbones.bench import count_flops
from flowerray.cluster.worker import build_method, split_store, validation
from flowerray.data.dataset import Dataset
from flowerray.data.resident import resident
from flowerray.data.source import DataConfig, open_dataset
from flowerray.data.store import build_store, resize_side
from flowerray.methods import triplet
from flowerray.model.embedder import EmbedderConfig
from flowerray.model.modes import deterministic
from flowerray.retrieval.embed import embed
from flowerray.retrieval.search import retrieval_per_query
from flowerray.training.config import TrainConfig
from flowerray.training.loop import Data, make_autocast, make_optimizer, make_sampler, train
from flowerray.training.run import Run
from flowerray.training.rundir import FolderReporter, RunDir
from tests.benchmarks.command import about

BACKBONES = {
    "ViT-S/16": "vit_small_patch16_224",
    "ConvNeXt-Tiny": "convnext_tiny",
    "ResNet-50": "resnet50",
    "lite0": "tf_efficientnet_lite0",
}
TINY = {"ViT-S/16": "test_vit", "ConvNeXt-Tiny": "test_convnext", "ResNet-50": "test_resnet",
        "lite0": "test_efficientnet"}  # fmt: skip
"""What stands for them with --quick."""
PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12,
    "L40S": 362e12,
}  # fmt: skip
"""Dense bf16 FLOP/s with sums in fp32, of NVIDIA's data sheets (which state twice that, with
sparsity, for Hopper and Ada); the first name that the card's name holds counts."""
K = 4
WARMUP = 10


class Bench:
    """The settings, the photographs, and the file that figures go to."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.quick: bool = options.quick
        name = "cuda:0" if torch.cuda.is_available() and not self.quick else "cpu"
        self.device = torch.device(name)
        self.size, self.p = (32, 4) if self.quick else (224, 32)
        self.backbones = TINY if self.quick else BACKBONES
        self.steps: int = 4 if self.quick else options.steps
        self.deadline = time.perf_counter() + options.seconds
        root = options.root or photographs(folder, self.quick)
        self.dataset = open_dataset(DataConfig(root=root))
        card = torch.cuda.get_device_name(self.device) if name != "cpu" else "CPU"
        self.peak = next((flops for part, flops in PEAKS.items() if part in card), None)
        self.content: dict[str, Any] = {
            **about(), "device": card, "image_size": self.size, "batch": self.p * K,
            "root": str(options.root or "noise"), "figures": {}, "left_out": {}, "seconds": {},
        }  # fmt: skip

    def run(self, name: str) -> Run:
        """The training of a backbone; its `epochs` are more than any window."""
        return Run(
            method=triplet.Config(miner="batch-hard"),  # the peer's
            embedder=EmbedderConfig(
                backbone=self.backbones[name], image_size=self.size, weights="none"
            ),
            train=TrainConfig(
                classes_per_batch=self.p, images_per_class=K, epochs=100,
                precision="fp32" if self.quick else "bf16",
            ),
        )  # fmt: skip

    def note(self, name: str, measure: Callable[..., Any], *args: Any, needs_s: float = 10) -> Any:
        """Measures one figure, unless the time is up, and writes the file."""
        found, left = None, self.deadline - time.perf_counter()
        begun = time.perf_counter()
        if left < needs_s:
            self.content["left_out"][name] = f"{left:.0f} s were left"
        else:
            try:
                found = self.content["figures"][name] = measure(self, *args)
            except Exception as error:  # the next figures are worth as much
                self.content["left_out"][name] = f"{type(error).__name__}: {str(error)[:300]}"
        self.content["seconds"][name] = round(time.perf_counter() - begun, 1)
        self.options.out.write_text(json.dumps(self.content, indent=2) + "\n")
        print(f"{name:<36}{told(found) or self.content['left_out'].get(name, '')}", flush=True)
        return found

    def wait(self) -> None:
        """Until the device has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def rate(self, step: Callable[[], object], images: int, steps: int | None = None) -> float:
        """Images a second."""
        for _ in range(2 if self.quick else WARMUP):
            step()
        self.wait()
        begun, steps = time.perf_counter(), steps or self.steps
        for _ in range(steps):
            step()
        self.wait()
        return steps * images / (time.perf_counter() - begun)


def told(value: Any) -> str:
    """A figure in a line."""
    return f"{value:12.3f}" if isinstance(value, float) else "" if value is None else f"  {value}"


def photographs(folder: Path, quick: bool) -> Path:
    """JPEGs of smooth noise, one folder a class: what decoding costs does not depend on flowers."""
    rng = np.random.default_rng(0)
    for c in range(8 if quick else 102):
        place = folder / "photographs" / f"{c:03d}"
        place.mkdir(parents=True)
        for n in range(22):
            coarse = rng.integers(0, 256, (16, 21, 3), dtype=np.uint8)
            side = (341, 256) if not quick else (60, 48)
            Image.fromarray(coarse).resize(side, Image.Resampling.BICUBIC).save(place / f"{n}.jpg")
    return folder / "photographs"


def targets(dataset: Dataset) -> NDArray[np.int64]:
    """Classes of the training images, from 0."""
    return np.unique(dataset.split_labels("train"), return_inverse=True)[1]


# ---- training


def pipeline(bench: Bench, run: Run, validate_too: bool = False) -> dict[str, float]:
    """The loop as it is: images a second after the warm-up, by the records' wall clock; validation
    is left out, or with `validate_too` its share of an epoch is measured.
    """
    targets_N = targets(bench.dataset)
    steps = WARMUP + bench.steps
    if validate_too:
        steps = 3 * make_sampler(run.train, targets_N).steps
    images = steps * bench.p * K
    run = run.model_copy(update={"train": run.train.model_copy(update={"images": images})})
    method = build_method(run, int(targets_N.max()) + 1)[0].to(bench.device)
    store = resident(split_store(bench.dataset, "train", bench.size), bench.device)
    validate = None
    if validate_too:
        val_store = resident(split_store(bench.dataset, "val", bench.size), bench.device)
        validate = validation(run, bench.dataset, {"train": store, "val": val_store})
    with tempfile.TemporaryDirectory(dir=bench.folder) as out:
        RunDir(Path(out) / "run").create(run.to_dict())
        reporter = FolderReporter(Path(out) / "run")
        data = Data(store, targets_N, validate)
        train(run.train, run.augment, run.harden, method, data, reporter, run.to_dict())
        records = reporter.dir.records()
    if validate_too:
        epochs = [r["metrics"] for r in records if "epoch/seconds" in r["metrics"]][1:]
        spent = [sum(e[f"epoch/{n}"] for e in epochs) for n in ("validation_seconds", "seconds")]
        return {"share_of_the_time": spent[0] / spent[1], "seconds": spent[0] / len(epochs)}
    marks = [
        (r["metrics"]["train/images"], r["time"]) for r in records if "train/images" in r["metrics"]
    ]
    first = next(mark for mark in marks if mark[0] >= (0 if bench.quick else WARMUP) * bench.p * K)
    return {"images_per_second": (marks[-1][0] - first[0]) / max(marks[-1][1] - first[1], 1e-9)}


def compute(bench: Bench, run: Run, compiled: bool = False) -> float:
    """Images a second of the same method, fed from the device's memory."""
    targets_N = targets(bench.dataset)
    method = build_method(run, int(targets_N.max()) + 1)[0].to(bench.device).train()
    if compiled:
        method.embedder.compile(backend="aot_eager" if bench.quick else "inductor")
    optimizer = make_optimizer(run.train, method)
    autocast = make_autocast(run.train.precision, bench.device)
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.rand(bench.p * K, 3, bench.size, bench.size, generator=generator)
    images_BCHW = images_BCHW.to(bench.device)
    labels_B = torch.arange(bench.p, device=bench.device).repeat_interleave(K)

    def step() -> None:
        with autocast():
            output = method(images_BCHW, labels_B)
        optimizer.zero_grad(set_to_none=True)
        output.loss.total.backward()
        nn.utils.clip_grad_norm_(method.parameters(), run.train.grad_clip)
        optimizer.step()

    return bench.rate(step, len(images_BCHW))


def deterministic_ratio(bench: Bench, run: Run) -> float:
    """Time of a step with --train.deterministic over that without."""
    plain = compute(bench, run)
    with deterministic():
        return plain / compute(bench, run)


def tuned_kernels_ratio(bench: Bench, run: Run) -> float:
    """Speed with cudnn.benchmark over that without."""
    plain = compute(bench, run)
    torch.backends.cudnn.benchmark = True
    try:
        return compute(bench, run) / plain
    finally:
        torch.backends.cudnn.benchmark = False


def peer(bench: Bench, run: Run) -> float:
    """Images a second of a careful user's own loop with other libraries."""
    from tests.benchmarks.peer import train_peer

    warmup = 2 if bench.quick else WARMUP
    marks, _ = train_peer(
        run, bench.dataset, steps_per_epoch=make_sampler(run.train, targets(bench.dataset)).steps,
        steps=warmup + bench.steps, folded=False, validate=False, device=bench.device,
        loaders=min(16, os.cpu_count() or 1),
    )  # fmt: skip
    seconds = marks[-1].seconds - marks[warmup - 1].seconds
    return (marks[-1].step - marks[warmup - 1].step) * bench.p * K / seconds


def share_of_peak(bench: Bench, run: Run, images_per_second: float) -> float | None:
    """Of the card's dense bf16 peak."""
    if bench.peak is None:
        return None
    method = build_method(run, 2)[0]
    return 3 * count_flops(method.embedder, bench.size) * images_per_second / bench.peak


# ---- what follows a training


def embedding(bench: Bench) -> dict[str, float]:
    """A folder's photographs a second: decoded once, then embedded from the store (fp32)."""
    paths = list(bench.dataset.paths)[: 64 if bench.quick else 8192]
    embedder = build_method(bench.run("lite0"), 2)[1].to(bench.device)
    side = resize_side(bench.size) + 1  # not that of the training: nothing is decoded yet
    begun = time.perf_counter()
    store = build_store(paths, side, progress=False)
    decoded = time.perf_counter()
    embed(embedder, store)
    bench.wait()
    ended = time.perf_counter()
    return {
        "photographs": float(len(paths)),
        "decoded_per_second": len(paths) / (decoded - begun),
        "embedded_per_second": len(paths) / (ended - decoded),
        "end_to_end_per_second": len(paths) / (ended - begun),
    }


def retrieval(bench: Bench) -> dict[str, float]:
    """R@K, MAP@R of all rows against each other, exactly; 100 rows a class."""
    count = 5_000 if bench.quick else 1_000_000
    generator = torch.Generator(bench.device).manual_seed(0)
    labels_N = torch.arange(count) // 100
    centres = torch.randn(count // 100, 128, device=bench.device, generator=generator)
    noise = torch.randn(count, 128, device=bench.device, generator=generator)
    emb_ND = nn.functional.normalize(centres[labels_N.to(bench.device)] + noise, dim=1)
    del noise
    bench.wait()
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    begun = time.perf_counter()
    found = retrieval_per_query(emb_ND, labels_N)
    seconds = time.perf_counter() - begun
    most = torch.cuda.max_memory_allocated(bench.device) if bench.device.type == "cuda" else 0
    return {
        "rows": float(count), "seconds": seconds, "recall_at_1": float(found["hit"].mean()),
        "map_at_r": float(found["average_precision"].mean()), "memory_gb": most / 1e9,
    }  # fmt: skip


def attack_step(bench: Bench, run: Run) -> float:
    """Attacked images times gradient steps a second: PGD on the margin, in full fp32."""
    embedder = build_method(run, 2)[1].to(bench.device).eval()
    count, steps = (8, 3) if bench.quick else (128, 10)
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.rand(count, 3, bench.size, bench.size, generator=generator).to(bench.device)
    labels_B = torch.arange(count, device=bench.device) % 8
    gallery_GD = nn.functional.normalize(torch.randn(1024, 128, generator=generator), dim=1)
    labels_G = torch.arange(1024, device=bench.device) % 8
    objective = margin(embedder, gallery_GD.to(bench.device), labels_G, labels_B)

    def call() -> Tensor:
        return pgd(objective, images_BCHW, PGDConfig(epsilon=2, steps=steps), seed=(0,)).value_B

    call()
    return bench.rate(call, count * steps, steps=1 if bench.quick else 3)


def measure(bench: Bench) -> None:
    """All figures, the most wanted ones first."""
    figures = bench.content["figures"]
    for name in BACKBONES:
        run = bench.run(name)
        split_store(bench.dataset, "train", bench.size)  # decoded before a clock runs
        whole = bench.note(f"{name}: pipeline", pipeline, run)
        alone = bench.note(f"{name}: compute", compute, run)
        other = bench.note(f"{name}: peer", peer, run, needs_s=25)
        if whole and alone:
            figures[f"{name}: pipeline / compute"] = whole["images_per_second"] / alone
            bench.note(f"{name}: share of the peak", share_of_peak, run, alone)
        if whole and other:
            figures[f"{name}: pipeline / peer"] = whole["images_per_second"] / other
    bench.note("retrieval", retrieval, needs_s=70)
    bench.note("embedding a folder", embedding, needs_s=15)
    for name in ("lite0", "ConvNeXt-Tiny"):
        bench.note(f"{name}: attack steps", attack_step, bench.run(name))
    lite0 = bench.run("lite0")
    bench.note("lite0: validation", pipeline, lite0, True)
    for name in BACKBONES:
        run = bench.run(name)
        fast = bench.note(f"{name}: compiled", compute, run, True, needs_s=45)
        if fast:
            bench.note(f"{name}: compiled, share of the peak", share_of_peak, run, fast)
    bench.note("lite0: deterministic / plain time", deterministic_ratio, lite0)
    bench.note("lite0: cudnn.benchmark / plain speed", tuned_kernels_ratio, lite0)


def main() -> None:
    """Measures, prints a line a figure, writes the JSON."""
    parser = argparse.ArgumentParser(description="training, search and attack on a GPU")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--root", type=Path, help="photographs; by default noise of 256 px")
    parser.add_argument("--steps", type=int, default=80, help="of a window, after 10 of warm-up")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for all of it")
    parser.add_argument("--quick", action="store_true", help="tiny, on the CPU: does it run?")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flowerray-gpu-") as folder:
        os.environ.setdefault("FLOWERRAY_HOME", folder)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS looks at it once
        measure(Bench(options, Path(folder)))


if __name__ == "__main__":
    main()
