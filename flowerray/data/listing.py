"""Photographs that a table lists: a .csv or .parquet file with a row an image.

Columns `path` (relative to the file) and `label`; where there are any, `split` (train, val, test,
or query and gallery), `group` (images of one plant, which no split tears apart) and `parent` (the
genus above a species). Others are not read. Letters: N images.
"""

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowerray.data.dataset import Dataset
from flowerray.data.folder import SUFFIXES
from flowerray.data.splits import SPLITS, Protocol, arrange, stratified, tagged
from flowerray.errors import UserError

COLUMNS = ("path", "label", "split", "group", "parent")
_GIVEN = {**SPLITS, "query": "test", "gallery": "gallery"}


class Row(NamedTuple):
    """One image."""

    line: int
    """Of the file, from 1; of a parquet file its row."""
    path: Path
    label: str
    split: str
    """Empty where the table has no split."""
    group: str
    parent: str


def is_listing(root: Path) -> bool:
    """Whether a data set is named by a table."""
    return root.suffix.lower() in (".csv", ".parquet") and not root.is_dir()


def read_listing(
    file: Path,
    train_per_class: int = 10,
    val_per_class: int = 10,
    seed: int = 0,
    protocol: Protocol = "official",
) -> Dataset:
    """The set that a table lists, with its own splits, or drawn as those of class folders are.

    Raises:
        UserError: the first line that cannot be used, and how many more; a split without images.
    """
    rows = _usable(file)
    if protocol == "notebooks":
        raise UserError(f"The protocol notebooks has no meaning for {file}; choose official.")
    classes, labels_N = _classes(rows)
    of_N = np.array([row.split for row in rows])
    fault = None
    if rows[0].split:
        parts = {name: np.flatnonzero(of_N == name) for name in ("train", "val", "test")}
        if empty := [name for name, part in parts.items() if not len(part)]:
            fault = f"no image for {' and '.join(empty)} in its column split."
    else:
        groups = [row.group or f"\0{row.line}" for row in rows]
        _, groups_N = np.unique(groups, return_inverse=True)
        parts = stratified(labels_N, train_per_class, val_per_class, seed, groups_N)
        whole = set.intersection(*(set(labels_N[part].tolist()) for part in parts.values()))
        if small := set(range(len(classes))) - whole:
            fault = (
                f"too few images (or groups) of {len(small)} classes to train, validate and test "
                f"(the first is {classes[min(small)]}): add some, or lower `data.train_per_class` "
                "or `data.val_per_class`."
            )
    if fault is not None and protocol != "disjoint":
        raise UserError(f"{file} has {fault}")
    splits = arrange(protocol, parts, labels_N, seed)
    if len(gallery := np.flatnonzero(of_N == "gallery")):
        splits["gallery"] = gallery
    return _dataset(file, rows, splits, protocol)


def read_all_listed(file: Path) -> Dataset:
    """Every image in one split, "test"; where the table has queries and a gallery, those are kept.

    Raises:
        UserError: see `read_listing`.
    """
    rows = _usable(file)
    of_N = np.array([row.split for row in rows])
    splits = {"test": np.arange(len(rows))}
    if (of_N == "gallery").any() and (of_N == "test").any():
        splits = {name: np.flatnonzero(of_N == name) for name in ("test", "gallery")}
    return _dataset(file, rows, splits, "official")


def listed(file: Path) -> tuple[list[Row], list[str]]:
    """The rows that can be used, and what is wrong with others, by line.

    Raises:
        UserError: no such file, or no table with the columns `path` and `label`.
    """
    rows: list[Row] = []
    wrong: list[str] = []
    lines: dict[Path, int] = {}
    splits: dict[str, Row] = {}
    parents: dict[str, Row] = {}
    for line, values in _records(file):
        name, label = values["path"], values["label"]
        given = values["split"].lower()
        path = file.parent / name
        row = Row(line, path, label, _GIVEN.get(given, ""), values["group"], values["parent"])
        fault = _fault(file, row, name, given)
        if fault is None and (earlier := lines.setdefault(path, line)) != line:
            fault = f"{name} stands in line {earlier} already"
        if fault is None and row.group:
            other = splits.setdefault(row.group, row)
            if (other.split, other.label) != (row.split, row.label):
                what = "class" if other.label != row.label else "split"
                fault = f"group {row.group} is in another {what} than in line {other.line}"
        if fault is None and (other := parents.setdefault(label, row)).parent != row.parent:
            fault = f"label {label} has another parent than in line {other.line}"
        if fault is None and rows and bool(rows[0].split) != bool(row.split):
            fault = f"split is {'given' if row.split else 'missing'}, unlike in line {rows[0].line}"
        if fault is None:
            rows.append(row)
        else:
            wrong.append(f"{file.name}, line {line}: {fault}")
    return rows, wrong


