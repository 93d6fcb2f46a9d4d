"""The width of an accuracy's interval, and the number of pairs that a given width takes."""

from __future__ import annotations

import math

from marginrm.calibration import Floats, correctness
from marginrm.intervals import NORMAL_975


def half_width(d: Floats) -> float:
    """Returns half the width of the accuracy's 95% interval, by Agresti and Coull (1998): 1.96 sqrt(p (1 - p) / (n + 4)).

    p = (right + 2) / (n + 4), a tie being half right; so all pairs right does not give a width of 0.

    Args:
        d: Margins, [pairs].
    """
    p, n = _adjusted(d)
    return NORMAL_975 * math.sqrt(p * (1 - p) / n)


def pairs_within(d: Floats, within: float) -> int:
    """Returns the number of pairs like these whose accuracy is known to +- `within` with 95% confidence.

    It solves `half_width` for n, at the accuracy of these pairs. Pairs count as independent: with many pairs to a prompt,
    more are needed.

    Args:
        d: Margins, [pairs].
        within: Half the width of the interval, above 0.
    """
    p, _ = _adjusted(d)
    return max(1, math.ceil(NORMAL_975**2 * p * (1 - p) / within**2 - 4))


def _adjusted(d: Floats) -> tuple[float, int]:
    return (float(correctness(d).sum()) + 2) / (len(d) + 4), len(d) + 4
