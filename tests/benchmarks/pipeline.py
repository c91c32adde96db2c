"""Speed of the whole training pipeline beside the model alone and a plain loop of other libraries.

    uv run python -m tests.benchmarks.pipeline --out DIR [--until-quality] [--root DATA]

writes DIR/pipeline.json (DIR/until-quality.json) and prints a table. Each side is a process of its
own; they take turns, with the same threads, batches of 12 x 4 images, optimizer, schedule and loss
(batch-hard triplet, margin 0.2), in float32 on the CPU:

    flowerray     `fit`: Ray Train with one worker, store, augmentation, checkpoints, live MLflow
    compute       the same model, loss and allocator on one batch in memory: no data path, no
                  augmentation
    peer          pytorch-metric-learning, timm's plain model from the same weights with BatchNorm
                  frozen, DataLoader with 2 processes: JPEG decode (Pillow), torchvision
                  transforms (tests/benchmarks/peer.py)
    peer-folded   the same with flowerray's model: what is left of the ratio is the data path's

The speed is that of the steps after 20 steps of warm-up, without start-up; flowerray's includes its
checkpoints and the change of epochs. It trains on train and val together, so nothing is validated.

With --until-quality flowerray and the peers train on the train split for the same steps, and each
is validated after every epoch by the same code, outside the clock: after how many seconds of
training does each reach the R@1 and MAP@R (val queries, train gallery) that a peer ends with?

    flowerray         the peer's loss, miner and rate (1e-4)
    flowerray-center  `center --init head`, the rate its default; what the head took, features and
                      its validations included, is on the clock
    peer              as above
    peer-cross-entropy  timm, a linear classifier on the embedding, shuffled images, center's rate

By default the photographs are the synthetic set's, 160 px on the shorter side. Larger files cost
the peer more: real Flowers-102 has 500 px (--photo-size 500 renders such).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from flowerray.cluster.worker import build_method, split_store
from flowerray.config import Config
from flowerray.data.batches import PKSampler
from flowerray.data.dataset import Dataset
from flowerray.data.source import DataConfig, open_dataset
from flowerray.memory import keep_freed_memory
from flowerray.methods import center, triplet
from flowerray.model.embedder import EmbedderConfig
from flowerray.rendered.synthetic import SyntheticConfig
from flowerray.training.config import TrainConfig
from flowerray.training.loop import Schedule
from flowerray.training.optimizer import make_optimizer
from flowerray.training.run import HEAD, ResourcesConfig, Run, own_defaults
from flowerray.training.rundir import Record, RunDir
from tests.benchmarks.command import about
from tests.benchmarks.peer import Clock, Epoch, Mark, race, targets, train_peer

SPEED_SIDES = ("flowerray", "compute", "peer", "peer-folded")
QUALITY_SIDES = ("flowerray", "flowerray-center", "peer", "peer-cross-entropy")
WARMUP = 20
"""Steps before the clock counts."""


class Job(Config):
    """What one process measures."""

    part: Literal["speed", "quality"]
    side: str
    steps: int = 0
    """Steps of a speed measurement after the warm-up; flowerray rounds up to whole epochs."""
    epochs: int = 0
    """Of a quality measurement."""
    threads: int
    seed: int
    root: Path | None
    photo_size: int
    """Shorter side of the synthetic photographs, in pixels."""


# ---- one side, in its own process


def make_run(job: Job) -> Run:
    """The run that flowerray trains and that the other sides copy."""
    speed = job.part == "speed"
    data = DataConfig(
        root=job.root,
        protocol="trainval" if speed else "official",
        # Test photographs are not read: few are rendered.
        synthetic=SyntheticConfig(scale=0.01, size=job.photo_size),
    )
    run = Run(
        method=triplet.Config(miner="batch-hard"),  # the peer's
        data=data,
        train=TrainConfig(epochs=max(1, job.epochs), seed=job.seed, precision="fp32"),
        threshold=0.5 if speed else None,
        resources=ResourcesConfig(workers=1, cpus_per_worker=job.threads, device="cpu"),
    )
    if job.side in ("flowerray-center", "peer-cross-entropy"):
        train = own_defaults(run.train, "center", run.embedder)
        return run.model_copy(update={"method": center.Config(), "train": train, "init": HEAD})
    if speed:
        epochs = -(-(WARMUP + job.steps) // make_sampler(run, open_dataset(data)).steps)
        run = run.model_copy(update={"train": run.train.model_copy(update={"epochs": epochs})})
    return run


def make_sampler(run: Run, dataset: Dataset) -> PKSampler:
    """flowerray's batches; the other sides take the number of steps from it."""
    train = run.train
    targets_N = targets(dataset)
    return PKSampler(targets_N, train.classes_per_batch, train.images_per_class, train.seed)


