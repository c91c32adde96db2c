"""Near-duplicates: which altered copies of photographs are found, and what else is flagged.

    uv run python -m tests.benchmarks.duplicates --root DATA --out FILE.json [--copies 20]
        [--pairs 2] [--seed 0]

Copies of random photographs of DATA, of every kind `--copies` and of every two kinds at once
`--pairs`, join the set as its test split. Flagged is what is found beyond the copies: pairs of DATA
itself (listed, to be looked at), and a copy with a photograph that is not its own.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flowerray.data.images import decoding_map
from flowerray.data.source import open_all
from flowerray.explore.duplicates import DuplicatePair, find_duplicates
from flowerray.explore.scan import Photograph, scan
from tests.benchmarks.command import about
from tests.explore.planted import KINDS, altered

Planted = dict[tuple[int, int], tuple[str, ...]]


def main() -> None:
    """Plants, searches, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--copies", type=int, default=20, help="of each kind")
    parser.add_argument("--pairs", type=int, default=2, help="of each two kinds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    originals = list(open_all(options.root).paths)
    with tempfile.TemporaryDirectory() as folder:
        planted, copies = plant(originals, Path(folder), options)
        started = time.monotonic()
        found, read_seconds = search([*originals, *copies], len(originals))
        seconds = time.monotonic() - started
    names = [path.relative_to(options.root).as_posix() for path in originals]
    names += ["a copy"] * len(copies)
    content = {
        **about(),
        "images": len(originals),
        "copies": len(copies),
        "seconds": {"reading": round(read_seconds, 1), "all": round(seconds, 1)},
        **evaluate(planted, found, len(originals), names),
    }
    options.out.write_text(json.dumps(content, indent=2) + "\n")
    print(table(content))


def plant(
    originals: list[Path], folder: Path, options: argparse.Namespace
) -> tuple[Planted, list[Path]]:
    """Writes the copies; (original, copy) -> kinds, positions in the set with its copies."""
    rng = np.random.default_rng(options.seed)
    jobs: list[tuple[str, ...]] = [(kind,) for kind in KINDS for _ in range(options.copies)]
    jobs += [pair for pair in combinations(KINDS, 2) for _ in range(options.pairs)]
    sources = rng.permutation(len(originals))[: len(jobs)].tolist()
    planted, copies = {}, []
    for number, (source, kinds) in enumerate(zip(sources, jobs, strict=True)):
        copies.append(folder / f"{number}.jpg")
        with Image.open(originals[source]) as picture:
            copies[-1].write_bytes(altered(picture, kinds, rng))
        planted[source, len(originals) + number] = kinds
    return planted, copies


def search(paths: list[Path], originals: int) -> tuple[list[DuplicatePair], float]:
    """What is found in files of which all after the first ones are copies; seconds of reading."""
    started = time.monotonic()
    with decoding_map(len(paths)) as run:
        photographs = [found for _, found, _ in run(partial(scan, size=8), paths)]
    seconds = time.monotonic() - started
    whole = [found for found in photographs if isinstance(found, Photograph)]
    assert len(whole) == len(paths), "a file that cannot be read"
    split_N = np.array(["train"] * originals + ["test"] * (len(paths) - originals))
    grey_NPP = np.stack([found.grey_PP for found in whole])
    return find_duplicates([found.keypoints for found in whole], grey_NPP, split_N), seconds


def evaluate(
    planted: Planted, found: list[DuplicatePair], originals: int, names: list[str]
) -> dict[str, Any]:
    """Copies found of each kind, alone and with another; photographs that are flagged besides."""
    got = {(pair.first, pair.second): pair for pair in found}
    kinds: dict[str, dict[str, list[int]]] = {}
    for kind in KINDS:
        for title, several in (("alone", 1), ("with another", 2)):
            hits = [pair in got for pair, k in planted.items() if kind in k and len(k) == several]
            kinds.setdefault(kind, {})[title] = [sum(hits), len(hits)]
    own = [pair for pair in found if pair.second < originals]
    partners: dict[int, set[int]] = {}
    for pair in own:
        partners.setdefault(pair.first, set()).add(pair.second)
        partners.setdefault(pair.second, set()).add(pair.first)
    source_of = {copy: source for source, copy in planted}
    wrong = []
    for pair in found:
        if pair.second < originals or (pair.first, pair.second) in planted:
            continue
        first, second = (source_of.get(i, i) for i in (pair.first, pair.second))
        if second not in partners.get(first, ()):
            wrong.append([names[pair.first], names[pair.second], round(pair.score, 3)])
    return {
        "kinds": kinds,
        "missed": [list(kinds) for pair, kinds in planted.items() if pair not in got],
        "in_the_set": [
            [names[p.first], names[p.second], round(p.score, 3), p.change()] for p in own
        ],
        "images_flagged_in_the_set": len(partners),
        "wrong": wrong,
    }


def table(content: dict[str, Any]) -> str:
    """A line a kind."""
    lines = [f"{'found':<22}{'alone':>12}{'with another':>14}"]
    for kind, row in content["kinds"].items():
        alone, other = (f"{hits} of {count}" for hits, count in row.values())
        lines.append(f"{kind:<22}{alone:>12}{other:>14}")
    lines.append(
        f"{content['images']:,} photographs, {content['copies']:,} copies; pairs in the set itself "
        f"{len(content['in_the_set']):,}; wrong {len(content['wrong']):,}"
    )
    lines.append(", ".join(f"{name} {value} s" for name, value in content["seconds"].items()))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
