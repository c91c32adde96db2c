"""`flowerray serve` on a real Ray Serve: it answers, is full, and leaves nothing behind."""

import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from flowerray.cli import dispatch
from flowerray.index import command
from flowerray.index.contents import open_index
from flowerray.serve import deployment
from tests.serve.conftest import CPU
from tests.tuning.heads import wait_for


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
    return found


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the service says on standard error: a pipe that nobody reads would stop it."""
    return tmp_path_factory.mktemp("serve") / "log"


@pytest.fixture(scope="module")
def running(served: Path, port: int, log: Path) -> Iterator[psutil.Popen]:
    """`flowerray serve`, which answers."""
    out = log.with_name("out")
    program = (  # a shell has what it starts in the background ignore Ctrl-C
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from flowerray.cli import main; main()"
    )
    words = [sys.executable, "-c", program, "serve", str(served), "--port", str(port)]
    with out.open("w") as stdout, log.open("w") as stderr:
        process = psutil.Popen(words, stdout=stdout, stderr=stderr, start_new_session=True)
    try:
        wait_for(lambda: out.read_text().endswith("\n"), 300)
        assert out.read_text() == f"serving   12 photographs at http://127.0.0.1:{port}/\n"
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture
def client(running: psutil.Popen, port: int) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        yield client


def alone(client: httpx.Client, path: str, photo: bytes) -> httpx.Response:
    """One request by a connection of its own: many threads on one client close each other's."""
    with httpx.Client(base_url=client.base_url, timeout=60, verify=False, trust_env=False) as own:
        return own.post(path, content=photo)


@pytest.mark.ray
def test_it_answers_as_index_search_does(
    client: httpx.Client, served: Path, photo: bytes, tmp_path: Path
) -> None:
    (tmp_path / "photo.jpg").write_bytes(photo)
    index = open_index(served)
    expected = command.search(index, command.model_of(index, CPU), tmp_path / "photo.jpg", 3)
    found = client.post("/search?k=3", content=photo).json()
    assert [n["image"] for n in found["neighbours"]] == [n["image"] for n in expected["neighbours"]]
    for one, other in zip(found["neighbours"], expected["neighbours"], strict=True):
        assert one == pytest.approx(other, abs=1e-6)
    assert client.get("/healthz").json()["photographs"] == 12
    assert client.post("/embed", content=b"<svg>").status_code == 415
    assert "<!doctype html>" in client.get("/").text
    assert "flowerray_requests_total" in client.get("/metrics").text


@pytest.mark.ray
def test_a_flood_is_answered_or_503(client: httpx.Client, photo: bytes) -> None:
    expected = client.post("/embed", content=photo).json()["embedding"]

    def ask(_: int) -> int:
        answer = alone(client, "/embed", photo)
        if answer.status_code == 200:  # the size of its batch shows in the last digits
            np.testing.assert_allclose(answer.json()["embedding"], expected, atol=1e-5)
        else:
            assert "full" in answer.json()["error"]
        return answer.status_code

    with ThreadPoolExecutor(80) as pool:
        codes = list(pool.map(ask, range(400)))
    assert set(codes) == {200, 503} and codes.count(200) > 40
    assert client.get("/healthz").status_code == 200


@pytest.mark.ray
def test_a_killed_replica_loses_what_it_was_answering(
    client: httpx.Client, running: psutil.Popen, photo: bytes
) -> None:
    """And nothing else: what comes meanwhile waits for the new one."""
    (replica,) = (p for p in running.children(recursive=True) if "ServeReplica" in p.name())
    killed: list[float] = []

    def ask(number: int) -> tuple[bool, bool]:
        time.sleep(0.05 * number)
        if number == 20:
            replica.kill()
            killed.append(time.monotonic())
        begun = time.monotonic()
        answer = alone(client, "/search", photo)
        under_way = bool(killed) and begun <= killed[0]
        return answer.status_code == 200, under_way

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(ask, range(40)))
    assert all(good or under_way for good, under_way in answers)
    assert sum(good for good, _ in answers) >= 30


@pytest.mark.ray
def test_ctrl_c_ends_all_of_it(running: psutil.Popen, port: int, log: Path) -> None:
    left = running.children(recursive=True)
    assert len(left) > 3
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    assert running.wait(180) == 130
    _, alive = psutil.wait_procs(left, 10)
    assert alive == []
    assert log.read_text().endswith("flowerray serve: interrupted.\n")
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["INDEX", "--host", "0.0.0.0"], "--host 0.0.0.0 would let others in: set FLOWERRAY_SERVE"),
        (
            ["nowhere"],
            "nowhere is no INDEX: `flowerray index build RUN DIR --out ",
        ),
        (["INDEX", "--port", "PORT"], "cannot be listened at (Address already in use): choose"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    words: list[str], said: str, served: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("FLOWERRAY_SERVE_TOKEN", raising=False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        places = {"INDEX": str(served), "PORT": str(other.getsockname()[1])}
        given = [places.get(word, word) for word in words]
        assert dispatch(["serve", *given]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count("\n") == 1 and shown.out == ""


def test_the_demo_ends_with_its_page(
    small_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An index of all its photographs, of its own model; a second time it is there."""
    run = shutil.copytree(small_run, tmp_path / "demo")
    served: list[deployment.Serving] = []

    def serve(serving: deployment.Serving, host: str, port: int, ready: Callable[[], None]) -> None:
        served.append(serving)
        ready()

    monkeypatch.setattr(deployment, "require", lambda host, port: None)
    monkeypatch.setattr(deployment, "run", serve)
    for _ in range(2):
        assert dispatch(["demo", "--resume", str(run), "--serve"]) == 0
        shown = capsys.readouterr().out
        assert "serving   144 photographs at http://127.0.0.1:8000/" in shown
    assert [one.index for one in served] == [run / "index"] * 2
    assert open_index(run / "index").manifest["model"]["name"] == str(run)
