"""The user's own photographs: one folder per class, its name the class's name.

Letters: N images.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowerray.data.dataset import Dataset
from flowerray.data.splits import Protocol, arrange, tags
from flowerray.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""Files that count as photographs, in any case."""
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
    folder are ignored. The splits depend on the file names and the seed alone.

    Args:
        root: the folder of the class folders.
        train_per_class: images of each class that train.
        val_per_class: images of each class that validate; the rest tests.
        seed: of the draw.
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
    found = class_files(root)
    if len(found) < 2:
        raise UserError(
            f"{root} must hold one folder of images per class, at least two, and holds "
            f"{len(found)}; accepted are {', '.join(SUFFIXES)}."
        )
    least = train_per_class + val_per_class + 1
    small = [f"{name} ({len(files)})" for name, files in found.items() if len(files) < least]
    if small and protocol != "disjoint":  # which uses every image of a class
        more = f" and {len(small) - _NAMED} more" if len(small) > _NAMED else ""
        raise UserError(
            f"Each class in {root} needs at least {least} images ({train_per_class} to train, "
            f"{val_per_class} to validate, 1 to test), and these have fewer: "
            f"{', '.join(small[:_NAMED])}{more}; add images, or lower --data.train-per-class or "
            "--data.val-per-class."
        )
    if empty := [name for name, files in found.items() if not files]:
        raise UserError(
            f"These class folders in {root} hold no image: {', '.join(empty[:_NAMED])}"
            f"{f' and {len(empty) - _NAMED} more' if len(empty) > _NAMED else ''}; remove them, or "
            "fill them."
        )
    paths, labels_N = _flatten(found)
    parts: dict[str, list[NDArray[np.int64]]] = {"train": [], "val": [], "test": []}
    ends = (train_per_class, train_per_class + val_per_class)
    first = np.cumsum([len(files) for files in found.values()])[:-1]
    for c, of_class in enumerate(np.split(np.arange(len(paths)), first)):
        drawn = np.random.default_rng((seed, c)).permutation(of_class)
        for part, indices in zip(parts.values(), np.split(drawn, ends), strict=True):
            part.append(indices)
    whole = {name: np.concatenate(part) for name, part in parts.items()}
    splits = arrange(protocol, whole, labels_N, seed)
    return _dataset(root, protocol, paths, labels_N, tuple(found), splits)


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
    found = {name: files for name, files in class_files(root).items() if files}
    if beside or not found:
        loose = images(root)
        if loose:
            found[root.name] = sorted([*found.get(root.name, ()), *loose])
    paths, labels_N = _flatten(found)
    if not paths:
        raise UserError(
            f"{root} holds no images, neither in folders per class nor itself; accepted are "
            f"{', '.join(SUFFIXES)}."
        )
    return _dataset(
        root, "official", paths, labels_N, tuple(found), {"test": np.arange(len(paths))}
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
            raise UserError(
                f"{root} holds {name}, whose name is not UTF-8, as tables and MLflow need it: "
                "rename it."
            ) from error
    return found


def faults(root: Path, found: dict[str, list[Path]]) -> list[str]:
    """What is wrong with the class folders, apart from the images themselves."""
    few = [f"{root} has {len(found)} class folders and needs at least two"] * (len(found) < 2)
    empty = [
        f"{name} has no image ({', '.join(SUFFIXES)})" for name, files in found.items() if not files
    ]
    overlooked = []
    for path in images(root):
        overlooked.append(f"{path.name} is left out: it lies beside the class folders")
    for name in found:
        for entry in sorted((root / name).iterdir()):
            suffix = entry.suffix.lower()
            if not _is_shown(entry):
                continue
            if entry.is_dir():
                inside = sum(p.suffix.lower() in SUFFIXES for p in entry.rglob("*"))
                if inside:
                    overlooked.append(
                        f"{name}/{entry.name} is left out with its {inside} images: a class is one "
                        "folder, without others inside"
                    )
                continue
            if suffix in SUFFIXES and not entry.exists():
                overlooked.append(f"{name}/{entry.name} is a link to a file that is not there")
            elif suffix not in SUFFIXES and suffix in Image.registered_extensions():
                overlooked.append(
                    f"{name}/{entry.name} is left out: accepted are {', '.join(SUFFIXES)}"
                )
    return few + empty + overlooked


def images(folder: Path) -> list[Path]:
    """The image files in a folder itself, sorted."""
    files = (entry for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES)
    return sorted(file for file in files if file.is_file() and _is_shown(file))


def _is_shown(path: Path) -> bool:
    return not path.name.startswith(".")


def _flatten(found: dict[str, list[Path]]) -> tuple[tuple[Path, ...], NDArray[np.int64]]:
    paths = tuple(path for files in found.values() for path in files)
    counts = [len(files) for files in found.values()]
    return paths, np.repeat(np.arange(len(counts)), counts)


def _dataset(
    root: Path,
    protocol: str,
    paths: tuple[Path, ...],
    labels_N: NDArray[np.int64],
    classes: tuple[str, ...],
    splits: dict[str, NDArray[np.int64]],
) -> Dataset:
    return Dataset(
        root=root,
        kind="folder",
        protocol=protocol,
        paths=paths,
        labels_N=labels_N,
        classes=classes,
        splits=splits,
        tags=tags(root, "folder", protocol, paths, labels_N, splits, {}),
    )
