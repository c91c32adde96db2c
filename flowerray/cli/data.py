"""`flowerray data`."""

from pathlib import Path
from typing import Annotated

from flowerray.cli.options import parse
from flowerray.errors import UserError


def data(words: list[str]) -> int:
    """`flowerray data {synthesize,fetch,check}`."""
    verbs = {"synthesize": synthesize, "fetch": fetch, "check": check}
    if words[:1] in (["-h"], ["--help"]):
        print(
            "usage: flowerray data VERB\n\n"
            "  synthesize   render flowers in the Oxford layout: --out DIR --classes N\n"
            "  fetch        download Oxford Flowers-102 and verify it: --out DIR\n"
            "  check        verify a data set: DIR"
        )
        return 0
    if not words or words[0] not in verbs:
        wrong = f"there is no {words[0]!r}; " if words else ""
        raise UserError(f"{wrong}say what to do: flowerray data {' | '.join(verbs)}.")
    return verbs[words[0]](words[1:])


def synthesize(words: list[str]) -> int:
    """`flowerray data synthesize --out DIR`."""
    from flowerray.rendered.synthetic import SyntheticConfig, synthesize

    class Options(SyntheticConfig):
        out: Path
        """A new folder for the set."""

    options = parse(
        Options, words, "data synthesize", "Renders flowers in the Oxford layout, with masks."
    )
    print(synthesize(options.out.expanduser().absolute(), SyntheticConfig.part_of(options)))
    return 0


def fetch(words: list[str]) -> int:
    """`flowerray data fetch --out DIR`."""
    from flowerray.config import Config
    from flowerray.data.oxford import fetch

    class Options(Config):
        out: Path
        """A folder for the set; a download that was cut goes on from where it stopped."""

    options = parse(
        Options, words, "data fetch", "Downloads Oxford Flowers-102 (330 MB and 200 MB of masks)."
    )
    fetch(options.out.expanduser().absolute())
    print(options.out)
    return 0


def check(words: list[str]) -> int:
    """`flowerray data check DIR`."""
    import tyro

    from flowerray.config import Config
    from flowerray.data.source import check_dataset, remarks
    from flowerray.text import labelled, visible

    class Options(Config):
        root: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
        """Oxford's layout, or one folder a class."""

    options = parse(
        Options, words, "data check", "Lists what is wrong with a data set, file by file."
    )
    problems = check_dataset(options.root)
    for problem in problems:
        print(visible(problem))
    for remark in remarks(options.root):
        print(labelled("known", remark))
    print(
        f"{options.root}: {len(problems)} problems"
        if problems
        else f"{options.root}: no problem found"
    )
    return 1 if problems else 0
