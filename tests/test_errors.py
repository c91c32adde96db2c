"""Errors as a library's caller and as the command line's user see them."""

import pytest

import flowerray as fr
from flowerray.cli import dispatch, with_flags
from flowerray.config import Config
from flowerray.errors import UserError


class Part(Config):
    epochs: int = 1


class Whole(Config):
    train: Part = Part()


def test_a_handler_of_value_errors_does_not_swallow_them() -> None:
    assert issubclass(UserError, fr.FlowerrayError) and not issubclass(UserError, ValueError)
    assert fr.UserError is UserError


def test_a_fault_in_a_part_names_the_whole_way() -> None:
    with pytest.raises(UserError, match=r"^`train\.epochs` = 'x': input should be a valid int"):
        Whole(train={"epochs": "x"})
    with pytest.raises(UserError, match=r"^`epochs` = 'x'"):
        Part(epochs="x")
    with pytest.raises(UserError, match=r"there is no option `train\.pace`\.$"):
        Whole(train={"pace": 1})


def test_a_part_of_larger_options() -> None:
    class Options(Part):
        out: str = "here"

    assert Part.part_of(Options(epochs=3)) == Part(epochs=3)
    assert Part.part_of(Options(), epochs=4) == Part(epochs=4)


def test_the_command_line_shows_arguments_as_flags() -> None:
    sentence = "`train.batch_size` and `epochs`: see `flowerray train --help`, /a/`b c`."
    words = ["train", "--train.epochs=3", "--data.root", "x"]
    said = with_flags(sentence, words)
    assert said == "--train.batch-size and --train.epochs: see `flowerray train --help`, /a/`b c`."
    assert with_flags("`seed`", ["--train.seed", "--data.seed"]) == "--seed"


@pytest.mark.parametrize("words", [["--debug", "train", "tripel"], ["train", "--debug", "tripel"]])
def test_debug_shows_the_traceback(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(words) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.endswith("center, siamese, triplet.\n")
    assert dispatch([word for word in words if word != "--debug"]) == 2
    assert "Traceback" not in capsys.readouterr().err
