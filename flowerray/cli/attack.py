"""`flowerray attack RUN`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from flowerray.cli.options import end_of_logging, given, parse, peek, pick_device, refuse
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
    from flowerray.robustness.table import attack_table

    model = open_model(options.run, pick_device("auto"))
    config = AttackConfig(**{field: getattr(options, field) for field in AttackConfig.model_fields})
    if config.norm == "l2" and preset == "default" and not given(words, ["eps"]):
        config = config.model_copy(update={"eps": L2_GRID})
    content = command.attack_model(
        model,
        config,
        beside=options.beside or command.standard_of(model),
        beside_may_lack=options.beside is None,
        audit=options.audit,
        audit_queries=options.audit_queries,
        ers=options.ers,
        quiet=options.as_json,
    )
    print(as_json(content) if options.as_json else attack_table(content))
    if model.folder is not None:
        end_of_logging(Path(model.folder.path))
    return 0
