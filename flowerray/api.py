"""What `import flowerray as fr` offers besides models, losses and methods; see docs/python.md.

Letters: Q queries, G gallery items, B images, D embedding dimensions, C channels, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from flowerray.errors import UserError
from flowerray.statistics import Interval

if TYPE_CHECKING:
    from flowerray.explain.draw import Pair
    from flowerray.model.embedder import Embedder
    from flowerray.opening import Photo

Labelled = tuple[ArrayLike | Tensor, ArrayLike | Tensor]
"""Embeddings and their labels."""


@dataclass(frozen=True)
class Training:
    """A finished training."""

    folder: Path
    """The RUN: every command takes it."""
    figures: dict[str, Any]
    """How it ended: `val_map_at_r`, `best_epoch`, `threshold`, `seconds`, `steps` and others."""

    @cached_property
    def model(self) -> "Embedder":
        """What was trained, on the CPU, in eval mode."""
        from flowerray.opening import load

        return load(self.folder)


def train(
    name: str,
    *,
    data: str | Path | dict[str, Any] | None = None,
    out: str | Path | None = None,
    epochs: int | None = None,
    method: dict[str, Any] | None = None,
    preset: Literal["demo", "laptop", "gpu"] = "laptop",
    resume: bool = False,
    quiet: bool = False,
    **parts: Any,
) -> Training:
    """`flowerray train NAME`: trains in this process, without Ray, unless told otherwise.

    Args:
        name: the method: center, siamese, triplet, or a registered one.
        data: the data set's folder, or options of `--data`; None: the rendered flowers.
        out: a new folder for the RUN; by default runs/NAME-TIME.
        epochs: passes over the images.
        method: options of the loss.
        preset: what the other arguments change.
        resume: `out` holds an interrupted RUN of these same options, which goes on.
        quiet: no progress on standard error.
        parts: further options as on the command line, by part: `train={"lr": 1e-4}`,
            `embedder={"dim": 64}`, `augment`, `harden`, `init`, `resources={"workers": 4}`
            (Ray Train on 4 workers; 0 is the default here).

    Raises:
        UserError: bad data, options or folder; a loss that diverged. The RUN stays resumable.
    """
    from flowerray import methods
    from flowerray.cli.options import absolute, default_out
    from flowerray.cluster.driver import head_first, train_run
    from flowerray.training.run import PRESETS, Run, from_preset

    if preset not in PRESETS:
        raise UserError(f"`preset` = {preset!r}: choose one of {', '.join(PRESETS)}.")
    changes: dict[str, Any] = {"resources": {"workers": 0}, **parts}
    for part, options in (("method", method or {}), ("embedder", changes.get("embedder", {}))):
        if not isinstance(options, dict):
            raise UserError(f"`{part}` = {options!r}: give its options, by name.")
    said = {k: v for k, v in changes.get("embedder", {}).items() if k in ("train", "backbone")}
    run = from_preset(preset, methods.get(name).config(**method or {}), **said)
    content = {k: v for k, v in run.to_dict().items() if k != "flowerray"} | {"method": run.method}
    if data is not None:
        changes["data"] = data if isinstance(data, dict) else {"root": data}
    if epochs is not None:
        changes["train"] = {**changes.get("train", {}), "epochs": epochs}
    for part, value in changes.items():
        old = content.get(part)
        merged = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        content[part] = merged
    folder = Path(out or default_out(name)).expanduser().absolute()
    run = head_first(absolute(Run(**content)), folder, resume, quiet)
    return Training(folder, train_run(run, folder, resume, quiet))


@dataclass(frozen=True)
class Evaluation:
    """Retrieval of one set of embeddings; `print` shows it as a table."""

    metrics: dict[str, Any]
    """As `retrieval_metrics` gives them: `recall_at_1`, `map_at_r`, `num_queries` and others."""
    per_query: dict[str, NDArray]
    """What each query scores, for paired tests: see `retrieval_per_query`."""

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """95 % intervals over queries of those metrics that are means of queries."""
        from flowerray.retrieval.table import intervals

        return intervals(self.metrics, self.per_query)

    def __str__(self) -> str:
        from flowerray.retrieval.table import LABELS
        from flowerray.show.columns import columns
        from flowerray.show.interval import words

        m = self.metrics
        rows = [
            [LABELS.get(k, k.replace("recall_at_", "R@")), words(self.intervals.get(k, value))]
            for k, value in m.items()
            if not k.startswith("num_")
        ]
        head = f"{m['num_queries']} queries, gallery of {m['num_gallery']} images"
        return "\n".join([head, "", *columns(rows, "<<", indent=2)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the metrics, and the intervals by metric."""
        shown = {name: found.to_dict() for name, found in self.intervals.items()}
        return {**self.metrics, "intervals": shown}


