"""The peers of the pipeline benchmark: plain loops as a careful user of pytorch-metric-learning and
timm, or of timm alone, would write them.

Letters: N training images, B images of a batch, C H W an image, D embedding dimensions.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms as tv

from flowerray.cluster.worker import split_store
from flowerray.data.dataset import Dataset
from flowerray.model.embedder import Embedder
from flowerray.retrieval.embed import embed
from flowerray.retrieval.measure import validation_metrics
from flowerray.training.loop import Schedule
from flowerray.training.run import Run

LOADERS = 2
"""Processes of the DataLoader."""


class Mark(NamedTuple):
    """How far a training is."""

    step: int
    seconds: float
    """Of training so far: no validation, no start-up."""


class Epoch(NamedTuple):
    """A validation; `seconds` as in `Mark`."""

    epoch: int
    seconds: float
    images: int
    recall_at_1: float
    map_at_r: float


def race(found: dict[str, list[Epoch]], peer: str, metric: str) -> dict[str, Any]:
    """When each side is where a peer ends; shares are of the peer's seconds."""
    target = getattr(found[peer][-1], metric)
    reached = {side: reach(epochs, metric, target) for side, epochs in found.items()}
    theirs = reached[peer]
    assert theirs is not None
    return {
        "peer": peer,
        "metric": metric,
        "target": target,
        "reached": {
            side: epoch and epoch._asdict() | {"share": epoch.seconds / theirs.seconds}
            for side, epoch in reached.items()
        },
    }


def reach(epochs: list[Epoch], metric: str, target: float) -> Epoch | None:
    """The first epoch at or above the target, or None."""
    return next((epoch for epoch in epochs if getattr(epoch, metric) >= target), None)


class Clock:
    """Seconds since it was made, less those of its pauses."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.marks: list[Mark] = []

    def mark(self, step: int) -> None:
        """Notes a finished step."""
        self.marks.append(Mark(step, time.perf_counter() - self.start))

    def skip(self, seconds: float) -> None:
        """Takes a pause of so many seconds, just ended, out of the account."""
        self.start += seconds


def targets(dataset: Dataset) -> NDArray[np.int64]:
    """Classes of the training images, counted from 0."""
    return np.unique(dataset.split_labels("train"), return_inverse=True)[1]


class Photographs(torch.utils.data.Dataset):
    """Labelled JPEG files."""

    def __init__(
        self, paths: Sequence[Path], labels_N: NDArray[np.int64], transform: Callable[..., Tensor]
    ) -> None:
        self.paths, self.labels_N, self.transform = paths, labels_N, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[i]) as image:
            return self.transform(image.convert("RGB")), int(self.labels_N[i])


class PlainModel(nn.Module):
    """timm's model and a projection, from the weights that `embedder` starts with."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        options: dict[str, Any] = {"num_classes": 0}
        cfg = timm.get_pretrained_cfg(embedder.config.backbone)
        if cfg is not None and cfg.fixed_input_size:
            options["img_size"] = embedder.image_size
        self.backbone = timm.create_model(embedder.config.backbone, **options)
        self.backbone.load_state_dict(embedder.backbone.state_dict())
        self.backbone.to(memory_format=torch.channels_last)
        self.projection = nn.Linear(embedder.num_features, embedder.dim, bias=False)
        self.projection.load_state_dict(embedder.projection.state_dict())

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Embeddings, which the loss normalises."""
        return self.projection(self.backbone(images_BCHW))


def transforms(run: Run, normalise: Embedder | None) -> Callable[..., Tensor]:
    """flowerray's augmentation in torchvision; on Pillow images v1 is its fastest variant."""
    a = run.augment
    steps = [
        tv.RandomResizedCrop(
            run.embedder.image_size, scale=(a.area_min, 1.0), ratio=(1 / a.aspect, a.aspect)
        ),
        tv.RandomHorizontalFlip(a.flip_probability),
        tv.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue),
        tv.ToTensor(),
    ]
    if normalise:
        steps.append(
            tv.Normalize(normalise.mean.flatten().tolist(), normalise.std.flatten().tolist())
        )
    grey = 0.0 if normalise else 0.5
    steps.append(
        tv.RandomErasing(a.erase_probability, (0.02, a.erase_area), ratio=(0.5, 2.0), value=grey)
    )
    return tv.Compose(steps)


