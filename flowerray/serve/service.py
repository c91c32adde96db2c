"""What the service answers, without HTTP: an INDEX, its model, and photographs as bytes.

Letters: B of a batch, D embedding dimensions, H W C S an image.
"""

import time
from base64 import b64encode
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from flowerray.attacks.objectives import margin, shift
from flowerray.attacks.pgd import PGDConfig, pgd
from flowerray.data.images import decode, eval_crop, read_file
from flowerray.data.store import floats
from flowerray.errors import UserError
from flowerray.explain.draw import overlays
from flowerray.explain.pair import compare, default_explainer
from flowerray.index.command import embed_crops, model_of, neighbours
from flowerray.index.contents import MANIFEST, Index, open_index
from flowerray.model.modes import full_precision
from flowerray.opening import Model

MAX_BYTES = 10 * 2**20
"""Of an uploaded photograph."""
MAX_PIXELS = 50_000_000
FORMATS = ("JPEG", "PNG", "WEBP")
THUMBNAIL = 320
"""Side of the photographs on the page, pixels."""
STEPS = 10
"""Of an attack."""
SAMPLED = 50
"""Photographs of the INDEX that are tried as a sample."""
ATTACKED = 500
"""Nearest photographs whose classes an attack looks at."""
FOLLOW_SECONDS = 1.0


class RefusedError(UserError):
    """A request that is not answered, with HTTP's number for why."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Upload(NamedTuple):
    """A photograph that was sent."""

    digest: bytes
    """Hash of its file."""
    crop_SSC: NDArray[np.uint8]


@dataclass(frozen=True)
class Served:
    """An INDEX as it was when a request came, and the model that made it; used by many threads, the
    model is neither changed nor leaves eval mode.
    """

    index: Index
    model: Model

    @property
    def name(self) -> str:
        """Of the model, without its folder."""
        return self.index.manifest["model"]["name"].rstrip("/").rpartition("/")[2]

    def read(self, data: bytes, name: str = "image") -> Upload:
        """A photograph's bytes, decoded.

        Raises:
            RefusedError: none, no JPEG, PNG or WebP, too large, or damaged.
        """
        kind(data, name)
        try:
            crop_SSC = eval_crop(decode(data), self.model.embedder.image_size)
        except UserError as error:
            raise RefusedError(422, str(error).replace("The given bytes", f"`{name}`")) from error
        return Upload(_digest(data), crop_SSC)

    def embed(self, crops: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
        """Unit embeddings of several uploads."""
        return list(embed_crops(self.model.embedder, crops))

    def similar(
        self, first_D: NDArray[Any], second_D: NDArray[Any], prior: float
    ) -> dict[str, Any]:
        """Whether two photographs show one class."""
        cosine = float(first_D.astype(np.float64) @ second_D.astype(np.float64))
        known = self.model.calibration
        return {
            "similarity": cosine,
            "probability": None if known is None else float(known.probability(cosine, prior)),
            "same": cosine >= self.model.threshold,
        }

    def search(
        self, emb_D: NDArray[np.float32], upload: Upload, k: int, prior: float
    ) -> dict[str, Any]:
        """What `flowerray index search` answers."""
        found = neighbours(self.index, self.model, emb_D, k, prior, upload.digest)
        return {"query": upload.digest.hex(), **found}

    def attack(self, emb_D: NDArray[np.float32], upload: Upload, eps: int) -> NDArray[np.uint8]:
        """The crop changed by at most `eps` of 255 levels, so that photographs of other classes
        become the nearest: PGD on the margin, where the class of the nearest one counts as its own;
        where classes do not tell, as far away from its embedding as possible.
        """
        if not eps:
            return upload.crop_SSC
        rows, _ = self.index.nearest(emb_D, ATTACKED)
        rows = np.array([row for row in rows if self.index.digest(int(row)) != upload.digest], int)
        embedder = deepcopy(self.model.embedder)  # an attack changes what needs gradients
        device = next(embedder.parameters()).device
        label_G = torch.from_numpy(self.index.entries_N["label"][rows].astype(np.int64)).to(device)
        if len(rows) and label_G[0] >= 0 and bool((label_G != label_G[0]).any()):
            gallery_GD = torch.from_numpy(self.index.vectors_ND[rows]).to(device)
            aim = margin(embedder, gallery_GD, label_G, label_G[:1])
        else:
            aim = shift(embedder, torch.from_numpy(emb_D[None]).to(device))
        found = pgd(aim, _pixels([upload.crop_SSC], device), PGDConfig(epsilon=eps, steps=STEPS))
        crop_SSC = (found.images_BCHW[0] * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        return np.ascontiguousarray(crop_SSC)

    def explain(self, upload: Upload, name: str) -> bytes:
        """Where an upload and a photograph of the INDEX are alike: both heat maps in one PNG."""
        other_SSC = eval_crop(decode(self.photograph(name)), self.model.embedder.image_size)
        embedder = deepcopy(self.model.embedder)  # maps hook into it
        images_2CHW = _pixels([upload.crop_SSC, other_SSC], next(embedder.parameters()).device)
        with full_precision():
            explainer = default_explainer(embedder, images_2CHW, None, None)
            pair, _ = compare(embedder, images_2CHW, explainer, ("", ""))
        sides = [Image.fromarray(drawn) for drawn in overlays(pair)]
        both = Image.new("RGB", (2 * THUMBNAIL, THUMBNAIL))
        for place, side in enumerate(sides):
            large = side.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
            both.paste(large, (place * THUMBNAIL, 0))
        return _encoded(both, "PNG")

    def photograph(self, name: str) -> bytes:
        """The file of a photograph of the INDEX, by the hash of its content: only one that still
        has that content is shown, whatever path the INDEX names.

        Raises:
            RefusedError: none has that hash, or its file is gone or another one now.
        """
        digest = np.frombuffer(bytes.fromhex(name), np.uint8)
        rows = np.flatnonzero((self.index.entries_N["digest"] == digest).all(1))
        if not len(rows):
            raise RefusedError(404, "the index holds no such photograph.")
        data = read_file(self.index.path(int(rows[0])))
        if isinstance(data, str) or _digest(data) != digest.tobytes():
            raise RefusedError(404, "the photograph is no longer where it was when it was indexed.")
        return data

    def sample(self) -> tuple[bytes, str]:
        """The file of any photograph that can be sent, and its kind; those that are gone, or of
        another format or size, are passed over.
        """
        if not len(self.index):
            raise RefusedError(404, "the index is empty.")
        for row in np.random.default_rng().permutation(len(self.index))[:SAMPLED]:
            with suppress(RefusedError):
                data = self.photograph(self.index.digest(int(row)).hex())
                return data, kind(data)
        raise RefusedError(
            404, "of the photographs that were drawn, none is still there and can be sent."
        )

    def thumbnail(self, name: str) -> bytes:
        """A photograph of the INDEX as a small JPEG."""
        image = ImageOps.contain(decode(self.photograph(name)), (THUMBNAIL, THUMBNAIL))
        return _encoded(image, "JPEG", quality=85)


class Service:
    """What is served now: what is added to the INDEX meanwhile, and another INDEX that is put in
    its place, counts from the next request on.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self._seen = self._state()
        self.now = self._open()

    def refresh(self) -> None:
        """Takes over what has changed; an INDEX that cannot be read leaves the old one."""
        if (state := self._state()) != self._seen:
            with suppress(UserError):
                self.now, self._seen = self._open(self.now), state

    def follow(self) -> NoReturn:
        """Refreshes for ever."""
        while True:
            time.sleep(FOLLOW_SECONDS)
            self.refresh()

    def _open(self, before: Served | None = None) -> Served:
        index = open_index(self.folder)
        _ = index.cells  # which take a while, before anybody waits for them
        if before and before.index.manifest["model"] == index.manifest["model"]:
            return Served(index, before.model)
        return Served(index, model_of(index, self.device))

    def _state(self) -> tuple[int, int]:
        with suppress(OSError):
            found = (self.folder / MANIFEST).stat()
            return found.st_ino, found.st_mtime_ns
        return 0, 0