def evaluate(
    emb_QD: ArrayLike | Tensor,
    labels_Q: ArrayLike | Tensor,
    *,
    gallery: Labelled | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> Evaluation:
    """Recall@K, MAP@R and R-precision of any embeddings, exact, with bootstrap intervals.

    Args:
        emb_QD: the queries, torch or NumPy, of any model; the nearer (Euclidean), the more alike.
        labels_Q: one class a query, integers or strings.
        gallery: where neighbours are searched; None: among the queries, each without itself.
        ks: the K of Recall@K.

    Raises:
        UserError: shapes that do not fit, values that are not finite, no query with a match.
    """
    from flowerray.retrieval.search import retrieval_per_query, summarise

    emb_GD, labels_G = (None, None) if gallery is None else _pair(gallery)
    per_query = retrieval_per_query(emb_QD, labels_Q, emb_GD, labels_G, ks=ks)
    metrics = summarise(per_query, labels_Q, ks=ks)
    if not metrics["num_queries"]:
        raise UserError("no query has an image of its class in the gallery: check the labels.")
    return Evaluation(metrics, per_query)


def attack(
    model: nn.Module,
    images_BCHW: Tensor,
    labels_B: ArrayLike | Tensor,
    *,
    gallery: Labelled,
    eps: float,
    norm: Literal["linf", "l2"] = "linf",
    steps: int = 20,
    restarts: int = 1,
    seed: int = 0,
) -> Tensor:
    """Images of which the nearest gallery item shall be of a wrong class: PGD on the margin.

    Maximises the largest cosine to a wrong class minus the largest to the own one (above 0,
    Recall@1 of the image is lost); the best point of all steps and restarts is kept. The model
    is left as it was. One attack is an upper bound on robustness: `flowerray attack` has more.

    Args:
        model: pixels (B, 3, H, W) in [0,1] -> unit embeddings (B, D); any module.
        images_BCHW: float pixels in [0,1], on the model's device.
        labels_B: one class an image, integers or strings.
        gallery: unit embeddings (G, D) of other images, and their classes: two or more, and those
            of the images.
        eps: the largest change, in 1/255 of the pixels' range.
        norm: "linf", each pixel's change; "l2", their root sum of squares.
        steps: gradient steps of each start.
        restarts: random starts.
        seed: of the random starts; no global generator is touched.

    Returns:
        Adversarial pixels (B, 3, H, W) in [0,1], within eps of the images.

    Raises:
        UserError: pixels outside [0,1], embeddings of another length than 1, labels that do not
            fit.
    """
    from flowerray.attacks.objectives import margin
    from flowerray.attacks.pgd import PGDConfig, pgd

    if not isinstance(images_BCHW, Tensor) or images_BCHW.ndim != 4 or images_BCHW.dtype not in (
        torch.float32, torch.float64,
    ):  # fmt: skip
        raise UserError("`images_BCHW` is a float32 or float64 tensor (B, 3, H, W) in [0,1].")
    if not isinstance(seed, int) or seed < 0:
        raise UserError(f"`seed` = {seed!r}: give an integer of at least 0.")
    device = images_BCHW.device
    emb_GD, labels_G = _pair(gallery)
    gallery_GD = torch.as_tensor(emb_GD).to(device)
    if gallery_GD.ndim != 2:
        shape = tuple(gallery_GD.shape)
        raise UserError(f"the gallery's embeddings have shape {shape}: a matrix is needed.")
    own_B, other_G = (_names(labels) for labels in (labels_B, labels_G))
    if len(own_B) != len(images_BCHW) or len(other_G) != len(gallery_GD):
        raise UserError(
            f"{len(images_BCHW)} images have {len(own_B)} labels, and {len(gallery_GD)} gallery "
            f"embeddings {len(other_G)}: give one label each."
        )
    if ((gallery_GD.norm(dim=1) - 1).abs() > 0.01).any():
        raise UserError("the gallery's embeddings are no unit vectors: normalise them first.")
    _, codes = np.unique(np.concatenate([own_B, other_G]), return_inverse=True)
    code_B, code_G = torch.from_numpy(codes).to(device).split([len(own_B), len(other_G)])
    if len(lost := own_B[~np.isin(codes[: len(own_B)], codes[len(own_B) :])]):
        raise UserError(
            f"the gallery holds no image of class {lost[0]}, so that its queries are lost before "
            "any attack: leave them out."
        )
    config = PGDConfig(norm=norm, epsilon=eps, steps=steps, restarts=restarts)
    aim = margin(model, gallery_GD, code_G, code_B)
    return pgd(aim, images_BCHW, config, seed=(seed,)).images_BCHW


def _pair(gallery: Labelled) -> Labelled:
    if isinstance(gallery, tuple | list) and len(gallery) == 2:
        return gallery[0], gallery[1]
    raise UserError("`gallery` is a pair: (embeddings, labels).")


def _names(labels: ArrayLike | Tensor) -> NDArray:
    return labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)


