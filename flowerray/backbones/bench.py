"""Backbones before any training: what each costs, and what its features know of the classes.

Letters: N training images, Q queries, F backbone features, B C H W a batch of images, M models.
"""

import csv
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from pydantic import Field
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from flowerray.config import Config
from flowerray.data.dataset import Dataset
from flowerray.errors import UserError
from flowerray.model.config import BUNDLED
from flowerray.model.embedder import Embedder, EmbedderConfig
from flowerray.model.modes import full_precision
from flowerray.retrieval.measure import BuildStore, EvaluateConfig, measure
from flowerray.statistics import mean_interval

DEFAULT_MODELS = (
    *BUNDLED,
    "mobilenetv3_large_100",
    "mobilenetv4_conv_small",
    "efficientnet_b0",
    "resnet18",
    "resnet50",
    "regnety_008",
    "convnext_nano",
    "vit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
)
"""Eight families of at most 28 million parameters."""
_CALLS = 3
"""Timed calls of a visit, after one that warms up."""


class BackbonesConfig(Config):
    """How every backbone of one table is measured."""

    image_size: int = Field(128, ge=32)
    """Side of the square input, in pixels."""
    split: Literal["val", "test"] = "val"
    """Queries, searched in train; a choice made on test is no longer tested by it."""
    linear_c: float = Field(0.1, gt=0)
    """Inverse strength of the linear probe's L2 penalty, on standardised features; fixed, so that
    no split chooses it."""
    files: Path | None = None
    """A folder of weight files (MODEL.safetensors, .pth or .pt), used before all other weights."""
    random_weights: bool = False
    """Measure a model whose weights cannot be had with random ones; it is marked and never
    recommended."""
    batch_size: int = Field(32, ge=1)
    """Images of a timed batch and of a timed training step."""
    rounds: int = Field(5, ge=1)
    """Rounds of the timing; each visits every model once, and the median counts."""


