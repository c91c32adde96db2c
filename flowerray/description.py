"""How a run is told apart from others: its options by dotted name, versions, commit."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

VERSION = "0.2.0"
"""flowerray's own."""

PACKAGES = ("flowerray", "torch", "timm", "ray", "optuna", "mlflow")


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"method": {"margin": 0.2}} as {"method.margin": 0.2}."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def describe(
    run_dir: Path, name: str, params: dict[str, Any], tags: dict[str, str]
) -> dict[str, Any]:
    """Name, flat parameters and tags of a run; tags given go before our own."""
    own = {"flowerray.training.run": str(run_dir), "mlflow.source.name": "flowerray"}
    own |= {f"version.{p}": found for p in PACKAGES if (found := installed(p))}
    if checkout := commit():
        own |= {"git_commit": checkout}
        own |= {"mlflow.source.git.commit": checkout.removesuffix("-dirty")}
    return {"name": name, "params": flatten(params), "tags": own | tags}


def installed(package: str) -> str:
    """A package's version, or "" where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def commit() -> str | None:
    """Of the checkout that flowerray runs from, if it runs from one; with `-dirty` behind it where
    its files differ from that commit.
    """
    checkout = Path(__file__).parent.parent
    if not (checkout / ".git").exists():
        return None
    command = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    try:
        done = subprocess.check_output(
            command, cwd=checkout, stderr=subprocess.DEVNULL, timeout=5, text=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.strip()
