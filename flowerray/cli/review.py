"""`flowerray methods` and `flowerray track`."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowerray.cli.options import end_of_logging
from flowerray.errors import UserError

if TYPE_CHECKING:
    from flowerray.methods import MethodFile


def methods(words: list[str]) -> int:
    """`flowerray methods`."""
    from flowerray import methods as files

    if words:
        if words in (["-h"], ["--help"]):
            print("usage: flowerray methods     lists the methods and what can be tuned in them")
            return 0
        raise UserError(f"methods takes no options: leave {' '.join(words)} out.")
    print(listing([files.get(name) for name in files.names()]))
    return 0


def track(words: list[str]) -> int:
    """`flowerray track sync RUN`; of a study or a comparison, all its trainings too."""
    from flowerray.tracking import sync

    if words[:1] in (["-h"], ["--help"]):
        print("usage: flowerray track sync RUN     sends to MLflow what it does not have yet")
        return 0
    if len(words) != 2 or words[0] != "sync":
        raise UserError("say what to send: flowerray track sync RUN.")
    path = Path(words[1])
    sync.send(path, strict=True)
    for note in sorted(path.glob("*/*/mlflow.json")):
        sync.send(note.parent, strict=True)
    end_of_logging(path)
    return 0


def listing(files: "Sequence[MethodFile]") -> str:
    """Each method with its summary and search space."""
    lines: list[str] = []
    for file in files:
        lines.append(textwrap.fill(f"{file.name}: {file.summary}", 80, subsequent_indent="  "))
        for name, space in file.space.items():
            if "choices" in space:
                text = ", ".join(map(str, space["choices"]))
            else:
                text = f"{space['low']} to {space['high']}" + (", log" if space.get("log") else "")
            lines.append(f"    {name:<28}{text}")
    return "\n".join(lines)