def find_models(patterns: Sequence[str]) -> list[str]:
    """timm's models of these names and patterns (`resnet*`, also with a tag), each once.

    Raises:
        UserError: a name or pattern that fits no model.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        if any(sign in pattern for sign in "*?["):
            names = timm.list_models(pattern, include_tags="." in pattern)
            if not names:
                raise UserError(
                    f"`models` {pattern!r} fits no timm model: shorten it, as in 'resnet*', and "
                    "quote it."
                )
            found |= dict.fromkeys(names)
        else:
            if not _known(pattern):
                raise UserError(
                    f"`models` {pattern!r} is no timm model: give a name such as resnet18, or a "
                    f"quoted pattern such as '{pattern[:6]}*'."
                )
            found[pattern] = None
    if not found:
        raise UserError("`models` is empty: give names or quoted patterns of timm models.")
    return list(found)


def _known(name: str) -> bool:
    try:
        return timm.is_model(name) and get_pretrained_cfg(name) is not None
    except RuntimeError:  # a tag that the model does not have
        return False


def weight_file(name: str, config: BackbonesConfig) -> Path | None:
    """A model's file in the user's folder, if there is one."""
    if config.files is None:
        return None
    given = [config.files / f"{name}{end}" for end in (".safetensors", ".pth", ".pt")]
    return next((path for path in given if path.is_file()), None)


def stamp(file: Path | None) -> list[Any] | None:
    """What tells a file of weights from another: its place, size in bytes and time of change."""
    if file is None:
        return None
    known = file.stat()
    return [str(file.absolute()), known.st_size, known.st_mtime_ns]


def open_backbone(name: str, config: BackbonesConfig) -> tuple[Embedder, str]:
    """A model with the best weights to be had, and where they are from: `file`, `bundled`, `hub`
    (or its cache), or `random`.

    Raises:
        UserError: no weights, or the model cannot be built at this image size.
    """
    file = weight_file(name, config)
    sources = {"hub": "hub"}
    if file is not None:
        sources = {"file": str(file)}
    elif name.partition(".")[0] in BUNDLED:
        sources = {"bundled": "bundled", **sources}
    if config.random_weights and file is None:
        sources["random"] = "none"
    fault = None
    for source, weights in sources.items():
        options = EmbedderConfig(backbone=name, image_size=config.image_size, weights=weights)
        try:
            return Embedder(options), source
        except UserError as error:
            fault = fault or error
    assert fault is not None
    raise fault


# ---- what it knows


def assess(
    name: str,
    dataset: Dataset,
    build_store: BuildStore,
    config: BackbonesConfig,
    device: torch.device,
) -> dict[str, Any]:
    """Size and frozen accuracy of one backbone.

    Returns:
        `model`, `family` (timm's file), `weights` (see `open_backbone`), `params`, `flops` (of one
        image; two a multiplication with addition), `features` (F), `queries`, `gallery`, and
        `recall_at_1`, `map_at_r`, `linear`: each a `mean` with the `low` and `high` of its 95 %
        interval over queries. `linear` (accuracy of `linear_probe`) is None where train
        does not hold the queries' classes.

    Raises:
        UserError: see `open_backbone` and `measure`; features that are not finite.
    """
    embedder, source = open_backbone(name, config)
    embedder.eval()
    flops = count_flops(embedder.backbone, config.image_size)
    embedder.to(device)
    found = measure(
        embedder, dataset, build_store, EvaluateConfig(split=config.split), frozen=True
    )  # fmt: skip
    counted_Q = found.per_query["num_relevant"] > 0
    row = {
        "model": name,
        "family": type(embedder.backbone).__module__.rpartition(".")[2],
        "weights": source,
        "weight_file": stamp(weight_file(name, config)),
        "params": sum(parameter.numel() for parameter in embedder.backbone.parameters()),
        "flops": flops,
        "features": embedder.num_features,
        "queries": int(counted_Q.sum()),
        "gallery": found.metrics["gallery"],
        "recall_at_1": mean_interval(found.per_query["hit"][counted_Q]).to_dict(),
        "map_at_r": mean_interval(found.per_query["average_precision"][counted_Q]).to_dict(),
        "linear": None,
    }
    if found.metrics["gallery"] == "train" and len(np.unique(found.gallery_labels)) > 1:
        right_Q = linear_probe(
            found.gallery_emb, found.gallery_labels, found.query_emb, config.linear_c
        ) == found.query_labels  # fmt: skip
        row["linear"] = mean_interval(right_Q).to_dict()
    return row


def linear_probe(
    train_NF: NDArray, train_labels_N: NDArray, query_QF: NDArray, c: float
) -> NDArray[np.int64]:
    """Classes (Q,) by a logistic regression on features standardised by train's mean and spread."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # random features may not separate
        probe.fit(train_NF.astype(np.float64), train_labels_N)
    classes_Q: NDArray[np.int64] = probe.predict(query_QF.astype(np.float64))
    return classes_Q


def count_flops(module: nn.Module, image_size: int) -> int:
    """FLOPs of convolutions, products and attention for one image, on the module's device; a
    multiplication with addition is two, and pointwise work counts nothing.
    """
    from torch.utils.flop_counter import FlopCounterMode

    device = next(module.parameters()).device
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, 3, image_size, image_size, device=device))
    return int(counter.get_total_flops())


# ---- what it costs


def time_models(
    names: Sequence[str],
    config: BackbonesConfig,
    device: torch.device,
    progress: Callable[[int], object] | None = None,
) -> dict[str, dict[str, Any]]:
    """Times models against each other, in fp32: each round visits all of them, from another start,
    so that a busy minute of the machine falls on no single one. Speed does not depend on the
    weights, which are random here.

    Args:
        progress: called with 1 after each of rounds x M visits.

    Returns:
        By model the medians over rounds `latency_ms` (one image at a time), `inference_img_s`
        (batches) and `training_img_s` (forward, backward and AdamW step on a batch); the last two
        also as `*_ratio` to the fastest here; `rounds`, the visits themselves.

    Raises:
        UserError: the device's memory does not hold a batch.
    """
    visits: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(config.rounds):
        start = number * len(names) // config.rounds
        for name in [*names[start:], *names[:start]]:
            visits[name].append(visit(name, config, device))
            if progress is not None:
                progress(1)
    speeds: dict[str, dict[str, Any]] = {
        name: {key: statistics.median(v[key] for v in seen) for key in seen[0]}
        for name, seen in visits.items()
    }
    for kind in ("inference", "training"):
        fastest = max(speed[f"{kind}_img_s"] for speed in speeds.values())
        for speed in speeds.values():
            speed[f"{kind}_ratio"] = speed[f"{kind}_img_s"] / fastest
    return {name: speed | {"rounds": visits[name]} for name, speed in speeds.items()}


