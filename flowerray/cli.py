"""The command line: a table of commands; each option is a field of a typed configuration."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from flowerray.errors import UserError

if TYPE_CHECKING:
    from flowerray.data.source import DataConfig
    from flowerray.run import Run
    from flowerray.rundir import RunDir

INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """One command: `run` gets the words after its name and returns the exit status."""

    run: Callable[[list[str]], int]
    help: str


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs one command and exits: 0 done, 2 the user's mistake (one sentence on standard error),
    130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, _interrupt)  # `ray job stop` and cluster schedulers send it
    sys.exit(dispatch(words))


def dispatch(words: list[str]) -> int:
    """`main` without the exit."""
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from flowerray import __version__

        print(f"flowerray {__version__}")
        return 0
    command = COMMANDS.get(words[0])
    if command is None:
        print(
            f"flowerray: there is no command {words[0]!r}; `flowerray --help` lists them.",
            file=sys.stderr,
        )
        return 2
    try:
        return command.run(words[1:])
    except UserError as error:
        print(f"flowerray {words[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"flowerray {words[0]}: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `flowerray ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: flowerray COMMAND [options]    `flowerray COMMAND --help` lists options.",
            "",
            "Image-similarity models: trained, measured and kept under review.",
            "",
            *lines,
        ]
    )


def parse(kind: Any, words: list[str], name: str, about: str = "", **more: Any) -> Any:
    """tyro's parse of one command's words; on a fault it prints a box that says what is wrong, and
    exits with 2.
    """
    import tyro

    return tyro.cli(kind, args=words, prog=f"flowerray {name}", description=about, **more)


# --- train ----------------------------------------------------------------------------------------


def train(words: list[str]) -> int:
    """`flowerray train METHOD [options]`."""
    method, words = take_method("train", words)
    options, run = parse_run(f"train {method}", method, words)
    from flowerray.cluster.fit import fit
    from flowerray.tables import training

    out = options.resume or options.out or default_out(method)
    summary = fit(run, out, resume=options.resume is not None)
    print(training(out, summary))
    end_of_logging(out)
    return 0


def take_method(command: str, words: list[str]) -> tuple[str, list[str]]:
    """The method's name and the other words.

    Raises:
        UserError: no such method.
    """
    from flowerray import methods

    if words[:1] in (["-h"], ["--help"]):
        from flowerray import tables

        listing = tables.summaries([methods.get(name) for name in methods.names()])
        print(f"usage: flowerray {command} METHOD [options]\n\nmethods:\n{listing}")
        sys.exit(0)
    if not words or words[0].startswith("-"):
        raise UserError(f"name a method first: {', '.join(methods.names())}.")
    return methods.get(words[0]).name, words[1:]


def parse_run(
    name: str, method: str, words: list[str], default_preset: str = "laptop"
) -> "tuple[Any, Run]":
    """The options beside the run, and the run: a preset, or the run that is resumed, changed by the
    words.

    Raises:
        UserError: a resumed run with options that differ from its run.json; see also `follow`.
    """
    from argparse import ArgumentError, ArgumentParser

    import tyro
    from pydantic import Field, create_model

    from flowerray import methods
    from flowerray.run import PRESETS, Run, differences
    from flowerray.rundir import RunDir

    early = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset", choices=list(PRESETS), default=default_preset)
    early.add_argument("--resume", type=Path)
    early.add_argument("--from", dest="source", type=Path)
    try:
        chosen, _ = early.parse_known_args(words)
    except ArgumentError as error:
        raise UserError(f"{error}.") from None
    config = methods.get(method).config
    old = None
    if chosen.resume is not None:
        old = Run.from_dict(RunDir(chosen.resume).read())
        if old.method_name != method:
            raise UserError(f"{chosen.resume} is a run of {old.method_name}, not of {method}.")
    start = old or PRESETS[chosen.preset](config())
    if chosen.source is not None:
        start = follow(RunDir(chosen.source), method)

    class Options(Run):
        preset: Literal[tuple(PRESETS)] = default_preset  # type: ignore[valid-type]
        """The run that the other options change."""
        out: Path | None = None
        """A new folder for the run; by default runs/METHOD-TIME."""
        resume: Path | None = None
        """Continue this interrupted run; options must not differ from its run.json."""
        from_run: Annotated[Path | None, tyro.conf.arg(name="from")] = None
        """For protocol `trainval`: the official run that the epochs and the threshold come from."""

    kind = create_model(
        "Options", __base__=Options, method=(config, Field(description="The loss."))
    )
    parts = {field: getattr(start, field) for field in Run.model_fields}
    about = methods.get(method).summary.partition(":")[0] + "."  # tyro does not wrap it
    options = parse(kind, words, name, about, default=kind(**parts))
    run = Run(**{field: getattr(options, field) for field in Run.model_fields})
    if old is not None and (changed := differences(old, run)):
        raise UserError(
            f"{chosen.resume} cannot be resumed with other options: {', '.join(changed)} differ "
            "from its run.json."
        )
    return options, absolute(run)


def follow(source: "RunDir", method: str) -> "Run":
    """The `trainval` run that follows a finished official run: its options, epochs, threshold.

    Raises:
        UserError: the source is unfinished, or a run of another method or protocol.
    """
    import json

    from flowerray.run import Run

    run = Run.from_dict(source.read())
    if run.method_name != method or run.data.protocol != "official":
        raise UserError(
            f"--from {source.path} has to be an official run of {method}, and is "
            f"{run.data.protocol} of {run.method_name}."
        )
    if not source.thresholds.exists():
        raise UserError(f"--from {source.path} has not finished: resume it first.")
    found = json.loads(source.thresholds.read_text())
    return run.model_copy(
        update={
            "data": run.data.model_copy(update={"protocol": "trainval"}),
            "train": run.train.model_copy(update={"epochs": found["best_epoch"], "patience": 0}),
            "threshold": found["threshold"],
        }
    )


def absolute(run: "Run") -> "Run":
    """The run with absolute paths: a worker's own working directory is somewhere else."""
    return run.model_copy(update={"data": absolute_data(run.data)})


