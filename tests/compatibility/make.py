"""Makes what `test_0_1_0.py` reads: files of flowerray 0.1.0, and what 0.1.0 itself reads in them.

In a checkout of 0.1.0 that this folder was copied into, with an empty folder SCRATCH:

    python -m tests.compatibility.make SCRATCH

Everything is small: 144 rendered photographs of 32 px, a network most of whose channels are 0 (and
stay so in training: nothing leads to them), a few epochs.
"""

import json
import lzma
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.update(
    MLFLOW_DISABLE_TELEMETRY="true",
    MPLBACKEND="agg",
    OMP_NUM_THREADS="1",
    RAY_AUTH_MODE="disabled",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_USAGE_STATS_ENABLED="0",
)

import timm  # noqa: E402 (the environment comes first)
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import flowerray  # noqa: E402
from flowerray.cli import dispatch  # noqa: E402
from tests.compatibility import archive, readings  # noqa: E402

DATA = {"data.synthetic.classes": 6, "data.synthetic.scale": 0.01, "data.synthetic.size": 32}
"""10 + 10 + 4 photographs of each class."""
EMBEDDER = {
    "embedder.backbone": "test_efficientnet",
    "embedder.weights": "weights.safetensors",
    "embedder.image-size": 32,
    "embedder.dim": 16,
}
TRAIN = {
    "train.classes-per-batch": 3,
    "train.images-per-class": 4,
    "train.lr": 1e-3,
    "train.precision": "fp32",
    "train.weight-decay": 0.0,
}
STEPS = {"train.epochs": 5, "train.checkpoint-every-steps": 4, "train.log-every-steps": 6}
HERE = {"resources.workers": 0}
KILLED = """
import os, signal, sys
from flowerray.cli import main
from flowerray.rundir import FolderReporter

report = FolderReporter.report

def dying(self, step, *args, **more):
    if step >= 23:
        os.kill(os.getpid(), signal.SIGKILL)
    report(self, step, *args, **more)

FolderReporter.report = dying
main(sys.argv[1:])
"""
"""A training that dies in the last but one of five epochs, with a checkpoint of step 20."""


def say(*words: object) -> None:
    """Runs a command that must work."""
    print("flowerray", *words, flush=True)
    assert dispatch([str(word) for word in words]) == 0


def options(*groups: dict[str, Any]) -> list[str]:
    """Words of a command line; a later group goes before an earlier one."""
    found = {key: value for group in groups for key, value in group.items()}
    return [word for name, value in found.items() for word in (f"--{name}", str(value))]


def write_weights(file: Path) -> None:
    """A random backbone with few channels, and norms that fit random images."""
    torch.manual_seed(0)
    backbone = timm.create_model("test_efficientnet", num_classes=0)
    state = backbone.state_dict()
    for name, value in state.items():
        if value.ndim == 0 or "running" in name:
            continue
        dims = (0, 1) if value.ndim == 4 else (0,)
        for dim in dims:
            size, kept = value.shape[dim], 16 if value.shape[dim] == 256 else 4
            if size > 12:  # neither the pixels' channels, nor a depthwise or squeezed dimension
                value.narrow(dim, kept, size - kept).zero_()
    state["bn2.bias"][16:] = -200  # where SiLU and its slope are 0
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean over all passes
    with torch.no_grad():
        for _ in range(8):
            backbone.train()(torch.randn(16, 3, 32, 32))
    save_file(backbone.state_dict(), file)


def standard(method: str, out: Path, **fields: Any) -> None:
    """A finished RUN whose files name no path at all. The command line would name the weights by
    theirs; so this is 0.1.0's own function, looked up by name since later versions lack it.
    """
    run = {
        "method": {"name": method, **fields},
        "data": {"synthetic": {"classes": 6, "scale": 0.01, "size": 32}},
        "embedder": {key[9:].replace("-", "_"): value for key, value in EMBEDDER.items()},
        "train": {key[6:].replace("-", "_"): value for key, value in (TRAIN | STEPS).items()},
        "resources": {"workers": 0},
    }
    kind = import_module("flowerray.run").Run
    import_module("flowerray.cluster.fit").fit(kind.from_dict(run), out, quiet=True)