@full_precision()
def visit(name: str, config: BackbonesConfig, device: torch.device) -> dict[str, float]:
    """One model's speeds now; it is built for the visit, so that memory holds one at a time."""
    size = config.image_size
    options = EmbedderConfig(backbone=name, image_size=size, weights="none")
    embedder = Embedder(options).to(device).eval()
    images_BCHW = torch.rand(config.batch_size, 3, size, size, device=device)
    optimizer = torch.optim.AdamW(embedder.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        emb_BD: Tensor = embedder(images_BCHW)
        (emb_BD @ emb_BD.T).square().mean().backward()
        optimizer.step()

    try:
        with torch.inference_mode():
            one = _seconds(lambda: embedder(images_BCHW[:1]), device)
            batch = _seconds(lambda: embedder(images_BCHW), device)
        embedder.train()
        training = _seconds(step, device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{name} cannot be timed with batches of {config.batch_size} in this GPU's memory: "
            "lower `batch_size`; what was measured so far is kept."
        ) from error
    return {
        "latency_ms": 1000 * one,
        "inference_img_s": config.batch_size / batch,
        "training_img_s": config.batch_size / training,
    }


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median of a few calls after one that warms up."""
    taken = []
    for _ in range(_CALLS + 1):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


# ---- what follows


def read_published(path: Path) -> dict[str, float]:
    """ImageNet top-1 (percent) by model, from a table as timm publishes it (results-imagenet.csv).

    Raises:
        UserError: no such file, or one without the columns `model` and `top1`.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as opened:
            table = csv.DictReader(opened)
            missing = {"model", "top1"} - set(table.fieldnames or ())
            if missing:
                raise UserError(
                    f"`results` {path} has no column {', '.join(sorted(missing))}: give timm's "
                    "results-imagenet.csv or one like it."
                )
            found: dict[str, float] = {}
            for row in table:
                found.setdefault(row["model"], float(row["top1"]))
            return found
    except (OSError, TypeError, ValueError) as error:
        raise UserError(
            f"`results` {path} cannot be read as a table of results ({error}): give timm's "
            "results-imagenet.csv."
        ) from error


def published_top1(name: str, published: dict[str, float]) -> float | None:
    """The table's entry of a model: under its own name, else with timm's default tag, else, for
    tables from before tags, without one.
    """
    plain = name.partition(".")[0]
    cfg = get_pretrained_cfg(name)
    keys = (name,) if name != plain else (name, f"{name}.{cfg.tag if cfg else ''}")
    old = () if any("." in key for key in published) else (plain,)
    return next((published[key] for key in (*keys, *old) if key in published), None)


def recommend(
    rows: Sequence[dict[str, Any]],
    max_latency_ms: float | None,
    max_params: float | None,
    split: str = "val",
) -> dict[str, Any]:
    """The model with the highest R@1 (then MAP@R, then the lowest latency) within a budget.

    Args:
        rows: as in backbones.json; those with random weights are never recommended.
        max_latency_ms: of one image alone, in milliseconds.
        max_params: in millions.
        split: whose queries were searched.

    Returns:
        `model` (None where none qualifies) and `why`, a sentence.
    """
    limits = []
    if max_latency_ms is not None:
        limits.append(f"at most {max_latency_ms:g} ms an image")
    if max_params is not None:
        limits.append(f"at most {max_params:g} M parameters")
    budget = " and ".join(["trained weights", *limits])
    trained = [row for row in rows if row["weights"] != "random"]
    within = [
        row for row in trained
        if (max_latency_ms is None or row["latency_ms"] <= max_latency_ms)
        and (max_params is None or row["params"] <= max_params * 1e6)
    ]  # fmt: skip
    best = None
    if split == "test":
        why = "A model chosen on test would not be tested any more: "
        why += "leave --split test out for a recommendation."
    elif not trained:
        why = "Every model here has random weights, and their accuracy says nothing of "
        why += "trained ones, so none is recommended."
    elif not within:
        why = f"There is no model with {budget}: raise the budget or name smaller models."
    else:
        best = max(
            within,
            key=lambda r: (r["recall_at_1"]["mean"], r["map_at_r"]["mean"], -r["latency_ms"]),
        )["model"]
        number = f"has the highest R@1 of {len(within)} models"
        why = f"It {'is the only model' if len(within) == 1 else number} with {budget}."
    return {"model": best, "why": why}
