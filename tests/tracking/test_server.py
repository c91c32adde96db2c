"""The MLflow side: a database made once, the logged model, addresses of models and runs."""

import io
import json
import os
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowerray.errors import UserError
from flowerray.tracking import server as tracking_server
from flowerray.tracking import sync
from flowerray.tracking.registry import resolve
from flowerray.tracking.state import State, run_id, tracking_uri
from tests.tracking.tracked import RUN, client, make_run


def test_prepare_makes_database_and_experiment(database: Path) -> None:
    with sqlite3.connect(database) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        query = "SELECT artifact_location FROM experiments WHERE name = 'flowerray'"
        assert connection.execute(query).fetchone() == (f"file://{database.parent}/mlartifacts",)


def test_a_fresh_database_is_opened_by_one_driver_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[int] = []
    most: list[int] = []

    class SlowClient:
        """Stands in for the migrations."""

        def __init__(self) -> None:
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)

        def get_experiment_by_name(self, name: str) -> None:
            return None

        def create_experiment(self, name: str, artifact_location: str) -> str:
            inside.pop()
            return "1"

    monkeypatch.setattr(tracking_server, "connect", lambda uri: SlowClient())
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda i: sync.prepare(tmp_path / "runs" / str(i)), range(6)))
    assert made == [True] * 6 and most == [1] * 6


RACE = """
import sys, time, pathlib
from flowerray.tracking import sync
import mlflow
ready, go, run = map(pathlib.Path, sys.argv[1:])
ready.touch()
while not go.exists(): time.sleep(0.01)
sys.exit(not sync.prepare(run))
"""


@pytest.mark.slow
def test_four_drivers_prepare_at_once(tmp_path: Path) -> None:
    """The same with MLflow itself, whose migrations break each other without a lock."""
    go, runs = tmp_path / "go", tmp_path / "runs"
    ready = [tmp_path / f"ready{i}" for i in range(4)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(file), str(go), str(runs / str(i))],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i, file in enumerate(ready)
    ]
    while not all(file.exists() for file in ready) and all(p.poll() is None for p in started):
        time.sleep(0.05)
    go.touch()
    for process in started:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        assert out == "" == err  # neither MLflow's nor alembic's chatter
    with sqlite3.connect(runs / "mlflow.db") as connection:
        query = "SELECT count(*) FROM experiments WHERE name = 'flowerray'"
        assert connection.execute(query).fetchone() == (1,)


FLOW = """
import sys, pathlib
from flowerray.tracking import sync
from flowerray.tracking.registry import resolve
run = pathlib.Path(sys.argv[1])
assert sync.prepare(run)
assert sync.finish(run)
assert sync.register(run, "flowers", "champion") == "1"
assert resolve("models:/flowers@champion").suffix == ".pth"
"""


@pytest.mark.slow
def test_mlflow_prints_nothing(tmp_path: Path, export: bytes) -> None:
    """From a fresh database to a registered model, without a line of MLflow's own."""
    run_dir = make_run(tmp_path, records=2)
    (run_dir / "best_model_triplet_loss.pth").write_bytes(export)
    done = subprocess.run(
        [sys.executable, "-c", FLOW, str(run_dir)], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def export() -> bytes:
    """A real exported file of a tiny embedder with random weights."""
    import torch

    from flowerray.model.embedder import Embedder, EmbedderConfig

    config = EmbedderConfig(**RUN["embedder"])  # type: ignore[arg-type]
    file = io.BytesIO()
    content = {
        "embedder": Embedder(config).state_dict(),
        "method": {},
        "run": json.dumps(RUN),
        "threshold": 0.5,
        "classes": ["a", "b"],
    }
    torch.save(content, file)
    return file.getvalue()


def jpegs(n: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    files = []
    for i in range(n):
        pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).resize((80 + i, 60)).save(file, "PNG" if i == 0 else "JPEG")
        files.append(file.getvalue())
    return files


def test_the_model_turns_image_files_into_embeddings(
    runs: Path, export: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import mlflow
    import pandas as pd
    import torch

    import flowerray
    from flowerray.data.store import eval_image
    from flowerray.serve import pyfunc

    run_dir = make_run(runs, records=1)
    path = run_dir / "best_model_triplet_loss.pth"
    path.write_bytes(export)
    assert sync.finish(run_dir)
    assert sync.register(run_dir, "flowers", "champion") == "1"
    assert sync.register(run_dir, "flowers", "champion") == "1", "it is one already"
    run = client(run_dir).get_run(run_id(run_dir))
    assert len(run.outputs.model_outputs) == 1

    uri = tracking_uri(run_dir)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(pyfunc, "BATCH", 2)
    files = jpegs(5)
    state = State.read(run_dir)
    assert state.model_uri is not None
    embedder = flowerray.load(path)
    images = np.stack([eval_image(file, 32) for file in files])
    with torch.inference_mode():
        expected = embedder(torch.from_numpy(images).float() / 255).numpy()
    for address in (state.model_uri, "models:/flowers@champion", "models:/flowers/1"):
        model = mlflow.pyfunc.load_model(address)
        found = model.predict(pd.DataFrame({"image": files}))
        assert found.dtype == np.float32 and found.shape == (5, 16)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        resolved = resolve(address)
        assert resolved.name == path.name and resolved.read_bytes() == export
    with monkeypatch.context() as away:  # the database beside the runs is found by itself
        away.delenv("MLFLOW_TRACKING_URI")
        away.setenv("FLOWERRAY_HOME", str(run_dir.parent / "home"))
        away.chdir(run_dir.parent)
        assert resolve("models:/flowers@champion").read_bytes() == export
        assert "MLFLOW_TRACKING_URI" not in os.environ
    signature = model.metadata.signature
    assert [(c.name, c.type.name) for c in signature.inputs] == [("image", "binary")]
    assert signature.outputs.inputs[0].shape == (-1, 16)
    assert model.predict(pd.DataFrame({"image": []}, dtype=object)).shape == (0, 16)

    folder = resolve(f"runs:/{run.info.run_id}")
    assert sorted(p.name for p in folder.iterdir()) == [path.name, "metrics.jsonl", "run.json"]
    flowerray.load(folder)
    assert resolve(f"runs:/{run.info.run_id}/{path.name}").read_bytes() == export
    for missing in ("models:/none@champion", "runs:/0123456789abcdef0123456789abcdef"):
        with pytest.raises(UserError, match="cannot be fetched from MLflow"):
            resolve(missing)
    with pytest.raises(UserError, match="holds 0 flowerray models"):
        resolve(f"runs:/{run.info.run_id}/metrics.jsonl")
    assert capfd.readouterr() == ("", "")


def test_resolve_of_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match="is not there: give a RUN folder"):
        resolve(str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI"):
        resolve("models:/flowers@champion")