def flowerray(job: Job, run: Run) -> dict[str, Any]:
    """The user's own way: `fit` with one Ray Train worker and a local MLflow database."""
    from flowerray.cluster.driver import head_first, train_run

    with tempfile.TemporaryDirectory(prefix="flowerray-pipeline-") as folder:
        out, seconds = Path(folder) / "run", 0.0
        if run.init == HEAD:
            os.environ["FLOWERRAY_HOME"] = folder  # no features are kept there
            prepare(run)
            start = time.perf_counter()
            own = {"resources": ResourcesConfig(workers=0)}  # Ray's start-up is no training
            init = head_first(run.model_copy(update=own), out, quiet=True).init
            seconds = time.perf_counter() - start
            run = run.model_copy(update={"init": init})
        train_run(run, out, quiet=True)
        records = RunDir(out).records()
    batch = run.train.classes_per_batch * run.train.images_per_class
    marks, epochs = read_records(records, batch)
    return {
        "marks": marks,
        "epochs": [epoch._replace(seconds=epoch.seconds + seconds) for epoch in epochs],
        "head_seconds": seconds,
    }


def read_records(records: list[Record], batch: int) -> tuple[list[Mark], list[Epoch]]:
    """Marks and validations of a RUN's metrics.jsonl, by its wall clock.

    All time between two records counts (steps, reports, checkpoints), except that before an epoch's
    closing record: this is the validation.
    """
    first = records[0]
    seconds = first["step"] * batch / first["metrics"]["train/images_per_second"]
    marks, epochs = [Mark(first["step"], seconds)], []
    for before, record in zip(records, records[1:], strict=False):
        metrics, step = record["metrics"], record["step"]
        if "epoch/seconds" not in metrics:
            seconds += record["time"] - before["time"]
            marks.append(Mark(step, seconds))
        elif "val/recall_at_1" in metrics:
            quality = metrics["val/recall_at_1"], metrics["val/map_at_r"]
            epochs.append(Epoch(record["epoch"], seconds, step * batch, *quality))
    return marks, epochs


def compute(job: Job, run: Run) -> dict[str, Any]:
    """flowerray's model, loss and optimizer on one batch that is there already."""
    keep_freed_memory()  # as flowerray's training does
    dataset = open_dataset(run.data)
    sampler, targets_N = make_sampler(run, dataset), targets(dataset)
    indices_B = sampler.epoch(0)[0]
    store = split_store(dataset, "train", run.embedder.image_size)
    images_BCHW = store.centre(indices_B, run.embedder.image_size).float().div(255)
    labels_B = torch.from_numpy(targets_N[indices_B])

    method = build_method(run, int(targets_N.max()) + 1)[0].train()
    optimizer, schedule = (
        make_optimizer(run.train, method),
        Schedule(run.train.epochs * sampler.steps, sampler.steps),
    )
    clock = Clock()
    for step in range(WARMUP + job.steps):
        schedule.apply(optimizer, step)
        output = method(images_BCHW, labels_B)
        optimizer.zero_grad(set_to_none=True)
        output.loss.total.backward()
        nn.utils.clip_grad_norm_(method.parameters(), run.train.grad_clip)
        optimizer.step()
        clock.mark(step + 1)
    return {"marks": clock.marks}