def absolute_data(data: "DataConfig") -> "DataConfig":
    """The data with an absolute root."""
    if data.root is None:
        return data
    return data.model_copy(update={"root": data.root.expanduser().absolute()})


def default_out(name: str) -> Path:
    """runs/NAME-TIME; in a Ray job, whose working directory is a temporary copy, below
    FLOWERRAY_HOME.
    """
    from datetime import datetime

    from flowerray.files import home

    base = home() if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else Path.cwd()
    return base / "runs" / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


# --- demo -----------------------------------------------------------------------------------------


def demo(words: list[str]) -> int:
    """`flowerray demo`: the main job on rendered flowers, start to end."""
    options, run = parse_run("demo", "triplet", words, default_preset="demo")
    from flowerray.cluster.fit import fit
    from flowerray.commands import evaluate_frozen, evaluate_model, open_model
    from flowerray.evaluate.measure import EvaluateConfig
    from flowerray.tables import compare, training

    out = options.resume or options.out or default_out("demo")
    summary = fit(run, out, resume=options.resume is not None)
    device = pick_device("auto")
    frozen = evaluate_frozen(run.embedder, run.data, EvaluateConfig(), device)
    trained = evaluate_model(open_model(str(out), device), run.data, False, EvaluateConfig())
    print(training(out, summary))
    print(compare({"frozen": frozen, run.method_name: trained}))
    end_of_logging(out)
    return 0


# --- measuring ------------------------------------------------------------------------------------


