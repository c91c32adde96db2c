"""`flowerray serve` under load on this machine, beside embedding in batches without a service.

    uv run python -m tests.benchmarks.serve RUN PHOTOS --out FILE.json
        [--sizes 128 224] [--seconds 20] [--overload 600]

For each size of the model's input (it is set: as fast as a training at that size): batches and the
service with as many requests as it takes, by turns; then half of what it managed, for the latency;
then twice as much. Every answer has to name the cosines that it named when less was asked, or to
be 503.
"""

import argparse
import http.client
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import Lock, local
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from flowerray.index import command
from flowerray.model.embedder import Embedder
from flowerray.opening import open_model
from flowerray.retrieval.command import gallery_of
from flowerray.tracking.registry import resolve
from flowerray.training.checkpoint import export_file
from tests.benchmarks.command import about

INDEXED, ASKED = 300, 200
"""Photographs that the index holds, and others that are asked for."""
ROUNDS = 3
AT_ONCE = 24
"""Requests that are under way at a time: below what the service takes."""


class Answer(NamedTuple):
    """Of one request."""

    seconds: float
    """From when it was due."""
    status: int
    right: bool


class Client:
    """Asks a service for photographs, over connections that stay open."""

    def __init__(self, port: int, photos: Sequence[bytes]) -> None:
        self.port, self.photos = port, photos
        self.mine = local()
        with ThreadPoolExecutor(4) as pool:
            self.known = [found for _, found in pool.map(self.ask, range(len(photos)))]

    def ask(self, number: int) -> tuple[int, list[float]]:
        """Status and cosines of one request."""
        if not hasattr(self.mine, "connection"):
            self.mine.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection = self.mine.connection
        connection.request("POST", "/search?k=5", self.photos[number % len(self.photos)])
        answer = connection.getresponse()
        content = json.loads(answer.read())
        return answer.status, [n["similarity"] for n in content.get("neighbours", ())]

    def load(self, seconds: float, rate: float | None, threads: int) -> tuple[list[Answer], float]:
        """Asks for so long: so many times a second, or as fast as the threads come to it; also the
        seconds until the last answer.
        """
        numbers, lock, start = count(), Lock(), time.perf_counter()

        def due() -> Iterator[tuple[int, float]]:
            while True:
                with lock:
                    number = next(numbers)
                at = time.perf_counter() if rate is None else start + number / rate
                if at > start + seconds:
                    return
                yield number, at

        def work(_: int) -> list[Answer]:
            answers = []
            for number, at in due():
                time.sleep(max(0.0, at - time.perf_counter()))
                status, found = self.ask(number)
                expected = self.known[number % len(self.known)]
                right = status == 503 or np.allclose(found, expected, rtol=0, atol=1e-5)
                answers.append(Answer(time.perf_counter() - at, status, right))
            return answers

        with ThreadPoolExecutor(threads) as pool:
            answers = [answer for part in pool.map(work, range(threads)) for answer in part]
        return answers, time.perf_counter() - start


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Of a load."""
    good = [answer.seconds for answer in answers if answer.status == 200]
    p50, p99 = np.quantile(good, [0.5, 0.99])
    return {
        "answered_per_second": len(good) / seconds,
        "p50_ms": 1000 * float(p50),
        "p99_ms": 1000 * float(p99),
        "status": {str(code): n for code, n in Counter(a.status for a in answers).items()},
        "wrong": sum(not answer.right for answer in answers),
    }


def batches(embedder: Embedder, stream: Iterator[list[tuple[Any, ...]]], seconds: float) -> float:
    """Photographs a second, from their files, by batches in one process."""
    next(stream)  # decoded while something else was measured
    done, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        crops = [crop for *_, crop in next(stream)]
        command.embed_crops(embedder, crops)
        done += len(crops)
    return done / (time.perf_counter() - start)


def memory(process: psutil.Process) -> float:
    """MiB of a process and all below it, what they share counted once."""
    every = [process, *process.children(recursive=True)]
    return sum(one.memory_full_info().uss for one in every) / 2**20


def measure(model: Path, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Everything of one image size."""
    paths = list(gallery_of(options.photos).paths)
    order = np.random.default_rng(0).permutation(len(paths))
    inside, asked = (
        [paths[n] for n in part] for part in np.split(order[: INDEXED + ASKED], [INDEXED])
    )
    with tempfile.TemporaryDirectory() as place, socket.socket() as probe:
        sized, index = Path(place) / "model.pth", Path(place) / "index"
        content = torch.load(model, weights_only=True)
        run = json.loads(content["run"])
        run["embedder"]["image_size"] = size
        torch.save({**content, "run": json.dumps(run)}, sized)
        gallery = Path(place) / "photographs"
        gallery.mkdir()
        for number, path in enumerate(inside):
            shutil.copy(path, gallery / f"{number}{path.suffix}")
        opened = open_model(str(sized), torch.device("cpu"))
        command.build(opened, gallery, index, quiet=True)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        found: dict[str, Any] = {"batches_per_second": [], "memory_mib": []}
        begin = time.perf_counter()
        words = [sys.executable, "-c", "from flowerray.cli import main; main()", "serve"]
        process = subprocess.Popen(
            [*words, str(index), "--port", str(port)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None and process.stdout.readline().startswith("serving")
            found["start_seconds"] = time.perf_counter() - begin
            client = Client(port, [path.read_bytes() for path in asked])
            seconds, tree = options.seconds, psutil.Process(process.pid)
            stream: Any = command.batches(list(asked) * 500, size)
            next(stream)  # its processes have started
            answers: list[Answer] = []
            took = 0.0
            for _ in range(ROUNDS):
                part = seconds / ROUNDS
                found["batches_per_second"].append(batches(opened.embedder, stream, part))
                more, elapsed = client.load(part, None, AT_ONCE)
                answers, took = answers + more, took + elapsed
            stream.close()
            found["sustained"] = summary(answers, took)
            capacity = found["sustained"]["answered_per_second"]
            found["memory_mib"].append(memory(tree))
            found["half"] = summary(*client.load(seconds, capacity / 2, AT_ONCE))
            found["twice"] = []
            for _ in range(ROUNDS):
                load = client.load(options.overload / ROUNDS, 2 * capacity, 4 * AT_ONCE)
                found["twice"].append(summary(*load))
                found["memory_mib"].append(memory(tree))
        finally:
            process.terminate()
            process.wait(60)
    found["ratio"] = capacity / float(np.mean(found["batches_per_second"]))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints a line a size, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run")
    parser.add_argument("photos", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 224])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--overload", type=float, default=600, help="seconds at twice the capacity")
    options = parser.parse_args(argv)
    model = export_file(resolve(options.run))
    sizes: dict[str, Any] = {}
    for size in options.sizes:
        found = sizes[str(size)] = measure(model, size, options)
        codes: Counter[str] = Counter()
        for part in found["twice"]:
            codes.update(part["status"])
        print(
            f"{size} px  {found['sustained']['answered_per_second']:.0f} answers a second, "
            f"{found['ratio']:.2f} of batches; half of it p99 {found['half']['p99_ms']:.0f} ms; "
            f"twice {dict(codes)}, wrong {sum(part['wrong'] for part in found['twice'])}; "
            f"memory {', '.join(f'{mib:.0f}' for mib in found['memory_mib'])} MiB",
            flush=True,
        )
    if options.out is not None:
        content = {**about(), "seconds": options.seconds, "overload": options.overload}
        options.out.write_text(json.dumps({**content, "sizes": sizes}, indent=2) + "\n")


if __name__ == "__main__":
    main()
