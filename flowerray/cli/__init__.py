"""The command line: a table of commands, each in one file of this folder; each option is a field
of a typed configuration.
"""

import errno
import os
import re
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from typing import Any, NamedTuple, NoReturn

from flowerray.errors import UserError
from flowerray.memory import keep_freed_memory
from flowerray.pool import ignore_pillow, leave_unguarded
from flowerray.text import visible

INTERRUPTED = 130
DEBUG = "--debug"
"""Anywhere among the words: an error is shown with its traceback."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""What a disk says that takes no more."""


REFUSED = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
"""What a machine does not let a user do."""


class Command(NamedTuple):
    """One command: where its function is, which gets the words after the command's name and returns
    the exit status.
    """

    module: str
    function: str
    help: str

    def run(self, words: list[str]) -> int:
        """Loads the command's file, so that `flowerray --help` loads none, and runs it."""
        module = import_module(f"flowerray.cli.{self.module}")
        function: Callable[[list[str]], int] = getattr(module, self.function)
        return function(words)


COMMANDS: dict[str, Command] = {
    "demo": Command("training", "demo", "the main job on rendered flowers, in under five minutes"),
    "data": Command("data", "data", "render, download or verify a data set"),
    "explore": Command("explore", "explore", "look at a data set: faults, look-alikes, copies"),
    "backbones": Command("backbones", "backbones", "which timm model to start from, by its cost"),
    "methods": Command("review", "methods", "the methods and what can be tuned in them"),
    "train": Command(
        "training", "train", "train a method: flowerray train triplet --data.root DIR"
    ),
    "tune": Command("tune", "tune", "search a method's settings, on this machine or a cluster"),
    "compare": Command(
        "compare", "compare", "train all methods under one budget, test what differs"
    ),
    "evaluate": Command("retrieval", "evaluate", "measure a trained model, or a frozen backbone"),
    "attack": Command("attack", "attack", "adversarial R@1 of a model, and whether to believe it"),
    "similar": Command("retrieval", "similar", "do two photographs show the same class?"),
    "search": Command(
        "retrieval", "search", "the images of a folder that are most like a photograph"
    ),
    "index": Command("index", "index", "photographs embedded once, to be searched; it grows"),
    "serve": Command("serve", "serve", "an index over HTTP, with a page to try it on"),
    "embed": Command("embed", "embed", "embeddings of many photographs as parquet, by Ray Data"),
    "explain": Command("explain", "explain", "why two photographs are alike, by maps and concepts"),
    "export": Command("export", "export", "a trained model for other programs: ONNX, torch.export"),
    "report": Command("report", "report", "one HTML page on a set of runs"),
    "cache": Command("cache", "cache", "what is kept to save time, and what of it may go"),
    "track": Command("review", "track", "send a run to MLflow that it did not get"),
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs one command and exits: 0 done, 2 the user's mistake (one sentence on standard error),
    130 interrupted.
    """
    leave_unguarded()
    if sys.platform == "win32":
        sys.exit("flowerray: Windows is not supported: use WSL2, which is Linux.")
    take_all_cores()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal may not know all letters of a name
            stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if argv is None else argv)
    keep_freed_memory()
    ignore_pillow()
    signal.signal(signal.SIGTERM, _interrupt)  # `ray job stop` and cluster schedulers send it
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _hung_up)  # not where nohup has it ignored
    sys.exit(dispatch(words))


def take_all_cores() -> None:
    """In a Ray job, forgets the single thread that Ray gives to a process without CPU slots of its
    own, which the job's driver is; what a user sets for the job stays.
    """
    job = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "")
    if job and "OMP_NUM_THREADS" not in job and os.environ.get("OMP_NUM_THREADS") == "1":
        del os.environ["OMP_NUM_THREADS"]


def dispatch(words: list[str]) -> int:
    """`main` without the exit."""
    debug, words = DEBUG in words, [word for word in words if word != DEBUG]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from flowerray.description import VERSION

        print(f"flowerray {VERSION}")
        return 0
    command = COMMANDS.get(words[0])
    if command is None:
        print(
            f"flowerray: there is no command {words[0]!r}; `flowerray --help` lists them.",
            file=sys.stderr,
        )
        return 2

    def say(sentence: str) -> None:
        if debug:
            traceback.print_exc()
        print(f"flowerray {words[0]}: {visible(sentence)}", file=sys.stderr)

    try:
        return command.run(words[1:])
    except UserError as error:
        say(with_flags(str(error), words))
        return 2
    except KeyboardInterrupt as error:
        again = f"; go on with: {error}" if str(error) else "."
        say(f"interrupted{again}")
        return INTERRUPTED
    except BrokenPipeError:  # `flowerray ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        place = error.filename2 or error.filename
        if error.errno in FULL and place is None:  # a file that is open already has no path
            said = f"a file cannot be written ({error.strerror}): make room, and try again."
        elif place is not None and (error.errno in REFUSED + FULL or named(str(place), words)):
            said = f"{place} cannot be used ({error.strerror}): check the path and its permissions."
        else:  # a fault of ours
            raise
        say(said)
        return 2
    except RuntimeError as error:
        from flowerray.gpu import fault

        if (sentence := fault(error)) is None:  # a fault of ours
            raise
        say(sentence)
        return 2


def named(place: str, words: list[str]) -> bool:
    """Whether a path, or a folder that it lies in, is among a command's words, or our own."""
    from flowerray.files import home

    texts = ["runs", str(home()), *(word.rpartition("=")[2] for word in words)]
    given = {os.path.abspath(os.path.expanduser(text)) for text in texts if text}
    path = os.path.abspath(place)
    return any(path == one or path.startswith(one.rstrip(os.sep) + os.sep) for one in given)


def with_flags(sentence: str, words: list[str]) -> str:
    """An error's sentence with its arguments as flags: `train.epochs` becomes --train.epochs, and
    `epochs` too where that is the flag among the words that ends so.
    """
    said = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}

    def flag(argument: re.Match[str]) -> str:
        name = argument[1].replace("_", "-")
        longer = [word for word in said if word.endswith(f".{name}")]
        return longer[0] if len(longer) == 1 else f"--{name}"

    return re.sub(r"`([a-z][a-z0-9_.]*)`", flag, sentence)


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: flowerray COMMAND [options]    `flowerray COMMAND --help` lists options.",
            "       --debug shows an error's traceback.",
            "",
            "Image-similarity models: trained, measured and kept under review.",
            "",
            *lines,
        ]
    )


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def _hung_up(*_: Any) -> NoReturn:
    """The terminal is gone, and what would be printed there would be an error of its own."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        with suppress(OSError):
            if not stat.S_ISREG(os.fstat(stream).st_mode):
                os.dup2(nowhere, stream)
    raise KeyboardInterrupt
