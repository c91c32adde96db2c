"""What the flowers look like: genera with a common form, species that vary it, some only finely."""

import math
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

Color = tuple[float, float, float]
T = TypeVar("T")

_COLORS: dict[str, Color] = {
    "white": (0.95, 0.94, 0.92),
    "cream": (0.96, 0.91, 0.70),
    "yellow": (0.97, 0.83, 0.13),
    "gold": (0.96, 0.66, 0.07),
    "orange": (0.94, 0.43, 0.09),
    "peach": (0.97, 0.70, 0.55),
    "red": (0.82, 0.09, 0.11),
    "crimson": (0.60, 0.04, 0.17),
    "pink": (0.94, 0.60, 0.72),
    "rose": (0.88, 0.27, 0.47),
    "magenta": (0.75, 0.13, 0.54),
    "lilac": (0.75, 0.62, 0.87),
    "purple": (0.47, 0.17, 0.61),
    "violet": (0.35, 0.23, 0.70),
    "blue": (0.27, 0.39, 0.83),
    "sky": (0.56, 0.70, 0.92),
}
_CENTRES: tuple[Color, ...] = (
    (0.93, 0.75, 0.12),
    (0.80, 0.52, 0.08),
    (0.30, 0.17, 0.08),
    (0.62, 0.70, 0.22),
    (0.20, 0.10, 0.16),
    (0.93, 0.90, 0.70),
)

_FORMS = "open open daisy daisy double cup trumpet lily orchid thistle".split()


@dataclass(frozen=True)
class Species:
    """One class of flowers. Lengths in petal lengths, angles in radians, colours RGB in [0,1]."""

    genus: int
    fine_of: int | None
    """The class that this one copies but for one small change, or None."""
    form: str
    """open, daisy, double, cup, trumpet, lily, orchid or thistle."""
    cluster: str
    """How blooms stand: solitary, umbel or spike."""
    petals: int
    layers: int
    width: float
    """Half the petal's greatest width."""
    swell: float
    """Exponent of the outline at the base: small = broad base."""
    taper: float
    """Exponent of the outline at the tip: small = blunt, large = pointed."""
    notch: float
    """Depth of the cleft in the tip."""
    fringe: float
    """Depth of the teeth along the tip."""
    ruffle: float
    """Waviness of the margin."""
    elevation: float
    """Rise of the petals from the plane of the bloom."""
    inner: float
    """Length of the innermost layer."""
    lip: float
    """How much petals differ around the bloom: 0 = radial."""
    base: Color
    tip: Color
    throat: Color
    mark: Color
    """Colour of veins, spots and the middle stripe."""
    edge: Color
    reach: float
    """How far the throat's colour runs up the petal."""
    blend: float
    """Share of the tip's colour."""
    margin: float
    """Strength of the coloured margin."""
    veins: float
    stripe: float
    spots: int
    centre: str
    """disc, stamens, boss, column or eye."""
    centre_size: float
    centre_color: Color
    anther_color: Color
    leaf_width: float
    leaf_color: Color


def species_table(classes: int, seed: int) -> tuple[Species, ...]:
    """The species of `classes` classes, genus by genus; a smaller table begins a larger one."""
    table: list[Species] = []
    genus = 0
    while len(table) < classes:
        rng = np.random.default_rng((seed, 1, genus))
        first = len(table)
        table.append(_genus(genus, rng))
        for _ in range(int(rng.integers(1, 5))):
            parent = int(rng.integers(first, len(table)))
            if rng.random() < 0.45:
                table.append(_fine(table[parent], parent, rng))
            else:
                table.append(_sibling(table[parent], rng))
        genus += 1
    return tuple(table[:classes])


def names(table: tuple[Species, ...], seed: int) -> list[str]:
    """A made-up binomial for each species: genus and epithet, all different."""
    starts = "Al Bel Cor Dra Eri Fen Gal Hel Ixo Lor Mir Nem Ora Pel Ros Sil Tur Ver Zin".split()
    middles = "a an e er i il o on or u".split()
    ends = "dia lia nthe phora ria stum thia via".split()
    rng = np.random.default_rng((seed, 2))
    words = [a + b + c for a in starts for b in middles for c in ends]
    genera = rng.permutation(words)
    epithets = [w.lower() for w in rng.permutation(words)]
    return [
        f"{genera[s.genus % len(genera)]} {epithets[i % len(epithets)]}"
        for i, s in enumerate(table)
    ]


def pick(rng: np.random.Generator, *options: T) -> T:
    """One of the options, each as likely."""
    return options[int(rng.integers(len(options)))]


def _color(rng: np.random.Generator) -> Color:
    return _COLORS[pick(rng, *_COLORS)]


