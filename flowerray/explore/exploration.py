"""Everything that is found out about a data set, in one object.

Letters: N images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowerray.explore import counts
from flowerray.explore.duplicates import DuplicatePair, find_duplicates
from flowerray.explore.leaks import recall_effect
from flowerray.explore.likeness import (
    LookAlike,
    Variation,
    agreement_of_nearest,
    look_alikes,
    variations,
)
from flowerray.explore.maps import Map, MapConfig, draw_images, make_map
from flowerray.explore.scan import Survey


@dataclass(frozen=True)
class Exploration:
    """What was found; positions count the survey's readable images."""

    survey: Survey
    model: str
    """What made the embeddings, in words."""
    problems: tuple[str, ...]
    """What `check_dataset` listed."""
    look_alikes: tuple[LookAlike, ...]
    variations: tuple[Variation, ...]
    map_images: NDArray[np.int64]
    """The images on the maps."""
    maps: dict[str, Map]
    """"pixels" and "embeddings", where they could be made."""
    nearest_agrees: dict[str, float]
    """The same keys -> share of the maps' images whose nearest one is of their class."""
    duplicates: tuple[DuplicatePair, ...]
    effect: dict[str, Any] | None
    """See `recall_effect`."""

    def across_splits(self) -> list[DuplicatePair]:
        """Near-duplicates with one image in one split and one in another: leaks."""
        split_N = self.survey.split_names()
        return [p for p in self.duplicates if split_N[p.first] != split_N[p.second]]

    def leaks_first(self) -> list[DuplicatePair]:
        """All near-duplicates, those across splits before the others."""
        leaks = self.across_splits()
        known = set(leaks)
        return [*leaks, *(p for p in self.duplicates if p not in known)]

    def across_classes(self) -> list[DuplicatePair]:
        """Near-duplicates with two labels: one of them is wrong."""
        labels_N = self.survey.dataset.labels_N
        return [p for p in self.duplicates if labels_N[p.first] != labels_N[p.second]]

    def facts(self) -> dict[str, Any]:
        """The content of explore.json: nested, without NaN."""
        survey, dataset = self.survey, self.survey.dataset
        names, labels_N = dataset.classes, dataset.labels_N
        light = {
            "brightness": survey.brightness_N,
            "contrast": survey.contrast_N,
            "saturation": survey.saturation_N,
        }
        return {
            "root": str(dataset.root),
            "kind": dataset.kind,
            "protocol": dataset.protocol,
            "fingerprint": dataset.tags.get("dataset/fingerprint"),
            "images": len(labels_N),
            "unreadable": [
                {"image": path.relative_to(dataset.root).as_posix(), "reason": reason}
                for path, reason in survey.unreadable
            ],
            "problems": list(self.problems),
            "imbalance": counts.imbalance(np.bincount(labels_N)),
            "splits": counts.split_table(dataset),
            "overlaps": counts.overlaps(survey),
            "sizes": counts.sizes(survey),
            "light": {
                name: {
                    "mean": float(values_N.mean()),
                    "between_classes": known(counts.between_classes(values_N, labels_N)),
                }
                for name, values_N in light.items()
            },
            "model": self.model,
            "look_alikes": [
                {
                    "classes": [names[a.first], names[a.second]],
                    "crossing": a.crossing,
                    "cosine": a.cosine,
                }
                for a in self.look_alikes
            ],
            "variation": [{"class": names[v.label], "cosine": v.cosine} for v in self.variations],
            "nearest_agrees": {k: known(v) for k, v in self.nearest_agrees.items()},
            "duplicates": {
                "pairs": len(self.duplicates),
                "across_splits": len(self.across_splits()),
                "across_classes": len(self.across_classes()),
                "images": len({i for p in self.duplicates for i in (p.first, p.second)}),
            },
            "recall_at_1": self.effect,
        }


def explore(
    survey: Survey,
    problems: Sequence[str],
    model: str,
    config: MapConfig,
    progress: Callable[[int, int], object] | None = None,
) -> Exploration:
    """Looks at a set that is read."""
    labels_N, emb_ND = survey.dataset.labels_N, survey.emb_ND
    on_map = draw_images(len(labels_N), config)
    pixels = survey.colour_NSS3[on_map].reshape(len(on_map), -1).astype(np.float32) / 255
    vectors: dict[str, NDArray[np.floating]] = {"pixels": pixels, "embeddings": emb_ND[on_map]}
    maps = {name: make_map(values, config) for name, values in vectors.items()}
    duplicates = find_duplicates(survey.keypoints, survey.grey_NPP, survey.split_names(), progress)
    return Exploration(
        survey=survey,
        model=model,
        problems=tuple(problems),
        look_alikes=tuple(look_alikes(emb_ND, labels_N)),
        variations=tuple(variations(emb_ND, labels_N)),
        map_images=on_map,
        maps={name: found for name, found in maps.items() if found is not None},
        nearest_agrees={
            name: agreement_of_nearest(values, labels_N[on_map]) for name, values in vectors.items()
        },
        duplicates=tuple(duplicates),
        effect=recall_effect(survey.dataset, emb_ND, duplicates),
    )


def known(value: float) -> float | None:
    """None for NaN, which JSON does not know."""
    return None if np.isnan(value) else value
