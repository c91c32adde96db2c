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
    """"oxford", "synthetic" or "folder"."""
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
    """"train", "val", "test" -> indices into `paths`, ascending. "val" is absent in `trainval`."""
    masks: tuple[Path, ...] | None = None
    """N segmentation files (Oxford's segmim/), or None."""
    tags: dict[str, str] = field(default_factory=dict)
    """Facts worth logging beside a run: fingerprint, md5 of setid.mat, generator settings."""

    def split_labels(self, split: str) -> NDArray[np.int64]:
        """Labels of one split, in the order of its indices."""
        return self.labels_N[self.splits[split]]
