"""What a set of RUN folders holds, read and grouped: settings, variants, seeds.

A setting is what has to be equal for numbers to stand in one table: the data and their split. A
variant is everything else but the seed; runs of a variant differ in their seed alone.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowerray.description import flatten
from flowerray.errors import UserError
from flowerray.files import read_json
from flowerray.retrieval.measure import Evaluation
from flowerray.robustness.record import Attacks
from flowerray.tracking.server import ARTIFACTS
from flowerray.tracking.sync import State
from flowerray.training.run import Run
from flowerray.training.rundir import Record, RunDir

IGNORED = (
    "flowerray", "data.", "threshold", "train.seed", "resources.", "train.log_every",
    "train.checkpoint_every",
)  # fmt: skip
"""Options that make no other variant: the setting's, and those that do not change the result."""
NAMED = 3
"""Options that a variant's label names at most."""
MOST = 8
"""Variants that pictures show: of more, those that retrieve best and worst."""


Floors = tuple[str, str, int, int]
"""`StoredRun.floor` and `asked`."""


def asked(record: Mapping[str, Any]) -> tuple[str, int, int]:
    """Equal for evaluations of one setting that may stand in one table: split, number of queries,
    number of gallery images.
    """
    m = record["metrics"]
    return record["split"], int(m["num_queries"]), int(m["num_gallery"])


