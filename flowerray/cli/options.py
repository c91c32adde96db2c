"""What several commands share: parsing, the METHOD and RUN arguments, paths, devices."""

import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from flowerray.errors import UserError
from flowerray.text import typed

if TYPE_CHECKING:
    from flowerray.data.source import DataConfig
    from flowerray.methods import MethodConfig, MethodFile
    from flowerray.model.embedder import EmbedderConfig
    from flowerray.training.run import Run
    from flowerray.training.rundir import RunDir


NOT_RESUMED = ("out", "preset")
"""What means nothing beside --resume."""
WHY_NOT_RESUMED = "--resume goes on in its own folder with its own options: leave them out."


def parse(kind: Any, words: list[str], name: str, about: str = "", **more: Any) -> Any:
    """tyro's parse of one command's words; on a fault it prints a box that says what is wrong, and
    exits with 2.
    """
    import tyro

    return tyro.cli(kind, args=words, prog=f"flowerray {name}", description=about, **more)


def take_method(command: str, words: list[str]) -> tuple[str, list[str]]:
    """The method's name and the other words.

    Raises:
        UserError: no such method.
    """
    from flowerray import methods

    if words[:1] in (["-h"], ["--help"]):
        listing = summaries([methods.get(name) for name in methods.names()])
        print(f"usage: flowerray {command} METHOD [options]\n\nmethods:\n{listing}")
        sys.exit(0)
    if not words or words[0].startswith("-"):
        raise UserError(f"name a method first: {', '.join(methods.names())}.")
    return methods.get(words[0]).name, words[1:]


def peek(words: list[str], **options: dict[str, Any]) -> dict[str, Any]:
    """The values of some options before all are parsed: those that set the others' defaults.

    Args:
        options: by name, what argparse's `add_argument` takes.

    Raises:
        UserError: a value that is missing or none of the choices.
    """
    from argparse import ArgumentError, ArgumentParser

    early = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, more in options.items():
        early.add_argument(f"--{name}", **more)
    try:
        return vars(early.parse_known_args(words)[0])
    except ArgumentError as error:
        raise UserError(f"{error}.") from None


def parse_run(
    name: str,
    method: str,
    words: list[str],
    default_preset: str = "laptop",
    about: str = "",
    **more: Any,
) -> "tuple[Any, Run]":
    """The options beside the run, and the run: a preset, or the run that is resumed, changed by the
    words.

    Args:
        more: further options beside the run, as pydantic's `create_model` takes them.

    Raises:
        UserError: a resumed run with options that differ from its run.json; see also `follow`.
    """
    import tyro
    from pydantic import Field, create_model

    from flowerray import methods
    from flowerray.training.run import HEAD, PRESETS, Run, differences
    from flowerray.training.rundir import RunDir

    chosen = peek(
        words, **starting(default_preset), resume={"type": Path}, **{"from": {"type": Path}}
    )
    resume, source = chosen.pop("resume"), chosen.pop("from")
    config = methods.get(method).config
    old = None
    if resume is not None:
        refuse(words, NOT_RESUMED, WHY_NOT_RESUMED)
        old = Run.from_dict(RunDir(resume).read())
        if old.method_name != method:
            raise UserError(f"{resume} is a run of {old.method_name}, not of {method}.")
        if old.data.root is not None and not old.data.root.exists():
            raise UserError(
                f"the data set of {resume} is no longer at {old.data.root}: put it back there, or "
                "a link to it."
            )
    start = old or started(config(), chosen)
    if source is not None:
        refuse(words, ["preset"], "--from takes the options of the run that it names.")
        start = follow(RunDir(source), method)

    class Options(Run):
        preset: Literal[tuple(PRESETS)] = default_preset  # type: ignore[valid-type]
        """demo = 40 rendered classes, 96 px, 8 epochs; laptop = tf_efficientnet_lite0, 128 px, 15
        epochs; gpu = ConvNeXt-Tiny from the Hub, 224 px, 30 epochs. Other options change it."""
        out: Path | None = None
        """A new folder for the run; by default runs/METHOD-TIME (of demo: runs/demo-TIME)."""
        resume: Path | None = None
        """Continue this interrupted run; options must not differ from its run.json."""
        from_run: Annotated[Path | None, tyro.conf.arg(name="from")] = None
        """For protocol `trainval`: the official run that the epochs and the threshold come from."""

    kind = create_model(
        "Options", __base__=Options, method=(config, Field(description="The loss.")), **more
    )
    about = about or methods.get(method).summary.partition(":")[0] + "."  # tyro does not wrap it
    options = parse(kind, words, name, about, default=kind(**dict(start)))
    run = absolute(Run.part_of(options))
    if old is not None and run.init == HEAD:  # which has been trained
        run = run.model_copy(update={"init": old.init})
    if old is not None and (changed := differences(old, run)):
        raise UserError(
            f"{resume} cannot be resumed with other options: {', '.join(changed)} differ "
            "from its run.json."
        )
    return options, run


