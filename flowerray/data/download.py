"""Files from the web: resumed where they broke off, checked by md5, unpacked without escape."""

import gzip
import hashlib
import re
import shutil
import tarfile
import time
import zlib
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

from flowerray.errors import UserError
from flowerray.files import atomic_folder

ATTEMPTS = 4
"""Tries in a row that bring no byte before a download is given up."""
PAUSE = 2.0
"""Seconds before the second try; twice as many before each further one."""
_TIMEOUT = 30  # seconds without a byte
_BLOCK = 1 << 18


def download(url: str, target: Path, md5: str, progress: bool = True) -> None:
    """Downloads a file, unless it is there already; goes on from `target.part` where that exists.

    Args:
        target: the file to write; it appears only when it is whole.
        md5: its sum, hexadecimal.

    Raises:
        UserError: no network, the server refuses, or the sum is wrong (the download is then
            removed, since a resumed one would keep the fault).
    """
    if target.exists() and md5_of(target) == md5:
        return
    part = target.with_name(target.name + ".part")
    attempts = 0
    with tqdm(
        desc=target.name, unit="B", unit_scale=True, disable=None if progress else True
    ) as bar:
        while True:
            before = _size(part)
            try:
                _receive(url, part, bar)
                break
            except (OSError, HTTPException) as error:
                attempts = 1 if _size(part) > before else attempts + 1
                final = isinstance(error, HTTPError) and error.code in (401, 403, 404, 410)
                if final or attempts >= ATTEMPTS:
                    raise UserError(
                        f"{url} cannot be downloaded ({_reason(error)}); check the network and the "
                        "disk and give the command again, which goes on where this one stopped."
                    ) from error
                time.sleep(PAUSE * 2 ** (attempts - 1))
    found = md5_of(part)
    if found != md5:
        part.unlink()
        raise UserError(
            f"{url} arrived with the md5 {found} instead of {md5}, so it was damaged or replaced; "
            "the download was removed, give the command again."
        )
    part.replace(target)


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks the regular files of `folder.name` in a tar archive into `folder`, all or nothing.

    Only plain names directly in that folder are written; links, devices and other folders are not.

    Raises:
        UserError: the archive is damaged, or names a path outside itself.
    """
    try:
        with tarfile.open(archive) as tar, atomic_folder(folder) as temporary:
            for member in tar:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise UserError(
                        f"{archive} tries to write to {member.name}, outside its folder, and was "
                        "not unpacked; delete it and fetch it from its publisher."
                    )
                plain = re.fullmatch(r"\w[\w.-]*", name.name)
                if member.isfile() and name.parts[:-1] == (folder.name,) and plain:
                    source = tar.extractfile(member)
                    assert source is not None
                    with source, (temporary / name.name).open("wb") as file:
                        shutil.copyfileobj(source, file)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{archive} is damaged ({error}); delete it and fetch it again.") from error


def md5_of(path: Path) -> str:
    """The md5 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _receive(url: str, part: Path, bar: tqdm) -> None:
    """Appends what `part` lacks, or starts again where the server does not resume."""
    start = _size(part)
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urlopen(request, timeout=_TIMEOUT)
    except HTTPError as error:
        if error.code == 416:  # nothing lacks; the sum tells whether that is true
            return
        raise
    with response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise ConnectionError("the server sent another part than the one asked for")
        start = start if resumed else 0
        length = response.headers.get("Content-Length")
        end = None if length is None else start + int(length)
        bar.total = end
        bar.n = start
        bar.refresh()
        with part.open("ab" if resumed else "wb") as file:
            while block := response.read1(_BLOCK):
                file.write(block)
                bar.update(len(block))
    if end is not None and _size(part) < end:
        raise ConnectionError(f"the connection broke off after {_size(part):,} of {end:,} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"the server answered {error.code} {error.reason}"
    if isinstance(error, URLError):
        return f"no connection: {error.reason}"
    return str(error) or type(error).__name__
