"""Intervals of estimates, by the normal distribution."""

from __future__ import annotations

import math

NORMAL_975 = 1.96  # the normal distribution's 97.5% point


def wilson(share: float, count: int) -> tuple[float, float]:
    """Returns the 95% interval of a share of `count` trials (Wilson, 1927)."""
    z2 = NORMAL_975**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = NORMAL_975 / (1 + z2) * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)
