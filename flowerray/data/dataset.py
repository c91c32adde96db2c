"""What every reader returns: labelled image files and a named split protocol."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Dataset:
    """Labelled photographs and their splits.

    Letters: N images, C classes.
    """

    root: Path
    """The folder that was read."""
    kind: str
    """"oxford", "synthetic", "folder" or "table"."""
    protocol: str
    """"official", "trainval", "disjoint" or "notebooks"; for a folder, "official" is its own
    stratified split.
    """
    paths: tuple[Path, ...]
    """N image files."""
    labels_N: NDArray[np.int64]
    """0-based class of each image."""
    classes: tuple[str, ...]
    """C class names; index = label."""
    splits: dict[str, NDArray[np.int64]]
    """"train", "val", "test" -> indices into `paths`, ascending. "val" is absent in `trainval`.
    A table may have "gallery"."""
    masks: tuple[Path, ...] | None = None
    """N segmentation files (Oxford's segmim/), or None."""
    tags: dict[str, str] = field(default_factory=dict)
    """Facts worth logging beside a run: fingerprint, md5 of setid.mat, generator settings."""
    table: Path | None = None
    """The file in `root` that lists the images, where one does."""
    parents: tuple[str, ...] | None = None
    """C names of what is above each class, such as a genus; None: not known."""

    @property
    def given(self) -> Path:
        """What opens it again."""
        return self.table or self.root

    def split_labels(self, split: str) -> NDArray[np.int64]:
        """Labels of one split, in the order of its indices."""
        return self.labels_N[self.splits[split]]
