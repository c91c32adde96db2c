"""`flowerray compare`: the methods under one budget, on the same queries, over seeds.

Letters: N training images.
"""

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flowerray.cluster.driver import check_run
from flowerray.cluster.session import require_gpus
from flowerray.cluster.tasks import DivergedTrainingsError, train_many
from flowerray.cluster.watch import Watcher
from flowerray.cluster.worker import pick_device
from flowerray.comparison.pictures import (
    METRICS,
    comparison_table,
    pairs_of,
    plot_comparison,
    rows_of,
)
from flowerray.comparison.plan import CompareConfig, PlannedRun, plan
from flowerray.data.dataset import Dataset
from flowerray.data.source import open_dataset, refuse_inside
from flowerray.description import VERSION, flatten
from flowerray.errors import UserError
from flowerray.files import (
    only_driver,
    read_json,
    read_kept,
    refuse_existing,
    write_json,
    writing,
)
from flowerray.opening import open_model
from flowerray.retrieval.command import evaluate_frozen, keep, run_measure
from flowerray.retrieval.measure import EvaluateConfig, Evaluation, as_record
from flowerray.tracking import sync
from flowerray.training.run import Run
from flowerray.training.rundir import RunDir

ELSEWHERE = ("cpus", "gpus")
"""Where trainings run; it does not change the comparison, so a resume may change it."""