def evaluate(words: list[str]) -> int:
    """`flowerray evaluate RUN [options]`."""
    import tyro

    from flowerray.data.source import DataConfig
    from flowerray.evaluate.measure import EvaluateConfig
    from flowerray.model import EmbedderConfig

    name, words = take_run(words)
    device = pick_device("auto")
    model = None
    if name is not None:
        from flowerray.commands import open_model

        model = open_model(name, device)

    class Options(EvaluateConfig):
        data: DataConfig = DataConfig()
        """Another data set than the run's: all its images are queries and gallery, unless
        --gallery or --data.train-per-class says otherwise."""
        embedder: EmbedderConfig = EmbedderConfig()
        """The backbone that --frozen measures where no RUN is given."""
        frozen: bool = False
        """Measure the backbone's features as they came: the floor that a method has to beat."""
        as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
        """Print one JSON object and nothing else."""

    start = Options()
    if model is not None:
        start = Options(data=model.run.data, embedder=model.run.embedder)
    about = "Measures RUN: a folder, an exported .pth, models:/... or runs:/..."
    options = parse(Options, words, "evaluate RUN", about, default=start)
    data = absolute_data(options.data)
    config = EvaluateConfig(
        split=options.split, gallery=options.gallery, batch_size=options.batch_size
    )
    if model is None and not options.frozen:
        raise UserError("name a RUN, or measure a backbone as it comes with --frozen.")

    from flowerray import commands, tables

    if options.frozen:
        measurement = commands.evaluate_frozen(
            options.embedder, data, config, device, options.as_json
        )
    else:
        assert model is not None
        other = data.root != model.run.data.root
        whole = other and not any(
            w.startswith(("--data.train-per-class", "--data.protocol")) for w in words
        )
        measurement = commands.evaluate_model(model, data, whole, config, options.as_json)
    title = f"{options.embedder.backbone}, frozen" if options.frozen else str(name)
    if options.as_json:
        print(tables.as_json({**measurement.metrics, "run": None if options.frozen else name}))
    else:
        print(tables.measurement(title, measurement))
    if model is not None and model.folder is not None and not options.frozen:
        end_of_logging(model.folder.path)
    return 0


def similar(words: list[str]) -> int:
    """`flowerray similar RUN A.jpg B.jpg`."""
    import tyro

    from flowerray import commands, tables
    from flowerray.config import Config

    class Options(Config):
        run: tyro.conf.Positional[str]
        """RUN, an exported .pth, models:/... or runs:/..."""
        first: tyro.conf.Positional[Path]
        """A photograph."""
        second: tyro.conf.Positional[Path]
        """Another photograph."""
        as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
        """Print one JSON object and nothing else."""

    options = parse(Options, words, "similar", "Do two photographs show the same class?")
    model = commands.open_model(options.run, pick_device("auto"))
    result = commands.similar(model, options.first, options.second)
    print(tables.as_json(result) if options.as_json else tables.similar(result))
    return 0


def search(words: list[str]) -> int:
    """`flowerray search RUN QUERY.jpg --gallery DIR --top 10`."""
    import tyro
    from pydantic import Field

    from flowerray import commands, tables
    from flowerray.config import Config

    class Options(Config):
        run: tyro.conf.Positional[str]
        """RUN, an exported .pth, models:/... or runs:/..."""
        query: tyro.conf.Positional[Path]
        """The photograph to look for."""
        gallery: Path
        """A folder of images, of class folders, or in the Oxford layout."""
        top: int = Field(10, ge=1)
        """Neighbours to show."""
        sheet: Path = Path("search.png")
        """Where the picture of the query and its neighbours goes."""
        as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
        """Print one JSON object and nothing else."""

    options = parse(
        Options, words, "search", "The images of a folder that are most like a photograph."
    )
    model = commands.open_model(options.run, pick_device("auto"))
    found = commands.search(
        model, options.query, options.gallery, options.top, options.sheet, quiet=options.as_json
    )
    if options.as_json:
        rows = [
            {"image": str(n.path), "class": n.class_name, "similarity": n.similarity} for n in found
        ]
        print(tables.as_json({"query": str(options.query), "neighbours": rows}))
    else:
        print(tables.neighbours(found))
        print(f"picture   {options.sheet}")
    return 0


