"""`flowerray attack RUN`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from flowerray.cli.options import (
    WHY_NOT_RESUMED,
    end_of_logging,
    given,
    parse,
    peek,
    pick_device,
    refuse,
    resumable,
)
from flowerray.errors import UserError


def attack(words: list[str]) -> int:
    """`flowerray attack RUN [options]`."""
    import tyro
    from pydantic import Field

    from flowerray.robustness.config import L2_GRID, PRESETS, AttackConfig

    def comma(kind: type, metavar: str) -> Any:
        """One word, its parts separated by commas."""
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavar,
            instance_from_str=lambda args: tuple(kind(part) for part in args[0].split(",")),
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=lambda value: [
                ",".join(f"{v:g}" if isinstance(v, float) else v for v in value)
            ],
        )

    class Options(AttackConfig):
        run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = None
        """A folder, an exported .pth, models:/... or runs:/..."""
        attacks: Annotated[tuple[str, ...], comma(str, "A,B,...")] = AttackConfig().attacks
        eps: Annotated[tuple[float, ...], comma(float, "0,0.5,...")] = AttackConfig().eps
        preset: Literal[tuple(PRESETS)] = "default"  # type: ignore[valid-type]
        """What the other options change. notebooks: FGSM, PGD-10 with steps of eps/4, CW (c = 1, 50
        steps) and DeepFool (50 steps) at 4 and 8/255, each by itself, with pair accuracy."""
        beside: str | None = None
        """Another RUN that is attacked the same way; by default the one that a hardened RUN
        started from."""
        audit: bool = False
        """Also check whether the figures can be believed; takes about as long again."""
        audit_queries: int = Field(128, ge=8)
        """Queries that the audit looks at."""
        ers: bool = False
        """Also the ten terms of the Empirical Robustness Score at 8/255, for the literature."""
        resume: bool = False
        """Go on with the RUN's attack that was interrupted, with its own options."""
        as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
        """Print one JSON object and nothing else."""

    preset = peek(words, preset={"choices": list(PRESETS), "default": "default"})["preset"]
    start = Options(preset=preset, **PRESETS[preset].model_dump())
    about = "Attacks a model: how much of its R@1 is left, and whether that can be believed."
    options = parse(Options, words, "attack", about, default=start)
    if options.run is None:
        raise UserError("name a RUN to attack: flowerray attack RUN.")

    if options.perturb == "gallery":
        unused = "attacks targets black_box_queries minimum_steps cw_weight standard independent"
        why = "no use with --perturb gallery, where queries and pairs stay clean."
        refuse(words, [*unused.split(), "max_pairs"], why)
    if not (options.audit or options.ers):
        refuse(words, ("audit_queries",), "no use without --audit or --ers.")

    from flowerray.files import as_json
    from flowerray.opening import open_model
    from flowerray.robustness import command as command
    from flowerray.robustness.journal import FOLDER, unfinished
    from flowerray.robustness.table import attack_table

    model = open_model(options.run, pick_device("auto"))
    run = None if model.folder is None else model.folder.path
    config = AttackConfig.part_of(options)
    if config.norm == "l2" and preset == "default" and not given(words, ["eps"]):
        config = config.model_copy(update={"eps": L2_GRID})
    asked: dict[str, Any] = {
        "beside": options.beside or command.standard_of(model),
        "beside_may_lack": options.beside is None,
        **{name: getattr(options, name) for name in ("audit", "audit_queries", "ers")},
    }
    if options.resume:
        if run is None:
            raise UserError(
                f"--resume goes on with an attack on a RUN folder; {model.name} is none."
            )
        refuse(words, ("preset",), WHY_NOT_RESUMED)
        kept = unfinished(run)
        config = AttackConfig(**kept.pop("config"))
        before = {**config.model_dump(), **kept}
        changed = [f for f in given(words, before) if getattr(options, f) != before[f]]
        if changed:
            raise UserError(
                f"{run} cannot be resumed with other options: {', '.join(changed)} differ from "
                "those of its attack."
            )
        asked = kept
    with resumable("attack", run or Path(options.run), FOLDER):
        content = command.attack_model(
            model, config, **asked, resume=options.resume, quiet=options.as_json
        )
    print(as_json(content) if options.as_json else attack_table(content))
    if run is not None:
        end_of_logging(run)
    return 0
