"""One attack on one model as plain data: what robustness.json and MLflow hold."""

import time
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from typing_extensions import TypedDict

from flowerray.description import VERSION
from flowerray.robustness.attack import Robustness
from flowerray.robustness.config import AttackConfig
from flowerray.robustness.victim import Victim


class Attacked(TypedDict):
    """What every reader of an attack's record relies on; see `record`."""

    split: str
    gallery: str
    norm: str
    perturb: str
    num_queries: int
    num_gallery: int
    config: dict[str, Any]
    worst_case: dict[str, dict[str, Any]]
    audit: dict[str, Any] | None


class Attacks(TypedDict):
    """RUN/robustness.json: an entry for each split, gallery, norm and attacked side."""

    results: list[Attacked]


def record(victim: Victim, result: Robustness) -> dict[str, Any]:
    """What the attacks on one model found, as plain data.

    Keys: `run`, `method`, `hardening`, `flowerray`, `torch`, `device`, `threads`, `time`; `split`,
    `gallery`, `protocol`, `norm`, `perturb`, `num_queries`, `num_gallery`, `gallery_hash`,
    `threshold`; `threat_model`: a sentence; `config`: the AttackConfig; `rows`: "cumulative" (an
    attack got the queries that those before it left right) or "independent";
    `clean`: {recall_at_1, ci [low, high], map_at_r, n, pair_accuracy, pair_auc, num_pairs};
    `attacks`: name -> eps -> {recall_at_1, ci, map_at_r, n} (and pair_accuracy: independent);
    `worst_case`: eps -> {recall_at_1, ci, map_at_r, n, recall_at_1_this_eps_alone, retention,
    pair_accuracy, pair_auc, num_pairs, right: "0110..." one character a query};
    `expected_robustness`: {mean, ci, eps} (and `recall_at_1`, what 0.1.0 called its mean);
    `collapse`: {mean_cosine, effective_rank, collapsed}; `seconds`, `images_attacked`: by attack;
    `queries`: files relative to the data's root, in the order of `right`.
    The caller adds `audit`: {passed, failed, eps, queries, checks [{name, passed, value, text}]} or
    None, `beside`: another model's record or None, and `ers` where asked for.
    An eps is a string in 1/255 such as "0.5"; pair keys are missing where there are no pairs.
    """
    model, config = victim.model, victim.config
    queries, gallery = len(victim.chosen_Q), len(victim.gallery_labels_G)
    base = model.run.data.root or victim.query_paths[0].parent
    return {
        "run": model.name,
        "method": model.run.method_name,
        "hardening": model.run.harden.kind,
        "flowerray": VERSION,
        "torch": torch.__version__,
        "device": str(victim.device),
        "threads": torch.get_num_threads(),
        "time": time.time(),
        "split": config.split,
        "gallery": victim.gallery_name,
        "protocol": victim.protocol,
        "norm": config.norm,
        "perturb": config.perturb,
        "num_queries": queries,
        "num_gallery": gallery,
        "gallery_hash": gallery_hash(victim),
        "threshold": model.threshold,
        "threat_model": threat_model(config, queries, gallery),
        "config": config.model_dump(mode="json"),
        **result.to_dict(),
        "audit": None,
        "beside": None,
        "ers": None,
        "queries": [
            path.relative_to(base).as_posix() if path.is_relative_to(base) else path.name
            for path in victim.query_paths
        ],
    }


def gallery_hash(victim: Victim) -> str:
    """Of the gallery's embeddings and labels."""
    digest = blake2b(digest_size=8)
    digest.update(np.ascontiguousarray(victim.gallery_GD).tobytes())
    digest.update(victim.gallery_labels_G.tobytes())
    return digest.hexdigest()


def threat_model(config: AttackConfig, queries: int, gallery: int) -> str:
    """Who may do what, in words."""
    who = {
        "query": f"the pixels of {queries} queries are changed; the gallery of {gallery} is clean",
        "gallery": f"the pixels of the gallery of {gallery} are changed; {queries} queries are "
        "clean",
        "both": f"the pixels of {queries} queries and of the gallery of {gallery} are changed",
    }[config.perturb]
    return (
        f"{who}; the attacker knows the model and the gallery (white box; square sees similarities "
        f"only); {config.norm} within eps/255 and [0,1], fp32; steps {config.steps}, "
        f"restarts {config.restarts}."
    )


def metrics(content: dict[str, Any]) -> dict[str, float]:
    """What MLflow shows: a number for each radius, and the mean over them."""
    prefix = f"{content['split']}/attacked_{content['norm']}"
    if content["perturb"] != "query":
        prefix += f"_{content['perturb']}"
    expected = content["expected_robustness"]["mean"]
    found = dict.fromkeys(
        [f"{prefix}/expected_{n}" for n in ("robustness", "recall_at_1")], expected
    )
    for eps, score in content["worst_case"].items():
        for name in ("recall_at_1", "map_at_r", "pair_accuracy", "pair_auc"):
            if name in score:
                found[f"{prefix}/{name}/eps_{eps}"] = score[name]
    if content["audit"] is not None:
        found[f"{prefix}/audit_failed"] = float(len(content["audit"]["failed"]))
    return found
