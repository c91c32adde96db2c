"""What a comparison trains: every row over the protocols and seeds, under one budget."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from flowerray import methods
from flowerray.config import Config
from flowerray.data.augment import AugmentConfig
from flowerray.data.source import DataConfig
from flowerray.errors import UserError
from flowerray.files import read_json
from flowerray.model.embedder import EmbedderConfig
from flowerray.training.config import TrainConfig
from flowerray.training.run import Run, differences, own_defaults
from flowerray.training.rundir import RunDir
from flowerray.tuning.study import Study

ENOUGH_SEEDS = 5
FRESH_SEED = 2000
"""First seed of tuned configurations: neither their searches nor the confirmations used it."""
HEAD_IMAGES = 48_000
"""What the command gives a head, whose images cost nothing once their features are kept."""
SET_HERE = ("epochs", "images", "seed", "patience")
"""Of TrainConfig: what the budget and the seeds decide."""


class Result(TypedDict):
    """What is needed of a study's result.json."""

    trials: dict[str, int]
    champion: str
    """RUN folder."""
    confirmed: NotRequired[dict[str, Any]]


class CompareConfig(Config):
    """One budget for every method."""

    data: DataConfig = DataConfig()
    """The photographs; `--protocols` says how they are split."""
    embedder: EmbedderConfig = EmbedderConfig(image_size=96)
    """The network, the same for all."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes to training images, the same for all."""
    train: TrainConfig = TrainConfig()
    """The optimisation of untuned methods; --images and --seeds set epochs, patience and seed."""
    images: int = Field(12_000, ge=1)
    """Images that each training draws, repeats included: equally many for every row, to a batch."""
    seeds: int = Field(5, ge=1, le=1000)
    """Trainings of each row and protocol, with seeds 0, 1, ...; tuned ones with 2000, 2001, ..."""
    protocols: tuple[Literal["official", "disjoint"], ...] = ("official", "disjoint")
    """official = known classes, new photographs; disjoint = classes that were never trained."""
    center: Path | None = None
    """Study of `flowerray tune center`, whose best configuration is compared (also without its
    center term, as cross-entropy); give one for each method, of equally many trials, or none."""
    siamese: Path | None = None
    """Study of `flowerray tune siamese`."""
    triplet: Path | None = None
    """Study of `flowerray tune triplet`."""
    cpus: float = Field(1, gt=0)
    """CPU cores of each training; as many train at a time as there is room for."""
    gpus: float = Field(0, ge=0)
    """GPUs of each training, also a fraction; 0 trains on the CPU. The command gives one where this
    machine has one."""


@dataclass(frozen=True)
class PlannedRun:
    """One training of the comparison."""

    protocol: str
    row: str
    run: Run

    @property
    def name(self) -> str:
        """Of its RUN folder."""
        return f"{self.protocol}-{self.row}-seed{self.run.train.seed}"


def plan(config: CompareConfig) -> tuple[list[PlannedRun], int, list[str]]:
    """Every training, the trials behind each method (0: defaults), and what a reader must know.

    Raises:
        UserError: options or studies that do not make one budget.
    """
    if not config.protocols or len(set(config.protocols)) < len(config.protocols):
        raise UserError("`protocols`: name each protocol once.")
    if config.data.protocol != DataConfig().protocol:
        raise UserError("compare splits the data by `protocols`: leave `data.protocol` out.")
    plain = TrainConfig()
    said = [name for name in SET_HERE if getattr(config.train, name) != getattr(plain, name)]
    if said:
        raise UserError(
            f"compare sets `train.{said[0]}` itself: give the budget with `images` and the number "
            "of seeds with `seeds`."
        )
    notes: list[str] = []
    bases, trials = base_runs(config, notes)
    first_seed = FRESH_SEED if trials else 0  # the search chose what its own seed favoured
    if config.seeds < ENOUGH_SEEDS:
        notes.append(f"{config.seeds} seeds are few: intervals are wide below {ENOUGH_SEEDS}.")
    entries = []
    for protocol in config.protocols:
        data = config.data.model_copy(update={"protocol": protocol})
        for row, base in bases.items():
            for seed in range(first_seed, first_seed + config.seeds):
                changes = {"images": config.images, "patience": 0, "seed": seed}
                train = base.train.model_copy(update=changes)
                run = base.model_copy(update={"data": data, "train": train})
                entries.append(PlannedRun(protocol, row, run))
    return entries, trials, notes


