"""Figures -> go or stop, by thresholds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from marginrm.rollout import comparison
from marginrm.rollout.comparison import Estimate, Results

_CACHED = 0.02  # share of responses from a cache, above which times are not compared
_FEWEST_BATCHES = 8  # below, chance alone may exceed a bound on time


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Bounds for a go. Those with an interval must hold for its worse end, so too little traffic is a stop.

    Attributes:
        agreement: Least share of preferences on which both revisions agree.
        pick_agreement: Least share of groups with the same pick.
        reward_shift: Largest standardised mean difference of rewards, either way.
        margin_ks: Largest Kolmogorov-Smirnov distance of margins over T.
        accuracy_drop: Most that the accuracy on labelled pairs may fall.
        ece_rise: Most that the expected calibration error may rise.
        time_ratio: Largest time of the new revision over that of the present one.
        lost: Largest share of rows that only the present revision can score.
    """

    agreement: float = 0.8
    pick_agreement: float = 0.5
    reward_shift: float = 0.5
    margin_ks: float = 0.25
    accuracy_drop: float = 0.05
    ece_rise: float = 0.05
    time_ratio: float = 1.5
    lost: float = 0.0


@dataclass(frozen=True, slots=True)
class Check:
    """One figure against its bound.

    Attributes:
        name: Name of the figure.
        value: The figure.
        bound: The bound that it must keep.
        ok: Whether it does.
        low: Lower end of the 95% interval, where there is one.
        high: Upper end.
        note: What the figure is made of.
    """

    name: str
    value: float
    bound: float
    ok: bool
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """The checks that the traffic allows, and notes on those that it does not allow."""

    checks: list[Check]
    notes: list[str]

    @property
    def go(self) -> bool:
        """True if every check is ok."""
        return all(check.ok for check in self.checks)


def decide(
    results: Results,
    temperatures: tuple[float, float],
    thresholds: Thresholds,
    *,
    labelled: bool = True,
    cached: tuple[float, float] = (0.0, 0.0),
) -> Decision:
    """Compares both revisions by the bounds.

    Args:
        results: Both revisions' results.
        temperatures: T of the present and of the new revision.
        thresholds: The bounds.
        labelled: Whether `chosen` is the better response of the pairs; otherwise labels are not used.
        cached: Responses that came from the cache of the present and of the new revision, whose times then say little.
    """
    checks, notes = list(_agreement(results, thresholds)), []
    if not checks:
        notes.append("Preferences were not compared: no row has two responses to one prompt.")
    if results.rows:
        checks += _drift(results, temperatures, thresholds)
    if labelled:
        checks += _labels(results, thresholds)
    share = max(cached) / max(1, sum(len(one.rewards) for one in results.old))
    times = comparison.time_ratio(results.seconds)
    if share > _CACHED:
        notes.append(
            f"Time was not compared: {min(share, 1):.0%} of the responses came from a reward cache. Start both servers anew, "
            "or with --reward-cache-mib 0."
        )
    elif times is None or len(results.seconds) < _FEWEST_BATCHES:
        notes.append(
            f"Time was not compared: it takes {_FEWEST_BATCHES + 1} batches. Give more rows or a smaller --batch."
        )
    else:
        ok = times.low <= thresholds.time_ratio
        note = f"{len(results.seconds):,} batches"
        checks.append(Check("time, NEW / OLD", times.value, thresholds.time_ratio, ok, times.low, times.high, note))
    return Decision([*checks, _lost(results, thresholds)], notes)


def _agreement(results: Results, thresholds: Thresholds) -> Iterator[Check]:
    preferences = comparison.preference_agreement(results)
    if preferences:
        count = sum(len(one.rewards) > 1 for one in results.old)
        yield _least("preferences that agree", preferences, thresholds.agreement, f"{count:,} pairs and groups")
    picks = comparison.pick_agreement(results)
    if picks:
        count = sum(len(one.rewards) > 1 for one, _ in results.of_kind("group"))
        yield _least("picks that agree", picks, thresholds.pick_agreement, f"{count:,} groups")


def _drift(results: Results, temperatures: tuple[float, float], thresholds: Thresholds) -> Iterator[Check]:
    old, new = comparison.all_rewards(results)
    moved = comparison.shift(old, new)
    note = f"mean {old.mean():.3f} to {new.mean():.3f}, std {old.std():.3f} to {new.std():.3f}"
    note += f", KS {comparison.kolmogorov_smirnov(old, new):.3f}"
    yield Check("shift of rewards", moved, thresholds.reward_shift, abs(moved) <= thresholds.reward_shift, note=note)
    old, new = comparison.margins(results, temperatures)
    if old.size:
        distance = comparison.kolmogorov_smirnov(old, new)
        note = f"mean {old.mean():.3f} to {new.mean():.3f}, shift {comparison.shift(old, new):+.2f}"
        ok = distance <= thresholds.margin_ks
        yield Check("KS distance of margins / T", distance, thresholds.margin_ks, ok, note=note)


def _labels(results: Results, thresholds: Thresholds) -> Iterator[Check]:
    found = comparison.accuracy(results)
    errors = comparison.calibration_errors(results)
    if found and errors:
        old, new, gained = found
        yield _least("change of accuracy", gained, -thresholds.accuracy_drop, f"{old:.1%} to {new:.1%}")
        rise, note = errors[1] - errors[0], f"{errors[0]:.3f} to {errors[1]:.3f}"
        yield Check("rise of the ECE", rise, thresholds.ece_rise, rise <= thresholds.ece_rise, note=note)


def _lost(results: Results, thresholds: Thresholds) -> Check:
    count = sum(results.lost.values())
    share = count / max(1, count + len(results.rows))
    reasons = ", ".join(f"{number:,} {code}" for code, number in sorted(results.lost.items()))
    ok = bool(results.rows) and share <= thresholds.lost
    return Check("rows that only OLD can score", share, thresholds.lost, ok, note=reasons or "none")


def _least(name: str, found: Estimate, bound: float, note: str) -> Check:
    ok = found.low >= bound
    if not ok and found.value >= bound:
        note += "; too few for this bound"
    return Check(name, found.value, bound, ok, found.low, found.high, note)