def compare(
    config: CompareConfig, out: Path, resume: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Trains every row over the seeds and protocols, measures all on test, and tests the
    differences.

    Writes `out`/compare.json, compare.png, compare.txt, a RUN for each training below `out`/runs,
    and one MLflow run under which the trainings are shown. What is there is not made again.

    Args:
        resume: `out` holds a comparison that was interrupted; otherwise it must not exist.
        quiet: no progress.

    Returns:
        The content of compare.json.

    Raises:
        UserError: options or studies that do not make one budget, or cannot train; trainings that
            failed, named.
        KeyboardInterrupt: the user's; `resume` goes on.
    """
    refuse_inside(out, config.data.root)
    entries, trials, notes = plan(config)
    if resume:
        entries = as_begun(entries, out, notes)
    require_gpus(config.gpus)
    for entry in entries:
        if entry.run.train.seed == entries[0].run.train.seed:
            check_run(entry.run, quiet)  # what is wrong with a row is wrong with all its seeds
    open_folder(config, out, resume)
    params = config.model_dump(mode="json")
    with (
        only_driver(out),
        Watcher(quiet, line=None, bar=False) as watcher,
        watcher.running(RunDir(out), params, {}),
    ):
        entries, costs, lost = train(config, out, entries, quiet)
        content = {
            "flowerray": VERSION,
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "budget": {
                "backbone": config.embedder.backbone,
                "image_size": config.embedder.image_size,
                "dim": config.embedder.dim,
                "images": config.images,
                "seeds": config.seeds,
                "trials": trials,
            },
            "protocols": {
                protocol: protocol_results(config, protocol, entries, costs, out, quiet)
                for protocol in config.protocols
            },
            "notes": notes + lost,
        }
        write_json(out / "compare.json", content)
        (out / "compare.txt").write_text(comparison_table(content) + "\n")
        plot_comparison(content, out / "compare.png")
        sync.log_folder(out, params, means(content))
    return content


def as_begun(entries: Sequence[PlannedRun], out: Path, notes: list[str]) -> list[PlannedRun]:
    """The entries of a comparison that 0.1.0 began: its trainings were of whole epochs."""
    epochs: dict[tuple[str, str], int] = {}
    for entry in entries:
        folder = RunDir(out / "runs" / entry.name)
        if folder.run_json.exists():
            begun = Run.from_dict(folder.read()).train
            if not begun.images:
                epochs[entry.protocol, entry.row] = begun.epochs
    if not epochs:
        return list(entries)
    notes.append("begun by 0.1.0: trained for whole epochs, so that rows drew nearly equally many.")
    found = []
    for entry in entries:
        number = epochs.get((entry.protocol, entry.row), max(epochs.values()))
        train = entry.run.train.model_copy(update={"images": 0, "epochs": number})
        found.append(replace(entry, run=entry.run.model_copy(update={"train": train})))
    return found


def train(
    config: CompareConfig, out: Path, entries: Sequence[PlannedRun], quiet: bool
) -> tuple[list[PlannedRun], list[dict[str, Any]], list[str]]:
    """Trains what is missing. Where a training diverges its seed is left out for every row, so that
    all are compared over the same seeds.

    Returns:
        The entries to compare, what each cost, and notes on the seeds that are left out.

    Raises:
        UserError: a training failed, other than by diverging; no seed is left.
    """

    def go(entries: Sequence[PlannedRun], quiet: bool) -> list[dict[str, Any]]:
        runs = [(entry.run, out / "runs" / entry.name) for entry in entries]
        return train_many(runs, cpus=config.cpus, gpus=config.gpus, quiet=quiet, parent=out)

    try:
        return list(entries), go(entries, quiet), []
    except DivergedTrainingsError as error:
        diverged = [entry for entry in entries if out / "runs" / entry.name in error.reasons]
        lost = {(entry.protocol, entry.run.train.seed) for entry in diverged}
        kept = [entry for entry in entries if (entry.protocol, entry.run.train.seed) not in lost]
        if {entry.protocol for entry in kept} != set(config.protocols):
            raise
    notes = [
        f"{entry.protocol}: seed {entry.run.train.seed} is left out for every row, since the "
        f"training of {entry.row} diverged."
        for entry in diverged
    ]
    return kept, go(kept, quiet=True), notes


def open_folder(config: CompareConfig, out: Path, resume: bool) -> None:
    """Makes the folder, or checks that it holds the same comparison."""
    options = out / "options.json"
    stored = config.model_dump(mode="json")
    if not resume:
        refuse_existing(out)
        with writing(out):
            write_json(options, stored)
        return
    a, b = flatten(read_options(out).model_dump(mode="json")), flatten(stored)
    names = (a.keys() | b.keys()) - set(ELSEWHERE)
    changed = sorted(name for name in names if a.get(name) != b.get(name))
    if changed:
        raise UserError(
            f"{out} cannot be resumed with other options: {', '.join(changed)} differ from its "
            "options.json."
        )


def read_options(out: Path) -> CompareConfig:
    """The options of a comparison that is there.

    Raises:
        UserError: no comparison in this folder.
    """
    missing = f"{out} holds no comparison to resume: it has no options.json."
    return CompareConfig(**read_json(out / "options.json", missing=missing))


def protocol_results(
    config: CompareConfig,
    protocol: str,
    entries: Sequence[PlannedRun],
    costs: Sequence[dict[str, Any]],
    out: Path,
    quiet: bool,
) -> dict[str, Any]:
    """Rows and pairs of one protocol."""
    data = config.data.model_copy(update={"protocol": protocol})
    dataset = open_dataset(data, progress=not quiet)
    device = pick_device("cuda" if config.gpus and torch.cuda.is_available() else "cpu")
    floor = out / f"frozen-{protocol}.json"
    if (frozen := read_kept(floor, Evaluation)) is None:
        began = time.perf_counter()
        measurement = evaluate_frozen(config.embedder, data, EvaluateConfig(), device, quiet)
        frozen = as_record(measurement, dataset.root, time.perf_counter() - began)
        write_json(floor, frozen)
    records: dict[str, list[dict[str, Any]]] = {"frozen": [frozen]}
    costs_of: dict[str, list[dict[str, Any]]] = {}
    for entry, cost in zip(entries, costs, strict=True):
        if entry.protocol == protocol:
            found = record_of(out / "runs" / entry.name, dataset, frozen, device, quiet)
            records.setdefault(entry.row, []).append(found)
            costs_of.setdefault(entry.row, []).append(cost)

    return {
        "queries": frozen["metrics"]["num_queries"],
        "gallery": frozen["gallery"],
        "rows": rows_of(records, costs_of),
        "pairs": pairs_of(records, quiet),
    }


def record_of(
    folder: Path, dataset: Dataset, like: dict[str, Any], device: torch.device, quiet: bool
) -> dict[str, Any]:
    """A RUN's evaluation on test, of the same queries and gallery as `like`; made, and noted in the
    RUN and in MLflow, where it is not there.
    """
    file = folder / "evaluation" / "test.json"
    if (found := read_kept(file, Evaluation)) is not None:
        if all(found.get(key) == like[key] for key in ("gallery", "queries")):
            return found
    model = open_model(str(folder), device)
    model.own_dataset(quiet)
    began = time.perf_counter()
    measurement = run_measure(model.embedder, dataset, EvaluateConfig(), quiet)
    keep(model, measurement, dataset.root, time.perf_counter() - began)
    return read_json(file)


def means(content: dict[str, Any]) -> dict[str, float]:
    """For MLflow: `official/triplet/recall_at_1` and so on."""
    return {
        f"{protocol}/{row}/{metric}": values[metric]["mean"]
        for protocol, found in content["protocols"].items()
        for row, values in found["rows"].items()
        for metric in METRICS
    }