def killed(method: str, out: str, words: list[str]) -> None:
    """An unfinished RUN."""
    command = [sys.executable, "-c", KILLED, "train", method, "--out", out, *words]
    assert subprocess.run(command).returncode == -signal.SIGKILL, out


def make(here: Path) -> None:
    """Everything, in the working directory `here`."""
    write_weights(here / "weights.safetensors")
    standard("triplet", here / "runs/triplet")
    standard("siamese", here / "runs/siamese", head="bce")
    standard("center", here / "runs/center")
    copy_photographs(here)
    folders = {"data.root": "photographs", "data.train-per-class": 4, "data.val-per-class": 4}
    pgd = {"harden.kind": "pgd", "harden.epsilon": 0.5, "harden.val-epsilon": 0.5}
    robust = options(folders, EMBEDDER, TRAIN, STEPS, HERE, pgd, {"init": "runs/center"})
    say("train", "center", "--out", "runs/robust", *robust)
    for run in readings.RUNS:
        say("evaluate", f"runs/{run}")
        say("attack", f"runs/{run}", *readings.ATTACK)
    say("explain", "runs/triplet", *readings.photographs()[:2], "--concepts", 4)
    say("explain", "runs/triplet", "--max-images", 6, "--choose-images", 6)

    every = (DATA, EMBEDDER, TRAIN, STEPS, HERE)
    killed("center", "runs/unfinished", options(*every, {"train.ema": 0.9}))
    lga = {**pgd, "harden.destination": "lga"}
    killed("triplet", "runs/unfinished-robust", options(*every, lga))

    search = {"trials": 3, "sampler": "random", "pruner": "none", "confirm-seeds": 1}
    say("tune", "siamese", "--out", "runs/study", "--max-concurrent", 1,
        *options(DATA, EMBEDDER, TRAIN, {"train.epochs": 4}, search))  # fmt: skip
    budget = {"protocols": "official", "images": 100, "seeds": 1, "train.classes-per-batch": 6}
    os.environ["MLFLOW_TRACKING_URI"] = "sqlite:///elsewhere/mlflow.db"  # not packed: small files
    say("compare", "--out", "runs/compare", *options(DATA, EMBEDDER, TRAIN, budget))
    del os.environ["MLFLOW_TRACKING_URI"]


def copy_photographs(here: Path) -> None:
    """Twelve photographs a class, one folder a class."""
    files = sorted((here / "home/synthetic").glob("*/jpg/*.jpg"))
    for number, file in enumerate(files):
        of_class, place = divmod(number, 24)
        if place < 12:
            folder = here / "photographs" / f"species-{of_class}"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder)


def lighten(here: Path) -> None:
    """Takes away what nothing reads, what is made again, and what is large: pictures, masks,
    checkpoints of finished trainings but the last ones of a study's winners and a comparison, which
    their --resume reads.
    """
    kept = set()
    champion = json.loads((here / "runs/study/result.json").read_text())["champion"]
    for run in ("triplet", f"study/confirm/{Path(champion).name}"):
        note = json.loads((here / "runs" / run / "mlflow.json").read_text())
        kept |= {note["run_id"], note["model_uri"].removeprefix("models:/")}
    artifacts = here / "runs/mlartifacts"
    for folder in [*artifacts.glob("[!m]*"), *artifacts.glob("models/*")]:
        if folder.name not in kept and folder.name != "models":
            shutil.rmtree(folder)
    ends = ("unfinished*", "study/confirm/*", "compare/runs/*")
    needed = {path for end in ends for path in (here / "runs").glob(f"{end}/checkpoints/last")}
    needed |= set((here / "runs").glob("unfinished*/checkpoints/best"))
    for folder in here.glob("runs/**/checkpoints/*"):
        if folder not in needed:
            shutil.rmtree(folder)
    (masks,) = (here / "home/synthetic").glob("*/segmim")
    for folder in (masks, here / "home/stores", here / "elsewhere", here / "runs/study/ray"):
        shutil.rmtree(folder)
    for file in here.rglob("*"):
        if file.suffix in (".png", ".lock"):
            file.unlink()
    for file in here.rglob("*.db"):
        with closing(sqlite3.connect(file)) as database:
            database.execute("VACUUM")


