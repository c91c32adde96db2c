"""The service over HTTP: an ASGI application that knows nothing of Ray.

Every answer but the pictures, the page and the metrics is JSON; an error is `{"error": sentence}`.
"""

import hmac
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from importlib.resources import files
from typing import Annotated, Any

import numpy as np
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import TypedDict

from flowerray.calibration import PRIOR
from flowerray.description import VERSION
from flowerray.errors import UserError
from flowerray.pool import cores
from flowerray.serve.service import (
    MAX_BYTES,
    RefusedError,
    Served,
    Service,
    Upload,
    picture,
    refuse_large,
)

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""Names by which a service without a token may be called: a web page that has its own name lead to
this machine (DNS rebinding) gets no answer."""
OPEN = ("/healthz", "/")
"""Answered without a token."""
K = Annotated[int, Query(ge=1, le=100, description="neighbours")]
Prior = Annotated[
    float, Query(gt=0, lt=1, description="chance of one class before the images are seen")
]
Id = Annotated[str, Query(pattern="^[0-9a-f]{32}$", description="of a neighbour")]
Eps = Annotated[int, Query(ge=0, le=8, description="largest change of a pixel, of 255 levels")]
Beside = Annotated[bool, Query(description="by the second index, `--beside`")]
Embed = Callable[[Served, NDArray[np.uint8]], Awaitable[NDArray[np.float32]]]


class Embedding(TypedDict):
    """Answer of /embed."""

    embedding: list[float]


class Similarity(TypedDict):
    """Answer of /similar."""

    similarity: float
    probability: float | None
    same: bool


class Neighbour(TypedDict):
    """One of those of /search."""

    image: str
    label: str | None
    similarity: float
    probability: float | None
    id: str


class Neighbours(TypedDict):
    """Answer of /search."""

    query: str
    neighbours: list[Neighbour]
    unknown: bool


class Attacked(Neighbours):
    """Answer of /attack."""

    picture: str
    """The attacked crop, a PNG file in base64."""


class Health(TypedDict):
    """Answer of /healthz."""

    status: str
    photographs: int
    model: str
    beside: str | None


class Error(TypedDict):
    """Of a request that is not answered."""

    error: str


def _sent(*fields: str) -> dict[str, Any]:
    """What a request's body may be, and how it may fail, for OpenAPI."""
    binary = {"type": "string", "format": "binary"}
    form = {"type": "object", "required": list(fields), "properties": dict.fromkeys(fields, binary)}
    content: dict[str, Any] = {"multipart/form-data": {"schema": form}}
    if len(fields) == 1:
        content |= {f"image/{kind}": {"schema": binary} for kind in ("jpeg", "png", "webp")}
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": dict.fromkeys((400, 401, 404, 413, 415, 422, 503), {"model": Error}),
    }


