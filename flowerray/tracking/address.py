"""Addresses of MLflow (`sqlite:///FILE`, `http://...`, `postgresql://...`), whose passwords are
never shown or kept.
"""

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote

from flowerray.files import home, sqlite_url

VARIABLE = "MLFLOW_TRACKING_URI"
_LOGIN = re.compile(r"(?<=://)([^:/@\s]*)(:\S*)?@")
"""Name and password before a server's name; a password may hold anything, also `@`."""


def database_file(uri: str) -> Path | None:
    """The file of a sqlite address, or None for a server."""
    path, _, _ = uri.removeprefix("sqlite:///").partition("?")
    if not uri.startswith("sqlite:///"):
        return None
    # 0.1.0 put paths into addresses as they are
    return Path(path) if Path(path).exists() else Path(unquote(path))


def shown(uri: str) -> str:
    """An address, or a text with addresses in it, as it may be shown and logged."""
    return _LOGIN.sub(lambda login: f"{login[1]}:***@" if login[2] else "***@", uri)


def kept(uri: str) -> str:
    """An address as it may be stored: without name and password."""
    return _LOGIN.sub("", uri)


def usable(uri: str) -> str:
    """An address as libraries read it: a sqlite path is absolute, since workers and jobs have other
    working directories; signs in a password are escaped.
    """
    if (database := database_file(uri)) is not None:
        query = uri.partition("?")[2]
        return sqlite_url(database.absolute()) + (f"?{query}" if query else "")

    def escaped(login: re.Match[str]) -> str:
        if login[2] and re.match(r":\d+/", login[2]):  # a port, and an @ in the path
            return login[0]
        parts = [login[1], *([login[2][1:]] if login[2] else [])]
        return ":".join(quote(unquote(part), safe="") for part in parts) + "@"

    return _LOGIN.sub(escaped, uri)


def given() -> str | None:
    """What the user named, in `MLFLOW_TRACKING_URI`."""
    return usable(uri) if (uri := os.environ.get(VARIABLE)) else None


def known() -> list[str]:
    """Where models and runs are looked for: what the user named; else `runs/mlflow.db` or
    `mlflow.db` here, or the jobs' `$FLOWERRAY_HOME/runs/mlflow.db`.
    """
    if uri := given():
        return [uri]
    folders = (Path.cwd() / "runs", Path.cwd(), home() / "runs")
    return [sqlite_url(f / "mlflow.db") for f in folders if (f / "mlflow.db").exists()]