def base_runs(config: CompareConfig, notes: list[str]) -> tuple[dict[str, Run], int]:
    """The run of each trained row, and the trials that its method was tuned with."""
    names = ("center", "siamese", "triplet")
    shared = {"embedder": config.embedder, "augment": config.augment}
    runs = {
        name: Run(
            method=methods.get(name).config(),
            train=own_defaults(config.train, name, config.embedder),
        ).model_copy(update=shared)
        for name in names
    }
    trials = 0
    studies = {name: path for name in names if (path := getattr(config, name)) is not None}
    if studies:
        if len(studies) < len(names):
            missing = ", ".join(f"`{name}`" for name in names if name not in studies)
            raise UserError(f"one budget for all: give a study for each method ({missing} too).")
        if config.train != TrainConfig():
            raise UserError("with studies the optimisation is theirs: leave `train` options out.")
        found = {name: read_study(path, name) for name, path in studies.items()}
        trials = found["center"].trials
        if any(study.trials != trials for study in found.values()):
            text = ", ".join(f"{name} {study.trials}" for name, study in found.items())
            raise UserError(f"one budget for all: the studies have unequal trials ({text}).")
        measured = range(FRESH_SEED, FRESH_SEED + config.seeds)
        for name, (best, _, seeds) in found.items():
            if used := sorted(seeds.intersection(measured)):
                raise UserError(
                    f"the study of `{name}` chose by seed {', '.join(map(str, used))}, with which "
                    f"tuned methods are compared ({measured[0]} to {measured[-1]}): give one whose "
                    "`train.seed`, and that + 1000 for its confirmation, lie below."
                )
            if best.harden.on or best.init is not None:
                raise UserError(
                    f"one budget for all: the study of `{name}` hardens or goes on from another "
                    "run (`init`), which cross-entropy and the others do not; give plain studies."
                )
            if (searched := best.embedder.train) != config.embedder.train:
                raise UserError(
                    f"the study of `{name}` trained {searched} and this comparison trains "
                    f"{config.embedder.train}: the learning rates of one are not the other's; give "
                    f"`embedder.train` {searched}, or other studies."
                )
            seen = [p for p in config.protocols if p != best.data.protocol]
            if "disjoint" in seen:
                notes.append(
                    f"disjoint: {name} was tuned on {best.data.protocol}, whose train and val hold "
                    "the classes and some of the images that disjoint tests."
                )
            runs[name] = best.model_copy(update={**shared, "threshold": None})
            if given_up := differences(best.model_copy(update={"threshold": None}), runs[name]):
                notes.append(
                    f"{name}: its study's {', '.join(given_up)} gave way to what all share."
                )
    center = runs["center"]
    plain = center.method.model_copy(update={"center_weight": 0.0})
    return {"cross-entropy": center.model_copy(update={"method": plain}), **runs}, trials


class Champion(NamedTuple):
    """What a study chose."""

    run: Run
    trials: int
    """From which it was chosen."""
    seeds: set[int]
    """By which it was chosen: the search's, and its confirmation's."""


def read_study(folder: Path, method: str) -> Champion:
    """The champion of a study.

    Raises:
        UserError: no finished study of this method.
    """
    missing = f"`{method}` {folder} is no finished study: `flowerray tune {method}` makes one."
    result = read_json(folder / "result.json", Result, missing=missing)
    champion = Path(*Path(result["champion"]).parts[-2:])  # the study may have been moved
    best = Run.from_dict(RunDir(folder / champion).read())
    seeds = {best.train.seed, *result.get("confirmed", {}).get("seeds", ())}
    if (folder / "study.json").exists():
        seeds.add(Study.read(folder).base.train.seed)
    if best.method_name != method:
        raise UserError(f"`{method}` {folder} is a study of {best.method_name}.")
    return Champion(best, sum(result["trials"].values()), seeds)
