"""`flowerray backbones`: measures timm models before any training, and says which to take."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowerray.backbones.bench import (
    BackbonesConfig,
    find_models,
    published_top1,
    read_published,
    recommend,
    stamp,
    weight_file,
)
from flowerray.backbones.pictures import plot_backbones
from flowerray.backbones.remote import assess_all, time_alone
from flowerray.data.source import DataConfig, open_dataset, refuse_inside
from flowerray.errors import UserError
from flowerray.files import atomic_file, read_json, read_kept, refuse_unwritable, write_json
from flowerray.retrieval.measure import default_gallery
from flowerray.statistics import front
from flowerray.tracking import sync

CHANGEABLE = ("random_weights", "files", "rounds", "batch_size")
"""Options that another call on the same folder may change: they touch no accuracy that is kept."""


def survey_backbones(
    patterns: Sequence[str],
    config: BackbonesConfig,
    data: DataConfig,
    out: Path,
    *,
    results: Path | None = None,
    max_latency_ms: float | None = None,
    max_params: float | None = None,
    cpus: float = 1,
    gpus: float = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measures models, draws them, and logs the result to MLflow.

    Args:
        patterns: names and patterns of timm models.
        out: backbones.json, backbones.csv, pareto.png; models/ and speeds.json hold what another
            call on the same folder takes over. Speeds are taken over only as a whole, since they
            are compared within one run.
        results: timm's published ImageNet table.
        max_latency_ms: budget of the recommendation, milliseconds for one image alone.
        max_params: budget in millions.
        cpus: cores of each model's accuracy task.
        gpus: GPUs of each; 0 = CPU.
        quiet: no progress.

    Returns:
        The content of backbones.json.

    Raises:
        UserError: no such model, data set or table; `out` holds something else; not one model
            could be measured.
    """
    names = find_models(patterns)
    published = {} if results is None else read_published(results)
    refuse_inside(out, data.root)
    dataset = open_dataset(data, progress=not quiet)
    if not len(dataset.splits.get(config.split, ())):
        raise UserError(
            f"Protocol {dataset.protocol} of {dataset.root} has no {config.split} split: choose "
            "another `data.protocol` or `split`."
        )
    options = {
        **config.model_dump(mode="json", exclude=set(CHANGEABLE)),
        "data": data.model_dump(mode="json"),
        "images": dataset.tags,
    }
    check_folder(out, options)

    def file(name: str) -> Path:
        return out / "models" / f"{name}.json"

    def holds(name: str, row: dict[str, Any]) -> bool:
        if config.files is not None:  # the user's files come before all else, and may be new
            if row.get("weight_file") != stamp(weight_file(name, config)):
                return False
        return config.random_weights or bool(row["weights"] != "random")

    kept = {n: row for n in names if (row := read_kept(file(n))) and holds(n, row)}
    skipped: dict[str, str] = {}

    def keep(row: dict[str, Any]) -> None:
        if "skipped" in row:
            skipped[row["model"]] = row["skipped"]
        else:
            write_json(out / "options.json", options)
            kept[row["model"]] = row
            write_json(file(row["model"]), row)

    todo = [name for name in names if name not in kept]
    assess_all(todo, config, data, keep, cpus=cpus, gpus=gpus, quiet=quiet)
    measured = [name for name in names if name in kept]
    if not measured:
        name = next(name for name in names if name in skipped)
        raise UserError(
            f"None of {len(names)} models could be measured ({name}: "
            f"{skipped[name].partition(': ')[0].rstrip('.')}): give weight files with `files`, or "
            "measure all the same with `random_weights`."
        )
    speeds = timed(measured, config, out, gpus, quiet)
    rows = [
        kept[name] | speeds["models"][name] | {"imagenet_top1": published_top1(name, published)}
        for name in measured
    ]
    for cost, label in (("latency_ms", "front_latency"), ("params", "front_params")):
        trained = [row for row in rows if row["weights"] != "random"]
        best = front([(row["recall_at_1"]["mean"], -row[cost]) for row in trained])
        chosen = {trained[i]["model"] for i in best}
        for row in rows:
            row[label] = row["model"] in chosen
    content = {
        "image_size": config.image_size,
        "split": config.split,
        "gallery": default_gallery(dataset, config.split),
        "protocol": dataset.protocol,
        "data": str(dataset.root),
        "linear_c": config.linear_c,
        "batch_size": config.batch_size,
        "rounds": config.rounds,
        "precision": "fp32",
        **{key: speeds[key] for key in ("device", "threads", "torch")},
        "random_weights": sum(row["weights"] == "random" for row in rows),
        "models": rows,
        "skipped": [{"model": n, "why": skipped[n]} for n in names if n in skipped],
        "budget": {"max_latency_ms": max_latency_ms, "max_params": max_params},
        "recommended": recommend(rows, max_latency_ms, max_params, config.split),
    }
    write_json(out / "backbones.json", content)
    write_table(rows, out / "backbones.csv")
    plot_backbones(content, out / "pareto.png")
    params = options | {"models": len(rows), "recommended": content["recommended"]["model"]}
    tags = dataset.tags | {"flowerray.kind": "backbones"}
    sync.log_folder(out, params, metrics(rows), tags)
    return content


def check_folder(out: Path, options: dict[str, Any]) -> None:
    """Looks whether results of these options may go there; the folder is made with the first one.

    Raises:
        UserError: it holds something else, or cannot be written.
    """
    note = out / "options.json"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not note.exists():
            raise UserError(f"`out` {out} exists and holds no table of backbones: choose another.")
        before = read_json(note)
        changed = [key for key in options if options[key] != before.get(key)]
        if changed:
            raise UserError(
                f"`out` {out} holds models measured with other options ({', '.join(changed)} "
                "differ): choose another."
            )
    refuse_unwritable(out)


def timed(
    names: Sequence[str], config: BackbonesConfig, out: Path, gpus: float, quiet: bool
) -> dict[str, Any]:
    """The speeds of these models against each other: those in `out`, if they are of exactly these
    models, rounds and batches, else measured.
    """
    file = out / "speeds.json"
    asked = {"names": sorted(names), "rounds": config.rounds, "batch_size": config.batch_size,
             "gpu": gpus > 0}  # fmt: skip
    if (known := read_kept(file)) and known.get("asked") == asked:
        return known
    speeds = time_alone(names, config, gpus, quiet) | {"asked": asked}
    write_json(file, speeds)
    return speeds


def write_table(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One line a model; a mean in its own column and its bounds beside it."""
    flat = []
    for row in rows:
        line: dict[str, Any] = {}
        for key, value in row.items():
            if key in ("recall_at_1", "map_at_r", "linear"):
                found = value or {"mean": None, "low": None, "high": None}
                line |= {key: found["mean"]}
                line |= {f"{key}_{bound}": found[bound] for bound in ("low", "high")}
            elif key != "rounds":
                line[key] = value
        flat.append(line)
    with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)


def metrics(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The numbers that MLflow charts; the accuracy of random weights under a name that says so."""
    found: dict[str, float] = {}
    for row in rows:
        mark = "random_weights/" if row["weights"] == "random" else ""
        for key in ("recall_at_1", "map_at_r", "linear"):
            if row[key] is not None:
                found[f"backbones/{mark}{row['model']}/{key}"] = row[key]["mean"]
        for key in ("params", "flops", "latency_ms", "inference_img_s", "training_img_s"):
            found[f"backbones/{row['model']}/{key}"] = float(row[key])
    return found
