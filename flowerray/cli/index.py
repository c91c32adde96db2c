"""`flowerray index`: photographs embedded once, to be searched."""

from pathlib import Path
from typing import Annotated

from flowerray.cli.options import parse, pick_device
from flowerray.errors import UserError

USAGE = """usage: flowerray index build RUN DIR --out INDEX   embed a folder's photographs
       flowerray index add INDEX PATH...           add photographs, or folders of them
       flowerray index remove INDEX PATH...        take some out again; the files stay
       flowerray index rebuild INDEX               embed all again, by a newer model
       flowerray index search INDEX PHOTO          which are most like a photograph
       flowerray index check INDEX                 is it whole, and what does its search find?"""


def index(words: list[str]) -> int:
    """`flowerray index build`, `add`, `remove`, `rebuild`, `search` and `check`."""
    import tyro
    from pydantic import Field

    from flowerray.calibration import PRIOR
    from flowerray.config import Config
    from flowerray.files import as_json

    class Shown(Config):
        as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
        """Print one JSON object and nothing else."""

    class Build(Shown):
        run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
        """A folder, an exported .pth, models:/... or runs:/..."""
        gallery: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
        """A folder of images, of class folders, or in the Oxford layout."""
        out: Path
        """A new folder for the INDEX."""

    class Check(Shown):
        folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
        """A folder that `flowerray index build` made."""

    class Change(Check):
        paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH...")]
        """Photographs, or folders of them; to add also a table, whose classes then count."""

    class Rebuild(Check):
        run: str | None = None
        """Another model: a RUN, an exported .pth, models:/... or runs:/...; by default the one that
        the INDEX was built with, where that address means another file now."""

    class Search(Check):
        photo: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PHOTO")]
        """The photograph to look for."""
        k: int = Field(10, ge=1)
        """Neighbours to show."""
        prior: float = Field(PRIOR, gt=0, lt=1)
        """Chance that two photographs show one class before they are seen, for the
        probabilities."""

    kinds = {
        "build": Build, "add": Change, "remove": Change, "rebuild": Rebuild, "search": Search,
        "check": Check,
    }  # fmt: skip
    if words[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if not words or words[0] not in kinds:
        raise UserError(f"say what to do: flowerray index {{{','.join(kinds)}}}.")
    line = next(line for line in USAGE.splitlines() if f" index {words[0]} " in line)
    about = f"{line.rpartition('  ')[2].capitalize()}."
    options = parse(kinds[words[0]], words[1:], f"index {words[0]}", about)
    if not getattr(options, "paths", True):
        raise UserError(f"say what to {words[0]}: photographs, or folders of them, after INDEX.")
    from flowerray.index import command, table
    from flowerray.index.contents import open_index, read_manifest
    from flowerray.opening import open_model

    quiet, show, device = options.as_json, table.changed, pick_device("auto")
    match words[0]:
        case "build":
            model = open_model(options.run, device)
            result = command.build(model, options.gallery, options.out, quiet)
        case "add":
            result = command.add(options.folder, options.paths, device, quiet)
        case "remove":
            result = command.remove(options.folder, options.paths)
        case "rebuild":
            name = options.run or read_manifest(options.folder)["model"]["name"]
            result = command.rebuild(options.folder, open_model(name, device), quiet)
        case "search":
            found = open_index(options.folder)
            opened = command.model_of(found, device)
            result = command.search(found, opened, options.photo, options.k, options.prior)
            show = table.neighbours
        case _:
            result, show = command.check(options.folder), table.checked
    print(as_json(result) if options.as_json else show(result))
    return 0
