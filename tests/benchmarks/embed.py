"""`flowerray embed` beside its model alone: photographs a second, in the same run.

    uv run python -m tests.benchmarks.embed RUN DIR --out FILE.json [--photographs 3000]
        [--rounds 3]

In turn: the model on crops in memory (no file is read or decoded), files decoded by processes for a
model in this one (as `flowerray index add` does it), and the workers of Ray Data. Starts are left
out: Ray Data is timed from its first results on.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyarrow.fs import LocalFileSystem

from flowerray.cluster import embedding
from flowerray.cluster.embedding import decoded, pieces, stream_of
from flowerray.cluster.session import ray_session
from flowerray.data.folder import images
from flowerray.index.command import batches
from flowerray.model.embedder import Embedder
from flowerray.opening import load
from flowerray.pool import cores
from flowerray.retrieval.embed import embed_crops
from tests.benchmarks.command import about


def alone(embedder: Embedder, crops: Sequence[Any]) -> float:
    """Photographs a second of the model."""
    begin = time.perf_counter()
    embed_crops(embedder, crops)
    return len(crops) / (time.perf_counter() - begin)


def decoding(embedder: Embedder, paths: Sequence[Path]) -> float:
    """Photographs a second where other processes decode."""
    begin = count = 0.0
    for batch in batches(paths, embedder.image_size):
        if not begin:  # the processes have started
            begin, count = time.perf_counter(), -len(batch)
        embed_crops(embedder, [crop for _, _, crop in batch if not isinstance(crop, str)])
        count += len(batch)
    return count / (time.perf_counter() - begin)


def workers(embedder: Embedder, paths: Sequence[Path]) -> float:
    """Photographs a second of Ray Data's workers, one a core."""
    decode = partial(decoded, filesystem=LocalFileSystem(), size=embedder.image_size)
    todo = pieces([str(path) for path in paths], set())
    begin = count = 0.0
    for batch in stream_of(embedder, decode, todo, cores(), 1, 0):
        count += len(batch["name"])
        if not begin and count >= cores() * embedding.PIECE:
            begin, count = time.perf_counter(), 0
    return count / (time.perf_counter() - begin)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures in turn, prints a table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photographs", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    embedder = load(options.run)
    embedding.PIECE = 64  # the first ones of each worker are not counted
    torch.set_num_threads(cores())
    paths = sorted(images(options.folder))[: options.photographs]
    crops: list[Any] = []
    for batch in batches(paths, embedder.image_size):
        crops += [crop for _, _, crop in batch if not isinstance(crop, str)]
    rates: dict[str, list[float]] = {"model alone": [], "decoded here": [], "Ray Data": []}
    with ray_session(min_cpus=cores()):
        for _ in range(options.rounds):
            rates["model alone"].append(alone(embedder, crops))
            rates["decoded here"].append(decoding(embedder, paths))
            rates["Ray Data"].append(workers(embedder, paths))
            print(rates, flush=True)
    ratios = {
        name: statistics.median(np.divide(rates["Ray Data"], rates[name]).tolist())
        for name in ("model alone", "decoded here")
    }
    content = {
        **about(), "photographs": len(crops), "image_size": embedder.image_size,
        "images_per_second": rates, "ray_data_over": ratios,
    }  # fmt: skip
    for name, found in rates.items():
        print(f"{name:<13} {statistics.median(found):7.1f} img/s")
    print(", ".join(f"Ray Data over {name}: {ratio:.2f}" for name, ratio in ratios.items()))
    if options.out is not None:
        options.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
