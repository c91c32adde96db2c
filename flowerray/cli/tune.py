"""`flowerray tune`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from flowerray.cli.options import (
    NOT_RESUMED,
    WHY_NOT_RESUMED,
    absolute,
    default_out,
    end_of_logging,
    given,
    parse,
    peek,
    refuse,
    resumable,
    started,
    starting,
    take_method,
)
from flowerray.errors import UserError


def tune(words: list[str]) -> int:
    """`flowerray tune METHOD [options]`."""
    method, words = take_method("tune", words)
    import tyro
    from pydantic import Field, create_model

    from flowerray import methods
    from flowerray.cluster.session import own_gpus
    from flowerray.config import Config
    from flowerray.files import as_json
    from flowerray.training import harden
    from flowerray.training.run import PRESETS, Run
    from flowerray.tuning.command import TrialResources, new_study, resume_study
    from flowerray.tuning.command import tune as search
    from flowerray.tuning.config import StudyConfig
    from flowerray.tuning.pictures import study_table
    from flowerray.tuning.space import COMMON, DIM, HEAD
    from flowerray.tuning.study import Study

    chosen = peek(words, **starting(), resume={"type": Path})
    file = methods.get(method)
    start, config = started(file.config(), chosen), StudyConfig()
    old = None
    if chosen["resume"] is not None:
        refuse(words, NOT_RESUMED, WHY_NOT_RESUMED)
        old = Study.read(chosen["resume"].expanduser().absolute())
        start, config = old.base, old.config
        if old.base.method_name != method:
            raise UserError(f"{chosen['resume']} tunes {old.base.method_name}, not {method}.")

    class Own(Config):
        preset: Literal[tuple(PRESETS)] = "laptop"  # type: ignore[valid-type]
        """The run that the other options change, the search's default: see `flowerray train`."""
        out: Path | None = None
        """A new folder for the study; by default runs/tune-METHOD-TIME."""
        resume: Path | None = None
        """Continue this interrupted study; options must not differ from its study.json."""
        search_dim: bool = False
        """Search the embedding size too."""
        hardened: Annotated[bool, tyro.conf.arg(name="harden")] = False
        """Search adversarial training too, with --harden.kind pgd and --objective pareto where no
        other is chosen."""
        as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
        """Print one JSON object and nothing else."""

    parts: dict[str, Any] = {n: f for n, f in Run.model_fields.items() if n != "resources"}
    fields = {**StudyConfig.model_fields, **TrialResources.model_fields, **parts}
    fields["method"] = Field(description="The loss.")
    kinds = {name: (field.annotation, field) for name, field in fields.items()}
    kinds["method"] = (file.config, fields["method"])
    kind = create_model("Options", __base__=Own, **kinds)  # type: ignore[call-overload]
    values = dict(config) | {n: getattr(start, n) for n in parts}
    values |= old.resources if old else {}
    about = f"Searches what {method} leaves open; a knob given here is not searched."
    options = parse(kind, words, f"tune {method}", about, default=kind(**values))

    def taken(part: type[Config]) -> dict[str, Any]:
        return {n: getattr(options, n) for n in part.model_fields if n in kinds}

    run, config = absolute(Run(**taken(Run))), StudyConfig(**taken(StudyConfig))
    if old is None and options.hardened and not given(words, ["objective"]):
        config = config.model_copy(update={"objective": "pareto"})  # clean alone favours weak ones
    if old is None and config.sampler == "nsga2" and not given(words, ["pruner"]):
        config = config.model_copy(update={"pruner": "none"})  # it learns from whole trials alone
    resources = TrialResources(**taken(TrialResources))
    if old is None and not given(words, ["gpus_per_trial"]):
        gpus = own_gpus(resources.workers_per_trial)
        resources = resources.model_copy(update={"gpus_per_trial": gpus})
    if options.hardened and not run.harden.on:
        content = {**run.harden.model_dump(), "kind": "pgd"}
        run = run.model_copy(update={"harden": harden.HardenConfig(**content)})
    if old is None:
        space = harden.space if options.hardened else {}
        fixed = given(words, [*file.space, *COMMON, *HEAD, *DIM, *space])
        more = {**space, **(DIM if options.search_dim else {})}
        out = (options.out or default_out(f"tune-{method}")).expanduser().absolute()
        study = new_study(run, out, config, resources, fixed, more)
    else:
        study = old
        known = " ".join(old.knobs)
        for flag, said, knob in (
            ("--search-dim", options.search_dim, "embedder.dim"),
            ("--harden", options.hardened, "harden."),
        ):
            if said and knob not in known:
                raise UserError(f"{study.folder} was begun without {flag}: start another study.")
        study.resources = resources.model_dump()
        study.searched = study.searched and not given(words, ["trials", "time_limit"])
        study.resume_with(run, config)
        resume_study(study, resources, options.as_json)
    with resumable(f"tune {method}", study.folder, "study.json"):
        result = search(study, resources, quiet=options.as_json)
    print(as_json(result) if options.as_json else study_table(result))
    end_of_logging(study.folder)
    return 0