def starting(default_preset: str = "laptop") -> dict[str, dict[str, Any]]:
    """What `peek` looks for, so that `started` gives the run that the other options change."""
    from flowerray.training.run import PRESETS

    return {
        "preset": {"choices": list(PRESETS), "default": default_preset},
        "embedder.train": {"choices": ["all", "head"], "default": "all"},
        "embedder.backbone": {"default": ""},
    }


def started(method: "MethodConfig", chosen: dict[str, Any]) -> "Run":
    """A preset with the method's defaults for what is trained; `chosen` holds `starting`'s."""
    from flowerray.training.run import from_preset

    return from_preset(
        chosen["preset"], method, chosen["embedder.train"], chosen["embedder.backbone"]
    )


def follow(source: "RunDir", method: str) -> "Run":
    """The `trainval` run that follows a finished official run: its options, epochs, threshold.

    Raises:
        UserError: the source is unfinished, or a run of another method or protocol.
    """
    from flowerray.training.run import Run

    run = Run.from_dict(source.read())
    if run.method_name != method or run.data.protocol != "official":
        raise UserError(
            f"--from {source.path} has to be an official run of {method}, and is "
            f"{run.data.protocol} of {run.method_name}."
        )
    found = source.outcome()
    replays = run.harden.replays if run.harden.kind == "free" else 1  # epochs count clean work
    epochs = found["best_epoch"] * replays
    return run.model_copy(
        update={
            "data": run.data.model_copy(update={"protocol": "trainval"}),
            "train": run.train.model_copy(update={"epochs": epochs, "patience": 0}),
            "threshold": found["threshold"],
        }
    )


def absolute(run: "Run") -> "Run":
    """The run with absolute paths: a worker's own working directory is somewhere else."""
    from flowerray.training.run import HEAD

    init = run.init
    if init is not None and str(init).startswith(("models:/", "runs:/")):
        from flowerray.tracking.registry import resolve

        init = resolve(str(init))
    init = init.expanduser().absolute() if init and init != HEAD else init
    changes = {"data": absolute_data(run.data), "embedder": absolute_embedder(run.embedder)}
    return run.model_copy(update={**changes, "init": init})


def absolute_embedder(embedder: "EmbedderConfig") -> "EmbedderConfig":
    """The embedder with an absolute path, where its weights are a file."""
    weights = Path(embedder.weights).expanduser()
    if embedder.weights in ("bundled", "hub", "none") or not weights.is_file():
        return embedder
    return embedder.model_copy(update={"weights": str(weights.absolute())})


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


def given(words: list[str], names: Iterable[str]) -> list[str]:
    """The dotted fields among `names` that the words set, whole or in part (`data` for
    `--data.root`).
    """
    said = set()
    for word in words:
        if word.startswith("--"):
            *parts, last = word[2:].partition("=")[0].replace("-", "_").split(".")
            said |= {".".join([*parts, last]), ".".join([*parts, last.removeprefix("no_")])}
    return [n for n in names if any(s == n or s.startswith(f"{n}.") for s in said)]


def refuse(words: list[str], names: Iterable[str], why: str) -> None:
    """Raises UserError where the words set one of these fields, which would do nothing."""
    if found := given(words, names):
        options = ", ".join("--" + name.replace("_", "-") for name in found)
        raise UserError(f"{options}: {why}")


def pick_device(device: str) -> Any:
    """See `cluster.worker.pick_device`."""
    from flowerray.cluster.worker import pick_device as pick

    return pick(device)


@contextmanager
def resumable(command: str, folder: Path, description: str) -> Iterator[None]:
    """Has the user's Ctrl-C say how to go on, where the work inside has come so far.

    Args:
        command: without --resume, such as "train triplet".
        folder: what --resume is to be given.
        description: the file in it without which nothing can be resumed.

    Raises:
        KeyboardInterrupt: the user's; its text is the command to type.
    """
    try:
        yield
    except KeyboardInterrupt:
        if not (folder / description).exists():
            raise
        again = typed(f"flowerray {command} --resume {folder}")
        raise KeyboardInterrupt(again) from None


def end_of_logging(run_dir: Path) -> None:
    """How to look at what was logged; on standard error, so that --json stays pure."""
    from flowerray.tracking.state import ui_line

    print(f"review    {ui_line(run_dir)}", file=sys.stderr)


def summaries(files: "Sequence[MethodFile]") -> str:
    """One paragraph a method."""
    return "\n".join(
        textwrap.fill(
            file.summary, 80, initial_indent=f"  {file.name:<10}", subsequent_indent=" " * 12
        )
        for file in files
    )
