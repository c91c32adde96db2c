"""What a set of RUN folders holds, read and grouped: settings, variants, seeds.

A setting is what has to be equal for numbers to stand in one table: the data and their split. A
variant is everything else but the seed; runs of a variant differ in their seed alone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowerray.description import flatten
from flowerray.errors import UserError
from flowerray.tracking.server import ARTIFACTS
from flowerray.tracking.sync import State
from flowerray.training.rundir import RunDir

IGNORED = (
    "flowerray", "data.", "threshold", "train.seed", "resources.", "train.log_every",
    "train.checkpoint_every",
)  # fmt: skip
"""Options that make no other variant: the setting's, and those that do not change the result."""
SHOWN = 3
"""Options that a variant's label names at most."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One RUN folder; equal to itself alone, so that it can be a key."""

    folder: RunDir
    options: dict[str, Any]
    """run.json, flat: `method.margin`."""
    records: list[dict[str, Any]]
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
        """Names the frozen features that the run has to beat: backbone and image size."""
        return f"{self.options['embedder.backbone']}, {self.options['embedder.image_size']} px"

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
    entries: tuple[Entry, ...]
    """By seed."""

    @property
    def method(self) -> str:
        """triplet, siamese, ..."""
        return self.entries[0].method

    @property
    def robust(self) -> bool:
        """Trained against attacks."""
        return self.entries[0].hardening != "none"


@dataclass(frozen=True)
class Setting:
    """Runs whose numbers may stand in one table."""

    title: str
    variants: tuple[Variant, ...]
    frozen: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`Entry.floor` -> the record of the backbone's features as they came, as an evaluation's."""
    notes: tuple[str, ...] = ()
    """What could not be had, in whole sentences."""

    @property
    def entries(self) -> list[Entry]:
        """All runs, a variant after the other."""
        return [entry for variant in self.variants for entry in variant.entries]


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


def read_entry(path: Path) -> Entry:
    """Reads a RUN folder.

    Raises:
        UserError: no RUN, or a file in it that is not what it should be.
    """
    folder = RunDir(path)
    options = flatten(folder.read())
    if "method.name" not in options:
        raise UserError(f"{folder.run_json} names no method: it is not a run of this program.")
    note = State.read(folder.path)
    records = folder.records()
    evaluations = _metrics_only(records)
    for file in sorted((folder.path / "evaluation").glob("*.json")):
        evaluations[file.stem] = read_json(file)
    robustness = folder.path / "robustness.json"
    return Entry(
        folder, options, records, note.tags, note.finished, evaluations,
        read_json(robustness) if robustness.exists() else None,
    )  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: it is none.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object.")
    return content


def group(entries: Sequence[Entry]) -> list[Setting]:
    """Entries by setting, variant and seed, in the order given; standard before robust."""
    settings: dict[str, list[Entry]] = {}
    for entry in entries:
        settings.setdefault(entry.setting, []).append(entry)
    found = []
    for part in settings.values():
        kept, notes = _one_a_seed(part)
        found.append(Setting(_title(part), _variants(kept), notes=notes))
    return found


def _one_a_seed(entries: list[Entry]) -> tuple[list[Entry], tuple[str, ...]]:
    """One run of each choice and seed, the finished, measured and newest one, and a note on the
    others: a training repeats itself exactly, so that a copy would pass for a seed and narrow the
    interval.
    """

    def rank(entry: Entry) -> tuple[bool, int, float]:
        measured = len(entry.evaluations) + bool(entry.robustness)
        return entry.finished, measured, entry.folder.run_json.stat().st_mtime

    best: dict[tuple[str, int], Entry] = {}
    for entry in entries:
        key = json.dumps(_choices(entry), sort_keys=True), entry.seed
        best[key] = max(best.get(key, entry), entry, key=rank)
    kept = [entry for entry in entries if entry in best.values()]
    if len(kept) == len(entries):
        return kept, ()
    names = ", ".join(str(entry.folder.path) for entry in entries if entry not in kept)
    return kept, (f"Left out, since another run has the same options and seed: {names}.",)


def _variants(entries: list[Entry]) -> tuple[Variant, ...]:
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(json.dumps(_choices(entry), sort_keys=True), []).append(entry)
    groups = [sorted(group, key=lambda e: e.seed) for group in found.values()]
    groups.sort(key=lambda group: (group[0].method, group[0].hardening != "none"))
    labels = _labels([group[0] for group in groups])
    return tuple(
        Variant(label, tuple(group)) for label, group in zip(labels, groups, strict=True)
    )  # fmt: skip


def _choices(entry: Entry) -> dict[str, Any]:
    """What makes the variant. Of a standard run `harden` says nothing; older ones have none."""
    ignored = (*IGNORED, "harden.") if entry.hardening == "none" else IGNORED
    found = {k: v for k, v in entry.options.items() if not k.startswith(ignored)}
    # The run that a training started from differs from seed to seed.
    return {**found, "init": "run" if found.get("init") else "backbone"}


def _labels(entries: list[Entry]) -> list[str]:
    """Method and hardening of each, and the options in which those of one method differ."""
    labels: list[str] = []
    for entry in entries:
        alike = [e for e in entries if (e.method, e.hardening) == (entry.method, entry.hardening)]
        choices = [_choices(e) for e in alike]
        names = dict.fromkeys(name for choice in choices for name in choice)
        differ = [n for n in names if len({json.dumps(c.get(n, "–")) for c in choices}) > 1]
        own = _choices(entry)
        texts = [f"{n.rpartition('.')[2].replace('_', ' ')} {_short(own.get(n))}" for n in differ]
        if len(texts) > SHOWN:
            texts = [*texts[: SHOWN - 1], f"{len(texts) - SHOWN + 1} more"]
        hardening = [] if entry.hardening == "none" else [f"robust ({entry.hardening})"]
        label = ", ".join([" ".join([entry.method, *hardening]), *texts])
        taken = sum(other.partition(" (no. ")[0] == label for other in labels)
        labels.append(f"{label} (no. {taken + 1})" if taken else label)
    return labels


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _title(entries: list[Entry]) -> str:
    """The data in a few words."""
    options, tags = entries[0].options, entries[0].tags
    root = options.get("data.root")
    parts = [Path(root).name if root else "rendered flowers"]
    if "dataset/classes" in tags:
        images = int(tags["dataset/images"])
        parts.append(f"{tags['dataset/classes']} classes, {images:,} images")
    return f"{parts[0]}: {', '.join([*parts[1:], 'protocol ' + str(options['data.protocol'])])}"


def _metrics_only(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The newest `test/...` metrics of metrics.jsonl as an evaluation without its queries."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        own = {k[5:]: v for k, v in record["metrics"].items() if k.startswith("test/")}
        if "recall_at_1" in own and "num_gallery" in own:
            found["test"] = {"metrics": own, "split": "test"}
    return found
