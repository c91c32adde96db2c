"""Oxford Flowers-102: reads the layout, guards the real set against mix-ups, downloads it.

    jpg/image_00001.jpg  segmim/segmim_00001.jpg (optional)  imagelabels.mat  setid.mat

Nilsback and Zisserman, "Automated flower classification over a large number of classes", ICVGIP
2008. Files and labels count from 1 on disk and from 0 here; nothing else does that step. Rendered
sets (`synthetic.json` beside them) go through the same reader, without the real set's sizes.

Letters: N images, C classes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat

from flowerray.data.dataset import Dataset
from flowerray.data.download import download, md5_of, unpack
from flowerray.data.splits import Protocol, arrange, tagged
from flowerray.errors import UserError
from flowerray.files import read_json

CLASSES = tuple(
    """
    pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger
    lily, moon orchid, bird of paradise, monkshood, globe thistle, snapdragon, colt's foot, king
    protea, spear thistle, yellow iris, globe-flower, purple coneflower, peruvian lily, balloon
    flower, giant white arum lily, fire lily, pincushion flower, fritillary, red ginger, grape
    hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke, sweet william,
    carnation, garden phlox, love in the mist, mexican aster, alpine sea holly, ruby-lipped
    cattleya, cape flower, great masterwort, siam tulip, lenten rose, barbeton daisy, daffodil,
    sword lily, poinsettia, bolero deep blue, wallflower, marigold, buttercup, oxeye daisy, common
    dandelion, petunia, wild pansy, primula, sunflower, pelargonium, bishop of llandaff, gaura,
    geranium, orange dahlia, pink-yellow dahlia?, cautleya spicata, japanese anemone, black-eyed
    susan, silverbush, californian poppy, osteospermum, spring crocus, bearded iris, windflower,
    tree poppy, gazania, azalea, water lily, rose, thorn apple, morning glory, passion flower,
    lotus, toad lily, anthurium, frangipani, clematis, hibiscus, columbine, desert-rose, tree
    mallow, magnolia, cyclamen, watercress, canna lily, hippeastrum, bee balm, ball moss, foxglove,
    bougainvillea, camellia, mallow, mexican petunia, bromelia, blanket flower, trumpet creeper,
    blackberry lily
    """.replace("\n    ", " ").strip().split(", ")
)  # fmt: skip
"""The 102 names in the order of the labels, as Oxford publishes them."""
PARTS = {"train": "trnid", "val": "valid", "test": "tstid"}
"""Split -> its key in setid.mat: the small sets are train and val, the large one is test."""
SIZES = {"train": 1020, "val": 1020, "test": 6149}
"""Images of each official split of the real set."""
PER_CLASS = 10
"""Images of each class in train, and again in val."""
MD5 = {
    "102flowers.tgz": "52808999861908f626f3c1f4e79d11fa",
    "imagelabels.mat": "e0620be6f572b9609742df49c70aed4d",
    "setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c",
    "102segmentations.tgz": "51375996b6c4f367a4b9f4492d7ecef5",
}
"""Published files and their sums."""
TWINS = ((7307, 7309), (8067, 8077))
"""Images of the published set that are one file and lie in two official splits."""
URL = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102"
"""Where Oxford publishes them."""
_ARCHIVES = {"102flowers.tgz": "jpg", "102segmentations.tgz": "segmim"}
_FETCH = "fetch it with `flowerray data fetch --out DIR`"


@dataclass(frozen=True)
class Tables:
    """What lies on disk, as it is counted there: from 1."""

    labels_N: NDArray[np.int64]
    """Class of each image."""
    parts: dict[str, NDArray[np.int64]]
    """Split -> image numbers."""
    synthetic: dict | None
    """The generator's record, None for the real set."""


def is_oxford(root: Path) -> bool:
    """True for a folder in the Oxford layout, also where a part of it is missing."""
    root = Path(root)
    signs = ("imagelabels.mat", "setid.mat", "jpg/image_00001.jpg")
    return any((root / sign).exists() for sign in signs)


def read_oxford(root: Path, protocol: Protocol = "official", seed: int = 0) -> Dataset:
    """Reads and checks a set in the Oxford layout.

    Returns:
        A data set of kind "oxford", or "synthetic" where synthetic.json lies beside the files.

    Raises:
        UserError: the first of `faults`.
    """
    root = Path(root)
    tables = read_tables(root)
    for fault in faults(root, tables):
        raise UserError(f"{fault}.")
    labels_N = tables.labels_N - 1
    parts = {name: ids - 1 for name, ids in tables.parts.items()}
    splits = arrange(protocol, parts, labels_N, seed)
    photographs, segmim = root / "jpg", root / "segmim"
    numbers = range(1, len(labels_N) + 1)
    paths = tuple(photographs / image_name(number) for number in numbers)
    masks = None
    if not _lacking(segmim, len(labels_N)):
        masks = tuple(segmim / image_name(number, "segmim") for number in numbers)
    facts = {"setid_md5": md5_of(root / "setid.mat")}
    kind, classes = "oxford", CLASSES
    if tables.synthetic is not None:
        kind = "synthetic"
        classes = tuple(
            tables.synthetic.get("classes")
            or (f"class_{label + 1:03d}" for label in range(int(labels_N.max()) + 1))
        )
        facts["synthetic"] = json.dumps(tables.synthetic.get("config"), sort_keys=True)
    found = Dataset(root, kind, protocol, paths, labels_N, classes, splits, masks)
    return tagged(found, facts)