@dataclass(frozen=True, eq=False)
class StoredRun:
    """What one RUN folder holds; equal to itself alone, so that it can be a key."""

    folder: RunDir
    options: dict[str, Any]
    """run.json, flat: `method.margin`."""
    records: list[Record]
    """metrics.jsonl."""
    tags: dict[str, str]
    """mlflow.json: the data's facts, versions, commit."""
    status: str | None
    """FINISHED, FAILED, KILLED; None where nothing was noted."""
    evaluations: dict[str, dict[str, Any]]
    """RUN/evaluation/<split>.json by split; of older runs the metrics alone."""
    robustness: dict[str, Any] | None
    """RUN/robustness.json."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.path.name

    @property
    def finished(self) -> bool:
        """The training came to its end: there is a model."""
        return any(self.folder.path.glob("*_model_*.pth"))

    @property
    def method(self) -> str:
        """triplet, siamese, ..."""
        return str(self.options["method.name"])

    @property
    def hardening(self) -> str:
        """The kind of adversarial training; "none" for a standard run."""
        return str(self.options.get("harden.kind") or "none")

    @property
    def floor(self) -> str:
        """Names the frozen features that the run has to beat."""
        name, weights, size = (
            self.options[f"embedder.{part}"] for part in ("backbone", "weights", "image_size")
        )
        return f"{name}, {weights} weights, {size} px"

    @property
    def seed(self) -> int:
        """Of the training."""
        return int(self.options.get("train.seed", 0))

    @property
    def setting(self) -> str:
        """Equal for runs on the same data and split."""
        if found := self.tags.get("dataset/fingerprint"):
            return f"{found} {self.options.get('data.protocol')}"
        return json.dumps({k: v for k, v in self.options.items() if k.startswith("data.")})

    def series(self, name: str) -> list[tuple[int, float]]:
        """(epoch, value) of a metric; the last value of each epoch."""
        found = {r["epoch"]: r["metrics"][name] for r in self.records if name in r["metrics"]}
        return sorted(found.items())


@dataclass(frozen=True)
class Variant:
    """The seeds of one choice of method, network and options."""

    label: str
    runs: tuple[StoredRun, ...]
    """By seed."""

    @property
    def method(self) -> str:
        """triplet, siamese, ..."""
        return self.runs[0].method

    @property
    def robust(self) -> bool:
        """Trained against attacks."""
        return self.runs[0].hardening != "none"

    @property
    def recall(self) -> float | None:
        """Mean R@1 of its evaluations on test; None where there is none."""
        found = [r.evaluations["test"] for r in self.runs if "test" in r.evaluations]
        values = [record["metrics"]["recall_at_1"] for record in found]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Setting:
    """Runs whose numbers may stand in one table."""

    title: str
    variants: tuple[Variant, ...]
    frozen: dict[Floors, dict[str, Any]] = field(default_factory=dict)
    """The records of the backbones' features as they came."""
    notes: tuple[str, ...] = ()
    """What could not be had, in whole sentences."""

    @property
    def runs(self) -> list[StoredRun]:
        """All runs, a variant after the other."""
        return [run for variant in self.variants for run in variant.runs]

    @property
    def shown(self) -> list[Variant]:
        """The variants that pictures show and tests compare: the best and the worst of many."""
        ranked = sorted(self.variants, key=lambda v: -1.0 if v.recall is None else v.recall)
        if len(ranked) > MOST:
            measured = [v for v in ranked if v.recall is not None] or ranked
            ranked = [*measured[: MOST // 2], *measured[MOST // 2 :][-MOST // 2 :]]
        return [variant for variant in self.variants if variant in ranked]

    def pictured(self, pattern: str) -> Iterator[tuple[str, StoredRun, list[Path]]]:
        """Of each shown variant the first seed that has such files: its name, run and files."""
        for variant in self.shown:
            for run in variant.runs:
                if files := sorted(run.folder.path.glob(pattern)):
                    yield f"{variant.label}, seed {run.seed}", run, files
                    break


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """RUN folders among `paths`, and those at most three folders below one that is none: those of a
    comparison (OUT/runs/NAME) or a study (OUT/trials/NAME) in `runs`, too; not MLflow's copies.

    Raises:
        UserError: a path with no RUN folder.
    """
    found: list[Path] = []
    for path in paths:
        below = [path, *(f for depth in ("*/", "*/*/", "*/*/*/") for f in sorted(path.glob(depth)))]
        runs = [folder for folder in below if (folder / "run.json").exists()]
        runs = [run for run in runs if ARTIFACTS not in run.relative_to(path).parts]
        if path in runs:
            runs = [path]
        if not runs:
            raise UserError(f"{path} is no RUN folder and holds none: a RUN has a run.json.")
        found += [run for run in runs if not any(part in runs for part in run.parents)]
    return list(dict.fromkeys(path.resolve() for path in found))


def read_run(path: Path) -> StoredRun:
    """Reads a RUN folder.

    Raises:
        UserError: no RUN, or a file in it that is not what it should be.
    """
    folder = RunDir(path)
    content = folder.read()
    with suppress(UserError):  # options that its version did not have are at their defaults
        content = Run.from_dict(content).to_dict()
    options = flatten(content)
    if "method.name" not in options:
        raise UserError(f"{folder.run_json} names no method: it is not a run of this program.")
    note = State.read(folder.path)
    records = folder.records()
    evaluations = _metrics_only(records)
    for file in sorted((folder.path / "evaluation").glob("*.json")):
        evaluations[file.stem] = read_json(file, Evaluation)
    robustness = folder.path / "robustness.json"
    return StoredRun(
        folder, options, records, note.tags, note.finished, evaluations,
        read_json(robustness, Attacks) if robustness.exists() else None,
    )  # fmt: skip


def group(runs: Sequence[StoredRun]) -> list[Setting]:
    """Entries by setting, variant and seed, in the order given; standard before robust."""
    found = []
    for part in _parted(runs, lambda run: run.setting):
        kept, notes = _one_a_seed(part)
        found.append(Setting(_title(part), _variants(kept), notes=notes))
    return found


def _parted(runs: Iterable[StoredRun], by: Callable[[StoredRun], object]) -> list[list[StoredRun]]:
    """Runs that are alike, in the order in which the first of each kind comes."""
    found: dict[object, list[StoredRun]] = {}
    for run in runs:
        found.setdefault(by(run), []).append(run)
    return list(found.values())


def _one_a_seed(runs: list[StoredRun]) -> tuple[list[StoredRun], tuple[str, ...]]:
    """One run of each choice and seed, the finished, measured and newest one, and a note on the
    others: a training repeats itself exactly, so that a copy would pass for a seed and narrow the
    interval.
    """

    def rank(run: StoredRun) -> tuple[bool, int, float]:
        measured = len(run.evaluations) + bool(run.robustness)
        return run.finished, measured, run.folder.run_json.stat().st_mtime

    best = [max(alike, key=rank) for alike in _parted(runs, lambda run: (_choice(run), run.seed))]
    kept = [run for run in runs if run in best]
    if len(kept) == len(runs):
        return kept, ()
    names = ", ".join(str(run.folder.path) for run in runs if run not in kept)
    return kept, (f"Left out, since another run has the same options and seed: {names}.",)


def _variants(runs: list[StoredRun]) -> tuple[Variant, ...]:
    groups = [sorted(group, key=lambda e: e.seed) for group in _parted(runs, _choice)]
    groups.sort(key=lambda group: (group[0].method, group[0].hardening != "none"))
    labels = _labels([group[0] for group in groups])
    return tuple(
        Variant(label, tuple(group)) for label, group in zip(labels, groups, strict=True)
    )  # fmt: skip


def _choices(run: StoredRun) -> dict[str, Any]:
    """What makes the variant. Of a standard run `harden` says nothing; older ones have none."""
    ignored = (*IGNORED, "harden.") if run.hardening == "none" else IGNORED
    found = {k: v for k, v in run.options.items() if not k.startswith(ignored)}
    # The run that a training started from differs from seed to seed.
    return {**found, "init": "run" if found.get("init") else "backbone"}


def _choice(run: StoredRun) -> str:
    return json.dumps(_choices(run), sort_keys=True)


def _labels(runs: list[StoredRun]) -> list[str]:
    """Method and hardening of each, and the options in which those of one method differ."""
    labels: list[str] = []
    for run in runs:
        alike = [e for e in runs if (e.method, e.hardening) == (run.method, run.hardening)]
        choices = [_choices(e) for e in alike]
        names = dict.fromkeys(name for choice in choices for name in choice)
        differ = [n for n in names if len({json.dumps(c.get(n, "–")) for c in choices}) > 1]
        own = _choices(run)
        texts = [f"{n.rpartition('.')[2].replace('_', ' ')} {_short(own.get(n))}" for n in differ]
        if len(texts) > NAMED:
            texts = [*texts[: NAMED - 1], f"{len(texts) - NAMED + 1} more"]
        hardening = [] if run.hardening == "none" else [f"robust ({run.hardening})"]
        label = ", ".join([" ".join([run.method, *hardening]), *texts])
        taken = sum(other.partition(" (no. ")[0] == label for other in labels)
        labels.append(f"{label} (no. {taken + 1})" if taken else label)
    return labels


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _title(runs: list[StoredRun]) -> str:
    """The data in a few words."""
    options, tags = runs[0].options, runs[0].tags
    root = options.get("data.root")
    parts = [Path(root).name if root else "rendered flowers"]
    if "dataset/classes" in tags:
        images = int(tags["dataset/images"])
        parts.append(f"{tags['dataset/classes']} classes, {images:,} images")
    return f"{parts[0]}: {', '.join([*parts[1:], 'protocol ' + str(options['data.protocol'])])}"


def _metrics_only(records: list[Record]) -> dict[str, dict[str, Any]]:
    """The newest `test/...` metrics of metrics.jsonl as an evaluation without its queries."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        own = {k[5:]: v for k, v in record["metrics"].items() if k.startswith("test/")}
        if "recall_at_1" in own and "num_gallery" in own:
            found["test"] = {"metrics": own, "split": "test"}
    return found
