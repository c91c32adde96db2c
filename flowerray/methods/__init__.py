"""Metric-learning methods, one file each: a file in this folder is registered by its name, one from
outside by `register` or the entry point group `flowerray.methods`.
"""

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flowerray.errors import UserError

if TYPE_CHECKING:  # listing the names must not import torch
    from flowerray.methods._base import Loss, Method, MethodConfig, common_curves

__all__ = ["Loss", "Method", "MethodConfig", "common_curves", "get", "names", "register"]

GROUP = "flowerray.methods"
"""The entry point group: each entry's name is a method's, its value the module."""


@dataclass(frozen=True)
class MethodFile:
    """What one method file declares."""

    name: str
    """The file's name; the word on the command line."""
    config: "type[MethodConfig]"
    method: "type[Method]"
    space: dict[str, dict[str, Any]]
    """Search space as plain data: dotted field -> {"low", "high", "log"} or {"choices"}."""
    defaults: dict[str, dict[str, Any]]
    """Of `train` options, for a training of "all" and of a "head" of the default backbone."""
    export_name: str
    """The `<name>` in `best_model_<name>.pth`."""
    summary: str
    """The first line of the file's docstring."""


_registered: dict[str, MethodFile] = {}
"""Methods from outside, by name."""


def names() -> list[str]:
    """Every method, sorted; files that begin with an underscore are not methods."""
    return sorted({*_own(), *_registered, *entry_points(group=GROUP).names})


def get(name: str) -> MethodFile:
    """The method called `name`.

    Raises:
        UserError: there is none; one from outside that cannot be used.
    """
    if name in _registered:
        return _registered[name]
    if name in _own():
        return _declared(importlib.import_module(f"{__name__}.{name}"), name)
    for entry in entry_points(group=GROUP, name=name):
        try:
            module = entry.load()
        except Exception as error:  # it is somebody's own code
            raise UserError(
                f"method {name!r} comes from {entry.value}, which cannot be imported ({error}): "
                "repair or uninstall it."
            ) from error
        return register(module, name)
    raise UserError(f"There is no method {name!r}; choose one of: {', '.join(names())}.")


def register(module: ModuleType, name: str | None = None) -> MethodFile:
    """Makes a method from outside known in this process.

    The command line, and workers in other processes, find it only by an entry point of the group
    `flowerray.methods` in the package that holds it; a RUN of it can be opened only there, too.

    Args:
        module: what a file in flowerray/methods has: a docstring, `Config` (a MethodConfig), one
            `Method` subclass, and optionally `space`, `defaults` and
            `EXPORT_NAME`.
        name: by default the last part of the module's.

    Raises:
        UserError: a part is missing, or the name is taken.
    """
    name = name or module.__name__.rpartition(".")[2]
    file = _declared(module, name)
    known = _registered.get(name)
    if name in _own() or (known is not None and known.method.__module__ != module.__name__):
        raise UserError(f"there is a method {name!r} already: register it with another `name`.")
    _registered[name] = file
    return file


def name_of(config: "type[MethodConfig]") -> str:
    """The name of the method that a configuration is of."""
    for file in _registered.values():
        if file.config is config:
            return file.name
    return config.__module__.rpartition(".")[2]


def _own() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]


def _declared(module: ModuleType, name: str) -> MethodFile:
    from flowerray.methods._base import Method, MethodConfig

    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
    ]
    config = getattr(module, "Config", None)
    if not (module.__doc__ and len(found) == 1 and inspect.isclass(config)
            and issubclass(config, MethodConfig)):  # fmt: skip
        raise UserError(
            f"{module.__name__} is no method: it needs a docstring that names the paper, a Config "
            f"that extends MethodConfig, and one Method subclass (it has {len(found)})."
        )
    return MethodFile(
        name=name,
        config=config,
        method=found[0],
        space=getattr(module, "space", {}),
        defaults=getattr(module, "defaults", {}),
        export_name=getattr(module, "EXPORT_NAME", name),
        summary=module.__doc__.strip().splitlines()[0],
    )


def __getattr__(name: str) -> Any:
    if name not in __all__[:4]:  # what a method file from outside needs
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}._base"), name)
