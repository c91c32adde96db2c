"""`flowerray embed`."""

from pathlib import Path
from typing import Annotated

from flowerray.cli.options import parse
from flowerray.text import counted, visible

NAMED = 10
"""Unreadable photographs that are named."""


def embed(words: list[str]) -> int:
    """`flowerray embed RUN SOURCE --out DIR`."""
    import tyro

    from flowerray.cluster.embedding import EmbedConfig, embed_source
    from flowerray.files import as_json

    class Options(EmbedConfig):
        run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
        """A folder, an exported .pth, models:/... or runs:/..."""
        source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
        """A folder or a .tar file of photographs, here or by an address such as s3://bucket/folder;
        the .tar files (WebDataset shards) of a folder are read too."""
        out: Path
        """Folder for the parquet files; what is there already is not embedded again."""
        as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
        """Print one JSON object and nothing else."""

    about = "Embeddings of many photographs as parquet, on this machine or a cluster."
    options = parse(Options, words, "embed", about)
    out = options.out.expanduser().absolute()
    config = EmbedConfig.part_of(options)
    result = embed_source(options.run, options.source, out, config, options.as_json)
    if options.as_json:
        print(as_json(result))
        return 0
    known = f", {result['known']:,} were there" if result["known"] else ""
    print(f"{visible(str(out))}: {counted(result['added'], 'photograph')} embedded{known}")
    bad = list(result["unreadable"].items())
    for path, why in bad[:NAMED]:
        print(f"left out  {visible(path)} ({visible(why)})")
    if len(bad) > NAMED:
        print(f"left out  {len(bad) - NAMED:,} more, see {visible(str(out / 'unreadable.json'))}")
    return 0