def _unlike(rng: np.random.Generator, *others: Color, options: tuple[Color, ...] = ()) -> Color:
    """One of `options`, by default the palette, that nobody takes for one of `others`."""
    options = options or tuple(_COLORS.values())
    apart = [min(math.dist(color, other) for other in others) for color in options]
    allowed = [i for i, distance in enumerate(apart) if distance > 0.6] or [int(np.argmax(apart))]
    return options[pick(rng, *allowed)]


def _near(color: Color, amount: float, rng: np.random.Generator) -> Color:
    """`color` moved by about `amount` in each channel."""
    moved = np.clip(np.array(color) + rng.normal(0, amount, 3), 0.02, 0.98)
    return float(moved[0]), float(moved[1]), float(moved[2])


def _mix(a: Color, b: Color, share: float) -> Color:
    mixed = np.array(a) * (1 - share) + np.array(b) * share
    return float(mixed[0]), float(mixed[1]), float(mixed[2])


def _deeper(color: Color, rng: np.random.Generator) -> Color:
    """A darker, redder or bluer relative of `color`, as veins and blotches have."""
    return _mix(color, _COLORS[pick(rng, "crimson", "purple", "violet", "magenta", "red")], 0.75)


def _genus(genus: int, rng: np.random.Generator) -> Species:
    form = pick(rng, *_FORMS)
    uniform = rng.uniform
    base = _near(_color(rng), 0.03, rng)
    body = Species(
        genus=genus,
        fine_of=None,
        form=form,
        cluster="solitary",
        petals=int(rng.integers(4, 9)),
        layers=1,
        width=uniform(0.32, 0.55),
        swell=uniform(0.5, 1.3),
        taper=uniform(0.25, 0.6),
        notch=uniform(0.08, 0.3) if rng.random() < 0.35 else 0.0,
        fringe=0.0,
        ruffle=uniform(0.0, 0.12),
        elevation=uniform(0.05, 0.4),
        inner=0.7,
        lip=0.0,
        base=base,
        tip=_near(_mix(base, _color(rng), 0.5), 0.04, rng),
        throat=_color(rng) if rng.random() < 0.6 else base,
        mark=_deeper(base, rng),
        edge=_unlike(rng, base),
        reach=uniform(0.12, 0.4),
        blend=uniform(0.0, 0.7),
        margin=uniform(0.4, 0.9) if rng.random() < 0.25 else 0.0,
        veins=uniform(0.3, 0.8) if rng.random() < 0.4 else 0.0,
        stripe=uniform(0.3, 0.8) if rng.random() < 0.2 else 0.0,
        spots=int(rng.integers(5, 16)) if rng.random() < 0.2 else 0,
        centre=pick(rng, "stamens", "boss", "eye", "disc"),
        centre_size=uniform(0.12, 0.24),
        centre_color=pick(rng, *_CENTRES),
        anther_color=pick(rng, *_CENTRES),
        leaf_width=uniform(0.12, 0.45),
        leaf_color=_near((0.24, 0.42, 0.16), 0.05, rng),
    )
    if form == "open":
        cluster = pick(rng, "solitary", "solitary", "solitary", "umbel", "spike")
        return replace(body, cluster=cluster)
    if form == "daisy":
        return replace(
            body,
            petals=int(rng.integers(11, 30)),
            layers=int(rng.integers(1, 3)),
            width=uniform(0.09, 0.18),
            swell=uniform(0.25, 0.6),
            notch=0.0,
            elevation=uniform(-0.1, 0.25),
            inner=0.85,
            centre="disc",
            centre_size=uniform(0.24, 0.5),
        )
    if form == "double":
        return replace(
            body,
            petals=int(rng.integers(7, 13)),
            layers=int(rng.integers(3, 6)),
            width=uniform(0.2, 0.5),
            elevation=uniform(0.15, 0.5),
            inner=uniform(0.25, 0.45),
            centre=pick(rng, "eye", "boss"),
            centre_size=uniform(0.06, 0.12),
        )
    if form == "cup":
        return replace(
            body,
            petals=int(rng.integers(5, 8)),
            layers=int(rng.integers(1, 3)),
            width=uniform(0.38, 0.52),
            elevation=uniform(0.55, 0.95),
            inner=0.9,
            centre=pick(rng, "stamens", "boss"),
        )
    if form == "trumpet":
        return replace(
            body,
            cluster=pick(rng, "solitary", "solitary", "umbel"),
            petals=5,
            width=uniform(0.62, 0.75),
            swell=uniform(0.9, 1.3),
            taper=uniform(0.32, 0.5),
            elevation=uniform(0.2, 0.5),
            reach=uniform(0.3, 0.6),
            centre=pick(rng, "eye", "column"),
            centre_size=uniform(0.1, 0.2),
        )
    if form == "lily":
        return replace(
            body,
            petals=int(rng.integers(5, 7)),
            layers=1,
            width=uniform(0.17, 0.3),
            swell=uniform(0.6, 1.1),
            taper=uniform(0.6, 1.1),
            notch=0.0,
            stripe=uniform(0.2, 0.7),
            spots=int(rng.integers(6, 20)) if rng.random() < 0.5 else 0,
            centre="stamens",
            centre_size=uniform(0.3, 0.55),
        )
    if form == "orchid":
        return replace(
            body,
            cluster=pick(rng, "solitary", "spike"),
            petals=int(rng.integers(4, 7)),
            lip=uniform(0.5, 1.0),
            width=uniform(0.28, 0.5),
            elevation=uniform(0.0, 0.3),
            centre="column",
            centre_size=uniform(0.12, 0.22),
        )
    return replace(
        body,
        petals=int(rng.integers(22, 34)),
        layers=3,
        width=uniform(0.03, 0.06),
        swell=0.3,
        taper=uniform(0.3, 1.0),
        notch=0.0,
        ruffle=0.0,
        elevation=uniform(0.5, 0.9),
        inner=0.45,
        spots=0,
        veins=0.0,
        centre="boss",
        centre_size=uniform(0.2, 0.4),
    )


