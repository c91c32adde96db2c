"""`attack`: a model's retrieval under attack, kept in its RUN folder and in MLflow."""

import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from flowerray.attacks import bank
from flowerray.data.dataset import Dataset
from flowerray.data.images import resize_side
from flowerray.data.store import build_store
from flowerray.errors import UserError
from flowerray.files import locked, read_kept, write_json
from flowerray.opening import Model, open_model
from flowerray.retrieval.command import new_pairs, not_kept, refuse_trained, stored_pairs
from flowerray.retrieval.pairs import Pairs
from flowerray.robustness.attack import Robustness, attack, key
from flowerray.robustness.audit import CHECKS, Auditor
from flowerray.robustness.config import AttackConfig
from flowerray.robustness.gallery import attack_gallery
from flowerray.robustness.pictures import Fallen, plot_robustness, worst_sheet
from flowerray.robustness.record import Attacks, metrics, record
from flowerray.robustness.score import ers as ers_terms
from flowerray.robustness.subject import Arena, Subject, attacked_queries, narrow, prepare
from flowerray.robustness.verification import attack_pairs, pairs_of_queries, query_pair_accuracy
from flowerray.tracking import sync
from flowerray.training import checkpoint
from flowerray.training.run import Run
from flowerray.training.rundir import RunDir

FILE = "robustness.json"
"""In a RUN folder: {"results": [a `record` for each split, gallery, norm and attacked side]}."""


