"""What the checks of an audit say, their limits, and when one attack counts as stronger.

Letters: Q audited queries.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowerray.robustness.attack import Robustness

HUGE = 128.0
"""A change of every pixel, in 1/255, at which any image can be made nearly any other."""
MANY_RESTARTS = 5
MANY_STEPS = 5
"""Times the steps of the measurement that its survivors have to withstand."""
STEPS = (1, 5, 20)
ZERO_GRADIENTS = 0.01
"""Largest share of images whose gradient may be exactly 0."""
EXTRA = 0.02
"""Largest share of queries that only a weaker or repeated attack may break."""
FEW_PASSES = 50
"""Forward passes of Square where only its bounds are looked at."""
ALONE = 8
"""Images whose gradient is taken alone and in a batch."""


class Check(NamedTuple):
    """One question to the measurement."""

    name: str
    passed: bool | None
    """None = could not be asked."""
    value: float | None
    """The figure that decided."""
    text: str
    """What was measured and what it means, one line."""


def beyond_chance(weak_right_Q: NDArray, strong_right_Q: NDArray) -> tuple[float, bool]:
    """By how much the attack that ought to be weaker is the stronger one.

    Returns:
        (Queries that only it breaks - queries that only the other breaks) / Q, and whether that is
        more than sampling error: 1.64 standard errors of paired outcomes, and more than one query.
    """
    only_weak = int((~weak_right_Q & strong_right_Q).sum())
    only_strong = int((weak_right_Q & ~strong_right_Q).sum())
    gap = only_weak - only_strong
    too_much = gap > max(1.0, 1.64 * np.sqrt(only_weak + only_strong))
    return gap / len(weak_right_Q), bool(too_much)


def telling_eps(result: Robustness) -> float:
    """The radius > 0 whose worst case is nearest to half the clean R@1: there, neither a floor nor
    a ceiling hides a difference.
    """
    half = result.clean.recall_at_1 / 2
    radii = [eps for eps in result.alone if eps > 0]
    return min(radii, key=lambda eps: abs(result.alone[eps].recall_at_1 - half), default=2.0)
