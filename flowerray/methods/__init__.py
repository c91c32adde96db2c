"""Metric-learning methods, one file each: a file in this folder is registered by its name."""

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowerray.errors import UserError

if TYPE_CHECKING:  # listing the names must not import torch
    from flowerray.methods._base import Method, MethodConfig


@dataclass(frozen=True)
class MethodFile:
    """What one method file declares."""

    name: str
    """The file's name; the word on the command line."""
    config: "type[MethodConfig]"
    method: "type[Method]"
    space: dict[str, dict[str, Any]]
    """Search space as plain data: dotted field -> {"low", "high", "log"} or {"choices"}."""
    export_name: str
    """The `<name>` in `best_model_<name>.pth`."""
    summary: str
    """The first line of the file's docstring."""


def names() -> list[str]:
    """Every method, sorted; files that begin with an underscore are not methods."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get(name: str) -> MethodFile:
    """The method file called `name`.

    Raises:
        UserError: no such file.
    """
    if name not in names():
        raise UserError(f"There is no method {name!r}; choose one of: {', '.join(names())}.")
    from flowerray.methods._base import Method, MethodConfig

    module = importlib.import_module(f"{__name__}.{name}")
    methods = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
    ]
    where = f"flowerray/methods/{name}.py"
    assert len(methods) == 1, f"{where} must define one Method subclass, found {len(methods)}"
    assert issubclass(module.Config, MethodConfig), f"{where}: Config must extend MethodConfig"
    assert module.__doc__, f"{where} needs a docstring that names the paper"
    return MethodFile(
        name=name,
        config=module.Config,
        method=methods[0],
        space=module.space,
        export_name=module.EXPORT_NAME,
        summary=module.__doc__.strip().splitlines()[0],
    )
