"""`flowerray cache`: what is kept in FLOWERRAY_HOME, and what of it may go."""

from flowerray.cli.options import parse
from flowerray.config import Config
from flowerray.errors import UserError


def cache(words: list[str]) -> int:
    """`flowerray cache list` and `flowerray cache prune`."""
    from typing import Annotated

    import tyro
    from pydantic import Field

    from flowerray import cache as kept
    from flowerray.files import as_json

    class Listing(Config):
        as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
        """Print one JSON object instead of a table."""

    class Pruning(Listing):
        days: float = Field(30, ge=0)
        """What was not used for so long is removed."""
        max_gb: float = Field(20, ge=0)
        """Then the longest unused until so much is left."""
        dry_run: bool = False
        """Only say what would be removed."""

    if words[:1] in (["-h"], ["--help"]):
        print("usage: flowerray cache {list,prune}     what is kept, and what of it may go")
        return 0
    if words[:1] == ["list"]:
        options = parse(Listing, words[1:], "cache list", "What is kept in FLOWERRAY_HOME.")
        found, what = kept.items(), "kept"
    elif words[:1] == ["prune"]:
        about = "Removes what can be made again and was not used for long; never a RUN."
        options = pruning = parse(Pruning, words[1:], "cache prune", about)
        found = kept.prune(pruning.days, pruning.max_gb * 1e9, pruning.dry_run)
        what = "would be removed" if pruning.dry_run else "removed"
    else:
        raise UserError("say what to do: flowerray cache list, or flowerray cache prune.")
    if options.as_json:
        items = [{**item._asdict(), "path": str(item.path)} for item in found]
        print(as_json({"items": items, "bytes": sum(item.bytes for item in found)}))
    else:
        print(kept.listing(found, what))
    return 0
