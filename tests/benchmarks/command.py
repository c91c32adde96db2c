"""The command line that a user would type, run by a benchmark; and where a benchmark ran."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def flowerray(words: list[str], log: Path, env: Mapping[str, str] | None = None) -> None:
    """Runs `flowerray WORDS` to its end; what it prints is added to `log`.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        subprocess.run(
            [sys.executable, "-c", "from flowerray.cli import main; main()", *words],
            check=True, stdout=file, stderr=file, env=env,
        )  # fmt: skip


def about() -> dict[str, Any]:
    """What a benchmark's JSON begins with: the command, and the machine that it ran on."""
    return {
        "command": sys.argv,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }
