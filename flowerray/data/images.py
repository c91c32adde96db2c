"""One photograph: a file (or its bytes) to RGB pixels, resized and cropped as every part expects.

Letters: H W C an image. Pillow and numpy are all it imports, so that decoding processes start fast.
"""

import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import blake2b
from importlib.util import find_spec
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from flowerray.errors import UserError
from flowerray.pool import cores, ignore_pillow, spawned

LONGEST = 2
"""The longer side is cut to this many shorter sides: one panorama must not blow up a batch."""
HEIC = find_spec("pillow_heif") is not None
"""Whether HEIC is read: by pillow-heif, where that is installed."""
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", *["HEIF"] * HEIC)
"""What files may hold, whatever their names say: Pillow also knows formats that start programs."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what sets the image upright."""
MAX_BYTES = 2**29
"""Of a file that is read as an image."""
_WORTH_A_POOL = 1000  # fewer images are decoded before new processes have started


def resize_side(size: int) -> int:
    """Shorter side, pixels, from which a square of `size` is cropped: the usual 0.875."""
    return round(size / 0.875)


def decode(source: Path | bytes) -> Image.Image:
    """Upright RGB image of a file or of its bytes.

    EXIF orientation is applied; transparent parts show white, since what hides under them is often
    black; of an animation the first frame counts.

    Raises:
        UserError: missing, damaged, cut short, or no image.
    """
    if isinstance(source, str):  # a model that 0.1.0 logged hands on what its server was sent
        raise UserError("An image is the bytes of its file, or a Path; a text is neither.")
    image = _decode(source)
    if isinstance(image, str):
        name = "The given bytes" if isinstance(source, bytes) else str(source)
        if not isinstance(source, bytes) and not Path(source).is_file():
            there = Path(source).exists()
            what = f"is {unlike_file(Path(source).stat().st_mode)}" if there else "is not there"
            raise UserError(f"{source} {what}: give the path of a photograph.")
        raise UserError(f"{name} cannot be read as an image ({image}); replace or remove it.")
    return image


def read_image(path: Path) -> tuple[str, Image.Image | str]:
    """Hash of a file's bytes, and its upright RGB image, or why it is none, as a short clause."""
    data = read_file(path)
    if isinstance(data, str):
        return "", data
    return blake2b(data, digest_size=16).hexdigest(), _decode(data)


def examine(path: Path) -> tuple[str, str | None]:
    """Hash of a file's bytes, and why it is not a whole image, as a short clause, or None."""
    digest, image = read_image(path)
    return digest, image if isinstance(image, str) else None


def read_file(path: Path) -> bytes | str:
    """A regular file's bytes, or why there are none: a pipe would never end, nor a device."""
    try:
        found = path.stat()
        if (kind := unlike_file(found.st_mode)) is not None:
            return f"it is {kind}"
        if found.st_size > MAX_BYTES:
            return f"it has {found.st_size / 2**20:,.0f} MB, more than {MAX_BYTES // 2**20}"
        return path.read_bytes()
    except OSError as error:
        return _reason(error)


def unlike_file(mode: int) -> str | None:
    """What a path's `st_mode` says that it is, where it is no regular file."""
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((name for is_kind, name in kinds if is_kind(mode)), None)


def eval_pixels(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """`eval_image` of an image that Pillow has opened, in any mode."""
    crop_HWC = eval_crop(_to_rgb(_upright(image)), size)
    return np.ascontiguousarray(crop_HWC.transpose(2, 0, 1))


def load_image(source: Path | bytes, shorter_side: int) -> NDArray[np.uint8]:
    """Decoded, cut to at most 1 : 2 around its centre, resized (bicubic, antialiased).

    Args:
        shorter_side: of the result, pixels.

    Returns:
        uint8 HWC, RGB.

    Raises:
        UserError: see `decode`.
    """
    return _resize(decode(source), shorter_side)


def load_or_fault(path: Path, shorter_side: int) -> NDArray[np.uint8] | str:
    """`load_image`, or why the file is not a whole image."""
    image = _decode(path)
    return image if isinstance(image, str) else _resize(image, shorter_side)


def crop_or_fault(data: bytes, size: int) -> NDArray[np.uint8] | str:
    """`eval_crop` of a file's bytes, or why they are not a whole image."""
    image = _decode(data)
    return image if isinstance(image, str) else eval_crop(image, size)


def centre_crop(image_HWC: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The middle square of `size` pixels, a view; an odd pixel stays at the bottom or right."""
    height, width = image_HWC.shape[:2]
    assert size <= min(height, width), "the image is smaller than its crop"
    top, left = (height - size) // 2, (width - size) // 2
    return image_HWC[top : top + size, left : left + size]


def eval_image(source: Path | bytes, size: int) -> NDArray[np.uint8]:
    """The evaluation transform of one image: shorter side to `resize_side(size)`, centre crop.

    Returns:
        uint8 CHW, RGB, bit-equal to `Store.centre` of the same file.

    Raises:
        UserError: see `decode`.
    """
    return np.ascontiguousarray(eval_crop(decode(source), size).transpose(2, 0, 1))


def eval_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The same of a decoded image; uint8 HWC."""
    return centre_crop(_resize(image, resize_side(size)), size)


def thumbnail(path: Path, side: int) -> Image.Image:
    """A square of the photograph's middle for a picture, upright, as every other part sees it.

    Raises:
        UserError: see `decode`.
    """
    return ImageOps.fit(decode(path), (side, side), Image.Resampling.BICUBIC)


@contextmanager
def decoding_map(count: int, processes: int | None = None) -> Iterator[Callable]:
    """A lazy, ordered `map` for `count` images, in this process or over new ones.

    Args:
        count: images to come.
        processes: None = one per core where that is worth starting them.

    Raises:
        UserError: one of the processes died.
    """
    if processes is None:
        processes = cores() if count >= _WORTH_A_POOL else 1
    if processes == 1:
        yield map
        return
    with spawned(
        processes, "decodes images", ignore_pillow
    ) as pool:  # Pillow holds the GIL: no threads
        yield partial(map_ahead, pool, 64 * processes)


def map_ahead(pool: Executor, ahead: int, function: Callable, items: Iterable) -> Iterator:
    """`pool.map` that is at most two parts of `ahead` items before its reader: decoded images of a
    large set would fill the memory where the disk is slower than the cores.
    """
    rest = iter(items)
    before: Iterator = iter(())
    while part := list(islice(rest, ahead)):
        now = pool.map(function, part, chunksize=16)
        yield from before
        before = now
    yield from before


def _decode(source: Path | bytes) -> Image.Image | str:
    data = source if isinstance(source, bytes) else read_file(Path(source))
    if isinstance(data, str):
        return data
    if (fault := _unnoticed_fault(data)) is not None:
        return fault
    try:
        if HEIC and data[4:8] == b"ftyp":
            import pillow_heif

            pillow_heif.register_heif_opener()
        with Image.open(BytesIO(data), formats=_FORMATS) as image:
            return _to_rgb(_upright(image))
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost any class
        return _reason(error)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says; `ImageOps.exif_transpose` would also rewrite all other tags, and
    refuse a whole photograph for one of them that is mistyped.
    """
    image.load()  # by which TIFF images turn themselves
    with suppress(Exception):  # damaged metadata raise almost any class
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        return image if turn is None else image.transpose(turn)
    return image


def _unnoticed_fault(data: bytes) -> str | None:
    """What Pillow does not notice: a JPEG whose missing end was filled with zeros."""
    if not data:
        return "the file is empty"
    if data[:2] != b"\xff\xd8":
        return None
    position = 2
    while data[position : position + 1] == b"\xff":  # the headers, up to the start of the scan
        if data[position + 1 : position + 2] == b"\xda":
            break
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    if data.endswith(b"\0\0") and data.find(b"\xff\xd9", position) < 0:
        return "the image file is truncated and filled with zeros"
    return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode == "I" and not _fits(image):
        raise ValueError(
            "its pixels are 32-bit numbers, of which nothing says what is white: save it with 8 or "
            "16 bits"
        )
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8 instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _fits(image: Image.Image) -> bool:
    low, high = image.getextrema()
    return 0 <= low and high <= 255  # type: ignore[operator]


def _reason(error: Exception) -> str:
    """One short clause; Pillow's own message for an unknown format shows a memory address."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "no known image format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = " ".join(str(error).split()) or type(error).__name__
    return text[0].lower() + text[1:]


def _resize(image: Image.Image, shorter_side: int) -> NDArray[np.uint8]:
    shortest = min(image.size)
    width, height = (min(length, LONGEST * shortest) for length in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    scale = shorter_side / shortest
    target = (round(width * scale), round(height * scale))
    box = (left, top, left + width, top + height)
    return np.asarray(image.resize(target, Image.Resampling.BICUBIC, box=box))
