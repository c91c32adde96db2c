"""Procedural flowers on disk, in the Oxford layout: the data set that needs no network.

Class sizes follow the shape of Oxford Flowers-102 (Nilsback and Zisserman, ICVGIP 2008): 40..258
photographs, 8,189 in 102 classes; 10 a class to train, 10 to validate, the rest to test. Files are
numbered class by class, as Oxford's.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from tqdm import tqdm

from flowerray.config import Config
from flowerray.errors import UserError
from flowerray.files import atomic_folder, read_json, write_json
from flowerray.pool import cores, spawned
from flowerray.rendered.painter import paint
from flowerray.rendered.species import names, species_table

VERSION = 1
"""Rises when the same config would give other files."""
MASK_BACKGROUND = (0, 0, 254)
"""What Oxford's segmentation files show where no flower is."""
_HELD = 10  # images of a class in train, and again in val
_LEAST_TEST = 4
_CHUNK = 32
_BEND = 4.495  # bends the curve of class sizes so that 102 classes hold 8,189 photographs


class SyntheticConfig(Config):
    """One rendered set; equal configs give equal files."""

    classes: int = Field(102, ge=2, le=255)
    """Number of species."""
    seed: int = Field(0, ge=0)
    """Another seed, other species and other photographs."""
    scale: float = Field(1.0, gt=0, le=1)
    """Share of the test photographs to render, at least 4 a class; train and val keep 10 each."""
    size: int = Field(160, ge=32, le=1024)
    """Shorter side of the photographs, pixels."""


def class_sizes(config: SyntheticConfig) -> NDArray[np.int64]:
    """Photographs of each class in all splits: 40..258 before `scale` shrinks the test part."""
    curve = np.linspace(0, 1, config.classes) ** _BEND
    sizes = np.round(40 + 218 * curve).astype(np.int64)
    sizes = np.random.default_rng((config.seed, 3)).permutation(sizes)
    test = np.maximum(np.round((sizes - 2 * _HELD) * config.scale), _LEAST_TEST)
    return 2 * _HELD + test.astype(np.int64)


def synthesize(
    out: Path, config: SyntheticConfig, progress: bool = True, processes: int | None = None
) -> Path:
    """Renders the set into the folder `out`, unless it is there already.

    Writes `jpg/image_00001.jpg`, `segmim/segmim_00001.jpg`, `imagelabels.mat`, `setid.mat` and
    `synthetic.json` into a temporary folder that is renamed at the end, so that `out` is never half
    a set. The files depend on `config` alone, not on the number of processes.

    Args:
        out: an absent or empty folder, or an earlier result with the same config, which is kept.

    Raises:
        UserError: `out` holds something else, or cannot be written.
    """
    out = Path(out)
    if is_complete(out, config):
        return out
    if os.path.ismount(out):  # the finished folder takes its place by a rename
        raise UserError(f"{out} is a mount point: name a folder in it.")
    sizes = class_sizes(config)
    jobs = [(c, k) for c, size in enumerate(sizes) for k in range(size)]
    chunks = [
        (start, jobs[start : start + _CHUNK], config) for start in range(0, len(jobs), _CHUNK)
    ]
    try:
        with atomic_folder(out) as folder:
            (folder / "jpg").mkdir()
            (folder / "segmim").mkdir()
            with tqdm(
                total=len(jobs),
                desc="painting flowers",
                unit="img",
                disable=None if progress else True,
            ) as bar:
                with _mapper(min(processes or cores(), len(chunks))) as run:
                    for done in run(_render, [(folder, *chunk) for chunk in chunks]):
                        bar.update(done)
            _write_tables(folder, sizes, config)
    except OSError as error:
        raise UserError(
            f"The synthetic set cannot be written to {out} ({error}); "
            "choose a folder that you may write to."
        ) from error
    return out


def is_complete(out: Path, config: SyntheticConfig) -> bool:
    """True for a set of this config, False where one may be written."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    with suppress(UserError):
        found = read_json(out / "synthetic.json")
        if found.get("generator") == VERSION:
            if found.get("config") == config.model_dump(mode="json"):
                return True
    raise UserError(
        f"{out} already holds something other than this synthetic set (other settings or files); "
        "choose another folder, or delete it first."
    )


@contextmanager
def _mapper(processes: int) -> Iterator:
    """`map`, in this process or over a pool."""
    if processes == 1:
        yield map
        return
    with spawned(processes, "paints the synthetic set", _one_thread) as pool:
        yield pool.map


def _one_thread() -> None:
    cv2.setNumThreads(1)


def _render(work: tuple[Path, int, list[tuple[int, int]], SyntheticConfig]) -> int:
    """Paints consecutive photographs, the first with 0-based number `start`."""
    folder, start, jobs, config = work
    table = species_table(config.classes, config.seed)
    for number, (c, k) in enumerate(jobs, start + 1):
        rng = np.random.default_rng((config.seed, 4, c, k))
        picture = paint(table[c], config.size, rng)
        quality = int(rng.integers(60, 93))
        Image.fromarray(picture.image).save(
            folder / "jpg" / f"image_{number:05d}.jpg", quality=quality
        )
        mask = np.where(
            picture.flower[..., None], picture.image, np.array(MASK_BACKGROUND, np.uint8)
        )
        Image.fromarray(mask).save(
            folder / "segmim" / f"segmim_{number:05d}.jpg", quality=92, subsampling=0
        )
    return len(jobs)


def _write_tables(folder: Path, sizes: NDArray[np.int64], config: SyntheticConfig) -> None:
    """Labels and splits (1-based, as Oxford's), and the generator's own record, last."""
    from scipy.io import savemat  # slow to import, and the painting processes do without

    labels = np.repeat(np.arange(len(sizes)), sizes)
    rng = np.random.default_rng((config.seed, 5))
    position = np.concatenate([np.arange(size) for size in sizes])
    ids = np.arange(1, len(labels) + 1)
    parts = {
        "trnid": ids[position < _HELD],
        "valid": ids[(position >= _HELD) & (position < 2 * _HELD)],
        "tstid": ids[position >= 2 * _HELD],
    }
    savemat(folder / "imagelabels.mat", {"labels": (labels + 1).astype(np.uint8)[None]})
    savemat(
        folder / "setid.mat",
        {name: rng.permutation(part).astype(np.uint16)[None] for name, part in parts.items()},
    )
    table = species_table(config.classes, config.seed)
    record = {
        "generator": VERSION,
        "config": config.model_dump(mode="json"),
        "classes": names(table, config.seed),
        "genus": [species.genus for species in table],
        "fine_of": [species.fine_of for species in table],
    }
    write_json(folder / "synthetic.json", record)
