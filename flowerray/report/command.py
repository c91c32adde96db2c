"""`report`: RUN folders in, one HTML page out."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from flowerray import files
from flowerray.data.source import open_dataset
from flowerray.description import flatten
from flowerray.errors import UserError
from flowerray.report import attacked, evidence, sections
from flowerray.report.gather import Floors, Setting, StoredRun, asked, find_runs, group, read_run
from flowerray.retrieval.command import evaluate_frozen
from flowerray.retrieval.measure import EvaluateConfig, as_record
from flowerray.show.page import Note, Page
from flowerray.text import counted
from flowerray.tracking import registry, sync
from flowerray.training import checkpoint
from flowerray.training.run import PRESETS, Run, from_preset

PAGE = "report.html"
OWN = (PAGE, "metrics.jsonl", "mlflow.json", ".mlflow.json.lock", ".mlflow.lock")
"""Files of a report's folder."""


def write_report(
    names: Sequence[str],
    out: Path,
    title: str,
    frozen: bool,
    device: torch.device,
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes the page of some runs into a folder and logs it to MLflow.

    Args:
        names: RUN folders, folders of them, `runs:/...`, `models:/...`.
        out: a new folder, or an older report's.

    Returns:
        The page's path and how much is on it.

    Raises:
        UserError: no such run, `out` holds other things, a file that cannot be read or written.
    """  # fmt: skip
    if out.exists() and (not out.is_dir() or any(f.name not in OWN for f in out.iterdir())):
        raise UserError(f"{out} exists and is no report's folder: choose another `out`.")
    files.refuse_unwritable(out)
    settings = group([read_run(path) for path in resolve(names)])
    if frozen:
        settings = [with_frozen(setting, device, quiet) for setting in settings]
    page = build(settings, title).write(out / PAGE)
    counts = {
        "runs": sum(len(setting.runs) for setting in settings),
        "variants": sum(len(setting.variants) for setting in settings),
        "settings": len(settings),
    }
    params = {"runs": [str(e.folder.path) for setting in settings for e in setting.runs]}
    metrics = {f"report/{name}": float(count) for name, count in counts.items()}
    sync.log_folder(out, params, metrics, {"flowerray.kind": "report"})
    return {"page": str(page), "bytes": page.stat().st_size, **counts}


def resolve(names: Sequence[str]) -> list[Path]:
    """RUN folders of what the user named.

    Raises:
        UserError: nothing there, or a model without its RUN folder.
    """
    paths = [registry.resolve(name) for name in names]
    for name, path in zip(names, paths, strict=True):
        if not path.is_dir():
            raise UserError(f"{name} is an exported model alone: the report needs its RUN folder.")
    return find_runs(paths)


def build(settings: Sequence[Setting], title: str) -> Page:
    """The page: a chapter a setting where there are several."""
    num_runs = sum(len(setting.runs) for setting in settings)
    one = len(settings) == 1
    on = settings[0].title if one else f"{len(settings)} data sets or splits"
    page = Page(title, f"{counted(num_runs, 'run')} on {on}. Written {date.today():%d %B %Y}.")
    for setting in settings:
        about = [Note(note) for note in setting.notes]
        if not one:
            page.chapter(setting.title)
        page.section("Summary", *about, *sections.summary_of(setting))
        page.section("Clean retrieval and verification", *sections.clean(setting))
        page.section("Under attack", *attacked.attacked(setting))
        page.section("Training curves", *sections.training(setting))
        page.section("Cost", *sections.cost(setting, parameters(setting.runs)))
        page.section("Retrieval galleries", *evidence.galleries(setting))
        page.section("Worst failures", *evidence.failures(setting))
        page.section("Explanations", *evidence.explanations(setting))
        page.section("Data", *sections.data_card(setting))
        page.section("How to reproduce", *sections.reproduce(setting, commands(setting.runs)))
    return page


def with_frozen(setting: Setting, device: torch.device, quiet: bool) -> Setting:
    """The setting with its backbones' features as they came, once for each backbone, image size,
    and kind of query: what the evaluations kept, and of older ones on test measured now.
    """
    found: dict[Floors, dict[str, Any]] = {}
    notes: list[str] = []
    for stored in setting.runs:
        for record in stored.evaluations.values():
            key = (stored.floor, *asked(record))
            if key not in found and record.get("frozen"):
                found[key] = {**record, **record["frozen"]}
            random = stored.options["embedder.weights"] == "none"
            if key in found or record["split"] != "test" or random:
                continue
            try:
                run = Run.from_dict(stored.folder.read())
                config = EvaluateConfig(gallery=record.get("gallery"))
                measured = evaluate_frozen(run.embedder, run.data, config, device, quiet)
                root = open_dataset(run.data, progress=False).root
                found[key] = as_record(measured, root, 0.0)
            except UserError as error:
                notes.append(f"Frozen features of {stored.name} could not be measured: {error}")
    return replace(setting, frozen=found, notes=(*setting.notes, *dict.fromkeys(notes)))


def parameters(runs: Sequence[StoredRun]) -> dict[StoredRun, int]:
    """Parameters of each run's exported embedder, of those that have one; one of each shape is
    opened.
    """
    counts: dict[str, int] = {}
    found = {}
    for stored in runs:
        if not stored.finished:
            continue
        shape = str({k: v for k, v in stored.options.items() if k.startswith("embedder.")})
        if shape not in counts:
            weights = checkpoint.load_export(stored.folder.path)["embedder"]
            counts[shape] = sum(
                value.numel()
                for name, value in weights.items()
                if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
            )
        found[stored] = counts[shape]
    return found


def commands(runs: Sequence[StoredRun]) -> dict[StoredRun, str]:
    """The command that trains each run again; none for a run that this version cannot read."""
    found = {}
    for stored in runs:
        try:
            run = Run.from_dict(stored.folder.read())
        except UserError:
            continue
        found[stored] = f"flowerray train {run.method_name} {' '.join(words(run))}".rstrip()
    return found


def words(run: Run) -> list[str]:
    """The options that make the run, from the preset that leaves the fewest to name."""
    own = flatten(run.to_dict())
    kinds = []
    for name, plain in PRESETS.items():
        method, network = type(run.method)(), plain(type(run.method)()).embedder
        start = flatten(
            from_preset(name, method, run.embedder.train, run.embedder.backbone).to_dict()
        )
        start |= {"embedder.train": network.train, "embedder.backbone": network.backbone}
        changed = [] if name == "laptop" else ["--preset", name]
        for option, value in own.items():
            if value != start[option]:
                changed += _option(option.replace("_", "-"), value)
        kinds.append(changed)
    return [shlex.quote(word) for word in min(kinds, key=len)]


def _option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        part, _, last = name.rpartition(".")
        last = last if value else f"no-{last}"
        return [f"--{part}.{last}" if part else f"--{last}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *map(str, values)]
