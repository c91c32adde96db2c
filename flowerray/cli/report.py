"""`flowerray report`."""

from pathlib import Path
from typing import Annotated, Any

from flowerray.cli.options import default_out, end_of_logging, parse, pick_device
from flowerray.errors import UserError


def report(words: list[str]) -> int:
    """`flowerray report RUN... [options]`."""
    import tyro

    from flowerray.config import Config

    class Options(Config):
        runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")] = ()
        """RUN folders, folders of them, or runs:/..."""
        experiment: str | None = None
        """Every run of this MLflow experiment, too."""
        out: Path | None = None
        """A folder for report.html; by default runs/report-TIME."""
        title: str = "Image similarity models"
        """The page's heading."""
        frozen: bool = True
        """Measure the backbones as they came, too: the floor that a method has to beat."""
        as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
        """Print one JSON object and nothing else."""

    about = "One HTML page on runs: results with intervals, curves, pictures, commands."
    options = parse(Options, words, "report", about)

    from flowerray.files import as_json
    from flowerray.report.command import write_report
    from flowerray.tracking.registry import experiment_runs

    names = [*options.runs]
    if options.experiment is not None:
        names += experiment_runs(options.experiment)
    if not names:
        raise UserError("name RUN folders, a folder of runs, or an --experiment.")
    out = options.out or default_out("report")
    facts = write_report(
        names, out, options.title, options.frozen, pick_device("auto"), quiet=options.as_json
    )
    print(as_json(facts) if options.as_json else summary(facts))
    end_of_logging(out)
    return 0


def summary(facts: dict[str, Any]) -> str:
    """Where the page is and what is on it."""
    return (
        f"page      {facts['page']} ({facts['bytes'] / 1e6:.1f} MB)\n"
        f"holds     runs {facts['runs']}, variants {facts['variants']}, data sets or splits "
        f"{facts['settings']}"
    )