def attack_model(
    model: Model,
    config: AttackConfig,
    *,
    beside: str | None = None,
    beside_may_lack: bool = False,
    audit: bool = False,
    audit_queries: int = 128,
    ers: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Attacks a model on its own data and, the same way, another one beside it.

    Args:
        model: any trained model; a RUN folder also keeps the result.
        config: the attacks.
        beside: another RUN, usually the one that was not hardened.
        beside_may_lack: leave it out, with a note, where it was trained on the queries.
        audit: also ask whether the figures can be believed, about as long again.
        audit_queries: queries that the audit looks at.
        ers: also the terms of the Empirical Robustness Score, on as many queries as the audit.
        quiet: no progress bars.

    Returns:
        See `attack_record.record`.

    Raises:
        UserError: an unknown split, gallery or attack; no such RUN; an audit of another attack than
            on queries.
    """
    if audit and config.perturb != "query":
        raise UserError(
            f"--audit asks about attacks on queries, not about --perturb {config.perturb}: leave "
            "one of them out."
        )
    device = next(model.embedder.parameters()).device
    dataset = model.own_dataset(quiet)
    chosen_Q = attacked_queries(dataset, config)
    standard = None if beside is None else open_model(beside, device)
    if standard is not None:
        try:
            refuse_strangers(standard, model, dataset, config.split)
        except UserError as error:
            if not beside_may_lack:
                raise
            print(f"nothing is attacked beside it: {error}", file=sys.stderr)
            standard = None
    subject = prepare(model, dataset, chosen_Q, config, quiet)
    config = possible(config, len(np.unique(subject.arena.gallery_labels_G)))
    other = None if standard is None else prepare(standard, dataset, chosen_Q, config, quiet)
    pairs = split_pairs(model, dataset, chosen_Q, config)
    other_result = None if other is None else _measure(other, pairs, config, quiet)
    result = _measure(subject, pairs, config, quiet)
    content = _record(subject, result)
    if other is not None and other_result is not None:
        content["beside"] = _record(other, other_result)
    if model.folder is not None:
        with suppress(OSError):  # `keep` says so
            note(model.folder, content)  # what follows is long, and may be interrupted
    if audit:
        unhardened = standard is not None and not standard.run.harden.on
        auditor = Auditor(
            subject.arena,
            result,
            queries=audit_queries,
            standard=other.arena if other is not None and unhardened else None,
            standard_result=(other_result if unhardened else None)
            if model.run.harden.on
            else result,
        )
        with tqdm(total=len(CHECKS), unit="check", desc="audit", disable=quiet or None) as bar:
            content["audit"] = auditor.run(bar.update).to_dict()
    if ers:
        content["ers"] = _score(subject, result, audit_queries, quiet)
        if other is not None and other_result is not None:
            content["beside"]["ers"] = _score(other, other_result, audit_queries, quiet)
    if model.folder is not None:
        try:
            keep(model, content, subject, result)
        except (OSError, UserError) as error:  # a full disk, somebody else's RUN
            not_kept(model.name, error)
    return content


def refuse_strangers(other: Model, model: Model, dataset: Dataset, split: str) -> None:
    """Refuses a model beside that was trained or chosen on the queries.

    Raises:
        UserError: so it was, or on an earlier state of the set.
    """
    if other.run.data != model.run.data:
        refuse_trained(other, dataset.root, dataset, split, "name another --beside")
    elif other.dataset not in (None, dataset.tags["dataset/fingerprint"]):
        raise UserError(
            f"{other.name} was trained before {dataset.root} got other files, classes or splits, "
            "and may know the queries: name another --beside."
        )


def possible(config: AttackConfig, classes: int) -> AttackConfig:
    """The configuration without those of the default attacks that need more classes.

    Raises:
        UserError: attacks were named, and one of them does.
    """
    fits = tuple(name for name in config.attacks if bank.least_classes(name) <= classes)
    if fits == config.attacks:
        return config
    left = ", ".join(name for name in config.attacks if name not in fits)
    why = f"it compares more classes than the {classes} of the gallery"
    if config.attacks != AttackConfig().attacks:
        raise UserError(f"--attacks: leave {left} out, since {why}.")
    print(f"{left} is left out: {why}.", file=sys.stderr)
    return config.model_copy(update={"attacks": fits})


def standard_of(model: Model) -> str | None:
    """The RUN or file that was not hardened and that a hardened model goes back to, perhaps through
    other hardened ones, where it is still there.
    """
    run = model.run
    while run.harden.on:
        init = run.init
        if init is None or not init.exists():
            return None
        try:
            run = Run.from_dict(checkpoint.load_export(init)["run"])
        except UserError:  # a folder without its model is no longer there either
            return None
        if not run.harden.on:
            return str(init)
    return None


def _score(subject: Subject, result: Robustness, queries: int, quiet: bool) -> dict[str, Any]:
    """The terms of the Empirical Robustness Score, never without what puts them into proportion."""
    config = result.config
    arena, _ = narrow(subject.arena, queries, config.seed)
    size = resize_side(subject.model.embedder.image_size)
    store = build_store(subject.measurement.gallery_paths, size, progress=not quiet)
    with tqdm(total=9, unit="attack", desc="ers", disable=quiet or None) as bar:
        found = ers_terms(
            arena, store, batch_size=config.batch_size, seed=config.seed, progress=bar.update
        )
    clean = result.clean.recall_at_1
    return {"clean_recall_at_1": clean, "collapsed": result.collapse["collapsed"], **found}


def split_pairs(
    model: Model, dataset: Dataset, chosen_Q: NDArray[np.int64], config: AttackConfig
) -> Pairs | None:
    """Verification pairs whose attacked side is a query; None where none are wanted or possible."""
    if not config.max_pairs or config.perturb == "gallery":
        return None
    if model.folder is not None:
        pairs = stored_pairs(model, dataset, config.split)
    else:
        pairs = new_pairs(model, dataset, config.split)
    if pairs is None:
        return None
    chosen = pairs_of_queries(pairs, chosen_Q, config.max_pairs, config.seed)
    both = chosen.same.any() and not chosen.same.all()
    return chosen if both else None


def _measure(
    subject: Subject, pairs: Pairs | None, config: AttackConfig, quiet: bool
) -> Robustness:
    """All attacks on one model."""
    arena, threshold = subject.arena, subject.model.threshold

    def arena_at(eps: float) -> Arena:
        if config.perturb == "query":
            return arena
        size = resize_side(subject.model.embedder.image_size)
        store = build_store(subject.measurement.gallery_paths, size, progress=not quiet)
        return replace(arena, gallery_GD=attack_gallery(arena, store, eps, config, bar.update))

    images = 0 if config.perturb == "gallery" else len(config.attacks) * len(arena.chosen_Q)
    images += 0 if config.perturb == "query" else len(arena.gallery_GD)
    images += 0 if pairs is None else len(pairs.index)
    total = images * sum(eps > 0 for eps in config.eps)
    title = f"attack {subject.model.name}"[-30:]
    with tqdm(
        total=total, unit="img", desc=title, disable=quiet or None, dynamic_ncols=True
    ) as bar:
        accuracy = None
        if pairs is not None and config.independent:
            accuracy = query_pair_accuracy(arena, pairs, threshold, config.batch_size)
        result = attack(
            arena, config, arena_at=arena_at, pair_accuracy=accuracy, progress=bar.update
        )
        if pairs is not None:
            result.pairs = attack_pairs(arena, pairs, threshold, config, bar.update)
    return result


def _record(subject: Subject, result: Robustness) -> dict[str, Any]:
    model = subject.model
    return record(
        model.name, model.run, model.threshold, subject.arena, subject.measurement,
        subject.gallery, result,
    )  # fmt: skip


def same_attack(kept: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether two attacks have the same options; older records lack some, newer ones have more."""
    try:
        return AttackConfig(**kept) == AttackConfig(**own)
    except UserError:
        return False


def note(folder: RunDir, content: dict[str, Any]) -> bool:
    """Writes RUN/robustness.json, in place of an earlier result of the same attack unless that one
    was audited and this one was not.

    Returns:
        Whether an attack on the same queries was audited, and this one was not: then that one stays
        what the RUN shows.
    """
    path = folder.path / FILE
    about = ("split", "gallery", "norm", "perturb", "num_queries")

    def audited(result: dict[str, Any]) -> bool:
        same = all(result[key] == content[key] for key in about)
        seeds = (r["config"].get("seed") for r in (result, content))
        return bool(result["audit"]) and same and len(set(seeds)) == 1

    with locked(path):
        known = read_kept(path, Attacks, aside=True)
        results = known["results"] if known else []
        stays = content["audit"] is None and any(audited(r) for r in results)
        again = [r for r in results if same_attack(r["config"], content["config"])]
        again = [r for r in again if all(r[key] == content[key] for key in about)]
        if not (stays and any(r["audit"] for r in again)):
            write_json(path, {"results": [*(r for r in results if r not in again), content]})
    return stays


def keep(model: Model, content: dict[str, Any], subject: Subject, result: Robustness) -> None:
    """Writes RUN/robustness.json, the pictures and the metrics, and sends them to MLflow."""
    folder = model.folder
    assert folder is not None
    if note(folder, content):
        print(
            f"{folder.path} goes on to show its audited attack on these queries.",
            file=sys.stderr,
        )
        return
    folder.note(metrics(content))
    shown = {folder.path.name: content}
    if content["beside"] is not None:
        name = Path(content["beside"]["run"]).name
        shown[f"{name}, beside it" if name in shown else name] = content["beside"]
    plot_robustness(shown, picture_title(content), folder.plots / "robustness.png")
    if rows := fallen(subject, result):
        eps = max(result.examples, key=lambda e: (len(result.examples[e]), -e))
        title = f"queries that fell at {key(eps)}/255 ({content['norm']})"
        worst_sheet(rows, title, folder.plots / "worst_queries.png")
    sync.send(folder.path)


def picture_title(content: dict[str, Any]) -> str:
    """What was attacked, in a line."""
    return (
        f"{content['num_queries']} {content['split']} queries, {content['norm']}, "
        f"steps {content['config']['steps']}, restarts {content['config']['restarts']}, "
        f"{content['perturb']} attacked"
    )


def fallen(subject: Subject, result: Robustness, shown: int = 3) -> list[Fallen]:
    """The examples of the radius that has most of them, the smallest such radius."""
    if not any(result.examples.values()):
        return []
    eps = max(result.examples, key=lambda e: (len(result.examples[e]), -e))
    clean = subject.measurement

    def neighbours(index_K: NDArray) -> list[tuple[Path, str]]:
        return [
            (clean.gallery_paths[g], clean.classes[clean.gallery_labels[g]])
            for g in index_K[:shown]
            if g >= 0
        ]

    return [
        Fallen(
            clean.classes[clean.query_labels[example.query]],
            example.attack,
            example.clean_CHW.float().numpy(),
            example.adversarial_CHW.float().numpy(),
            neighbours(example.before_K),
            neighbours(example.after_K),
        )
        for example in result.examples[eps]
    ]
