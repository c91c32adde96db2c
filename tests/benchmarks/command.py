"""The command line that a user would type, run by a benchmark."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


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
