"""A report in headless Chromium: it opens from disk, says nothing on the console, asks for nothing,
and shows ink in light, dark and on a phone.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from flowerray.report.command import PAGE, build
from flowerray.report.gather import group, read_run
from tests.report.runs import make_run, photographs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH"),
]
torch.set_num_threads(1)


class View(NamedTuple):
    """A screenshot and what the browser said while it was taken."""

    image: Image.Image
    console: list[str]
    requests: list[str]
    """Addresses that the page asked for."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    root = photographs(folder / "flowers")
    runs = [
        make_run(folder / f"{robust}{s}", seed=s, robust=robust, hits=0.8, right=0.3, root=root)
        for robust in (False, True)
        for s in range(2)
    ]
    settings = group([read_run(path) for path in runs])
    return build(settings, "A report").write(folder / PAGE)


def view(
    page: Path | str, folder: Path, width: int, dark: bool = False, height: int = 1500
) -> View:
    """Opens a page, a file or an address, and takes a screenshot of that many CSS pixels."""
    address = page if isinstance(page, str) else page.as_uri()
    shot, log = folder / "shot.png", folder / "net.json"
    words = [
        "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--no-first-run",
        "--virtual-time-budget=2000", "--enable-logging=stderr", f"--log-net-log={log}",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}",
        f"--screenshot={shot}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]  # fmt: skip
    assert CHROMIUM is not None
    done = subprocess.run([CHROMIUM, *words, address], capture_output=True, text=True, timeout=120)
    assert shot.exists(), done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    sent = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # The browser's own errands (clock, updates) have no page as their initiator.
    pages = [p["url"] for p in sent if p.get("initiator", "not an origin") != "not an origin"]
    requests = [asked for asked in pages if not asked.startswith("data:")]
    return View(Image.open(shot).convert("RGB"), console, requests)


def paper(image: Image.Image) -> float:
    """Brightness of the background, 0..255."""
    return float(np.asarray(image.crop((0, 0, 4, image.height))).mean())


def ink(image: Image.Image) -> float:
    """Share of pixels that are not background."""
    grey = np.asarray(image.convert("L"), float)
    return float((np.abs(grey - grey[0, 0]) > 40).mean())


@pytest.mark.parametrize(
    ("width", "dark"), [(1200, False), (1200, True), (500, False)], ids=["light", "dark", "phone"]
)
def test_a_report_opens_from_disk(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    seen = view(page, tmp_path, width, dark)
    assert seen.console == [] and seen.requests == []
    assert seen.image.size == (width, 1500)
    assert paper(seen.image) < 60 if dark else paper(seen.image) > 200
    assert 0.01 < ink(seen.image) < 0.5


def test_the_checks_above_can_fail(page: Path, tmp_path: Path) -> None:
    """A page that logs, and one that asks for a picture elsewhere, are told from a good one."""
    bad = tmp_path / "bad.html"
    bad.write_text("<script>console.error('no')</script><img src='http://127.0.0.1:9/a.png'>")
    seen = view(bad, tmp_path, 500)
    assert any("no" in line for line in seen.console)
    assert any("127.0.0.1:9" in address for address in seen.requests)
    assert ink(seen.image) < 0.01


def test_nothing_sticks_out_of_a_phone(page: Path, tmp_path: Path) -> None:
    """The page itself never scrolls sideways: wide things scroll in their own boxes."""
    probe = tmp_path / "probe.html"
    probe.write_text(
        f"<iframe src='{page.as_uri()}' width=400 height=900></iframe>"
        "<p id=w></p><script>onload=()=>{const d=document.querySelector('iframe')."
        "contentDocument.documentElement;document.getElementById('w').textContent="
        "d.scrollWidth+' of '+d.clientWidth}</script>"
    )
    assert CHROMIUM is not None
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    words += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [CHROMIUM, *words, "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    text = done.stdout.partition('<p id="w">')[2].partition("</p>")[0]
    scroll, _, client = text.partition(" of ")
    assert 350 < int(client) <= 400 and int(scroll) <= int(client)
