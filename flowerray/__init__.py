"""flowerray: image-similarity models that are trained, tuned, hardened, measured and explained.

`flowerray.load(RUN_or_file)` gives a trained `Embedder`: float32 pixels in [0,1] (BCHW) in,
unit-norm embeddings (BD) out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowerray import description
    from flowerray.opening import load

    __version__ = description.VERSION

__all__ = ["__version__", "load"]

_FROM = {"__version__": ("description", "VERSION"), "load": ("opening", "load")}
"""Where each name comes from: loaded when it is asked for."""


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module 'flowerray' has no attribute {name!r}")
    module, own = _FROM[name]
    return getattr(import_module(f"flowerray.{module}"), own)


def __dir__() -> list[str]:
    return __all__
