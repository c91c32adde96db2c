"""INDEXes whose model is an alias of MLflow's registry, built again when that moves."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from flowerray.errors import FlowerrayError
from flowerray.index.command import rebuild
from flowerray.index.contents import read_manifest
from flowerray.opening import open_model
from flowerray.text import visible
from flowerray.tracking.registry import alias_version

SECONDS = 60.0
"""Between two looks at the registry."""


def versions(folders: Sequence[Path]) -> dict[Path, str]:
    """The version that the alias of each INDEX means now.

    Raises:
        UserError: one was built with no alias, or MLflow does not have it.
    """
    return {folder: alias_version(_alias(folder)) for folder in folders}


def follow(known: dict[Path, str]) -> NoReturn:
    """Looks for ever; what fails is said once, and tried again.

    Args:
        known: the versions that the INDEXes are by; "" is none.
    """
    torch.set_num_threads(1)  # the replicas answer meanwhile
    said = ""
    while True:
        try:
            for folder in known:
                known[folder] = take_over(folder, known[folder])
        except FlowerrayError as error:
            if (sentence := f"warning: {visible(str(error))}") != said:
                print(said := sentence, file=sys.stderr, flush=True)
        time.sleep(SECONDS)


def take_over(folder: Path, known: str) -> str:
    """Builds an INDEX again where its alias has moved from `known`; returns the version."""
    name = _alias(folder)
    if (version := alias_version(name)) != known:
        found = rebuild(folder, open_model(name, torch.device("cpu")), quiet=True)
        if "embedded" in found:
            count = found["photographs"]
            print(f"rebuilt   {count:,} photographs by version {version} of {name}", flush=True)
    return version


def _alias(folder: Path) -> str:
    return read_manifest(folder)["model"]["name"]
