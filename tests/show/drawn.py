"""Figures caught before they become pixels."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def catch(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[Any]:
    """The figures that a module draws from now on, in place of their files."""
    figures: list[Any] = []

    def save(figure: Any, out_png: Path) -> Path:
        figures.append(figure)
        return out_png

    monkeypatch.setattr(module, "save", save)
    return figures