def train_peer(
    run: Run,
    dataset: Dataset,
    *,
    steps_per_epoch: int,
    steps: int,
    folded: bool,
    validate: bool,
    cross_entropy: bool = False,
    device: torch.device | None = None,
    loaders: int = LOADERS,
) -> tuple[list[Mark], list[Epoch]]:
    """Trains for `steps` steps.

    Args:
        steps_per_epoch: flowerray's, so that the schedules are equal.
        folded: flowerray's model in place of timm's.
        validate: after each epoch, outside the clock.
        cross_entropy: of a linear classifier on the embedding, from shuffled images, in place of
            pytorch-metric-learning's triplet loss, miner and sampler.
        device: by default the CPU; bf16 is autocast there.
        loaders: processes of the DataLoader.
    """
    device = device or torch.device("cpu")
    bf16 = run.train.precision == "bf16"
    torch.manual_seed(run.train.seed)
    np.random.seed(run.train.seed)  # the sampler's
    config = run.train
    embedder = Embedder(run.embedder, seed=config.seed)
    model = embedder if folded else PlainModel(embedder)
    model.to(device).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()

    batch = config.classes_per_batch * config.images_per_class
    paths, targets_N = [dataset.paths[i] for i in dataset.splits["train"]], targets(dataset)
    photographs = Photographs(paths, targets_N, transforms(run, None if folded else embedder))
    sampler: torch.utils.data.Sampler = MPerClassSampler(
        targets_N, config.images_per_class, batch, length_before_new_iter=steps_per_epoch * batch
    )
    if cross_entropy:
        sampler = torch.utils.data.RandomSampler(photographs, num_samples=steps_per_epoch * batch)
    loader = DataLoader(
        photographs,
        batch_size=batch,
        sampler=sampler,
        num_workers=loaders,
        pin_memory=device.type == "cuda",
        persistent_workers=True,
    )
    criterion, miner = TripletMarginLoss(margin=0.2), BatchHardMiner()
    classifier = nn.Linear(embedder.dim, int(targets_N.max()) + 1).to(device)

    def loss_of(emb_BD: Tensor, labels_B: Tensor) -> Tensor:
        if cross_entropy:
            return F.cross_entropy(classifier(emb_BD), labels_B)
        return criterion(emb_BD, labels_B, miner(emb_BD, labels_B))

    optimizer = torch.optim.AdamW(
        [
            {"params": model.backbone.parameters(), "lr": config.lr},
            {
                "params": [*model.projection.parameters(), *classifier.parameters()],
                "lr": config.lr * config.head_lr_factor,
            },
        ],
        weight_decay=config.weight_decay,
    )
    schedule = Schedule(config.epochs * steps_per_epoch, steps_per_epoch)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)

    clock: Clock | None = None
    epochs: list[Epoch] = []
    step = 0
    while step < steps:
        for images_BCHW, labels_B in loader:
            clock = clock or Clock()  # the first batch has come: the loaders have started
            images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
            images_BCHW = images_BCHW.to(device, non_blocking=True)
            labels_B = labels_B.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                emb_BD = model(images_BCHW).float()
            loss = loss_of(emb_BD, labels_B)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            scheduler.step()
            step += 1
            if step == steps and device.type == "cuda":
                torch.cuda.synchronize(device)
            clock.mark(step)
            if step == steps:
                break
        assert clock is not None
        if validate:
            start = time.perf_counter()
            quality = validated(model, embedder, dataset)
            clock.skip(time.perf_counter() - start)
            epochs.append(Epoch(len(epochs) + 1, clock.marks[-1].seconds, step * batch, *quality))
    assert clock is not None
    return clock.marks, epochs


def validated(model: nn.Module, embedder: Embedder, dataset: Dataset) -> tuple[float, float]:
    """R@1 and MAP@R of a peer's model by flowerray's validation: `embedder` takes its weights."""
    embedder.load_state_dict(model.state_dict())
    labels = {split: dataset.split_labels(split) for split in ("train", "val")}
    emb = {
        split: embed(embedder, split_store(dataset, split, embedder.image_size)) for split in labels
    }
    found = validation_metrics(emb["val"], labels["val"], (emb["train"], labels["train"]))
    return found["val/recall_at_1"], found["val/map_at_r"]
