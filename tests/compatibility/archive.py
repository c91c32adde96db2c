"""The files that flowerray 0.1.0 left, packed without the paths of the machine that made them."""

import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path

import torch

FILE = Path(__file__).with_name("0_1_0.tar.xz")
EXPECTED = Path(__file__).with_name("0_1_0.json")
HERE = "@HERE@"
"""Stands in the packed files for the folder that they were made in."""
FLOWERRAY = "/elsewhere/flowerray"
"""And for the checkout of flowerray, which a logged model names and nothing reads."""
BINARY = (".jpg", ".png", ".mat", ".npy", ".npz", ".pt", ".safetensors", ".pkl")


def unpack(folder: Path) -> Path:
    """Unpacks everything into an empty folder, and lets the files name it."""
    with tarfile.open(FILE) as tar:
        tar.extractall(folder, filter="data")
    move(folder, HERE, str(folder))
    return folder


def move(folder: Path, old: str, new: str) -> None:
    """Writes the path `new` for `old` in every file of a folder that may hold one."""
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.suffix in BINARY:
            continue
        if file.suffix == ".db":
            move_database(file, old, new)
        elif file.suffix == ".pth":
            move_export(file, old, new)
        elif old in (text := file.read_text()):
            file.write_text(text.replace(old, new))


def move_export(file: Path, old: str, new: str) -> None:
    """An exported model keeps its options as JSON; one that names no path is left as it is."""
    content = torch.load(file, weights_only=True)
    if old in content["run"]:
        torch.save({**content, "run": content["run"].replace(old, new)}, file)


def move_database(file: Path, old: str, new: str) -> None:
    """MLflow's paths stand in artifact_location of experiments and logged_models, artifact_uri of
    runs, source and storage_location of model_versions, and in the values of params and tags;
    Optuna's file has none. Every text column is looked at.
    """
    with closing(sqlite3.connect(file, isolation_level=None)) as database:
        tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (table,) in tables:
            for column in database.execute(f'PRAGMA table_info("{table}")').fetchall():
                if column[2].upper().startswith(("VARCHAR", "TEXT", "CHAR", "JSON")):
                    name = f'"{column[1]}"'
                    database.execute(
                        f'UPDATE "{table}" SET {name} = replace({name}, ?, ?) '
                        f"WHERE instr({name}, ?)",
                        (old, new, old),
                    )
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
