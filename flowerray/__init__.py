"""flowerray: image-similarity models that are trained, tuned, hardened, measured and explained.

    import flowerray as fr
    run = fr.train("triplet", data="FLOWERS", out="runs/mine")
    embedder = fr.load("runs/mine")  # float32 pixels in [0,1] (BCHW) -> unit vectors (BD)
    print(fr.evaluate(fr.embed(embedder, photographs), labels))

Everything is loaded when it is asked for: docs/python.md describes it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowerray import description, losses, methods
    from flowerray.api import attack, evaluate, explain_pair, train
    from flowerray.errors import FlowerrayError, UserError
    from flowerray.opening import embed, load

    __version__ = description.VERSION

__all__ = [
    "FlowerrayError",
    "UserError",
    "__version__",
    "attack",
    "embed",
    "evaluate",
    "explain_pair",
    "load",
    "losses",
    "methods",
    "train",
]

_FROM = {
    "api": ("attack", "evaluate", "explain_pair", "train"),
    "errors": ("FlowerrayError", "UserError"),
    "opening": ("embed", "load"),
}
"""Where each name comes from."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("flowerray.description").VERSION
    if name in ("losses", "methods"):
        return import_module(f"flowerray.{name}")
    for module, names in _FROM.items():
        if name in names:
            return getattr(import_module(f"flowerray.{module}"), name)
    raise AttributeError(f"module 'flowerray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