def peer(job: Job, run: Run) -> dict[str, Any]:
    """A plain loop of other libraries, with timm's model or flowerray's."""
    dataset = open_dataset(run.data)
    steps_per_epoch, speed = make_sampler(run, dataset).steps, job.part == "speed"
    marks, epochs = train_peer(
        run,
        dataset,
        steps_per_epoch=steps_per_epoch,
        steps=WARMUP + job.steps if speed else run.train.epochs * steps_per_epoch,
        folded=job.side == "peer-folded",
        validate=not speed,
        cross_entropy=job.side == "peer-cross-entropy",
    )
    return {"marks": marks, "epochs": epochs}


def measure(job: Job) -> dict[str, Any]:
    """One side's raw figures."""
    torch.set_num_threads(job.threads)
    run = make_run(job)
    if job.side == "compute":
        return compute(job, run)
    return (flowerray if job.side.startswith("flowerray") else peer)(job, run)


# ---- all sides in turn


def in_process(job: Job) -> dict[str, Any]:
    """`measure` in a process of its own."""
    names = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")  # a cluster or server of the user's stays out
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-m", "tests.benchmarks.pipeline", "--job", job.model_dump_json()]
    load, start = os.getloadavg()[0], time.perf_counter()
    output = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment | {"OMP_NUM_THREADS": str(job.threads)},
    ).stdout
    found = json.loads(output.splitlines()[-1])
    return found | {"load_before": load, "process_seconds": time.perf_counter() - start}


def speed(job: Job, rounds: int) -> dict[str, Any]:
    """Steps per second of each side, and flowerray's ratios to the others."""
    raw: dict[str, list[dict[str, Any]]] = {side: [] for side in SPEED_SIDES}
    for number in range(rounds):
        turn = number % len(SPEED_SIDES)  # no side always comes after the same one's heat
        for side in SPEED_SIDES[turn:] + SPEED_SIDES[:turn]:
            found = in_process(job.model_copy(update={"side": side}))
            found["steps_per_second"] = rate([Mark(*mark) for mark in found["marks"]])
            raw[side].append(found)
            print(f"round {number + 1}  {side}: {found['steps_per_second']:.3f} steps/s",
                  file=sys.stderr, flush=True)  # fmt: skip
    rates = {side: [found["steps_per_second"] for found in raw[side]] for side in SPEED_SIDES}
    median = {side: statistics.median(values) for side, values in rates.items()}
    return {
        "steps_per_second": {
            side: {"median": median[side], "min": min(values), "max": max(values)}
            for side, values in rates.items()
        },
        # Of neighbours in time, so that a machine that slows down over the rounds leaves no trace.
        "ratios": {
            side: statistics.median(np.divide(rates["flowerray"], rates[side]).tolist())
            for side in SPEED_SIDES[1:]
        },
        "rounds": raw,
    }


def rate(marks: list[Mark]) -> float:
    """Steps per second after the warm-up."""
    start = next(mark for mark in marks if mark.step >= WARMUP)
    return (marks[-1].step - start.step) / (marks[-1].seconds - start.seconds)


def until_quality(job: Job, seeds: list[int]) -> dict[str, Any]:
    """Seconds and images that each side needs to what each peer ends with."""
    rows: list[dict[str, Any]] = []
    curves = {}
    for seed in seeds:
        found = {}
        for side in QUALITY_SIDES:
            raw = in_process(job.model_copy(update={"side": side, "seed": seed}))
            found[side] = [Epoch(*epoch) for epoch in raw["epochs"]]
            print(f"seed {seed}  {side}: {found[side][-1]}", file=sys.stderr, flush=True)
        rows += [
            {"seed": seed, **race(found, peer, metric)}
            for peer in QUALITY_SIDES
            if peer.startswith("peer")
            for metric in ("recall_at_1", "map_at_r")
        ]
        curves[seed] = {side: [e._asdict() for e in epochs] for side, epochs in found.items()}
    return {"races": rows, "epochs": curves}


