"""`flowerray explain`: two photographs, or a whole split."""

from pathlib import Path
from typing import Annotated

from flowerray.cli.options import end_of_logging, parse, pick_device, refuse
from flowerray.errors import UserError

ONLY_SCORES = ("beside", "method", "choose_images", "faithfulness")
"""What judging the maps of a split takes."""
ONLY_SPLITS = (
    "beside", "choose_images", "concept_class", "faithfulness", "max_images", "split",
)  # fmt: skip
"""What means nothing for two photographs."""


def explain(words: list[str]) -> int:
    """`flowerray explain RUN [A.jpg B.jpg] [options]`."""
    import tyro
    from pydantic import Field

    from flowerray.explain import command as splits
    from flowerray.explain import named as named
    from flowerray.explain import pair as pairs
    from flowerray.explain import table
    from flowerray.explain.cam import HEAD_METHODS
    from flowerray.explain.concepts import ConceptsConfig
    from flowerray.files import as_json
    from flowerray.opening import open_model

    class Options(splits.ExplainConfig):
        run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
        """A folder, an exported .pth, models:/... or runs:/..."""
        photographs: Annotated[
            tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[A.jpg B.jpg]")
        ] = ()
        """Two photographs: why are they alike or not? Without them, a whole split is judged."""
        beside: str | None = None
        """Another RUN of the same data, such as a robust one, on the same images."""
        concepts: int = Field(12, ge=0, le=64)
        """Concepts that the training images are described by (two photographs only); 0 = none."""
        concept_folders: Path | None = None
        """A folder with one folder of example images a concept: does likeness depend on them?"""
        concept_class: str | None = None
        """With --concept-folders: only images of this class."""
        out: Path | None = None
        """Folder for pictures and faithfulness.json; by default RUN/explanations."""
        as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
        """Print one JSON object and nothing else."""

    about = "Why are two photographs alike for a model, and can its heat maps be believed?"
    options = parse(Options, words, "explain", about)
    if len(options.photographs) not in (0, 2):
        raise UserError("name two photographs, or none for a whole split.")
    if options.photographs and options.concept_folders is not None:
        raise UserError("--concept-folders tests a whole split: leave the photographs out.")
    if options.photographs:
        refuse(
            words, ONLY_SPLITS, "they belong to a whole split: leave them or the photographs out."
        )
    elif options.concept_folders is not None:
        refuse(words, ["concepts", *ONLY_SCORES], "--concept-folders tests concepts, not maps.")
    else:
        refuse(words, ["concepts"], "it belongs to two photographs: name them.")
        refuse(words, ["concept_class"], "it belongs to --concept-folders: name them.")
    if options.method in HEAD_METHODS and options.layer is not None:
        raise UserError(f"--layer: {options.method} has no layer to choose, leave it out.")
    device = pick_device("auto")
    model = open_model(options.run, device)
    quiet = options.as_json
    if options.photographs:
        concepts = None
        if options.concepts:
            concepts = ConceptsConfig(count=options.concepts, seed=options.seed)
        result = pairs.explain_pair(
            model, *options.photographs, method=options.method, layer=options.layer,
            concepts=concepts, out=options.out, quiet=quiet,
        )  # fmt: skip
        print(as_json(result) if quiet else table.pair(result))
    elif options.concept_folders is not None:
        result = named.explain_concepts(
            model, options.concept_folders, class_name=options.concept_class, layer=options.layer,
            split=options.split, max_images=options.max_images, seed=options.seed, out=options.out,
            quiet=quiet,
        )  # fmt: skip
        print(as_json(result) if quiet else table.concepts(result))
    else:
        config = splits.ExplainConfig.part_of(options)
        beside = None if options.beside is None else open_model(options.beside, device)
        result = splits.explain_split(model, config, options.out, beside, quiet)
        print(as_json(result) if quiet else table.split(result))
        if not quiet:
            folder = pairs.explanations(model, options.out)
            print(f"\npictures  {folder}")
    if model.folder is not None and options.out is None:
        end_of_logging(model.folder.path)
    return 0
