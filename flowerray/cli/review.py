"""`flowerray methods` and `flowerray track`."""

from pathlib import Path

from flowerray.cli.options import end_of_logging
from flowerray.errors import UserError


def methods(words: list[str]) -> int:
    """`flowerray methods`."""
    from flowerray import methods as files
    from flowerray import tables

    if words:
        if words in (["-h"], ["--help"]):
            print("usage: flowerray methods     lists the methods and what can be tuned in them")
            return 0
        raise UserError(f"methods takes no options: leave {' '.join(words)} out.")
    print(tables.methods([files.get(name) for name in files.names()]))
    return 0


def track(words: list[str]) -> int:
    """`flowerray track sync RUN`; of a study or a comparison, all its trainings too."""
    from flowerray import tracking

    if words[:1] in (["-h"], ["--help"]):
        print("usage: flowerray track sync RUN     sends to MLflow what it does not have yet")
        return 0
    if len(words) != 2 or words[0] != "sync":
        raise UserError("say what to send: flowerray track sync RUN.")
    path = Path(words[1])
    tracking.sync(path, strict=True)
    for note in sorted(path.glob("*/*/mlflow.json")):
        tracking.sync(note.parent, strict=True)
    end_of_logging(path)
    return 0
