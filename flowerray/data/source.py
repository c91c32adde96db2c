"""From one configuration to a data set, whatever its kind; and the check of a set on disk."""

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from filelock import FileLock
from pydantic import Field
from tqdm import tqdm

from flowerray import files
from flowerray.config import Config
from flowerray.data import folder, listing, oxford
from flowerray.data.dataset import Dataset
from flowerray.data.images import decoding_map, examine
from flowerray.data.splits import Protocol
from flowerray.errors import UserError
from flowerray.pool import leave_unguarded
from flowerray.rendered.synthetic import VERSION, SyntheticConfig, is_complete, synthesize


class DataConfig(Config):
    """Which photographs, and how they are split."""

    root: Path | None = None
    """Folder in the Oxford layout, or with one folder of images per class, or a .csv or .parquet
    file that lists images; None = the synthetic set, rendered once."""
    protocol: Protocol = "official"
    """official = a small train, a val, a large test; trainval = train and val train, no val;
    disjoint = other classes test; notebooks = train and test exchanged (Oxford layout only)."""
    train_per_class: int = Field(10, ge=1)
    """Images of each class that train (class folders, and tables without splits)."""
    val_per_class: int = Field(10, ge=1)
    """Images of each class that validate, likewise; the rest tests."""
    seed: int = Field(0, ge=0)
    """Of the split of class folders, and of the classes that `disjoint` validates on."""
    views: int = Field(8, ge=0, le=10_000)
    """Augmented views of each training image whose features are kept where only the head is trained
    (`--embedder.train head`), beside those of its centre crop."""
    synthetic: SyntheticConfig = SyntheticConfig()
    """The set that is rendered where `root` is None."""


def open_dataset(config: DataConfig, progress: bool = True) -> Dataset:
    """Opens the configured set; renders the synthetic one first where it is needed and absent.

    Raises:
        UserError: see `read_oxford`, `read_folder`, `read_listing` and `synthesize`.
    """
    root = config.root
    if root is None:
        root = _synthetic_root(config.synthetic, progress)
    if oxford.is_oxford(root):
        return oxford.read_oxford(root, config.protocol, config.seed)
    read = listing.read_listing if listing.is_listing(root) else folder.read_folder
    return read(root, config.train_per_class, config.val_per_class, config.seed, config.protocol)


def open_all(root: Path, beside: bool = False) -> Dataset:
    """A set of any layout with every image in one split, "test"; of a table with queries and a
    gallery those.

    Args:
        beside: see `read_all`.

    Raises:
        UserError: see `read_oxford`, `read_all` and `read_listing`.
    """
    if listing.is_listing(root):
        return listing.read_all_listed(root)
    if not oxford.is_oxford(root):
        return folder.read_all(root, beside)
    dataset = oxford.read_oxford(root)
    return replace(dataset, splits={"test": np.arange(len(dataset.paths))})


def refuse_inside(out: Path, root: Path | None) -> None:
    """Raises UserError where `out` lies in a set that is told by its folders."""
    if root is None or oxford.is_oxford(root):
        return
    if root.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(
            f"`out` {out} lies in the data set {root} and would become a part of it: "
            "choose a folder elsewhere."
        )


def check_dataset(
    root: Path, progress: bool = True, examined: Mapping[Path, tuple[str, str | None]] | None = None
) -> list[str]:
    """Reads every file of a set and lists what is wrong with it, by file name.

    Unreadable and truncated images, labels or splits that break the layout's rules, a class with
    one image, the same file in two classes or in two splits; of class folders, which are split by
    chance, any file that is there twice, and images that are overlooked.

    Args:
        examined: what `examine` found in files that were read before.

    Raises:
        UserError: there is nothing that could be checked.
    """
    root = Path(root)
    known = set()
    if oxford.is_oxford(root):
        tables = oxford.read_tables(root)
        known = set(oxford.twins(root, tables))
        problems = oxford.faults(root, tables) + oxford.oddities(root, tables)
        listed = oxford.listed_files(root, tables)
    elif listing.is_listing(root):
        rows, problems = listing.listed(root)
        listed = [(row.path, row.label, row.split) for row in rows]
        root = root.parent
    else:
        problems, listed = [], []
        for part, place in (folder.given_parts(root) or {"": root}).items():
            found = folder.class_files(place)
            problems += [f"{part}: {why}" if part else why for why in folder.faults(place, found)]
            listed += [(path, name, part) for name, paths in found.items() for path in paths]
    count = Counter(name for _, name, _ in listed)
    problems += [f"{name} has a single image" for name in sorted(count) if count[name] == 1]
    return problems + _file_problems(root, listed, progress, examined or {}, known)


def remarks(root: Path) -> list[str]:
    """What is odd in a set and nobody's fault."""
    if not oxford.is_oxford(root):
        return []
    tables = oxford.read_tables(root)
    split = {path: name for path, _, name in oxford.listed_files(root, tables)}
    pairs = [
        f"{a.stem} ({split[a]}) = {b.stem} ({split[b]})" for a, b in oxford.twins(root, tables)
    ]
    text = (
        f"as every copy of Oxford's set, this one has {len(pairs)} pairs of equal files in two "
        f"splits, {', '.join(pairs)}: too few to be felt, and nothing is to be done."
    )
    return [text] if pairs else []


def _file_problems(
    root: Path,
    listed: list[tuple[Path, str, str]],
    progress: bool,
    examined: Mapping[Path, tuple[str, str | None]],
    known: Container[tuple[Path, Path]],
) -> list[str]:
    """Damaged files, and equal files where they do harm; `listed` holds path, class and split,
    `known` pairs that may be equal.
    """
    problems = []
    first: dict[str, tuple[Path, str, str]] = {}
    new = [path for path, _, _ in listed if path not in examined]
    bar = tqdm(
        total=len(new), desc="checking images", unit="img", disable=None if progress else True
    )
    with bar, decoding_map(len(new)) as run:
        results = iter(run(examine, new))
        for path, name, split in listed:
            if (result := examined.get(path)) is None:
                result = next(results)
                bar.update()
            digest, fault = result
            short = path.relative_to(root).as_posix()
            if fault is not None:
                problems.append(f"{short} cannot be read as an image ({fault})")
                continue
            other, other_name, other_split = first.setdefault(digest, (path, name, split))
            if (other, path) in known:
                continue
            same = f"{short} is the same file as {other.relative_to(root).as_posix()}"
            if name != other_name:
                problems.append(f"{same} and labelled {name} against {other_name}")
            elif split != other_split:
                problems.append(f"{same} and in {split} against {other_split}")
            elif not split and path != other:
                problems.append(f"{same}, and one may train where the other tests")
    return problems


def _synthetic_root(config: SyntheticConfig, progress: bool) -> Path:
    """The rendered set of a config under `files.home()`, rendered now if it is not there."""
    name = (
        f"v{VERSION}-{config.classes}-classes-seed-{config.seed}"
        f"-scale-{config.scale}-{config.size}px"
    )
    root = files.home() / "synthetic" / name
    if is_complete(root, config):
        return root
    leave_unguarded()
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root.with_name(f"{name}.lock")):  # several workers of a node may ask at once
            return synthesize(root, config, progress)
    except OSError as error:
        raise UserError(
            f"The synthetic set cannot be written to {root.parent} ({error.strerror}); "
            "set FLOWERRAY_HOME to a folder that you may write to."
        ) from error
