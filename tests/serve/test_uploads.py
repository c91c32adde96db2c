"""What the service refuses: sixty bad uploads and malformed requests, one sentence each."""

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.serve.conftest import saved


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG file of any stated size."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunks)


def bad_uploads() -> Iterator[tuple[str, bytes, int]]:
    """Sixty: what it is, the bytes, the status."""
    jpeg, other, webp = saved("JPEG", (90, 80)), saved("PNG", (90, 80)), saved("WEBP", (90, 80))
    html = b"<!doctype html><script>alert(1)</script>"
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    yield "nothing", b"", 400
    for name, text in {
        "a page": html, "svg": svg, "svg with xml": b"<?xml version='1.0'?>" + svg, "text": b"hi",
        "json": b"{}", "zero": b"\0", "zeros": bytes(5000), "pdf": b"%PDF-1.7\n%", "zip": b"PK\3\4",
        "gzip": b"\x1f\x8b\x08", "elf": b"\x7fELF", "script": b"#!/bin/sh\nid", "php": b"<?php 1;",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "mp4": b"\0\0\0\x18ftypmp42",
        "heic": b"\0\0\0\x18ftypheic", "avif": b"\0\0\0\x18ftypavif", "psd": b"8BPS\0\1",
        "pickle": b"\x80\x04}q.", "wav": b"RIFF\4\0\0\0WAVE", "path": b"/etc/passwd",
        "base64": b"/9j/4AAQSkZJRgABAQ==", "address": b"http://127.0.0.1/a.jpg",
        "xbm": b"#define a_width 8\n#define a_height 8\n", "ppm": b"P6 1 1 255\n123",
        "fits": b"SIMPLE  =", "ico": b"\0\0\1\0", "tar": bytes(257) + b"ustar",
    }.items():  # fmt: skip
        yield name, text, 415
    for kind in ("GIF", "BMP", "TIFF", "PPM", "ICO", "TGA"):
        yield kind, saved(kind), 415
    for share in (0.1, 0.3, 0.5, 0.9):
        yield f"jpeg cut at {share}", jpeg[: int(len(jpeg) * share)], 422
        yield f"png cut at {share}", other[: int(len(other) * share) + 20], 422
        yield f"webp cut at {share}", webp[: int(len(webp) * share) + 30], 422
    yield "jpeg's two bytes", b"\xff\xd8", 415
    yield "png's signature", b"\x89PNG\r\n\x1a\n", 415
    yield "jpeg filled with zeros", jpeg[:900] + bytes(len(jpeg) - 900), 422
    yield "png of no size", png(0, 0, chunk(b"IEND", b"")), 415
    yield "png without pixels", png(9, 9, chunk(b"IEND", b"")), 422
    yield "png of wrong pixels", png(99, 99, chunk(b"IDAT", b"zz"), chunk(b"IEND", b"")), 422
    packed = zlib.compress(bytes(10**6))
    yield "bomb", png(60_000, 60_000, chunk(b"IDAT", packed), chunk(b"IEND", b"")), 413
    yield "bomb below Pillow's bound", png(9000, 9000, chunk(b"IDAT", packed)), 413
    yield "wide bomb", png(2**31 - 1, 1, chunk(b"IDAT", packed)), 413
    text_bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 * 2**20)))
    yield "text bomb", png(9, 9, text_bomb, chunk(b"IEND", b"")), 422
    yield "huge", jpeg + bytes(11 * 2**20), 413
    yield "png in noise", bytes(range(256)) * 20 + other, 415


UPLOADS = list(bad_uploads())


@pytest.mark.parametrize(
    ("data", "status"), [(d, s) for _, d, s in UPLOADS], ids=[n for n, *_ in UPLOADS]
)
def test_a_bad_upload_is_one_sentence(client: TestClient, data: bytes, status: int) -> None:
    for sent in ({"content": data}, {"files": {"image": ("a.jpg", data, "image/jpeg")}}):
        answer = client.post("/search", **sent)
        said = answer.json()
        assert answer.status_code // 100 == 4 and list(said) == ["error"], said
        assert (
            said["error"].endswith(".") and len(said["error"]) < 200 and "\n" not in said["error"]
        )
        assert "<" not in said["error"] and "0x" not in said["error"]
        assert answer.status_code == status, said


def test_there_are_sixty() -> None:
    assert len(UPLOADS) >= 58


@pytest.mark.parametrize(
    ("path", "sent", "status", "said"),
    [
        ("/similar", {"content": b"a"}, 415, "as multipart/form-data"),
        ("/similar", {"files": {"image": b"a"}}, 400, "no field `other`"),
        ("/search", {"files": {"other": b"a"}}, 400, "no field `image`"),
        ("/search", {"data": {"image": "a"}, "files": {"x": b"a"}}, 415, "no JPEG, PNG or WebP"),
        ("/search?k=0", {"content": b"a"}, 422, "`k`: input should be greater than"),
        ("/search?k=ten", {"content": b"a"}, 422, "`k`: input should be a valid integer"),
        ("/search?prior=1", {"content": b"a"}, 422, "`prior`: input should be less than 1"),
        ("/explain?id=../../etc/passwd", {"content": b"a"}, 422, "`id`: string should match"),
        ("/explain", {"content": b"a"}, 422, "`id`: field required"),
        ("/nothing", {}, 404, "there is nothing here"),
        ("/healthz", {"content": b"a"}, 405, "takes another method"),
        (
            "/search",
            {"content": b"--x", "headers": {"content-type": "multipart/form-data"}},
            400,
            "cannot be read",
        ),
        (
            "/search",
            {"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}},
            400,
            "",
        ),
    ],
)
def test_a_bad_request_is_one_sentence(
    client: TestClient, path: str, sent: dict[str, Any], status: int, said: str
) -> None:
    answer = client.post(path, **sent)
    assert answer.status_code == status and list(answer.json()) == ["error"]
    assert said in answer.json()["error"]


def test_a_body_without_a_stated_length_is_bounded(client: TestClient) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(2**20)

    assert client.post("/embed", content=endless()).status_code == 413