def _fault(file: Path, row: Row, name: str, given: str) -> str | None:
    if not name or not row.label:
        return f"{'label' if name else 'path'} is empty"
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return f"{name} does not lie below the table: put the table above its images"
    if row.path.suffix.lower() not in SUFFIXES:
        return f"{name} is no image by its name: accepted are {', '.join(SUFFIXES)}"
    if not row.path.is_file():
        return f"{name} is not there, or no file"
    if given and not row.split:
        return f"split {given} is none of {', '.join(_GIVEN)}"
    return None


def _records(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line and the columns of each row, stripped; a column that is not there is empty."""
    try:
        if file.suffix.lower() == ".parquet":
            yield from _parquet(file)
        else:
            yield from _csv(file)
    except FileNotFoundError:
        raise UserError(f"{file} is not there; give a folder, a .csv or a .parquet file.") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{file} cannot be read as a table ({reason}): write it anew.") from error


def _csv(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with file.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        names = [name.strip().lower() for name in next(reader, [])]
        _refuse_columns(file, names)
        for values in reader:
            if not any(values):
                continue
            if len(values) != len(names):
                raise UserError(
                    f"{file}, line {reader.line_num}: {len(values)} values for {len(names)} "
                    "columns; put a value that holds a comma in double quotes."
                )
            found = {n: v.strip() for n, v in zip(names, values, strict=True) if n in COLUMNS}
            yield reader.line_num, dict.fromkeys(COLUMNS, "") | found


def _parquet(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        names = {name.strip().lower(): name for name in parquet.read_schema(file).names}
        _refuse_columns(file, list(names))
        chosen = [name for name in COLUMNS if name in names]
        table = parquet.read_table(file, columns=[names[name] for name in chosen])
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error
    columns = [column.to_pylist() for column in table.columns]
    for number, values in enumerate(zip(*columns, strict=True), start=1):
        texts = ("" if value is None else str(value).strip() for value in values)
        yield number, dict.fromkeys(COLUMNS, "") | dict(zip(chosen, texts, strict=True))


def _refuse_columns(file: Path, names: list[str]) -> None:
    if lacking := [name for name in ("path", "label") if name not in names]:
        raise UserError(
            f"{file} has no column {' or '.join(lacking)}; its first line names "
            f"{', '.join(names)[:200] or 'none'} (columns are parted by commas)."
        )


def _usable(file: Path) -> list[Row]:
    rows, wrong = listed(file)
    if wrong:
        more = f" and {len(wrong) - 1} more faults, which `flowerray data check` lists"
        raise UserError(f"{wrong[0]}{more * (len(wrong) > 1)}.")
    if not rows:
        raise UserError(f"{file} lists no image.")
    return rows


def _classes(rows: list[Row]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    names, labels_N = np.unique([row.label for row in rows], return_inverse=True)
    return tuple(map(str, names)), labels_N


def _dataset(
    file: Path, rows: list[Row], splits: dict[str, NDArray[np.int64]], protocol: str
) -> Dataset:
    paths, (classes, labels_N) = tuple(row.path for row in rows), _classes(rows)
    found = Dataset(file.parent, "table", protocol, paths, labels_N, classes, splits, table=file)
    parents = {row.label: row.parent for row in rows}
    if any(parents.values()):
        found = replace(found, parents=tuple(parents[name] for name in classes))
    return tagged(found)
