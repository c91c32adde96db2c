"""RUN folders under tracking, and what MLflow has of them."""

import json
import socket
from pathlib import Path
from typing import Any

from flowerray.tracking import server as tracking_server
from flowerray.tracking import sync
from flowerray.tracking.state import run_id, tracking_uri

RUN = {
    "flowerray": "0.1.0",
    "method": {"name": "triplet", "margin": 0.2},
    "data": {"root": None, "protocol": "official"},
    "embedder": {"backbone": "test_efficientnet", "dim": 16, "image_size": 32, "weights": "none"},
    "resources": {"workers": 1},
}


def make_run(folder: Path, records: int = 0, name: str = "triplet-1") -> Path:
    """A RUN folder of a training under way."""
    run_dir = folder / name
    run_dir.mkdir(parents=True)
    (run_dir / "run.json").write_text(json.dumps(RUN))
    append(run_dir, range(1, records + 1))
    sync.start(run_dir, name, RUN, {"data.fingerprint": "abc"}, experiment="here")
    return run_dir


def record(step: int, sitting: int = 0) -> str:
    metrics = {"train/loss": 1 / step, "system/cpu_utilization_percentage": 50.0}
    content = {"step": step, "epoch": 1, "time": 1000.5 + step + 100 * sitting, "metrics": metrics}
    return json.dumps(content) + "\n"


def append(run_dir: Path, steps: range, sitting: int = 0) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.writelines(record(step, sitting) for step in steps)


def client(run_dir: Path) -> Any:
    return tracking_server.connect(tracking_uri(run_dir))


def logged(run_dir: Path, metric: str = "train/loss") -> list[tuple[int, float]]:
    return sorted(
        (m.step, m.value) for m in client(run_dir).get_metric_history(run_id(run_dir), metric)
    )


def curve(steps: range) -> list[tuple[int, float]]:
    return [(step, 1 / step) for step in steps]


def closed_port() -> str:
    """Where no server listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"