# --- data, methods, tracking ----------------------------------------------------------------------


def data(words: list[str]) -> int:
    """`flowerray data {synthesize,fetch,check}`."""
    verbs = {"synthesize": synthesize, "fetch": fetch, "check": check}
    if words[:1] in (["-h"], ["--help"]):
        print(
            "usage: flowerray data VERB\n\n"
            "  synthesize   render flowers in the Oxford layout: --out DIR --classes 102 --seed 0\n"
            "  fetch        download Oxford Flowers-102 and verify it: --out DIR\n"
            "  check        verify a data set: DIR"
        )
        return 0
    if not words or words[0] not in verbs:
        raise UserError(f"say what to do: flowerray data {' | '.join(verbs)}.")
    return verbs[words[0]](words[1:])


def synthesize(words: list[str]) -> int:
    """`flowerray data synthesize --out DIR`."""
    from flowerray.data.synthetic import SyntheticConfig, synthesize

    class Options(SyntheticConfig):
        out: Path
        """A new folder for the set."""

    options = parse(
        Options, words, "data synthesize", "Renders flowers in the Oxford layout, with masks."
    )
    fields = {field: getattr(options, field) for field in SyntheticConfig.model_fields}
    print(synthesize(options.out.expanduser().absolute(), SyntheticConfig(**fields)))
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
    from flowerray.data.source import check_dataset

    class Options(Config):
        root: tyro.conf.Positional[Path]
        """Oxford's layout, or one folder a class."""

    options = parse(
        Options, words, "data check", "Lists what is wrong with a data set, file by file."
    )
    problems = check_dataset(options.root)
    for problem in problems:
        print(problem)
    print(
        f"{options.root}: {len(problems)} problems"
        if problems
        else f"{options.root}: no problem found"
    )
    return 1 if problems else 0


def list_methods(words: list[str]) -> int:
    """`flowerray methods`."""
    from flowerray import methods, tables

    print(tables.methods([methods.get(name) for name in methods.names()]))
    return 0


def track(words: list[str]) -> int:
    """`flowerray track sync RUN`."""
    from flowerray import tracking

    if words[:1] in (["-h"], ["--help"]):
        print("usage: flowerray track sync RUN     sends to MLflow what it does not have yet")
        return 0
    if len(words) != 2 or words[0] != "sync":
        raise UserError("say what to send: flowerray track sync RUN.")
    path = Path(words[1])
    tracking.sync(path, strict=True)
    end_of_logging(path)
    return 0


def take_run(words: list[str]) -> tuple[str | None, list[str]]:
    """The RUN argument, where the first word is one, and the other words."""
    if words and not words[0].startswith("-"):
        return words[0], words[1:]
    return None, words


def pick_device(device: str) -> Any:
    """See `cluster.worker.pick_device`."""
    from flowerray.cluster.worker import pick_device as pick

    return pick(device)


def end_of_logging(run_dir: Path) -> None:
    """How to look at what was logged; on standard error, so that --json stays pure."""
    from flowerray import tracking

    print(f"review    {tracking.ui_line(run_dir)}", file=sys.stderr)


COMMANDS: dict[str, Command] = {
    "demo": Command(demo, "the main job on rendered flowers, in under five minutes"),
    "train": Command(train, "train a method: flowerray train triplet --data.root DIR"),
    "evaluate": Command(evaluate, "measure a trained model, or a frozen backbone"),
    "similar": Command(similar, "do two photographs show the same class?"),
    "search": Command(search, "the images of a folder that are most like a photograph"),
    "data": Command(data, "render, download or verify a data set"),
    "methods": Command(list_methods, "the methods and what can be tuned in them"),
    "track": Command(track, "send a run to MLflow that it did not get"),
}


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt
