"""The command line: its surface, its options, its output."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flowerray
from flowerray import cli, methods
from flowerray.cli import dispatch, options, usage
from flowerray.cli.options import given, parse_run
from flowerray.cli.review import listing
from flowerray.text import typed
from flowerray.training.checkpoint import load_export
from flowerray.training.run import Run
from flowerray.training.rundir import RunDir
from tests.data.pictures import class_folders
from tests.small import small, words

Say = Callable[..., tuple[str, str]]


def test_a_terminal_that_lacks_a_letter_gets_its_number() -> None:
    program = "from flowerray import cli; cli.dispatch = lambda _: print('r\u00e9'); cli.main([])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("r\\xe9\n", "")


@pytest.mark.parametrize(
    "command", ["train triplet", "tune triplet", "compare", "backbones --models test_vit"]
)
def test_results_do_not_become_a_class(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = class_folders(tmp_path / "set", {"a": 4, "b": 4})
    place = root / "a" / "mine"
    assert dispatch([*command.split(), "--data.root", str(root), "--out", str(place)]) == 2
    said = capsys.readouterr().err
    assert f"--out {place} lies in the data set {root}" in said and not place.exists()


def test_a_disk_that_is_full_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error of an open file names no path."""

    def full(_: object, words: list[str]) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli.Command, "run", full)
    assert dispatch(["report"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("flowerray report: a file cannot be written (No space left on device)")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FileNotFoundError(2, "No such file", "runs/mine/plots"), True),
        (FileNotFoundError(2, "No such file", "elsewhere/module.json"), False),
        (PermissionError(13, "Permission denied", "/elsewhere"), True),
    ],
)
def test_only_a_users_path_is_a_users_mistake(
    error: OSError, sentence: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that no word of the command names is missing by a fault of ours."""

    def fails(_: object, words: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli.Command, "run", fails)
    if sentence:
        assert dispatch(["report", "runs/mine"]) == 2
    else:
        with pytest.raises(FileNotFoundError):
            dispatch(["report", "runs/mine"])


HANGING_UP = """
import os, signal, sys, time; signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
from flowerray import cli
def work(_, words):
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(10)
    finally:
        open(words[0], "w").write("ended in order")
cli.Command.run = work
cli.main(["report", sys.argv[1]])
"""


def test_a_closed_terminal_ends_a_command_as_ctrl_c_does(tmp_path: Path) -> None:
    note = tmp_path / "note"
    done = subprocess.run([sys.executable, "-c", HANGING_UP, str(note)], capture_output=True)
    assert note.read_text() == "ended in order" and done.returncode == cli.INTERRUPTED


def test_init_takes_what_mlflow_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        "flowerray.tracking.registry.resolve", lambda name: tmp_path / f"{name[8:]}.pth"
    )
    run = small(tmp_path).model_copy(update={"init": Path("models:/flowerray-center@champion")})
    assert options.absolute(run).init == tmp_path / "flowerray-center@champion.pth"


# --- the surface ----------------------------------------------------------------------------------


def test_the_surface_is_frozen() -> None:
    """Scripts and jobs use these words: a new one is added here on purpose, none disappears."""
    assert list(cli.COMMANDS) == [
        "demo", "data", "explore", "backbones", "methods", "train", "tune", "compare", "evaluate",
        "attack", "similar", "search", "index", "serve", "embed", "explain", "export", "report",
        "cache", "track",
    ]  # fmt: skip
    assert all(len(line) <= 80 for line in usage().splitlines())


@pytest.mark.parametrize("method", methods.names())
def test_the_options_of_train_are_frozen(
    method: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        dispatch(["train", method, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    shown = {w.strip("[],|") for w in text.split() if w.startswith("--")}
    for option in (
        "--preset", "--out", "--resume", "--from", "--threshold", "--data.root", "--data.protocol",
        "--data.train-per-class", "--data.val-per-class", "--data.seed", "--data.synthetic.classes",
        "--embedder.backbone", "--embedder.dim", "--embedder.image-size", "--embedder.weights",
        "--train.epochs", "--train.classes-per-batch", "--train.images-per-class", "--train.lr",
        "--train.seed", "--train.precision", "--train.ema", "--train.patience",
        "--resources.workers", "--resources.device", "--resources.cpus-per-worker",
    ):  # fmt: skip
        assert option in shown, option
    for field in methods.get(method).config.model_fields:
        assert f"--method.{field.replace('_', '-')}" in " ".join(shown)


def test_help_version_and_lists(say: Say) -> None:
    assert say("--help")[0].startswith("usage: flowerray COMMAND")
    assert say("--version")[0].split() == ["flowerray", flowerray.__version__]
    assert all(name in say("methods")[0] for name in methods.names())
    assert "usage: flowerray methods" in say("methods", "--help")[0]
    assert "synthesize" in say("data", "--help")[0]
    assert max(map(len, say("data", "--help")[0].splitlines())) <= 80
    assert "track sync RUN" in say("track", "-h")[0]
    with pytest.raises(SystemExit) as stop:
        dispatch(["train", "--help"])
    assert stop.value.code == 0


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("evaluate", "[OPTIONS] RUN"), ("attack", "[OPTIONS] RUN"), ("explore", "[OPTIONS] DIR"),
        ("explain", "[OPTIONS] RUN [A.jpg B.jpg]"), ("report", "[OPTIONS] RUN..."),
        ("similar", "RUN A.jpg B.jpg"), ("search", "RUN QUERY.jpg"), ("data check", "DIR"),
    ],
)  # fmt: skip
def test_help_names_what_has_no_dashes(
    command: str, usage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        dispatch([*command.split(), "--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[1:])) <= 80  # tyro folds no usage
    assert usage in " ".join(lines[:3]) and "STR" not in lines[0]


def test_nothing_said_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch([]) == 2
    assert capsys.readouterr().out == usage() + "\n"


def test_an_interrupt_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C and SIGTERM, which `main` turns into the same."""

    def interrupted(_: list[str]) -> int:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the signal did not arrive")

    monkeypatch.setattr("flowerray.cli.training.demo", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main(["demo"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "flowerray demo: interrupted.\n"


@pytest.mark.parametrize(
    ("command", "work", "description"),
    [
        ("train triplet", "flowerray.cluster.driver.train_run", "run.json"),
        ("demo", "flowerray.cluster.driver.train_run", "run.json"),
        ("tune triplet", "flowerray.tuning.command.tune", "study.json"),
        ("compare", "flowerray.comparison.command.compare", "options.json"),
    ],
)
def test_an_interrupt_says_how_to_go_on(
    command: str,
    work: str,
    description: str,
    small_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"

    def interrupted(*_: Any, **more: Any) -> None:
        out.mkdir(exist_ok=True)
        (out / description).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(work, interrupted)
    few = ["--train.classes-per-batch", "3"] if "tune" in command else []
    said = [*command.split(), *few, "--out", str(out), "--data.root", str(small_set)]
    assert dispatch(said) == 130
    again = typed(f"flowerray {command} --resume {out}")
    line = f"flowerray {command.split()[0]}: interrupted; go on with: {again}\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("job", "threads", "left"),
    [
        ('{"runtime_env": {}}', "1", None),  # Ray's own choice for a process without CPU slots
        ('{"runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}', "1", "1"),
        ('{"runtime_env": {}}', "4", "4"),
        (None, "1", "1"),
    ],
)
def test_the_driver_of_a_job_has_all_cores(
    job: str | None, threads: str, left: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    if job:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", job)
    cli.take_all_cores()
    assert os.environ.get("OMP_NUM_THREADS") == left


def test_a_closed_pipe_is_no_error() -> None:
    """`flowerray ... | head -0`."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from flowerray.cli import main; main(['track', '--help'])"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, b"")


# --- commands on a finished RUN -------------------------------------------------------------------


def test_train_and_resume(say: Say, small_set: Path, small_run: Path) -> None:
    """A finished run that is resumed changes nothing; another place to run is allowed."""
    out = small_run.with_name("cli-run")
    stdout, stderr = say("train", "center", *words(small_set, out=out, train__epochs=1))
    assert f"model     {out / 'best_model_center_loss.pth'}" in stdout
    following = typed(f"flowerray evaluate {out} --split test")
    assert f"next      {following}" in stdout
    assert "epoch 1  loss" in stderr and "mlflow ui --backend-store-uri sqlite:////" in stderr
    model = out / "best_model_center_loss.pth"
    before = load_export(model)
    stdout, _ = say("train", "center", "--resume", out, "--resources.cpus-per-worker", 1)
    assert "1 epochs, 6 steps" in stdout
    after = load_export(model)
    for part in ("embedder", "method"):
        assert all(torch.equal(after[part][k], v) for k, v in before[part].items())
    assert after["threshold"] == before["threshold"]


def test_a_data_set_that_is_gone_is_asked_back(
    run: Path, small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((run / "run.json").read_text())
    content["data"]["root"] = str(tmp_path / "gone")
    (run / "run.json").write_text(json.dumps(content))
    assert dispatch(["train", "triplet", "--resume", str(run)]) == 2
    said = capsys.readouterr().err
    assert f"is no longer at {tmp_path / 'gone'}: put it back there, or a link to it" in said


def test_attack_options_that_would_do_nothing(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, sentence in (
        (["--perturb", "gallery", "--attacks", "margin"], "--attacks: no use with --perturb"),
        (["--audit-queries", "16"], "--audit-queries: no use without --audit or --ers"),
    ):
        assert dispatch(["attack", str(run), *wrong]) == 2
        assert sentence in capsys.readouterr().err


def test_paths_are_absolute_before_a_worker_sees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_run: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("weights.pth").touch()
    _, run = parse_run("train", "triplet", ["--embedder.weights", "weights.pth"])
    assert run.embedder.weights == str(tmp_path / "weights.pth")
    for word in ("bundled", "none", "hub", "gone.pth"):  # the last is refused by its name
        _, run = parse_run("train", "triplet", ["--embedder.weights", word])
        assert run.embedder.weights == word
    stored = Run.from_dict(RunDir(small_run).read())
    assert stored.data.root is not None
    monkeypatch.chdir(stored.data.root.parent)
    words = ["--resume", str(small_run), "--data.root", stored.data.root.name]
    assert parse_run("train", "triplet", words)[1] == stored


def test_options_among_the_words() -> None:
    words = [
        "--train.images-per-class", "4", "--train.lr=1e-3", "--trials", "4", "--data.root", "set",
        "--train.no-compile", "--no-json", "--method.negative_margin", "1",
    ]  # fmt: skip
    names = [
        "train.images_per_class", "train.lr", "train.weight_decay", "data", "train.compile", "json",
        "method.negative_margin", "trial", "set", "method.margin",
    ]  # fmt: skip
    said = {"train.images_per_class", "train.lr", "data", "train.compile", "json"}
    assert given(words, names) == [n for n in names if n in {*said, "method.negative_margin"}]


def test_track_sync(say: Say, run: Path) -> None:
    _, stderr = say("track", "sync", run)
    assert "mlflow ui --backend-store-uri" in stderr


# --- data -----------------------------------------------------------------------------------------


def test_data_synthesize_and_check(
    say: Say, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    options = ["--classes", 2, "--scale", 0.01, "--size", 32]
    assert say("data", "synthesize", "--out", out, *options)[0].strip() == str(out)
    assert "no problem found" in say("data", "check", out)[0]
    (out / "jpg" / "image_00003.jpg").write_bytes(b"")
    assert dispatch(["data", "check", str(out)]) == 1
    assert "image_00003.jpg cannot be read as an image (the file is empty)" in (
        capsys.readouterr().out
    )


def test_only_the_systems_own_errors_become_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = [FileNotFoundError(2, "No such file", "gone.jpg"), FileNotFoundError("a bug")]

    def broken(_: list[str]) -> int:
        raise errors.pop(0)

    monkeypatch.setattr(cli.Command, "run", lambda _, words: broken(words))
    assert dispatch(["methods", "gone.jpg"]) == 2
    assert "gone.jpg cannot be used (No such file): check" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="a bug"):
        dispatch(["methods"])


def test_methods_fit_80_columns() -> None:
    files = [methods.get(name) for name in methods.names()]
    for text in (listing(files), options.summaries(files)):
        assert max(map(len, text.splitlines())) <= 80
        assert all(name in text for name in methods.names())
    assert "method.margin               0.03 to 0.5, log" in listing(files)


def test_windows_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match="use WSL2"):
        cli.main(["methods"])
