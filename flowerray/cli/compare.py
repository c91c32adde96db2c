"""`flowerray compare`."""

from pathlib import Path
from typing import Annotated, Any

from flowerray.cli.options import (
    NOT_RESUMED,
    WHY_NOT_RESUMED,
    absolute_data,
    absolute_embedder,
    default_out,
    end_of_logging,
    given,
    parse,
    peek,
    refuse,
    resumable,
)


def compare(words: list[str]) -> int:
    """`flowerray compare [options]`."""
    import tyro

    from flowerray.cluster.session import own_gpus
    from flowerray.comparison.command import compare, read_options
    from flowerray.comparison.pictures import comparison_table
    from flowerray.comparison.plan import HEAD_IMAGES, CompareConfig
    from flowerray.files import as_json

    chosen = peek(words, resume={"type": Path}, **{"embedder.train": {"default": "all"}})
    resume = chosen["resume"]
    if resume is not None:
        refuse(words, NOT_RESUMED, WHY_NOT_RESUMED)
    start = CompareConfig() if resume is None else read_options(resume)
    if resume is None and chosen["embedder.train"] == "head":
        start = start.model_copy(update={"images": HEAD_IMAGES})

    class Options(CompareConfig):
        out: Path | None = None
        """A new folder for the comparison; by default runs/compare-TIME."""
        resume: Path | None = None
        """Continue this interrupted comparison; options must not differ from its options.json."""
        as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
        """Print one JSON object and nothing else."""

    about = (
        "Trains cross-entropy, center, siamese and triplet under one budget and compares them, and "
        "frozen features, on test: intervals over seeds, paired tests, cost."
    )
    options = parse(Options, words, "compare", about, default=Options(**dict(start)))
    changes: dict[str, Any] = {
        "data": absolute_data(options.data),
        "embedder": absolute_embedder(options.embedder),
    }
    if resume is None and not given(words, ["gpus"]):
        changes["gpus"] = own_gpus()
    for name in ("center", "siamese", "triplet"):
        if (study := getattr(options, name)) is not None:
            changes[name] = study.expanduser().absolute()
    out = (options.resume or options.out or default_out("compare")).expanduser().absolute()

    config = CompareConfig.part_of(options, **changes)
    with resumable("compare", out, "options.json"):
        content = compare(config, out, options.resume is not None, quiet=options.as_json)
    print(as_json(content) if options.as_json else comparison_table(content))
    if not options.as_json:
        print(f"\npicture   {out / 'compare.png'}")
    end_of_logging(out)
    return 0
