"""`flowerray explain RUN A.jpg B.jpg`: one picture of why two photographs are alike or not."""

from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from typing_extensions import TypedDict

from flowerray import cache
from flowerray.data.images import resize_side
from flowerray.data.store import build_store
from flowerray.errors import UserError
from flowerray.explain import decompose
from flowerray.explain.cam import HEAD_METHODS, METHODS, Explainer, MethodName, Norm
from flowerray.explain.concepts import Concepts, ConceptsConfig, fit_concepts, shared
from flowerray.explain.draw import ConceptStrip, Pair, best_matches, draw_pair
from flowerray.explain.layers import Layer, find_layers
from flowerray.files import read_json, refuse_unwritable
from flowerray.model.embedder import Embedder
from flowerray.model.modes import full_precision
from flowerray.model.precision import device_name
from flowerray.opening import Model, as_pixels
from flowerray.text import file_name
from flowerray.tracking import sync

SHOWN = 2
"""Concepts of each kind in the picture: what both images have most of, then, of the others, those
whose removal changes the similarity most."""


class ChosenMap(TypedDict):
    """The map that was chosen on val images, in faithfulness.json."""

    method: MethodName
    layer: str
    norm: Norm


class Chosen(TypedDict):
    """What `pick_explainer` needs of explanations/faithfulness.json."""

    run: str
    chosen: ChosenMap


class Faithfulness(Chosen):
    """What the report needs of it."""

    split: str
    images: int
    scores: dict[str, dict[str, dict[str, Any]]]
    sanity: dict[str, dict[str, dict[str, Any]]]


