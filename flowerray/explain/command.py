"""`flowerray explain RUN`: how far the maps of a model can be believed, over a split."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from flowerray.config import Config
from flowerray.data.dataset import Dataset
from flowerray.errors import UserError
from flowerray.explain import baselines, decompose
from flowerray.explain.baselines import Saliency
from flowerray.explain.cam import HEAD_METHODS, Explainer, MethodName
from flowerray.explain.examples import draw_images, make_subjects, progress_bar
from flowerray.explain.faithfulness import FaithfulnessConfig
from flowerray.explain.judge import (
    LOCALISATION,
    Subjects,
    choose,
    choose_gaussian,
    gains,
    intervals,
    judge,
    options,
)
from flowerray.explain.layers import find_layers
from flowerray.explain.localise import read_masks
from flowerray.explain.pair import explanations, pick_layer
from flowerray.explain.pictures import Judged, beside_sheet, maps_sheet, scores_chart
from flowerray.explain.sanity import cascade, sanity
from flowerray.files import write_json
from flowerray.model.modes import full_precision
from flowerray.opening import Model
from flowerray.statistics import Interval
from flowerray.tracking import sync

CHECKED = 16
"""Images of the sanity checks."""
MEAN_MASKS = 500
"""Training masks in the mean mask, at most."""


class ExplainConfig(Config):
    """Faithfulness and localisation over a split."""

    split: Literal["val", "test"] = "test"
    """Images that the maps are judged on."""
    max_images: int = Field(300, ge=2)
    """At most that many of them, drawn from `seed`."""
    choose_images: int = Field(100, ge=2)
    """Val images that method and layer are chosen on; with split val at most half of them, and the
    others are judged."""
    method: MethodName | None = None
    """Heat map; by default the best on val images is taken."""
    layer: str | None = None
    """Layer of the backbone; by default the best on val images is taken."""
    faithfulness: FaithfulnessConfig = FaithfulnessConfig()
    """Deletion, insertion and ROAD."""
    seed: int = Field(0, ge=0)
    """Of the draws of images."""


@full_precision()
def explain_split(
    model: Model, config: ExplainConfig, out: Path | None, beside: Model | None, quiet: bool = False
) -> dict[str, Any]:
    """Chooses method and layer on val images, judges them once, and notes it in explanations/.

    Args:
        out: folder of the results; by default the RUN's explanations/.
        beside: another model of the same data (a robust one), with its own choice, on the same
            images.

    Returns:
        The content of faithfulness.json, plain numbers.

    Raises:
        UserError: no val images to choose on, a method that the model does not allow, no place for
            the results.
    """
    folder = explanations(model, out)
    dataset = model.own_dataset(quiet)
    if beside is not None and beside.own_dataset(quiet).tags != dataset.tags:
        raise UserError(
            f"`beside` {beside.name} was trained on other data or by another protocol than "
            f"{model.name}: its own training images could be judged."
        )
    chosen_on, judged = draw_images(
        dataset, config.split, config.max_images, config.choose_images, config.seed
    )
    own = _judge_model(model, dataset, chosen_on, judged, config, quiet)
    result = own.result
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{len(judged)} {config.split} images"
    tested = len(own.scores["chosen"]["deletion"])
    if tested < len(judged):
        title += f" ({tested} of them for deletion, insertion and ROAD)"
    scores_chart(
        own, f"{Path(model.name).name}: {title}", folder / f"faithfulness_{config.split}.png"
    )
    maps_sheet(own, folder / f"maps_{config.split}.png", f"{len(judged)} {config.split} images")
    if beside is not None:
        other = _judge_model(beside, dataset, chosen_on, judged, config, quiet)
        differences = gains(other.scores["chosen"], {"chosen": own.scores["chosen"]})["chosen"]
        # Deletion, insertion and ROAD are cosines, and each model has a scale of its own for them.
        shared = {metric: found for metric, found in differences.items() if metric in LOCALISATION}
        result["beside"] = other.result | {"gain_over_run": _plain(shared)}
        beside_sheet(own, other, folder / f"beside_{config.split}.png")
    write_json(folder / "faithfulness.json", result)
    if model.folder is not None and out is None:
        means = {metric: found.mean for metric, found in own.table["chosen"].items()}
        model.folder.note({f"explain_{config.split}/{name}": mean for name, mean in means.items()})
        sync.send(model.folder.path)
    return result


def _judge_model(
    model: Model,
    dataset: Dataset,
    chosen_on: NDArray[np.int64] | None,
    judged: NDArray[np.int64],
    config: ExplainConfig,
    quiet: bool,
) -> Judged:
    embedder = model.embedder
    if config.layer is None:
        layers = find_layers(embedder)
    else:
        layers = [pick_layer(embedder, config.layer)]
    subjects = make_subjects(model, dataset, config.split, judged, quiet)
    additive = True
    try:
        decompose.parts(embedder, subjects.batch(0, embedder.projection.weight.device)[0][:2])
    except UserError:
        if config.method in HEAD_METHODS:
            raise
        additive = False
    # The exact methods have no layer to choose, so that --layer leaves them to the comparison.
    choices = options(layers, additive and config.layer is None, config.method)
    tuning = None
    if chosen_on is not None:
        tuning = make_subjects(model, dataset, "val", chosen_on, quiet)
        with progress_bar(len(tuning), "choose on val", quiet) as bar:
            ranked = choose(embedder, tuning, choices, config.faithfulness, bar.update)
    elif len(choices) == 1:
        ranked = [(choices[0], float("nan"))]
    else:
        raise UserError(
            f"Protocol {dataset.protocol} has no val images to choose a map on: say which with "
            "`method` decomposition, or `method` eigencam and `layer`."
        )
    explainer = ranked[0][0]
    methods = _methods(model, dataset, explainer, layers[0].name, additive, tuning, config)
    with progress_bar(len(subjects), "judge", quiet) as bar:
        scores = judge(embedder, subjects, methods, config.faithfulness, bar.update)
    gain = gains(scores["chosen"], {k: v for k, v in scores.items() if k != "chosen"})
    checked = tuning or subjects
    rows = checked.spread(CHECKED)
    images, reference = checked.take(rows, embedder.projection.weight.device)
    one_class = len(np.unique(checked.labels_N[rows])) == 1
    kinds: dict[str, Saliency] = {"chosen": explainer, "edges": baselines.edges}
    result = {
        "run": model.name,
        "split": config.split,
        "images": len(subjects),
        "protocol": dataset.protocol,
        "masks": subjects.masks_NHW is not None,
        "faithfulness": config.faithfulness.model_dump(mode="json"),
        "chosen": asdict(explainer)
        | {
            "on": "val" if tuning else None,
            "free": config.method is None and config.layer is None,
            "images": len(tuning) if tuning else 0,
            "candidates": len(ranked),
            "ranking": [{"map": str(e), "score": score} for e, score in ranked if tuning],
        },
        "scores": {name: _plain(rows) for name, rows in intervals(scores).items()},
        "gain_over": {name: _plain(rows) for name, rows in gain.items()},
        "sanity": {
            name: {
                key: asdict(check)
                for key, check in sanity(
                    embedder, saliency, images, reference, config.faithfulness, one_class
                ).items()
            }
            for name, saliency in kinds.items()
        },
        "randomised_cascade": cascade(embedder, explainer, images, reference),
    }
    return Judged(model, explainer, subjects, methods, scores, result)


def _methods(
    model: Model,
    dataset: Dataset,
    explainer: Explainer,
    layer: str,
    additive: bool,
    tuning: Subjects | None,
    config: ExplainConfig,
) -> dict[str, Saliency]:
    """The chosen map, the exact one, and the baselines."""
    methods: dict[str, Saliency] = {"chosen": explainer}
    if additive and explainer.method != "decomposition":
        methods["decomposition"] = Explainer("decomposition")
    if explainer.method != "eigencam":
        methods["EigenCAM"] = Explainer("eigencam", layer)
    sigma = 0.2
    if tuning is not None and tuning.masks_NHW is not None:
        sigma = choose_gaussian(model.embedder, tuning)
    methods["centre Gaussian"] = baselines.centre_gaussian(sigma)
    if dataset.masks is not None and "train" in dataset.splits:
        order = np.random.default_rng((config.seed, 1)).permutation(dataset.splits["train"])
        files = [dataset.masks[i] for i in order[:MEAN_MASKS]]
        methods["mean mask"] = baselines.mean_mask(read_masks(files, model.embedder.image_size))
    methods["edges"] = baselines.edges
    methods["random"] = baselines.random(config.seed)
    return methods


def _plain(rows: Mapping[str, Interval]) -> dict[str, dict[str, Any]]:
    return {metric: found.to_dict() for metric, found in rows.items()}
