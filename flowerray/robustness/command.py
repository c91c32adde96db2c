"""`attack`: a model's retrieval under attack, kept in its RUN folder and in MLflow."""

import sys
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flowerray.data.dataset import Dataset
from flowerray.description import VERSION
from flowerray.errors import UserError
from flowerray.files import locked, read_kept, write_json
from flowerray.opening import Model, open_model
from flowerray.retrieval.command import new_pairs, not_kept, refuse_trained, stored_pairs
from flowerray.retrieval.pairs import Pairs
from flowerray.robustness.attack import Robustness, attack, images_to_attack
from flowerray.robustness.audit import CHECKS, Auditor
from flowerray.robustness.config import AttackConfig
from flowerray.robustness.journal import keeping
from flowerray.robustness.pictures import plot_robustness, worst_sheet
from flowerray.robustness.record import Attacks, metrics, record
from flowerray.robustness.score import ers as ers_terms
from flowerray.robustness.verification import pairs_of_queries
from flowerray.robustness.victim import Victim, open_victim
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
    resume: bool = False,
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
        resume: only go on with the same attack, which was interrupted; by default it begins anew
            where something that decides its outcome has changed.
        quiet: no progress bars.

    Returns:
        See `record.record`.

    Raises:
        UserError: an unknown split, gallery or attack; no such RUN; an audit of another attack than
            on queries.
    """
    if audit and config.perturb != "query":
        raise UserError(
            f"`audit` asks about attacks on queries, not about `perturb` {config.perturb}: leave "
            "one of them out."
        )
    device = next(model.embedder.parameters()).device
    dataset = model.own_dataset(quiet)
    standard = None if beside is None else open_model(beside, device)
    if standard is not None:
        try:
            refuse_strangers(standard, model, dataset, config.split)
        except UserError as error:
            if not beside_may_lack:
                raise
            print(f"nothing is attacked beside it: {error}", file=sys.stderr)
            standard = None
    asked = {
        "config": config.model_dump(mode="json"),
        "beside": beside,
        "beside_may_lack": beside_may_lack,
        "audit": audit,
        "audit_queries": audit_queries,
        "ers": ers,
    }
    run = None if model.folder is None else model.folder.path
    with keeping(run, asked, facts(dataset, model, standard), resume) as journal:
        victim = replace(open_victim(model, dataset, config, quiet), journal=journal)
        victims = [victim]
        if standard is not None:
            other = open_victim(standard, dataset, victim.config, quiet)
            victims.append(replace(other, journal=journal.of("beside")))
        pairs = split_pairs(victim, dataset)
        measured = [(one, _attack(one, pairs, quiet)) for one in victims]
        records = [record(one, found) for one, found in measured]
        content, result = records[0], measured[0][1]
        content["beside"] = records[1] if standard is not None else None
        if model.folder is not None:
            with suppress(OSError):  # `keep` says so
                note(model.folder, content)  # what follows is long, and may be interrupted
        if audit:
            content["audit"] = _audit(*measured, queries=audit_queries, quiet=quiet)
        if ers:
            for (one, found), its in zip(measured, records, strict=True):
                its["ers"] = _score(one, found, audit_queries, quiet)
        if model.folder is not None:
            try:
                keep(victim, content, result)
            except (OSError, UserError) as error:  # a full disk, somebody else's RUN
                not_kept(model.name, error)
    return content


def facts(dataset: Dataset, *models: Model | None) -> dict[str, str]:
    """What decides an attack's outcome beside its options."""
    digest = blake2b(digest_size=8)
    devices = set()
    for model in models:
        if model is not None:
            digest.update(repr((model.run.embedder, model.threshold)).encode())
            for tensor in model.embedder.state_dict().values():
                digest.update(tensor.cpu().numpy().tobytes())
                devices.add(tensor.device.type)
    return {
        "flowerray": VERSION,
        "torch": torch.__version__,
        "device": " ".join(sorted(devices)),
        "data set": str(dataset.tags["dataset/fingerprint"]),
        "model": digest.hexdigest(),
    }


def refuse_strangers(other: Model, model: Model, dataset: Dataset, split: str) -> None:
    """Refuses a model beside that was trained or chosen on the queries.

    Raises:
        UserError: so it was, or on an earlier state of the set.
    """
    if other.run.data != model.run.data:
        refuse_trained(other, dataset.given, dataset, split, "name another `beside`")
    elif other.dataset not in (None, dataset.tags["dataset/fingerprint"]):
        raise UserError(
            f"{other.name} was trained before {dataset.root} got other files, classes or splits, "
            "and may know the queries: name another `beside`."
        )


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


def split_pairs(victim: Victim, dataset: Dataset) -> Pairs | None:
    """Verification pairs whose attacked side is a query; None where none are wanted or possible."""
    config = victim.config
    if not config.max_pairs or config.perturb == "gallery":
        return None
    find = new_pairs if victim.model.folder is None else stored_pairs
    pairs = find(victim.model, dataset, config.split)
    if pairs is None:
        return None
    chosen = pairs_of_queries(pairs, victim.chosen_Q, config.max_pairs, config.seed)
    return chosen if chosen.same.any() and not chosen.same.all() else None


def _attack(victim: Victim, pairs: Pairs | None, quiet: bool) -> Robustness:
    """All attacks on one model, with a progress bar."""
    total, title = images_to_attack(victim, pairs), f"attack {victim.model.name}"[-30:]
    with tqdm(
        total=total, unit="img", desc=title, disable=quiet or None, dynamic_ncols=True
    ) as bar:
        return attack(victim, pairs, bar.update)


def _audit(
    measured: tuple[Victim, Robustness],
    *beside: tuple[Victim, Robustness],
    queries: int,
    quiet: bool,
) -> dict[str, Any]:
    """Whether the figures can be believed; the model beside helps where it was not hardened."""
    plain = [(other, found) for other, found in beside if not other.model.run.harden.on]
    standard, standard_result = plain[0] if plain else (None, None)
    if not measured[0].model.run.harden.on:
        standard_result = measured[1]
    auditor = Auditor(
        *measured, queries=queries, standard=standard, standard_result=standard_result
    )
    with tqdm(total=len(CHECKS), unit="check", desc="audit", disable=quiet or None) as bar:
        return auditor.run(bar.update)


def _score(victim: Victim, result: Robustness, queries: int, quiet: bool) -> dict[str, Any]:
    """The terms of the Empirical Robustness Score, never without what puts them into proportion."""
    with tqdm(total=9, unit="attack", desc="ers", disable=quiet or None) as bar:
        found = ers_terms(victim.narrow(queries)[0], bar.update)
    clean = result.clean.recall_at_1
    return {"clean_recall_at_1": clean, "collapsed": result.collapse["collapsed"], **found}


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


def keep(victim: Victim, content: dict[str, Any], result: Robustness) -> None:
    """Writes RUN/robustness.json, the pictures and the metrics, and sends them to MLflow."""
    folder = victim.model.folder
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
    title = (
        f"{content['num_queries']} {content['split']} queries, {content['norm']}, "
        f"steps {content['config']['steps']}, restarts {content['config']['restarts']}, "
        f"{content['perturb']} attacked"
    )
    plot_robustness(shown, title, folder.plots / "robustness.png")
    if any(result.examples.values()):  # the smallest radius of those that have most of them
        eps = max(result.examples, key=lambda e: (len(result.examples[e]), -e))
        worst_sheet(victim, result, eps, folder.plots / "worst_queries.png")
    sync.send(folder.path)
