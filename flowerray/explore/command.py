"""`explore`: reads a data set, embeds it, and writes what was found as a page, tables, pictures."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flowerray.data import folder, listing, oxford
from flowerray.data.dataset import Dataset
from flowerray.data.source import DataConfig, check_dataset, open_all, open_dataset, refuse_inside
from flowerray.errors import UserError
from flowerray.explore.chapters import build_page
from flowerray.explore.exploration import explore
from flowerray.explore.maps import MapConfig
from flowerray.explore.results import write_pictures, write_tables
from flowerray.explore.scan import take_survey
from flowerray.files import atomic_folder, refuse_unwritable, write_json, writing
from flowerray.model.embedder import Embedder, EmbedderConfig
from flowerray.opening import open_model
from flowerray.retrieval.embed import embed_crops
from flowerray.tracking import sync


def explore_dataset(
    data: DataConfig,
    out: Path,
    *,
    run: str | None = None,
    embedder: EmbedderConfig | None = None,
    maps: MapConfig | None = None,
    device: torch.device,
    quiet: bool = False,
) -> dict[str, Any]:
    """Explores a data set and logs the result to MLflow.

    Args:
        out: a new folder: index.html, explore.json, images.csv, classes.csv, duplicates.csv, PNGs.
        run: a trained model for maps, look-alikes and Recall@1; None = the frozen backbone.

    Returns:
        The content of explore.json.

    Raises:
        UserError: no such set, no readable image, `out` in use or in the set, a RUN that is none.
    """
    started = time.monotonic()
    assert data.root is not None
    refuse_inside(out, data.root)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"`out` {out} exists already: choose a new folder.")
    refuse_unwritable(out)
    maps = maps or MapConfig()
    if run is not None:
        model = open_model(run, device)
        network, title = model.embedder, f"{model.run.method_name} model {model.name}"
    else:
        network = Embedder(embedder or EmbedderConfig()).to(device)
        title = f"{network.config.backbone}, frozen, {network.image_size} px"
    dataset, note = open_for_exploring(data)

    embedding = partial(embed_crops, network, frozen=run is None)
    survey = take_survey(dataset, network.image_size, embedding, progress=not quiet)
    if (
        oxford.is_oxford(data.root)
        or listing.is_listing(data.root)
        or folder.given_parts(data.root)
        or any(folder.class_files(data.root).values())
    ):
        problems = check_dataset(data.root, not quiet, survey.examined())
    else:  # a flat folder is no set to train on, and is looked at all the same
        problems = [f"{path.name} is left out: {why}" for path, why in survey.unreadable]
    with tqdm(desc="drawing maps", unit="", disable=quiet or None) as bar:

        def progress(done: int, total: int) -> None:
            bar.set_description("comparing", refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        found = explore(survey, problems, title, maps, progress)
    facts = found.facts() | {"note": note}
    with writing(out), atomic_folder(out) as made:
        write_tables(found, made)
        charts = write_pictures(found, made)
        facts["seconds"] = round(time.monotonic() - started, 1)
        write_json(made / "explore.json", facts)
        build_page(found, facts, charts, made).write(made / "index.html")
    params = {"data": data.model_dump(mode="json"), "maps": maps.model_dump(), "model": title}
    sync.log_folder(out, params, _metrics(facts), dataset.tags | {"flowerray.kind": "explore"})
    return facts


def open_for_exploring(data: DataConfig) -> tuple[Dataset, str | None]:
    """The set with its splits, or whole where it is too small to be split; a note says so.

    Raises:
        UserError: see `open_dataset` and `open_all`.
    """
    root = data.root
    assert root is not None
    if listing.is_listing(root):
        try:
            return open_dataset(data), None
        except UserError as error:
            return open_all(root), f"The set is looked at whole, as one split, since {error}"
    drawn = not oxford.is_oxford(root) and folder.given_parts(root) is None
    if drawn and data.protocol in ("official", "trainval"):
        sizes = {name: len(files) for name, files in folder.class_files(root).items()}
        filled = sum(size > 0 for size in sizes.values())
        least = data.train_per_class + data.val_per_class + 1
        reason = None
        if filled < 2:
            reason = f"it has {filled or 'no'} class folder{'s' * (filled != 1)} of images"
        elif min(sizes.values()) < least:
            name = min(sizes, key=lambda n: (sizes[n], n))
            reason = (
                f"its smallest class, {name}, has {sizes[name]} images and a split of "
                f"{data.train_per_class} to train and {data.val_per_class} to validate needs "
                f"{least} (--train-per-class and --val-per-class change that)"
            )
        if reason is not None:
            return open_all(root), f"The set is looked at whole, as one split, since {reason}."
    return open_dataset(data), None


def _metrics(facts: dict[str, Any]) -> dict[str, float]:
    """The numbers that MLflow charts."""
    metrics = {
        "explore/images": facts["images"],
        "explore/unreadable": len(facts["unreadable"]),
        "explore/problems": len(facts["problems"]),
        "explore/seconds": facts["seconds"],
    }
    metrics |= {f"explore/{k}": v for k, v in facts["imbalance"].items()}
    metrics |= {f"explore/duplicates/{k}": v for k, v in facts["duplicates"].items()}
    recall = facts["recall_at_1"]
    if recall is not None:
        metrics["explore/recall_at_1"] = recall["every"]["mean"]
        if recall["clean"] is not None:
            metrics["explore/recall_at_1_without_duplicates"] = recall["clean"]["mean"]
    return {name: float(value) for name, value in metrics.items()}
