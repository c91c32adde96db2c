"""The user's own photographs: one folder per class, its name the class's name.

Letters: N images.
"""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowerray.data.dataset import Dataset
from flowerray.data.images import HEIC, unlike_file
from flowerray.data.splits import SPLITS, Protocol, arrange, stratified, tagged
from flowerray.errors import UserError
from flowerray.text import counted, some

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", *[".heic", ".heif"] * HEIC)
"""Files that count as photographs, in any case."""
_OTHERS = {
    *Image.registered_extensions(),
    *".heic .heif .avif .jxl .arw .cr2 .cr3 .dng .nef .orf .pef .raf .rw2 .srw".split(),
}
"""Photographs that are not read; a check names them."""
_NAMED = 5  # small classes that an error lists


def read_folder(
    root: Path,
    train_per_class: int = 10,
    val_per_class: int = 10,
    seed: int = 0,
    protocol: Protocol = "official",
) -> Dataset:
    """Reads class folders and draws stratified splits.

    Labels follow the sorted folder names. Hidden files, other suffixes and folders inside a class
    folder are ignored. The splits depend on the file names and the seed alone. Where `root` holds
    train, val (or valid, validation) and test with the class folders inside, those are the splits.

    Args:
        protocol: "official" is this draw; see `arrange`. "notebooks" exists for Oxford only.

    Raises:
        UserError: no folder, fewer than two classes, a class too small for its split, or the
            protocol "notebooks".
    """
    root = Path(root)
    if protocol == "notebooks":
        raise UserError(
            "The protocol notebooks repeats tables on Oxford Flowers-102 and has no meaning for "
            f"the folder {root}; choose official, trainval or disjoint."
        )
    if parts := given_parts(root):
        return _read_parts(root, parts, protocol, seed)
    found = class_files(root)
    _refuse_deeper(root, found)
    if len(found) < 2:
        raise UserError(
            f"{root} must hold one folder of images per class, at least two, and holds "
            f"{len(found)}; accepted are {', '.join(SUFFIXES)}."
        )
    least = train_per_class + val_per_class + 1
    small = [f"{name} ({len(files)})" for name, files in found.items() if len(files) < least]
    if small and protocol != "disjoint":  # which uses every image of a class
        raise UserError(
            f"Each class in {root} needs at least {least} images ({train_per_class} to train, "
            f"{val_per_class} to validate, 1 to test), and these have fewer: "
            f"{some(small, _NAMED)}; add images, or lower `data.train_per_class` or "
            "`data.val_per_class`."
        )
    if empty := [name for name, files in found.items() if not files]:
        raise UserError(
            f"These class folders in {root} hold no image: {some(empty, _NAMED)}; remove them, or "
            "fill them."
        )
    paths, labels_N = _flatten(found)
    whole = stratified(labels_N, train_per_class, val_per_class, seed)
    splits = arrange(protocol, whole, labels_N, seed)
    return tagged(Dataset(root, "folder", protocol, paths, labels_N, tuple(found), splits))


def read_all(root: Path, beside: bool = False) -> Dataset:
    """Reads every image of a folder into one split, "test": a gallery, or a set to evaluate on.

    Images that lie in `root` itself form one class, named as `root` is, where there are no class
    folders.

    Args:
        beside: take them too where there are.

    Raises:
        UserError: no folder, or no images.
    """
    root = Path(root)
    if parts := given_parts(root):
        dataset = _read_parts(root, parts, "official", 0)
        return tagged(replace(dataset, splits={"test": np.arange(len(dataset.paths))}))
    found = class_files(root)
    if not images(root):
        _refuse_deeper(root, found)
    found = {name: files for name, files in found.items() if files}
    if (beside or not found) and (loose := images(root)):
        found[root.name] = sorted([*found.get(root.name, ()), *loose])
    paths, labels_N = _flatten(found)
    if not paths:
        raise UserError(
            f"{root} holds no images, neither in folders per class nor itself; accepted are "
            f"{', '.join(SUFFIXES)}."
        )
    splits = {"test": np.arange(len(paths))}
    return tagged(Dataset(root, "folder", "official", paths, labels_N, tuple(found), splits))


def given_parts(root: Path) -> dict[str, Path] | None:
    """split -> its folder of class folders, where that is all that `root` holds; else None."""
    if not root.is_dir():
        return None
    folders = [entry for entry in root.iterdir() if entry.is_dir() and _is_shown(entry)]
    parts = {SPLITS.get(folder.name.lower(), folder.name): folder for folder in folders}
    whole = parts.keys() == set(SPLITS.values()) and len(folders) == len(parts)
    return parts if whole and all(_deeper(folder) for folder in folders) else None


