"""`flowerray explore`."""

from pathlib import Path
from typing import Annotated, Any

from flowerray.cli.options import default_out, end_of_logging, parse, pick_device


def explore(words: list[str]) -> int:
    """`flowerray explore DIR [options]`."""
    import tyro

    from flowerray.config import Config
    from flowerray.data.source import DataConfig
    from flowerray.data.splits import Protocol
    from flowerray.explore.maps import MapConfig
    from flowerray.model.embedder import EmbedderConfig

    start, maps = DataConfig(), MapConfig()

    class Options(Config):
        root: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
        """Oxford's layout, or one folder of images a class."""
        out: Path | None = None
        """A new folder for page, tables and pictures; by default runs/explore-TIME."""
        protocol: Protocol = start.protocol
        """How the set is split; see `flowerray train METHOD --help`."""
        train_per_class: int = start.train_per_class
        """Images of each class that train (class folders only)."""
        val_per_class: int = start.val_per_class
        """Images of each class that validate (class folders only)."""
        run: str | None = None
        """A trained model (RUN, .pth, models:/..., runs:/...) for maps, look-alikes and R@1, in
        place of the frozen backbone."""
        embedder: EmbedderConfig = EmbedderConfig()
        """The frozen backbone."""
        max_images: int = maps.max_images
        """Images on a map, drawn at random where the set has more."""
        seed: int = maps.seed
        """Of splits, draws and t-SNE."""
        as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
        """Print one JSON object and nothing else."""

    about = "Looks at a data set: classes, splits, light, look-alikes, maps, near-duplicates."
    options = parse(Options, words, "explore", about)
    data = DataConfig(
        root=options.root.expanduser().absolute(),
        protocol=options.protocol,
        train_per_class=options.train_per_class,
        val_per_class=options.val_per_class,
        seed=options.seed,
    )
    maps = MapConfig(max_images=options.max_images, seed=options.seed)

    from flowerray.explore.command import explore_dataset
    from flowerray.files import as_json

    out = options.out or default_out("explore")
    facts = explore_dataset(
        data, out, run=options.run, embedder=options.embedder, maps=maps,
        device=pick_device("auto"), quiet=options.as_json,
    )  # fmt: skip
    print(as_json(facts) if options.as_json else summary(facts, out))
    end_of_logging(out)
    return 0


def summary(facts: dict[str, Any], out: Path) -> str:
    """What was found, in a few lines of at most 80 columns."""
    from flowerray.text import labelled

    i, d, recall = facts["imbalance"], facts["duplicates"], facts["recall_at_1"]
    splits = ", ".join(f"{row['name']} {row['images']:,}" for row in facts["splits"])
    classes = f"{i['classes']} class{'es' * (i['classes'] != 1)}"
    bad = len(facts["unreadable"])
    lines = {
        "images": f"{facts['images']:,} in {classes} ({splits})",
        "balance": f"{i['smallest']} to {i['largest']} images a class, Gini {i['gini']:.2f}",
        "problems": f"{len(facts['problems']) or 'none'}" + f", {bad} unreadable" * bool(bad),
        "alike": "; ".join(
            f"{a['classes'][0]} and {a['classes'][1]} ({a['crossing']:.0%} cross)"
            for a in facts["look_alikes"][:2]
        ),
        "copies": f"{d['pairs']} near-duplicate pairs, {d['across_splits']} across splits",
    }
    if recall is not None:
        text = f"{recall['every']['mean']:.3f} of {recall['every']['n']:,} queries"
        if recall["removed"] and recall["clean"] is not None:
            clean = recall["clean"]
            text += f"; without near-duplicates {clean['mean']:.3f} of {clean['n']:,}"
        lines["R@1"] = text
    if facts["note"]:
        lines["note"] = facts["note"]
    lines["page"] = str(out / "index.html")
    return "\n".join(labelled(name, text) for name, text in lines.items() if text)
