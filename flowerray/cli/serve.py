"""`flowerray serve INDEX`: an index over HTTP."""

import os
from pathlib import Path
from threading import Thread
from typing import Annotated

from flowerray.cli.options import parse
from flowerray.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HOST, PORT = "127.0.0.1", 8000


def serve(words: list[str]) -> int:
    """Serves until Ctrl-C."""
    import tyro
    from pydantic import Field

    from flowerray.config import Config

    class Options(Config):
        index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
        """A folder that `flowerray index build` made."""
        port: int = Field(PORT, ge=1, le=65535)
        """Of the page and the service."""
        host: str = HOST
        """Address to listen at; beyond this machine only with a token, which
        FLOWERRAY_SERVE_TOKEN holds and each request brings."""
        beside: Path | None = None
        """A second INDEX, of a robust model: the page compares how both withstand attacks."""
        follow: bool = False
        """Look each minute whether the models:/NAME@ALIAS that the INDEX was built with means
        another version, and build the INDEX again by it, while the old one goes on answering."""
        replicas: int = Field(1, ge=1)
        """Processes that answer, each with its own copy of the model."""
        gpus: float = Field(0, ge=0)
        """Of each replica; a part of one is a share."""

    about = "An index over HTTP, with a page to try it on."
    options = parse(Options, words, "serve", about)
    from flowerray.index.contents import model_file, open_index
    from flowerray.pool import cores
    from flowerray.serve.deployment import TOKEN, Serving, require, run
    from flowerray.serve.follow import follow, versions

    token = os.environ.get(TOKEN) or None
    if options.host not in LOOPBACK and token is None:
        raise UserError(
            f"`host` {options.host} would let others in: set {TOKEN} to a secret that each request "
            "has to bring, or leave `host` out."
        )
    require(options.host, options.port)
    serving = Serving(
        index=options.index.absolute(),
        beside=options.beside and options.beside.absolute(),
        token=token,
        replicas=options.replicas,
        cpus=max(1, cores() // options.replicas),
        gpus=options.gpus,
    )
    indexes = [open_index(folder) for folder in (serving.index, serving.beside) if folder]
    for index in indexes:
        model_file(index.folder, index.manifest)  # its faults are told here, not in a replica
    host = f"[{options.host}]" if ":" in options.host else options.host
    said = f"serving   {len(indexes[0]):,} photographs at http://{host}:{options.port}/"
    folders = [index.folder for index in indexes] if options.follow else []
    _ = versions(folders)  # their faults, too

    def ready() -> None:
        print(said, flush=True)
        if folders:
            Thread(target=follow, args=[dict.fromkeys(folders, "")], daemon=True).start()

    run(serving, options.host, options.port, ready)
    return 0
