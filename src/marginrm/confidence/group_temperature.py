"""The temperature of a choice among N candidates, which differs from that of a given pair.

The best of N is chosen because its reward is high, so its reward tends to be too high (the winner's curse, or optimiser's
curse: Smith and Winkler 2006), and its runner-up is another such extreme. A temperature fitted on given pairs does not
hold for them. So log T is a straight line in log N, fitted on chosen maxima.
"""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field


class GroupTemperature(BaseModel):
    """Temperatures for N candidates, of which the one with the highest reward is chosen."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    temperature: float = Field(gt=0, description="T for two candidates.")
    pick_slope: float = Field(description="Change of log T with log N, for P(the best beats the runner-up).")
    best_slope: float = Field(description="Change of log T with log N, for P(a candidate is the best of all).")
    largest: int = Field(ge=2, description="The largest N that was measured; above it, T stays as it is there.")

    def of_pick(self, candidates: int) -> float:
        """Returns T of P(the best beats the runner-up) among so many candidates."""
        return self.temperature * math.exp(self.pick_slope * self._log_ratio(candidates))

    def of_best(self, candidates: int) -> float:
        """Returns T of the Luce choice probabilities of so many candidates."""
        return self.temperature * math.exp(self.best_slope * self._log_ratio(candidates))

    def _log_ratio(self, candidates: int) -> float:
        return log_ratio(max(2, min(candidates, self.largest)))


def log_ratio(candidates: int) -> float:
    """Returns log(N / 2), in which log T is linear."""
    return math.log(candidates / 2)