# ---- report


def speed_table(report: dict[str, Any], batch: int) -> str:
    """The speeds in 80 columns."""
    lines = [
        f"{'side':<14}{'steps/s':>9}{'(min .. max)':>18}{'images/s':>10}{'flowerray / side':>19}"
    ]
    for side, row in report["steps_per_second"].items():
        spread = f"({row['min']:.3f} .. {row['max']:.3f})"
        ratio = f"{report['ratios'][side]:.3f}" if side in report["ratios"] else ""
        lines.append(
            f"{side:<14}{row['median']:>9.3f}{spread:>18}{row['median'] * batch:>10.1f}{ratio:>19}"
        )
    return "\n".join(line.rstrip() for line in lines)


def quality_table(report: dict[str, Any]) -> str:
    """Each seed's races in 80 columns."""
    lines = []
    for row in report["races"]:
        name = {"recall_at_1": "R@1", "map_at_r": "MAP@R"}[row["metric"]]
        lines += [
            f"seed {row['seed']}, until {row['peer']}'s last {name} of {row['target']:.3f}",
            f"  {'side':<20}{'epoch':>6}{'seconds':>9}{'images':>8}{'share':>7}{'at the end':>12}",
        ]
        for side, epoch in row["reached"].items():
            end = report["epochs"][row["seed"]][side][-1][row["metric"]]
            when = f"{'never':>30}" if epoch is None else (
                f"{epoch['epoch']:>6}{epoch['seconds']:>9.1f}{epoch['images']:>8}{epoch['share']:>7.2f}"
            )  # fmt: skip
            lines.append(f"  {side:<20}{when}{end:>12.3f}")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table and writes the JSON."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--until-quality", action="store_true", help="time to a peer's last R@1")
    parser.add_argument("--root", type=Path, help="data set; by default the synthetic one")
    parser.add_argument("--photo-size", type=int, default=160, help="of the synthetic set, pixels")
    parser.add_argument("--rounds", type=int, default=3, help="of the speeds")
    parser.add_argument("--steps", type=int, default=40, help="of a round, after 20 of warm-up")
    parser.add_argument("--epochs", type=int, default=15, help="of --until-quality")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of --until-quality")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measure(Job(**json.loads(options.job)))))
        return
    if options.out is None:
        parser.error("--out is required")
    job = Job(
        part="quality" if options.until_quality else "speed",
        side="flowerray",
        steps=options.steps,
        epochs=options.epochs,
        threads=options.threads,
        seed=0,
        root=options.root.absolute() if options.root else None,
        photo_size=options.photo_size,
    )
    prepare(make_run(job))
    report = (
        until_quality(job, options.seeds) if options.until_quality else speed(job, options.rounds)
    )
    options.out.mkdir(parents=True, exist_ok=True)
    name = "until-quality.json" if options.until_quality else "pipeline.json"
    packages = ("torchvision", "timm", "ray", "mlflow", "pytorch-metric-learning")
    versions = {name: version(name) for name in packages}
    content = {**about(), "threads": options.threads, "versions": versions, **report}
    (options.out / name).write_text(json.dumps(content, indent=2) + "\n")
    batch = TrainConfig().classes_per_batch * TrainConfig().images_per_class
    print(quality_table(report) if options.until_quality else speed_table(report, batch))


def prepare(run: Run) -> None:
    """Renders and decodes before the first process, so that all find the same files."""
    dataset = open_dataset(run.data)
    for split in ("train", "val"):
        if split in dataset.splits:
            split_store(dataset, split, EmbedderConfig().image_size, progress=True)


if __name__ == "__main__":
    main()