def refuse_large(count: int, name: str = "the request") -> None:
    """Raises RefusedError where so many bytes are too many."""
    if count > MAX_BYTES:
        said = f"`{name}` has more than {MAX_BYTES // 2**20} MB: send a smaller file."
        raise RefusedError(413, said)


def kind(data: bytes, name: str = "image") -> str:
    """Media type of a photograph's bytes; raises RefusedError where they cannot be one."""
    if not data:
        raise RefusedError(400, f"`{name}` is empty: send the bytes of a photograph.")
    refuse_large(len(data), name)
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as header:
            pixels, media = header.width * header.height, Image.MIME[header.format or ""]
    except Image.DecompressionBombError:
        pixels = MAX_PIXELS + 1
    except Image.UnidentifiedImageError:
        raise RefusedError(415, f"`{name}` is no JPEG, PNG or WebP photograph.") from None
    except Exception as error:  # Pillow's readers raise almost any class
        said = f"`{name}` cannot be read as an image: it is damaged."
        raise RefusedError(422, said) from error
    if pixels > MAX_PIXELS:
        said = f"`{name}` has more than {MAX_PIXELS // 10**6} million pixels: send fewer."
        raise RefusedError(413, said)
    return media


def picture(crop_SSC: NDArray[np.uint8]) -> str:
    """Pixels as a PNG file in base64."""
    return b64encode(_encoded(Image.fromarray(crop_SSC), "PNG")).decode()


def _pixels(crops: Sequence[NDArray[np.uint8]], device: torch.device) -> torch.Tensor:
    return floats(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2), device)


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