@full_precision()
def explain_pair(
    model: Model,
    first: Path,
    second: Path,
    *,
    method: str | None,
    layer: str | None,
    concepts: ConceptsConfig | None,
    out: Path | None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Draws the pair and returns what the picture says.

    Args:
        method: see `pick_explainer`.
        layer: see `pick_explainer`.
        concepts: None leaves them out.
        out: folder of the picture; by default the RUN's explanations/.

    Raises:
        UserError: a file that is no image, a method that the model does not allow, no place for
            the picture.
    """
    folder = explanations(model, out)
    embedder = model.embedder
    pixels = [as_pixels(path, embedder.image_size) for path in (first, second)]
    images_2CHW = torch.stack(pixels).to(embedder.projection.weight.device)
    explainer = pick_explainer(model, folder, images_2CHW, method, layer)
    pair, notes = compare(
        embedder,
        images_2CHW,
        explainer,
        (f"{first.parent.name}/{first.name}", f"{second.parent.name}/{second.name}"),
    )
    strips: tuple[ConceptStrip, ...] = ()
    if concepts is not None:
        try:
            dictionary = run_concepts(model, folder, concepts, quiet)
            strips = _strips(model, dictionary, images_2CHW)
        except UserError as error:
            notes.append(f"concepts are left out: {error}")
    pair = replace(pair, threshold=model.threshold, concepts=strips)
    picture = draw_pair(pair, folder / f"pair-{_stem(first)}-{_stem(second)}.png")
    if model.folder is not None and out is None:
        sync.send(model.folder.path)
    return {
        "first": str(first),
        "second": str(second),
        "similarity": pair.similarity,
        "threshold": model.threshold,
        "same": pair.similarity >= model.threshold,
        "method": str(explainer),
        "matches": [asdict(match) for match in pair.matches],
        "concepts": [{"name": s.name, "drop": s.drop, "shares": list(s.shares)} for s in strips],
        "notes": notes,
        "picture": str(picture),
    }


def compare(
    embedder: Embedder, images_2CHW: Tensor, explainer: Explainer, names: tuple[str, str]
) -> tuple[Pair, list[str]]:
    """Maps of two images towards each other and their matching regions, and what was not possible.

    Raises:
        UserError: a method that the model does not allow.
    """
    with torch.no_grad():
        emb_2D = embedder(images_2CHW)
    similarity = float(emb_2D[0].double() @ emb_2D[1].double())
    maps = explainer(embedder, images_2CHW, emb_2D.flip(0))
    notes: list[str] = []
    try:
        parts = decompose.parts(embedder, images_2CHW)
        grid = parts.grid
        matches = best_matches(decompose.pairwise(*parts.parts_BPD), grid)
    except UserError as error:
        grid, matches = (maps.shape[1], maps.shape[2]), ()
        notes.append(f"regions are not matched: {error}")
    bytes_2SS3 = (images_2CHW.cpu() * 255).round().byte().permute(0, 2, 3, 1).numpy()
    pair = Pair(bytes_2SS3, names, maps, str(explainer), similarity, None, matches, grid, ())
    return pair, notes


def explanations(model: Model, out: Path | None) -> Path:
    """Where explanations of a model go.

    Raises:
        UserError: a model without a RUN folder, and no --out; a place that cannot be written.
    """
    if out is None:
        if model.folder is None:
            raise UserError(f"{model.name} is no RUN folder: say with `out` where the pictures go.")
        out = model.folder.path / "explanations"
    refuse_unwritable(out)
    return out


def pick_explainer(
    model: Model, folder: Path, images_BCHW: Tensor, method: str | None, layer: str | None
) -> Explainer:
    """The method that is asked for; else the one that was chosen on val images, if it was; else the
    decomposition, which is exact, or HiResCAM for a model that does not allow it.

    A method without a layer is used at the first that `find_layers` gives.

    Raises:
        UserError: no such method or layer.
    """
    file = folder / "faithfulness.json"
    if method is None and layer is None and file.exists():
        content = read_json(file, Chosen, advice="run `flowerray explain RUN` again")
        # A folder that --out names may hold the choice for another model.
        own = model.folder is not None and folder == model.folder.path / "explanations"
        chosen = content["chosen"]
        free = chosen.get("free", True)  # a map that --method forced was not chosen
        if free and (own or content["run"] == model.name):
            return Explainer(chosen["method"], chosen["layer"], chosen["norm"])
    return default_explainer(model.embedder, images_BCHW, method, layer)


def default_explainer(
    embedder: Embedder, images_BCHW: Tensor, method: str | None, layer: str | None
) -> Explainer:
    """`pick_explainer` where no method was chosen on val images."""
    if method is None and layer is None:
        with suppress(UserError):
            decompose.parts(embedder, images_BCHW)
            return Explainer("decomposition")
    known = [name for name in METHODS if name == (method or "hirescam")]
    if not known:
        raise UserError(f"`method` = {method!r}: choose one of {', '.join(METHODS)}.")
    if known[0] in HEAD_METHODS:
        return Explainer(known[0])
    return Explainer(known[0], pick_layer(embedder, layer).name, "held")


def pick_layer(embedder: Embedder, name: str | None) -> Layer:
    """The layer of that name; the default where none is given.

    Raises:
        UserError: no heat map can be taken there.
    """
    layers = {layer.name: layer for layer in find_layers(embedder)}
    if name is not None and name not in layers:
        raise UserError(
            f"`layer` {name}: {embedder.config.backbone} has {', '.join(layers)} to choose from."
        )
    return layers[name or next(iter(layers))]


def run_concepts(model: Model, folder: Path, config: ConceptsConfig, quiet: bool) -> Concepts:
    """The concepts of a model's training images; kept in the folder, since every pair asks again.

    Raises:
        UserError: the data set cannot be read; see `fit_concepts`.
    """
    dataset = model.own_dataset(quiet)
    split = "train" if "train" in dataset.splits else "test"
    paths = [dataset.paths[i] for i in dataset.splits[split]]
    store = build_store(paths, resize_side(model.embedder.image_size), progress=not quiet)
    device = device_name(next(model.embedder.parameters()).device)
    facts = store.fingerprint, config.model_dump_json()
    digest = cache.key(model.embedder.state_dict(), device, *facts)
    file = folder / f"concepts-{digest}.npz"
    if (kept := cache.read_arrays(file)) is not None:
        return Concepts(kept["basis"], kept["crops"], float(kept["explained"]))
    total = min(config.images, len(store))
    with tqdm(total=total, unit="img", desc="concepts", disable=quiet or None) as bar:
        found = fit_concepts(model.embedder, store, config, bar.update)
    explained = np.asarray(found.explained)
    cache.write_arrays(file, basis=found.basis_KF, crops=found.crops_KMPP3, explained=explained)
    return found


def _strips(model: Model, dictionary: Concepts, images_2CHW: Tensor) -> tuple[ConceptStrip, ...]:
    found = shared(model.embedder, dictionary, images_2CHW)
    both = np.argsort(-found.shares.min(0), kind="stable")[:SHOWN].tolist()
    by_drop = np.argsort(-np.abs(found.drop_K), kind="stable").tolist()
    others = [k for k in by_drop if k not in both][:SHOWN]
    return tuple(
        ConceptStrip(
            f"concept {k + 1}",
            float(found.drop_K[k]),
            (float(found.shares[0, k]), float(found.shares[1, k])),
            found.coef_2KHW[:, k],
            dictionary.crops_KMPP3[k],
        )
        for k in (*both, *others)
    )


def _stem(path: Path) -> str:
    """Folder and name: photographs of different classes often have the same number."""
    return file_name("_".join(filter(None, (path.absolute().parent.name, path.stem))))
