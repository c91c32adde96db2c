"""`flowerray evaluate`, `similar` and `search`."""

from pathlib import Path
from typing import Annotated

from flowerray.cli.options import absolute_data, end_of_logging, given, parse, pick_device, refuse
from flowerray.errors import UserError

SPLITS = ("data.protocol", "data.train_per_class", "data.val_per_class", "data.seed")
"""What says how another set than the run's is split; without them all of it is measured."""


def evaluate(words: list[str]) -> int:
    """`flowerray evaluate RUN [options]`."""
    import tyro

    from flowerray.data.source import DataConfig
    from flowerray.model.embedder import EmbedderConfig
    from flowerray.retrieval.measure import EvaluateConfig

    class Options(EvaluateConfig):
        run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = None
        """A folder, an exported .pth, models:/... or runs:/..."""
        data: DataConfig = DataConfig()
        """Another data set than the run's: all its images are queries and gallery, unless
        --gallery, --data.protocol or --data.train-per-class says otherwise."""
        embedder: EmbedderConfig = EmbedderConfig()
        """The backbone that --frozen measures where no RUN is given."""
        frozen: bool = False
        """Measure the backbone's features as they came: the floor that a method has to beat."""
        as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
        """Print one JSON object and nothing else."""

    about = "Retrieval and pair verification of a trained model, or of a frozen backbone."
    options = parse(Options, words, "evaluate", about)
    device = pick_device("auto")
    model = None
    if options.run is not None:
        from flowerray.opening import open_model

        model = open_model(options.run, device)
        start = Options(data=model.run.data, embedder=model.run.embedder)
        options = parse(Options, words, "evaluate", about, default=start)
    data = absolute_data(options.data)
    config = EvaluateConfig.part_of(options)
    if model is None and not options.frozen:
        raise UserError("name a RUN, or measure a backbone as it comes with --frozen.")

    if not options.frozen:
        refuse(words, ["embedder"], "a RUN has its own embedder; with --frozen they count.")

    from flowerray.files import as_json
    from flowerray.retrieval import command, floor, table

    other = model is not None and command.is_another_set(model, data.root)
    whole = other and not given(words, SPLITS)
    if options.frozen:
        measurement = command.evaluate_frozen(
            options.embedder, data, config, device, options.as_json, whole
        )
    else:
        assert model is not None
        measurement = command.evaluate_model(model, data, whole, config, options.as_json)
    title = f"{options.embedder.backbone}, frozen" if options.frozen else str(options.run)
    hardened = model is not None and model.run.harden.on
    if options.as_json:
        decided = measurement.decisions
        known = table.intervals(measurement.metrics, measurement.per_query) | decided.intervals
        more = {
            "run": None if options.frozen else options.run,
            "intervals": {name: found.to_dict() for name, found in known.items()},
            "frozen": floor.as_facts(title, measurement, hardened),
            **({"reliability": decided.to_dict()} if decided.reliability else {}),
        }
        print(as_json({**measurement.metrics, **more}))
    else:
        print(table.measurement(title, measurement, hardened))
    if model is not None and model.folder is not None and not options.frozen:
        end_of_logging(model.folder.path)
    return 0


def similar(words: list[str]) -> int:
    """`flowerray similar RUN A.jpg B.jpg`."""
    import tyro

    from flowerray import opening
    from flowerray.config import Config
    from flowerray.files import as_json
    from flowerray.retrieval import command, table

    class Options(Config):
        run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
        """A folder, an exported .pth, models:/... or runs:/..."""
        first: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="A.jpg")]
        """A photograph."""
        second: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="B.jpg")]
        """Another photograph."""
        prior: float | None = None
        """Chance of one class before the photographs are seen, which the probability depends on;
        0.5 if not given."""
        far: float | None = None
        """False-match rate of the threshold, on validation pairs of classes drawn evenly; by
        default the threshold has the best balanced accuracy on them."""
        as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
        """Print one JSON object and nothing else."""

    options = parse(Options, words, "similar", "Do two photographs show the same class?")
    model = opening.open_model(options.run, pick_device("auto"))
    result = command.similar(model, options.first, options.second, options.prior, options.far)
    print(as_json(result) if options.as_json else table.similar(result))
    return 0


def search(words: list[str]) -> int:
    """`flowerray search RUN QUERY.jpg --gallery DIR --top 10`."""
    import tyro
    from pydantic import Field

    from flowerray import opening
    from flowerray.config import Config
    from flowerray.files import as_json
    from flowerray.retrieval import command, table

    class Options(Config):
        run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
        """A folder, an exported .pth, models:/... or runs:/..."""
        query: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="QUERY.jpg")]
        """The photograph to look for."""
        gallery: Path
        """A folder of images, of class folders, or in the Oxford layout."""
        top: int = Field(10, ge=1)
        """Neighbours to show."""
        prior: float | None = None
        """Chance, before it is seen, that a gallery image is of the query's class; 0.5 if not
        given. One class of a hundred evenly filled ones has 0.01."""
        sheet: Path | None = None
        """Where the picture of the query and its neighbours goes, 50 of them at most; by default
        search.png here, and none with --json."""
        as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
        """Print one JSON object and nothing else."""

    options = parse(
        Options, words, "search", "The images of a folder that are most like a photograph."
    )
    model = opening.open_model(options.run, pick_device("auto"))
    found = command.search(
        model, options.query, options.gallery, options.top, options.as_json, options.prior
    )
    if options.as_json:
        rows = [
            {
                "image": str(n.path),
                "class": n.class_name,
                "similarity": n.similarity,
                "probability": n.probability,
            }
            for n in found
        ]
        unknown = not found or found[0].similarity < model.threshold
        print(as_json({"query": str(options.query), "neighbours": rows, "unknown": unknown}))
    else:
        print(table.neighbours(found, options.prior))
    sheet = options.sheet or (None if options.as_json else Path("search.png"))
    if sheet is None:
        return 0
    try:
        command.draw_neighbours(options.query, found, sheet)
    except OSError as error:
        raise UserError(
            f"no picture, since {sheet} cannot be written ({error.strerror}): name another --sheet."
        ) from error
    if not options.as_json:
        print(f"picture   {sheet}")
    return 0
