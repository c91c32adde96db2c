"""The served model: images as bytes or base64 in every form of input, never files of the server."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from flowerray.tracking.registry import save_model

PATHS = ("/etc/passwd", "{photo}", "{photo.parent}", "/none", "cGF0aA==")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph on the server's disk."""
    path = tmp_path_factory.mktemp("server") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def model(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    import mlflow

    folder = tmp_path_factory.mktemp("served") / "model"
    save_model(folder, next(small_run.glob("*.pth")), 16)
    return mlflow.pyfunc.load_model(str(folder))


def ask(model: Any, body: str, kind: str = "application/json") -> tuple[int, str]:
    """What `/invocations` answers."""
    from mlflow.pyfunc.scoring_server import invocations

    try:
        done = invocations(body, kind, model, model.metadata.get_input_schema())
    except Exception as error:
        return 400, f"{type(error).__name__} {error}"
    return done.status, done.response


def forms(text: str) -> list[tuple[str, str]]:
    """A text in the `image` column, in all forms of input."""
    return [
        (f"image\n{text}\n", "text/csv"),
        *(
            (json.dumps(body), "application/json")
            for body in (
                {"dataframe_split": {"columns": ["image"], "data": [[text]]}},
                {"dataframe_records": [{"image": text}]},
                {"inputs": {"image": [text]}},
                {"inputs": [text]},
                {"instances": [{"image": text}]},
                {"instances": [text]},
            )
        ),
    ]


@pytest.mark.parametrize("form", range(7))
def test_no_text_opens_a_file(model: Any, photo: Path, form: int) -> None:
    said = set()
    for path in PATHS:
        text = path.format(photo=photo)
        status, answer = ask(model, *forms(text)[form])
        assert status >= 400, answer
        said.add(answer.replace(text, "") if text else answer)
    assert not any("is not there" in a or "is a folder" in a or "rectory" in a for a in said)


def test_base64_is_an_image_where_a_table_says_binary(model: Any, photo: Path) -> None:
    expected = model.predict(pd.DataFrame({"image": [photo.read_bytes()]}))
    text = base64.b64encode(photo.read_bytes()).decode()
    answered = 0
    for form in forms(text):
        status, answer = ask(model, *form)
        if status == 200:
            answered += 1
            found = np.array(json.loads(answer)["predictions"])
            np.testing.assert_allclose(found, expected, atol=1e-5)
    assert answered >= 3  # the others have no column for it


@pytest.mark.parametrize("form", [str, Path])
def test_a_table_in_python_holds_bytes(model: Any, photo: Path, form: type) -> None:
    with pytest.raises(Exception, match="never a path|image|binary"):
        model.predict(pd.DataFrame({"image": [form(photo)]}))