def _read_parts(root: Path, parts: dict[str, Path], protocol: Protocol, seed: int) -> Dataset:
    found = {name: class_files(parts[name]) for name in ("train", "val", "test")}
    classes = sorted({label for of_part in found.values() for label in of_part})
    if lacking := [label for label in classes if not found["train"].get(label)]:
        raise UserError(
            f"{parts['train']} has no image of {len(lacking)} classes that "
            f"{root} has elsewhere: {', '.join(lacking[:_NAMED])}; add some, or remove "
            f"{'it' if len(lacking) == 1 else 'them'}."
        )
    rows = [
        (path, label, part)
        for label, name in enumerate(classes)
        for part, of_part in found.items()
        for path in of_part.get(name, ())
    ]
    labels_N = np.array([label for _, label, _ in rows])
    of_N = np.array([part for _, _, part in rows])
    whole = {part: np.flatnonzero(of_N == part) for part in found}
    splits = arrange(protocol, whole, labels_N, seed)
    paths = tuple(path for path, _, _ in rows)
    return tagged(Dataset(root, "folder", protocol, paths, labels_N, tuple(classes), splits))


def _deeper(folder: Path) -> bool:
    """Whether the images of a folder lie in folders inside it."""
    return not images(folder) and any(
        entry.is_dir() and _is_shown(entry) and images(entry) for entry in folder.iterdir()
    )


def _refuse_deeper(root: Path, found: dict[str, list[Path]]) -> None:
    deeper = [name for name in found if _deeper(root / name)]
    if deeper and not any(found.values()):
        raise UserError(
            f"The images of {root} lie one level deeper, in folders inside "
            f"{', '.join(deeper[:3])}: name the folder of the class folders ({root / deeper[0]}), "
            "or bring train, val and test, of which each holds class folders: those are then the "
            "splits."
        )


def class_files(root: Path) -> dict[str, list[Path]]:
    """Sorted class names -> sorted image files (maybe none).

    Raises:
        UserError: `root` is not a folder; a class or a file whose name cannot be written down.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give the folder that holds the data set.")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and _is_shown(entry))
    found = {folder.name: images(folder) for folder in folders}
    for path in (*folders, *(file for files in found.values() for file in files)):
        try:
            path.name.encode()
        except UnicodeEncodeError as error:
            name = path.relative_to(root).as_posix().encode(errors="replace").decode()
            try:
                os.fsencode(path.name).decode()
            except UnicodeDecodeError:
                why = "whose name is not UTF-8, as tables and MLflow need it: rename it"
            else:
                why = "whose name this locale cannot read: export LC_ALL=C.UTF-8"
            raise UserError(f"{root} holds {name}, {why}.") from error
    return found


def faults(root: Path, found: dict[str, list[Path]]) -> list[str]:
    """What is wrong with the class folders, apart from the images themselves."""
    few = [f"{root} has {len(found)} class folders and needs at least two"] * (len(found) < 2)
    empty = [
        f"{name} has no image ({', '.join(SUFFIXES)})" for name, files in found.items() if not files
    ]
    overlooked = [
        f"{path.name} is left out: it lies beside the class folders" for path in images(root)
    ]
    for name in found:
        other: Counter[str] = Counter()
        for entry in sorted((root / name).iterdir()):
            suffix, here = entry.suffix.lower(), f"{name}/{entry.name}"
            if not _is_shown(entry):
                continue
            try:
                kind = unlike_file(entry.stat().st_mode)
            except OSError:
                if suffix in SUFFIXES:
                    overlooked.append(f"{here} is a link to a file that is not there")
                continue
            if entry.is_dir() and (inside := sum(map(_is_image, entry.rglob("*")))):
                overlooked.append(
                    f"{here} is left out with its {inside} images: a class is one folder, without "
                    "others inside"
                )
            elif kind is not None and (suffix in SUFFIXES or not entry.is_dir()):
                overlooked.append(f"{here} is left out: it is {kind}")
            elif kind is None and suffix not in SUFFIXES and suffix in {"", *_OTHERS}:
                other[suffix] += 1
        for suffix, count in sorted(other.items()):
            what = counted(count, f"{suffix} file".strip()) + " without extension" * (not suffix)
            heic = " (.heic where pillow-heif is installed)" * (suffix in (".heic", ".heif"))
            overlooked.append(f"{name}: {what} left out: accepted are {', '.join(SUFFIXES)}{heic}")
    return few + empty + overlooked


def images(folder: Path) -> list[Path]:
    """The image files in a folder itself, sorted."""
    return sorted(entry for entry in folder.iterdir() if _is_image(entry) and _is_shown(entry))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _is_shown(path: Path) -> bool:
    return not path.name.startswith(".")


def _flatten(found: dict[str, list[Path]]) -> tuple[tuple[Path, ...], NDArray[np.int64]]:
    paths = tuple(path for files in found.values() for path in files)
    counts = [len(files) for files in found.values()]
    return paths, np.repeat(np.arange(len(counts)), counts)