def _sibling(parent: Species, rng: np.random.Generator) -> Species:
    """Another species of the genus: its own colours, and a few traits moved."""
    base = _near(_color(rng) if rng.random() < 0.6 else parent.base, 0.04, rng)
    child = replace(
        parent,
        fine_of=None,
        base=base,
        tip=_near(_mix(base, parent.tip, rng.uniform(0, 0.7)), 0.05, rng),
        mark=_deeper(base, rng),
        width=parent.width * rng.uniform(0.8, 1.2),
        taper=parent.taper * rng.uniform(0.7, 1.4),
        elevation=parent.elevation + rng.normal(0, 0.08),
        centre_size=parent.centre_size * rng.uniform(0.8, 1.25),
    )
    for _ in range(2):
        child = _change(child, pick(rng, *_TRAITS), rng)
    return child


_TRAITS = ("throat", "veins", "spots", "stripe", "margin", "petals", "notch", "blend", "centre")
_SWITCHES = {
    "veins": (0.6, 0.9, "mark"), "stripe": (0.6, 0.9, "mark"), "margin": (0.7, 0.95, "edge"),
}  # fmt: skip
"""Trait that is there or not -> how strong it may be, and what has its colour."""


def _fine(parent: Species, index: int, rng: np.random.Generator) -> Species:
    """A look-alike of class `index`: one trait differs."""
    child = replace(parent, fine_of=index)
    while replace(child, fine_of=parent.fine_of) == parent:
        child = _change(child, pick(rng, *_TRAITS), rng)
    return child


def _change(species: Species, trait: str, rng: np.random.Generator) -> Species:
    """`species` with one trait switched or moved; a trait that its form lacks stays."""
    if trait == "throat":
        # A daisy's disc hides what lies under it.
        reach = max(rng.uniform(0.25, 0.5), species.centre_size + 0.2)
        throat = _unlike(rng, species.throat, species.base)
        return replace(species, throat=throat, reach=reach)
    if trait in _SWITCHES and (trait == "margin" or species.form != "thistle"):
        low, high, part = _SWITCHES[trait]
        changes: dict[str, Any] = {trait: 0.0}
        if not getattr(species, trait):
            changes = {trait: rng.uniform(low, high), part: _unlike(rng, species.base)}
        return replace(species, **changes)
    if trait == "spots" and species.form in ("open", "cup", "lily", "orchid", "trumpet"):
        if species.spots:
            return replace(species, spots=0)
        return replace(species, spots=int(rng.integers(9, 20)), mark=_unlike(rng, species.base))
    if trait == "petals" and species.form not in ("trumpet", "thistle"):
        step = 1 if species.petals < 10 else max(2, species.petals // 4)
        more = step if species.petals < 5 or rng.random() < 0.5 else -step
        return replace(species, petals=species.petals + more)
    if trait == "notch" and species.form in ("open", "cup", "trumpet", "double"):
        if rng.random() < 0.5:
            return replace(species, notch=0.0 if species.notch else rng.uniform(0.15, 0.35))
        return replace(species, fringe=0.0 if species.fringe else rng.uniform(0.12, 0.25))
    if trait == "blend":
        tip = _unlike(rng, species.base, species.tip)
        return replace(species, blend=rng.uniform(0.6, 0.9), tip=tip)
    if trait == "centre":
        color = _unlike(rng, species.centre_color, options=_CENTRES)
        return replace(species, centre_color=color)
    return species
