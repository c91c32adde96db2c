"""The page in headless Chromium: a photograph is sent, neighbours come, a click says why."""

import asyncio
import threading
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Mount, Route

from flowerray.serve.app import make_app
from flowerray.serve.service import Service
from tests.report.test_browser import CHROMIUM, ink, paper, view
from tests.serve.conftest import CPU

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH"),
]
torch.set_num_threads(1)
USER = """<img src="/held" hidden>
<script>
(async () => {
  const photo = await (await fetch("/probe.jpg")).blob();
  await search(new File([photo], "mine.jpg", {type: "image/jpeg"}));
  await document.querySelector("#neighbours button").onclick();
  const map = document.getElementById("why-map"), high = map.offsetHeight * 2 === map.offsetWidth;
  await map.decode();
  const asks = [], fetched = window.fetch;
  window.fetch = (...words) => { asks.push(words[0]); return fetched(...words); };
  const attacks = () => asks.filter(address => address.includes("eps="));
  const slider = document.getElementById("eps");
  for (slider.value = 1; slider.dispatchEvent(new Event("change")) && slider.value < 8;) {
    slider.stepUp();
  }
  while (attacks().length === 0) await new Promise(done => setTimeout(done, 50));
  scrollTo(0, document.body.scrollHeight);
  const status = document.getElementById("status"), place = status.getBoundingClientRect();
  const told = status.textContent && place.top >= 0 && place.bottom <= innerHeight;
  while (status.textContent) await new Promise(done => setTimeout(done, 50));
  scrollTo(0, 0);
  const columns = getComputedStyle(document.querySelector("#sides ol")).gridTemplateColumns;
  const canvas = Object.assign(document.createElement("canvas"), {width: 2000, height: 1000});
  const clear = await smaller(await new Promise(done => canvas.toBlob(done)));
  canvas.getContext("2d").drawImage(await createImageBitmap(clear), 0, 0);
  const corner = [...canvas.getContext("2d").getImageData(9, 9, 1, 1).data];
  const images = [...document.images].filter(image => image.src && !image.hidden);
  await Promise.all(images.map(image => image.decode()));
  const text = document.body.innerText, wide = document.documentElement.scrollWidth > innerWidth;
  const body = JSON.stringify({text, wide, active: document.activeElement.id, attacks: attacks(),
    told: Boolean(told), high, columns: columns.split(" ").length, corner});
  await fetch("/said", {method: "POST", body});
})();
</script>"""
"""What a user does, added to the page, whose picture is taken once that is done."""


class Visited:
    """A service of two indexes with a page on which a user is at work."""

    def __init__(self, service: Service, beside: Service, photo: bytes) -> None:
        self.said: list[dict] = []
        page = (files("flowerray.serve") / "page.html").read_text(encoding="utf-8")

        async def probe(_: Request) -> Response:
            return HTMLResponse(page + USER)

        async def picture(_: Request) -> Response:
            return Response(photo, media_type="image/jpeg")

        done = asyncio.Event()

        async def said(request: Request) -> Response:
            self.said.append(await request.json())
            done.set()
            return Response()

        async def held(_: Request) -> Response:
            done.clear()
            await asyncio.wait_for(done.wait(), 60)
            return Response(photo, media_type="image/jpeg")

        app = Starlette(routes=[
            Route("/probe", probe), Route("/probe.jpg", picture), Route("/held", held),
            Route("/said", said, methods=["POST"]), Mount("/", make_app(service, beside=beside)),
        ])  # fmt: skip
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.05)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.address = f"http://127.0.0.1:{port}/probe"


@pytest.fixture(scope="module")
def visited(served: Path, other: Path, photo: bytes) -> Iterator[Visited]:
    found = Visited(Service(served, CPU), Service(other, CPU), photo)
    yield found
    found.server.should_exit = True
    found.thread.join()


@pytest.mark.parametrize(
    ("width", "dark"), [(1200, False), (1200, True), (500, False)], ids=["light", "dark", "phone"]
)
def test_a_photograph_is_looked_for_and_explained(
    visited: Visited, tmp_path: Path, width: int, dark: bool
) -> None:
    visited.said.clear()
    seen = view(visited.address, tmp_path, width, dark)
    assert seen.console == []
    own = visited.address.removesuffix("/probe")
    assert {address for address in seen.requests if not address.startswith((own, "blob:"))} == set()
    assert paper(seen.image) < 60 if dark else paper(seen.image) > 200
    assert 0.005 < ink(seen.image) < 0.7
    (said,) = visited.said
    assert "12 photographs" in said["text"] and "Where they are alike" in said["text"]
    assert "8 of 255 levels" in said["text"] and "small" in said["text"]
    verdicts = said["text"].count("Most likely") + said["text"].count("None of these")
    assert verdicts == 3  # of the photograph, and of each model under attack
    assert not said["wide"] and said["active"] == "why-title"
    assert {eps.partition("&")[0] for eps in said["attacks"]} == {"/attack?eps=8"}  # not 1 to 7
    assert said["told"]  # what it is at stays in sight
    assert said["high"]  # room for the map before it comes, so that the page scrolls far enough
    assert said["columns"] == (2 if width == 500 else 4)  # names keep their words whole
    assert min(said["corner"]) > 250  # transparent parts are white, as for the service
