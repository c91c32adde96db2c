"""The code blocks of README and docs, run on small stand-ins for data."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import flowerray as fr
from flowerray import cli, methods
from tests.small import OPTIONS
from tests.test_house_rules import PAGES, flowerray_lines

NOT_RUN = {
    "demo": "renders and trains for minutes; tests/cluster/test_driver.py trains with Ray",
    "train": "trains for minutes; tests/cli/test_cli.py runs it small",
    "tune": "trains many times; tests/tuning runs it small",
    "compare": "trains many times; tests/comparison runs it small",
    "backbones": "measures twelve models, most from the Hub; tests/backbones runs it small",
    "explore": "draws maps with t-SNE; tests/explore runs it small",
    "attack": "takes minutes; tests/robustness runs it small",
    "explain": "judges a split or fits concepts; tests/explain runs it small",
    "index": "needs the command before it; tests/index runs it",
    "embed": "starts Ray; tests/cluster/test_embedding.py runs it",
    "serve": "serves until Ctrl-C; tests/serve runs it",
    "report": "measures frozen backbones; tests/report runs it small",
}
"""Commands that are only parsed here (test_house_rules), and why."""
NOT_HERE = {
    "--frozen": "embeds with the default backbone",
    "models:/": "the registry of a study",
    "fetch": "downloads",
    "sync": "a server that was down",
}
"""Words with which a command that is run is not."""


def blocks(page: Path) -> list[str]:
    """The python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.fixture
def here(small_run: Path, small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages speak of."""
    (tmp_path / "runs").mkdir()
    shutil.copytree(small_run, tmp_path / "runs" / "mine")
    photographs = sorted((small_set / "jpg").iterdir())
    for name, path in zip("abcd", photographs, strict=False):
        shutil.copy(path, tmp_path / f"{name}.jpg")
        shutil.copy(path, tmp_path / f"{name.upper()}.jpg")
    for name in ("FLOWERS", "DIR", "OTHER"):
        (tmp_path / name).symlink_to(small_set)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(methods, "_registered", {})
    return tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.name)
def test_python_blocks(page: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowerray import api

    small: dict[str, Any] = {"embedder": {}, "train": {}}
    for name, value in OPTIONS.items():
        part, _, field = name.partition(".")
        if part in small:
            small[part][field.replace("-", "_")] = value
    train = api.train

    def small_train(name: str, **said: Any) -> api.Training:
        """As the page says, with a tiny network and one epoch."""
        said |= {p: {**said.get(p, {}), **small[p]} for p in small}
        return train(name, **{**said, "epochs": 1}, quiet=True)

    monkeypatch.setattr(api, "train", small_train)
    embedder = fr.load("runs/mine")
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 32, 32, generator=generator)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    with torch.no_grad():
        emb_GD = embedder(torch.rand(6, 3, 32, 32, generator=generator))
    known: dict[str, Any] = {
        "embedder": embedder, "images": images, "images_BCHW": images, "labels": labels,
        "gallery": emb_GD, "gallery_labels": labels, "emb_GD": emb_GD, "labels_G": labels,
        "batches": [(images, labels)] * 2,
    }  # fmt: skip
    for code in blocks(page):
        if code.startswith('"""'):  # a file of its own
            (here / "multisimilarity.py").write_text(code)
        else:
            exec(compile(code, str(page), "exec"), known)


RUN = [
    words
    for words in flowerray_lines()
    if words[0] not in NOT_RUN and not any(w.startswith(tuple(NOT_HERE)) for w in words)
]


@pytest.mark.parametrize("words", RUN, ids=" ".join)
def test_commands(words: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.dispatch(["runs/mine" if word == "RUN" else word for word in words]) == 0
    assert capsys.readouterr().out


def test_what_is_left_out_is_known() -> None:
    assert {words[0] for words in RUN} >= {"evaluate", "similar", "search", "methods"}
    assert set(NOT_RUN) <= {words[0] for words in flowerray_lines()}, "a reason for nothing"