def make_app(
    service: Service,
    token: str | None = None,
    beside: Service | None = None,
    embed: Embed | None = None,
    waiting: int = sys.maxsize,
) -> ASGIApp:
    """The application.

    Args:
        token: that a request has to bring (`Authorization: Bearer TOKEN`); None answers requests to
            this machine's own names only.
        beside: the same photographs by another model, to compare.
        embed: the embedding of a crop; by default one at a time.
        waiting: requests at a time; more are answered with 503.
    """
    api = FastAPI(title="flowerray", version=VERSION, docs_url=None, redoc_url=None)
    in_thread = partial(run_sync, limiter=CapacityLimiter(cores()))
    alone = partial(run_sync, limiter=CapacityLimiter(1))  # what takes long, so that others go on
    registry = CollectorRegistry()
    Gauge("flowerray_photographs", "in the index", registry=registry).set_function(
        lambda: len(service.now.index)
    )

    async def one_at_a_time(served: Served, crop: NDArray[np.uint8]) -> NDArray[np.float32]:
        return (await in_thread(served.embed, [crop]))[0]

    embedded = embed or one_at_a_time

    async def uploads(request: Request, served: Served, *names: str) -> list[Upload]:
        found = await _parts(request, names)
        return [await in_thread(served.read, found[name], name) for name in names]

    def chosen(other: bool) -> Served:
        if other and beside is None:
            raise RefusedError(404, "the service has no second index.")
        return (beside if beside and other else service).now

    @api.post("/embed", **_sent("image"))
    async def embedding(request: Request) -> Embedding:
        """The unit embedding of a photograph."""
        served = service.now
        (upload,) = await uploads(request, served, "image")
        return {"embedding": (await embedded(served, upload.crop_SSC)).tolist()}

    @api.post("/similar", **_sent("image", "other"))
    async def similar(request: Request, prior: Prior = PRIOR) -> Similarity:
        """Do two photographs show one class?"""
        served = service.now
        pair = await uploads(request, served, "image", "other")
        emb_D, other_D = [await embedded(served, upload.crop_SSC) for upload in pair]
        return served.similar(emb_D, other_D, prior)  # type: ignore[return-value]

    @api.post("/search", **_sent("image"))
    async def search(
        request: Request, k: K = 10, prior: Prior = PRIOR, beside: Beside = False
    ) -> Neighbours:
        """The photographs of the index that are most like one."""
        served = chosen(beside)
        (upload,) = await uploads(request, served, "image")
        emb_D = await embedded(served, upload.crop_SSC)
        found = await in_thread(served.search, emb_D, upload, k, prior)
        return found  # type: ignore[return-value]

    @api.post("/attack", **_sent("image"))
    async def attack(
        request: Request, eps: Eps, k: K = 10, prior: Prior = PRIOR, beside: Beside = False
    ) -> Attacked:
        """What /search finds once the photograph is changed so that it finds something else."""
        served = chosen(beside)
        (upload,) = await uploads(request, served, "image")
        emb_D = await embedded(served, upload.crop_SSC)
        crop_SSC = await alone(served.attack, emb_D, upload, eps)
        emb_D = await embedded(served, crop_SSC)
        found = await in_thread(served.search, emb_D, upload, k, prior)
        return {**found, "picture": picture(crop_SSC)}  # type: ignore[typeddict-item]

    @api.post("/explain", **_sent("image"))
    async def explain(request: Request, id: Id) -> Response:
        """Where a photograph and one of the index are alike: two heat maps beside each other."""
        served = service.now
        (upload,) = await uploads(request, served, "image")
        return Response(await alone(served.explain, upload, id), media_type="image/png")

    @api.get("/photograph", responses={404: {"model": Error}})
    async def photograph(id: Id) -> Response:
        """A photograph of the index, made small."""
        return Response(await in_thread(service.now.thumbnail, id), media_type="image/jpeg")

    @api.get("/sample", responses={404: {"model": Error}})
    async def sample() -> Response:
        """The file of a photograph of the index, drawn at random."""
        data, kind = await in_thread(service.now.sample)
        return Response(data, media_type=kind)

    @api.get("/healthz")
    async def healthz() -> Health:
        """That the service is up, and what it serves."""
        return {
            "status": "ok",
            "photographs": len(service.now.index),
            "model": service.now.name,
            "beside": beside.now.name if beside else None,
        }

    @api.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    @api.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        text = (files("flowerray.serve") / "page.html").read_text(encoding="utf-8")
        policy = "default-src 'none'; connect-src 'self'; img-src blob: data:; "
        policy += "script-src 'unsafe-inline'; style-src 'unsafe-inline'; frame-ancestors 'none'"
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    @api.exception_handler(UserError)
    async def refused(_: Request, error: UserError) -> JSONResponse:
        return _error(getattr(error, "status", 500), str(error))

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        fault = error.errors()[0]
        return _error(422, f"`{fault['loc'][-1]}`: {fault['msg'][0].lower()}{fault['msg'][1:]}.")

    @api.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> JSONResponse:
        said = {404: "there is nothing here", 405: "this address takes another method"}
        return _error(error.status_code, f"{said.get(error.status_code, error.detail)}.")

    @api.exception_handler(Exception)  # which is also raised, so that the log has it
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return _error(500, "the service failed; its log says why.")

    return Guard(api, registry, token, waiting)


async def _parts(request: Request, names: tuple[str, ...]) -> dict[str, bytes]:
    """The files of a request, by name: multipart fields, or the body itself.

    Raises:
        RefusedError: too many bytes, a broken form, or a missing field.
    """
    refuse_large(int(request.headers.get("content-length", "0") or 0) - 4096 * len(names))
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > len(names) * (MAX_BYTES + 4096):
            refuse_large(len(body))
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        if len(names) > 1:
            raise RefusedError(
                415, f"send {' and '.join(f'`{n}`' for n in names)} as multipart/form-data."
            )
        return {names[0]: bytes(body)}

    async def whole() -> AsyncGenerator[bytes, None]:
        yield bytes(body)

    try:
        form = await MultiPartParser(request.headers, whole(), max_files=2, max_fields=2).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise RefusedError(400, "the form cannot be read: it is broken.") from error
    found = {}
    try:
        for name in names:
            part = form.get(name)
            if part is None:
                raise RefusedError(400, f"the form has no field `{name}`.")
            found[name] = part.encode() if isinstance(part, str) else await part.read()
    finally:
        await form.close()
    return found


def _error(status: int, sentence: str) -> JSONResponse:
    more = {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}
    return JSONResponse({"error": sentence}, status, more.get(status))


class Guard:
    """What stands before every request: whose it is, whether there is room for it, and what is
    counted of it.
    """

    def __init__(
        self, app: ASGIApp, registry: CollectorRegistry, token: str | None, waiting: int
    ) -> None:
        self.app, self.token, self.waiting, self.inside = app, token, waiting, 0
        self.requests = Counter(
            "flowerray_requests", "answered", ("path", "status"), registry=registry
        )
        self.seconds = Histogram(
            "flowerray_request_seconds", "from head to answer", ("path",), registry=registry
        )
        Gauge("flowerray_in_flight", "requests", registry=registry).set_function(
            lambda: self.inside
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, started = 500, time.perf_counter()

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        refusal = self._refusal(scope)
        self.inside += 1
        try:
            await (refusal or self.app)(scope, receive, counted)
        finally:
            self.inside -= 1
            path = route.path if (route := scope.get("route")) is not None else "other"
            self.requests.labels(path, status).inc()
            self.seconds.labels(path).observe(time.perf_counter() - started)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers = dict(scope["headers"])
        if self.token is None:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name not in LOOPBACK:
                return _error(403, "without a token the service answers this machine alone.")
        elif scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
                return _error(401, "send the service's token: `Authorization: Bearer TOKEN`.")
        if scope["method"] == "POST" and self.inside >= self.waiting:
            return _error(503, "the service is full: try again in a second.")
        return None