@dataclass(frozen=True)
class PairExplanation:
    """Why two photographs are alike for a model, or not."""

    pair: "Pair"
    """`similarity` (cosine), `maps_2HW` (where in each photograph the likeness to the other comes
    from; those of the decomposition, which is exact, sum to the cosine), `method` (what made
    them), `matches` (the strongest pairs of regions and their shares of the cosine)."""
    notes: list[str]
    """What this model does not allow."""

    def save(self, path: str | Path) -> Path:
        """Draws both photographs, their maps and the matches into a PNG file."""
        from flowerray.explain.draw import draw_pair
        from flowerray.files import writing

        with writing(Path(path), advice="choose another `path`"):
            return draw_pair(self.pair, Path(path))


def explain_pair(
    embedder: "Embedder",
    first: "Photo",
    second: "Photo",
    *,
    method: str | None = None,
    layer: str | None = None,
) -> PairExplanation:
    """Why two photographs are alike for a model; it is left as it was.

    Args:
        first: a path, a PIL image, an array or a tensor: see `embed`.
        second: another one.
        method: of the maps: decomposition, hirescam, gradcam and others; by default the
            decomposition, or HiResCAM for a model that does not allow it.
        layer: of the backbone, for methods that have one.

    Raises:
        UserError: no image; no such method or layer.
    """
    from flowerray.explain.pair import compare, default_explainer
    from flowerray.model.modes import evaluating, full_precision
    from flowerray.opening import as_pixels

    pixels = [as_pixels(photo, embedder.image_size) for photo in (first, second)]
    names = [str(p) if isinstance(p, str | Path) else n for p, n in ((first, "A"), (second, "B"))]
    with evaluating(embedder), full_precision():
        images_2CHW = torch.stack(pixels).to(next(embedder.parameters()).device)
        explainer = default_explainer(embedder, images_2CHW, method, layer)
        return PairExplanation(*compare(embedder, images_2CHW, explainer, (names[0], names[1])))
