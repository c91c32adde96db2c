"""`flowerray backbones`."""

from pathlib import Path
from typing import Annotated

from flowerray.cli.options import absolute_data, default_out, end_of_logging, parse
from flowerray.errors import UserError


def backbones(words: list[str]) -> int:
    """`flowerray backbones [options]`."""
    import tyro
    from pydantic import Field

    from flowerray.backbones.bench import DEFAULT_MODELS, BackbonesConfig
    from flowerray.data.source import DataConfig

    class Options(BackbonesConfig):
        models: tuple[str, ...] = DEFAULT_MODELS
        """timm's names, or quoted patterns such as 'resnet*'."""
        data: DataConfig = DataConfig()
        """The photographs."""
        out: Path | None = None
        """Folder for table and picture, by default runs/backbones-TIME; models that are there
        already are kept."""
        results: Path | None = None
        """timm's published results-imagenet.csv: its top-1 becomes a column."""
        max_latency_ms: float | None = Field(None, gt=0)
        """Budget of the recommendation: milliseconds for one image alone."""
        max_params: float | None = Field(None, gt=0)
        """Budget of the recommendation: millions of parameters."""
        cpus: float = Field(1, gt=0)
        """CPU cores of each model's accuracy task; as many run at a time as there is room for."""
        gpus: float | None = Field(None, ge=0)
        """GPUs of each, also a fraction; by default 1 where this machine has one, else 0."""
        as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
        """Print one JSON object and nothing else."""

    about = "Measures timm models before any training; recommends one for a budget."
    options = parse(Options, words, "backbones", about)
    files = None if options.files is None else options.files.expanduser().absolute()
    if files is not None and not files.is_dir():
        raise UserError(f"--files {options.files} is no folder: name one of weight files.")

    from flowerray.backbones.command import survey_backbones
    from flowerray.backbones.pictures import backbones_table
    from flowerray.cluster.session import own_gpus
    from flowerray.files import as_json

    out = (options.out or default_out("backbones")).expanduser().absolute()
    gpus = own_gpus() if options.gpus is None else options.gpus
    config = BackbonesConfig.part_of(options, files=files)
    content = survey_backbones(
        options.models, config, absolute_data(options.data), out,
        results=options.results, max_latency_ms=options.max_latency_ms,
        max_params=options.max_params, cpus=options.cpus, gpus=gpus, quiet=options.as_json,
    )  # fmt: skip
    if options.as_json:
        print(as_json(content))
    else:
        print(f"{backbones_table(content)}\npicture     {out / 'pareto.png'}")
    end_of_logging(out)
    return 0
