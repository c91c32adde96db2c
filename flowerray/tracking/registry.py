"""Models that MLflow keeps: logged, registered, found and fetched."""

import os
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from flowerray.description import installed
from flowerray.errors import UserError
from flowerray.files import atomic_folder, home
from flowerray.tracking import address, server

PYFUNC = Path(__file__).parents[1] / "serve" / "pyfunc.py"
"""What MLflow keeps and runs of a logged model."""
EXPORTS = ("best_model_*.pth", "robust_model_*.pth")
T = TypeVar("T")


def save_model(folder: Path, export: Path, dim: int) -> None:
    """Makes a pyfunc model of an export: image files' bytes in, embeddings of length `dim` out."""
    import mlflow
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    inputs = Schema([ColSpec("binary", "image")])
    outputs = Schema([TensorSpec(np.dtype(np.float32), (-1, dim))])
    packages = ("mlflow", "torch", "timm", "numpy", "pillow", "pydantic")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice to add an input example
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(PYFUNC),
            artifacts={"model": str(export)},
            signature=ModelSignature(inputs, outputs),
            pip_requirements=[f"{package}=={installed(package)}" for package in packages],
        )


def log_model(client: Any, experiment_id: str, run_id: str, export: Path, dim: int) -> str:
    """Logs `save_model` of an exported `.pth` with a run; its `models:/` address.

    Through the client, since MLflow's own `log_model` works on process-wide state.
    """
    from mlflow.entities import LoggedModelOutput

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_model(folder, export, dim)
        model = client.create_logged_model(
            experiment_id, export.stem, run_id, model_type="embedder"
        )
        client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return f"models:/{model.model_id}"


def register_model(client: Any, run_id: str, model_uri: str, name: str, alias: str) -> str:
    """Makes a logged model the registered `name`'s newest version, unless this run's is one, and
    points `alias` at it.
    """
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    for known in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        client.set_registered_model_alias(name, alias, known.version)
        return str(known.version)
    model_id = model_uri.removeprefix("models:/")
    source = client.get_logged_model(model_id).artifact_location
    made = client.create_model_version(name, source, run_id, model_id=model_id)
    client.set_registered_model_alias(name, alias, made.version)
    return str(made.version)


def download(uri: str, source: str, folder: Path) -> None:
    """Fetches `models:/...`, `runs:/ID/PATH`, or of `runs:/ID` the files at the top: no command
    reads the folders, which are large."""
    client = server.connect(uri)
    import mlflow

    run_id, _, path = source.removeprefix("runs:/").partition("/")
    sources = [source]
    if source.startswith("runs:/") and not path:
        files = [item.path for item in client.list_artifacts(run_id) if not item.is_dir]
        sources = [f"runs:/{run_id}/{file}" for file in files]
    # For models:/ MLflow looks where the variable says, whatever it is given.
    before = os.environ.get(address.VARIABLE)
    os.environ[address.VARIABLE] = uri
    try:
        for source in sources:
            mlflow.artifacts.download_artifacts(
                artifact_uri=source, dst_path=str(folder), tracking_uri=uri, registry_uri=uri
            )
    finally:
        del os.environ[address.VARIABLE]
        if before is not None:
            os.environ[address.VARIABLE] = before


@server.settings()
def resolve(run: str) -> Path:
    """The RUN argument of a command as a path that `flowerray.load` takes.

    Args:
        run: a RUN folder, a `.pth` file, `models:/NAME@ALIAS` (or /VERSION, or an id), `runs:/ID`
            (gives a folder) or `runs:/ID/PATH`. MLflow's are fetched to `$FLOWERRAY_HOME/mlflow`
            from `MLFLOW_TRACKING_URI`; without that from `runs/mlflow.db` or `mlflow.db` here, or
            the jobs' `$FLOWERRAY_HOME/runs/mlflow.db`.

    Raises:
        UserError: nothing is there, or it holds no model.
    """
    if not run.startswith(("models:/", "runs:/")):
        path = Path(run).expanduser().absolute()
        if not path.exists():
            raise UserError(
                f"{run} is not there: give a RUN folder, a .pth file, models:/NAME@ALIAS or "
                "runs:/ID."
            )
        return path
    target = home() / "mlflow" / re.sub(r"[^\w.-]+", "_", run)

    def fetch(uri: str) -> None:
        with atomic_folder(target) as folder:
            download(uri, run, folder)

    _from_any(run, fetch)
    if (target / "run.json").exists():
        return target
    found = [path for pattern in EXPORTS for path in target.rglob(pattern)]
    if len(found) != 1:
        raise UserError(f"{run} holds {len(found)} flowerray models, not one.")
    return found[0]


@server.settings()
def alias_version(name: str) -> str:
    """The version that `models:/NAME@ALIAS` means now.

    Raises:
        UserError: it is no such address, or MLflow does not have it.
    """
    model, at, alias = name.removeprefix("models:/").partition("@")
    if not (name.startswith("models:/") and at):
        raise UserError(f"{name} is no alias that could move, such as models:/NAME@champion.")
    return _from_any(
        name, lambda uri: str(server.connect(uri).get_model_version_by_alias(model, alias).version)
    )


def _from_any(name: str, fetch: Callable[[str], T]) -> T:
    reason = "no mlflow.db here: set MLFLOW_TRACKING_URI"
    for uri in address.known():
        try:
            return fetch(uri)
        except Exception as error:  # of many kinds, by store; the next address may have it
            reason = f"{address.shown(uri)}: {server.brief(error)}"
    raise UserError(f"{name} cannot be fetched from MLflow ({reason}).")


@server.settings()
def experiment_runs(name: str) -> list[str]:
    """The trainings of an experiment as `resolve` takes them, oldest first: the RUN folder where it
    is on this machine, else `runs:/ID`.

    Args:
        name: an experiment of the addresses that `resolve` looks at.

    Raises:
        UserError: there is none, or it holds no training.
    """
    for uri in address.known():
        try:
            client = server.connect(uri)
            experiment = client.get_experiment_by_name(name)
        except Exception as error:
            place = address.shown(uri)
            raise UserError(f"MLflow at {place} cannot be used ({server.brief(error)}).") from error
        if experiment is None:
            continue
        found, token = [], None
        while True:
            page = client.search_runs(
                [experiment.experiment_id], order_by=["attributes.start_time"], page_token=token
            )
            found += [run for run in page if "method.name" in run.data.params]
            if not (token := page.token):
                break
        folders = [Path(run.data.tags.get("flowerray.training.run", "")) for run in found]
        if found:
            return [
                str(folder) if (folder / "run.json").exists() else f"runs:/{run.info.run_id}"
                for folder, run in zip(folders, found, strict=True)
            ]
    raise UserError(
        f"no MLflow here has an experiment {name} with trainings: set MLFLOW_TRACKING_URI."
    )