def pack(here: Path, checkout: Path) -> None:
    """Writes the archive, without the paths of this machine."""
    archive.move(here, str(here), archive.HERE)
    archive.move(here, str(checkout), archive.FLOWERRAY)
    known = [str(here.parent), str(checkout), str(Path.home())]
    for file in filter(Path.is_file, here.rglob("*")):
        found = [name for name in known if name.encode() in file.read_bytes()]
        assert not found, f"{file}: {found}"
    with (
        lzma.open(archive.FILE, "wb", preset=9 | lzma.PRESET_EXTREME) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for file in sorted(here.rglob("*")):
            entry = tar.gettarinfo(file, file.relative_to(here).as_posix())
            entry.uid = entry.gid = entry.mtime = 0
            entry.uname = entry.gname = ""
            if file.is_file():
                with file.open("rb") as content:
                    tar.addfile(entry, content)
            else:
                tar.addfile(entry)


def read(here: Path) -> dict[str, Any]:
    """What 0.1.0 reads in the unpacked files."""
    enter(archive.unpack(here))
    note = json.loads(Path("runs/triplet/mlflow.json").read_text())
    os.environ["MLFLOW_TRACKING_URI"] = note["tracking_uri"]
    served = readings.served(note["model_uri"])
    del os.environ["MLFLOW_TRACKING_URI"]
    runs, unfinished = readings.RUNS, readings.UNFINISHED
    return {
        "machine": readings.machine(),
        "embeddings": {run: readings.embeddings(f"runs/{run}") for run in runs},
        "served": served,
        "similar": {run: readings.similar(run) for run in runs},
        "searched": {run: readings.searched(run) for run in runs},
        "tuned": readings.tuned(),
        "compared": readings.compared(),
        "reported": readings.reported(),
        "evaluated": {run: readings.evaluated(run) for run in runs},
        "attacked": {run: readings.attacked(run) for run in readings.ATTACKED},
        "continued": readings.continued(),
        "resumed": {run: readings.resumed(run) for run in unfinished},
    }


def text(expected: dict[str, Any]) -> str:
    """JSON with a line for each result."""
    lines = []
    for name, content in expected.items():
        whole = json.dumps(content)
        if isinstance(content, dict) and len(whole) > 150:
            parts = [f"  {json.dumps(key)}: {json.dumps(part)}" for key, part in content.items()]
            whole = "{\n" + ",\n".join(parts) + "\n }"
        lines.append(f" {json.dumps(name)}: {whole}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def enter(here: Path) -> None:
    """Works in a folder from here on."""
    here.mkdir(parents=True, exist_ok=True)
    os.environ["FLOWERRAY_HOME"] = str(here / "home")
    os.chdir(here)


def main(scratch: Path) -> None:
    """See above."""
    assert flowerray.__version__ == "0.1.0", flowerray.__file__
    checkout = Path(flowerray.__file__).parent.parent
    os.environ["PYTHONPATH"] = str(checkout)  # of Ray's workers, too
    scratch = scratch.absolute()
    enter(scratch / "made")
    make(scratch / "made")
    shutil.copytree(scratch / "made", scratch / "packed")
    lighten(scratch / "packed")
    archive.move(scratch / "packed", str(scratch / "made"), str(scratch / "packed"))
    pack(scratch / "packed", checkout)
    expected = read(scratch / "read")
    archive.EXPECTED.write_text(text(expected))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
