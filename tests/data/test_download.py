"""Fetching from a local server: resume, sums, archives that want out."""

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from flowerray.data import download as module
from flowerray.data.download import download, md5_of, unpack
from flowerray.data.oxford import fetch
from flowerray.errors import UserError
from tests.data.pictures import picture, write_tables


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files` with ranges, and breaks off as told."""

    server: "Server"

    def do_GET(self) -> None:  # noqa: N802 (the base class's name)
        """Answers one request."""
        asked = self.headers.get("Range")
        self.server.requests.append((self.path, asked))
        if self.server.failures:
            return self.send_error(self.server.failures.pop())
        content = self.server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        start = int(asked[6:-1]) if asked and self.server.ranges else 0
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = start + self.server.cuts.pop() if self.server.cuts else None
        self.wfile.write(content[start:end])

    def log_message(self, *_: object) -> None:
        """Stays quiet."""


class Server(ThreadingHTTPServer):
    """Files by path, and what is to go wrong."""

    def __init__(self) -> None:
        """Any free port of this machine."""
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.cuts: list[int] = []
        self.failures: list[int] = []
        self.ranges = True
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


CONTENT = np.random.default_rng(0).bytes(100_000)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def get(server: Server, target: Path, expected: bytes = CONTENT) -> None:
    download(f"{server.url}/{target.name}", target, md5(expected), progress=False)


def test_a_cut_download_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = CONTENT
    server.cuts = [20_000, 30_000]  # the last is taken first
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    ranges = [asked for _, asked in server.requests]
    assert ranges == [None, "bytes=30000-", "bytes=50000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    get(server, tmp_path / "a.bin")  # there already
    assert len(server.requests) == 3


def test_a_later_call_goes_on(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = CONTENT
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:70_000])
    get(server, tmp_path / "a.bin")
    assert server.requests == [("/a.bin", "bytes=70000-")]
    (tmp_path / "b.bin.part").write_bytes(CONTENT)  # whole, only its renaming was lost
    server.files["/b.bin"] = CONTENT
    get(server, tmp_path / "b.bin")
    assert (tmp_path / "b.bin").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = CONTENT
    server.ranges = False
    (tmp_path / "a.bin.part").write_bytes(b"x" * 500)
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = CONTENT
    server.failures = [503, 500]
    get(server, tmp_path / "a.bin")
    assert len(server.requests) == 3


def test_a_wrong_sum_is_refused_and_removed(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = CONTENT[:-1] + b"x"
    with pytest.raises(
        UserError, match=rf"a\.bin arrived with the md5 .* instead of {md5(CONTENT)}"
    ):
        get(server, tmp_path / "a.bin")
    assert not list(tmp_path.iterdir())
    server.files["/a.bin"] = CONTENT
    (tmp_path / "a.bin").write_bytes(b"an earlier, damaged file")
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_missing_file_is_not_asked_for_twice(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="404"):
        get(server, tmp_path / "a.bin")
    assert len(server.requests) == 1


def test_no_network_is_one_sentence_and_keeps_the_part(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = CONTENT
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:10])
    server.failures = [503] * module.ATTEMPTS
    with pytest.raises(UserError, match="check the network"):
        get(server, tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"cannot be downloaded \(no connection: ") as caught:
        download("http://127.0.0.1:9/a.bin", tmp_path / "a.bin", md5(CONTENT), progress=False)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "a.bin.part").read_bytes() == CONTENT[:10]


def tar(names: dict[str, bytes], link: tuple[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        if link:
            member = tarfile.TarInfo(link[0])
            member.type, member.linkname = tarfile.SYMTYPE, link[1]
            archive.addfile(member)
        for name, content in names.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["../evil", "jpg/../../evil", "/tmp/flowerray-evil"])
def test_an_archive_that_wants_out_is_refused(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "in" / "a.tgz"
    archive.parent.mkdir()
    archive.write_bytes(tar({"jpg/image_00001.jpg": b"1", name: b"evil"}))
    with pytest.raises(UserError, match="outside its folder"):
        unpack(archive, tmp_path / "in" / "jpg")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tgz", "in"]


def test_only_plain_files_of_the_folder_are_unpacked(tmp_path: Path) -> None:
    archive = tmp_path / "a.tgz"
    names = {"./jpg/image_00001.jpg": b"1", "jpg/deep/b.jpg": b"2", "c.jpg": b"3", "jpg/._d": b"4"}
    archive.write_bytes(tar(names, link=("jpg/deep", "/tmp")))
    unpack(archive, tmp_path / "jpg")
    assert [path.name for path in (tmp_path / "jpg").iterdir()] == ["image_00001.jpg"]


def test_a_damaged_archive_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    archive = tmp_path / "a.tgz"
    content = tar({f"jpg/{i}.jpg": np.random.default_rng(i).bytes(999) for i in range(9)})
    for damaged in (content[: len(content) // 2], b"no archive"):
        archive.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            unpack(archive, tmp_path / "jpg")
        assert [path.name for path in tmp_path.iterdir()] == ["a.tgz"]


@pytest.fixture
def published(server: Server, tmp_path: Path) -> dict[str, str]:
    """A set of five photographs on the server; returns its sums."""
    source = tmp_path / "source"
    source.mkdir()
    parts = {"trnid": [1, 2], "valid": [3], "tstid": [4, 5]}
    write_tables(source, [1, 2, 1, 2, 1], parts)
    buffer = io.BytesIO()
    picture(0).save(buffer, "JPEG")
    for archive, stem in (("102flowers", "jpg/image"), ("102segmentations", "segmim/segmim")):
        names = {f"{stem}_{number:05d}.jpg": buffer.getvalue() for number in range(1, 6)}
        server.files[f"/{archive}.tgz"] = tar(names)
    for name in ("imagelabels.mat", "setid.mat"):
        server.files[f"/{name}"] = (source / name).read_bytes()
    return {path[1:]: md5(content) for path, content in server.files.items()}


def test_fetch_brings_the_whole_layout_once(
    server: Server, published: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert fetch(out, progress=False, base_url=server.url, md5=published) == out
    assert sorted(path.name for path in out.iterdir()) == [
        "imagelabels.mat", "jpg", "segmim", "setid.mat",
    ]  # fmt: skip
    assert len(list((out / "jpg").iterdir())) == len(list((out / "segmim").iterdir())) == 5
    assert md5_of(out / "setid.mat") == published["setid.mat"]
    before = len(server.requests)
    fetch(out, progress=False, base_url=server.url, md5=published)
    assert len(server.requests) == before
    (out / "jpg" / "image_00004.jpg").unlink()  # a set that lost a file is mended
    fetch(out, progress=False, base_url=server.url, md5=published)
    assert server.requests[before:] == [("/102flowers.tgz", None)]
    assert (out / "jpg" / "image_00004.jpg").exists()


def test_fetch_replaces_nobodys_photographs(
    server: Server, published: dict[str, str], tmp_path: Path
) -> None:
    mine = tmp_path / "mine" / "jpg" / "holiday.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"holds holiday\.jpg, which is none of Oxford's"):
        fetch(tmp_path / "mine", progress=False, base_url=server.url, md5=published)
    (tmp_path / "rendered").mkdir()
    (tmp_path / "rendered" / "synthetic.json").write_text("{}")
    with pytest.raises(UserError, match="holds a rendered set"):
        fetch(tmp_path / "rendered", progress=False, base_url=server.url, md5=published)
    assert mine.read_bytes() == b"mine" and not server.requests


def test_fetch_refuses_an_archive_that_lacks_images(
    server: Server, published: dict[str, str], tmp_path: Path
) -> None:
    server.files["/102flowers.tgz"] = tar({"jpg/image_00001.jpg": b"1"})
    published["102flowers.tgz"] = md5(server.files["/102flowers.tgz"])
    with pytest.raises(UserError, match=r"102flowers\.tgz lacks image_00002\.jpg"):
        fetch(tmp_path / "out", progress=False, base_url=server.url, md5=published)


def test_fetch_into_an_unwritable_place_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        fetch(tmp_path / "file" / "out", progress=False)