def fetch(
    out: Path, progress: bool = True, base_url: str = URL, md5: Mapping[str, str] = MD5
) -> Path:
    """Downloads the real set and its masks into `out`; what is there already is kept.

    A broken download goes on where it stopped, also in a later call. The archives are removed once
    they are unpacked.

    Returns:
        `out`, which `read_oxford` reads.

    Raises:
        UserError: `out` cannot be written, or holds another set; see `download` and `unpack`.
    """
    out = Path(out)
    _refuse_others(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("imagelabels.mat", "setid.mat"):
            download(f"{base_url}/{name}", out / name, md5[name], progress)
        total = len(_read_mat(out / "imagelabels.mat", ("labels",))["labels"])
        for archive, folder in _ARCHIVES.items():
            if not _lacking(out / folder, total):
                continue
            download(f"{base_url}/{archive}", out / archive, md5[archive], progress)
            unpack(out / archive, out / folder)
            if lacking := _lacking(out / folder, total):
                what = f"{out / archive} lacks {lacking[0]}"
                raise UserError(f"{what}; delete it and fetch it again.")
            (out / archive).unlink()
    except OSError as error:
        raise UserError(
            f"The set cannot be written to {out} ({error.strerror}); choose a folder with room "
            "that you may write to."
        ) from error
    return out


def _refuse_others(out: Path) -> None:
    """Refuses a folder whose content the archives would replace."""
    if (out / "synthetic.json").exists():
        raise UserError(f"{out} holds a rendered set: choose another `out`.")
    for folder in _ARCHIVES.values():
        names = sorted(e.name for e in (out / folder).iterdir()) if (out / folder).is_dir() else []
        kind = "image" if folder == "jpg" else folder
        others = [name for name in names if not re.fullmatch(rf"{kind}_\d{{5}}\.jpg", name)]
        if others:
            raise UserError(
                f"{out / folder} holds {others[0]}, which is none of Oxford's files and would be "
                "lost: choose another `out`."
            )


def image_name(number: int, folder: str = "jpg") -> str:
    """File name of the image, or in segmim/ of the mask, with this number, from 1."""
    return f"{'image' if folder == 'jpg' else folder}_{number:05d}.jpg"


def _lacking(folder: Path, total: int) -> list[str]:
    """Names of the images 1..total that a folder lacks."""
    present = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    names = (image_name(number, folder.name) for number in range(1, total + 1))
    return [name for name in names if name not in present]


def read_tables(root: Path) -> Tables:
    """The label and split files and the names of the photographs.

    Raises:
        UserError: one of them is missing or cannot be read.
    """
    for name in ("imagelabels.mat", "setid.mat", "jpg"):
        if not (root / name).exists():
            raise UserError(f"{root} lacks {name}, so the set is not complete; {_FETCH}.")
    labels_N = _read_mat(root / "imagelabels.mat", ("labels",))["labels"]
    setid = _read_mat(root / "setid.mat", tuple(PARTS.values()))
    synthetic = None
    if (root / "synthetic.json").exists():
        synthetic = read_json(root / "synthetic.json", advice="render the set again")
    return Tables(labels_N, {name: setid[key] for name, key in PARTS.items()}, synthetic)


def faults(root: Path, tables: Tables) -> list[str]:
    """What is wrong with labels, splits and the list of files; each a sentence without its dot.

    For the real set also what breaks its published numbers, first of all the exchange of the
    training and the test split that many programs carry.
    """
    labels_N, parts = tables.labels_N, tables.parts
    real = tables.synthetic is None
    found = []
    sizes = {name: len(ids) for name, ids in parts.items()}
    setid, labels_file = root / "setid.mat", root / "imagelabels.mat"
    if real and sizes == {"train": SIZES["test"], "val": SIZES["val"], "test": SIZES["train"]}:
        found.append(
            f"{setid} has its splits swapped: trnid must be the {SIZES['train']:,} training images "
            f"and tstid the {SIZES['test']:,} test images; {_FETCH}, or choose the protocol "
            "notebooks with the original file if you want the exchange"
        )
    elif real and sizes != SIZES:
        found.append(
            f"{setid} has splits of {_counts(sizes)} images and Oxford's have {_counts(SIZES)}; "
            f"{_FETCH}, or put other photographs into one folder per class"
        )
    last = len(CLASSES) if real else int(labels_N.max())
    low, high = int(labels_N.min()), int(labels_N.max())
    if low < 1 or high > last:
        found.append(
            f"{labels_file} holds labels {low}..{high} where the file counts 1..{last}: they are "
            f"shifted or not Oxford's; {_FETCH}"
        )
    elif absent := sorted(set(range(1, last + 1)) - set(labels_N.tolist())):
        found.append(f"{labels_file} holds no image of class {absent[0]}; {_FETCH}")
    if real and len(labels_N) != sum(SIZES.values()):
        found.append(
            f"{labels_file} labels {len(labels_N):,} images and Oxford's {sum(SIZES.values()):,}; "
            f"{_FETCH}"
        )
    found += _split_faults(setid, tables)
    if real and not found:
        for name in ("train", "val"):
            found += _class_faults(labels_N, name, parts[name])
    if missing := _lacking(root / "jpg", len(labels_N)):
        found.append(
            f"{root / 'jpg'} lacks {len(missing):,} of {len(labels_N):,} images, the first "
            f"{missing[0]}, so the set is not complete; {_FETCH}"
        )
    return found


def oddities(root: Path, tables: Tables) -> list[str]:
    """What a check reports and the reader bears: tables that are not Oxford's own, lost masks."""
    found = [
        f"{root / name} is not the file that Oxford publishes (md5 {md5_of(root / name)}); {_FETCH}"
        for name in _changed(root, tables)
    ]
    masks = root / "segmim"
    if masks.exists() and (lacking := _lacking(masks, len(tables.labels_N))):
        found.append(f"{masks} lacks {len(lacking):,} masks, the first {lacking[0]}; {_FETCH}")
    return found


def _changed(root: Path, tables: Tables) -> list[str]:
    """Tables that are not Oxford's own."""
    names = ("imagelabels.mat", "setid.mat") if tables.synthetic is None else ()
    return [name for name in names if md5_of(root / name) != MD5[name]]


def twins(root: Path, tables: Tables) -> list[tuple[Path, Path]]:
    """Equal files in two splits that every copy of the published set has; none of other sets."""
    if tables.synthetic is not None or _changed(root, tables):
        return []
    first, second = ([root / "jpg" / image_name(pair[side]) for pair in TWINS] for side in (0, 1))
    return list(zip(first, second, strict=True))


def listed_files(root: Path, tables: Tables) -> list[tuple[Path, str, str]]:
    """(path, class, split) of each image that is in the tables and on disk."""
    split_of = {int(number): name for name, ids in tables.parts.items() for number in ids}
    return [
        (path, f"class {label}", split_of.get(number, "no split"))
        for number, label in enumerate(tables.labels_N, 1)
        if (path := root / "jpg" / image_name(number)).exists()
    ]


def _split_faults(setid: Path, tables: Tables) -> list[str]:
    """Numbers outside the set, in no split, twice in one or in two."""
    found = []
    total = len(tables.labels_N)
    everything = np.concatenate(list(tables.parts.values()))
    outside = everything[(everything < 1) | (everything > total)]
    if len(outside):
        found.append(f"{setid} names image {outside[0]} and the set has images 1..{total:,}")
    for name, part in tables.parts.items():
        ids, counts = np.unique(part, return_counts=True)
        if (counts > 1).any():
            found.append(f"{setid} names {image_name(ids[counts > 1][0])} twice in {name}")
    for name, other in combinations(tables.parts, 2):
        shared = np.intersect1d(tables.parts[name], tables.parts[other])
        if len(shared):
            found.append(
                f"{setid} has {len(shared):,} images in both {name} and {other}, the first "
                f"{image_name(shared[0])}"
            )
    left_out = np.setdiff1d(np.arange(1, total + 1), everything)
    if len(left_out):
        found.append(
            f"{setid} leaves out {len(left_out):,} images, the first {image_name(left_out[0])}"
        )
    return found


def _class_faults(labels_N: NDArray[np.int64], name: str, ids: NDArray[np.int64]) -> list[str]:
    counts = np.bincount(labels_N[ids - 1], minlength=len(CLASSES) + 1)[1:]
    return [
        f"Class {c + 1} ({CLASSES[c]}) has {counts[c]} images in {name} and must have exactly "
        f"{PER_CLASS}: labels or splits are not Oxford's; {_FETCH}"
        for c in np.flatnonzero(counts != PER_CLASS)
    ]


def _counts(sizes: dict[str, int]) -> str:
    return " / ".join(f"{size:,}" for size in sizes.values())


def _read_mat(path: Path, keys: tuple[str, ...]) -> dict[str, NDArray[np.int64]]:
    try:
        content = loadmat(path)
        found = {key: np.asarray(content[key]).astype(np.int64).ravel() for key in keys}
    except Exception as error:  # SciPy's reader raises almost any class on a damaged file
        raise UserError(
            f"{path} cannot be read as Oxford's file with {', '.join(keys)} "
            f"({type(error).__name__}: {error}); {_FETCH}."
        ) from error
    for key, values in found.items():
        if not len(values):
            raise UserError(f"{path} has an empty {key}; {_FETCH}.")
    return found
