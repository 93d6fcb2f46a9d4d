"""What the runs must show, as pure functions of what was seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

OVERLOADED = frozenset({429, 503})


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request.

    Attributes:
        kind: What was sent, such as "score" or "oversized".
        status: Of the answer; None if there was none.
        seconds: From its planned start to the last byte of the answer, or to the fault.
        fault: Why there is no answer ("refused", "reset", "timeout"), or what is wrong with it; empty if nothing is.
        retry_after: Whether the answer has a `Retry-After`.
        at: Seconds after the run's start at which it was planned.
    """

    kind: str
    status: int | None
    seconds: float
    fault: str = ""
    retry_after: bool = False
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a report.

    Attributes:
        name: What must hold.
        seen: What was seen.
        passed: Whether it holds.
    """

    name: str
    seen: str
    passed: bool


@dataclass(frozen=True, slots=True)
class Report:
    """One run.

    Attributes:
        name: Of the section in docs/reliability.md.
        command: That makes it again.
        facts: What was done, as lines for people.
        checks: What came of it.
    """

    name: str
    command: str
    facts: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(check.passed for check in self.checks)


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the smallest value that at least this share of the values do not exceed; 0 of none."""
    if not values:
        return 0.0
    rank = max(1, -(-len(values) * share // 1))  # ceil
    return sorted(values)[int(rank) - 1]


def growth(rss: Sequence[tuple[float, int]]) -> float:
    """Returns by what share memory grew from the second quarter of the time to the last.

    The first quarter is left out: pools, caches and the allocator's arenas fill in it.
    """
    if len(rss) < 8:
        return 0.0
    quarter = len(rss) // 4
    before = [size for _, size in rss[quarter : 2 * quarter]]
    after = [size for _, size in rss[-quarter:]]
    return (sum(after) / len(after)) / (sum(before) / len(before)) - 1


def memory_course(rss: Sequence[tuple[float, int]]) -> str:
    """Returns the memory at each tenth of the time, for people."""
    tenths = rss[:: max(1, len(rss) // 10)]
    return ", ".join(f"{size / 2**20:,.0f}" for _, size in tenths) + " MiB"


def goodput(outcomes: Collection[Outcome], deadline: float, start: float, seconds: float) -> float:
    """Returns the right answers within the deadline that came in a stretch of the run, per second.

    Args:
        outcomes: Of requests.
        deadline: Seconds from a request's planned start.
        start: Of the stretch, in seconds after the run's start.
        seconds: Of the stretch.
    """
    came = [outcome.at + outcome.seconds for outcome in outcomes if good(outcome, deadline)]
    return sum(start <= at < start + seconds for at in came) / seconds


def good(outcome: Outcome, deadline: float) -> bool:
    """Whether a request got a right answer in time."""
    return outcome.status == 200 and not outcome.fault and outcome.seconds <= deadline


def answered_once(outcomes: Sequence[Outcome], sent: int) -> Check:
    """Every request has exactly one answer."""
    none = Counter(outcome.fault or "none" for outcome in outcomes if outcome.status is None)
    seen = (
        f"{len(outcomes):,} outcomes of {sent:,} requests, {sum(none.values()):,} without an answer {dict(none) or ''}"
    )
    return Check("every request gets exactly one answer", seen.strip(), len(outcomes) == sent and not none)


def only_statuses(outcomes: Collection[Outcome], allowed: Collection[int]) -> Check:
    """No answer has another status, and every 429 and 503 says when to come back."""
    found = Counter(outcome.status for outcome in outcomes if outcome.status is not None)
    silent = sum(outcome.status in OVERLOADED and not outcome.retry_after for outcome in outcomes)
    shown = ", ".join(f"{status}: {count:,}" for status, count in sorted(found.items()))
    return Check(
        f"only {', '.join(map(str, sorted(allowed)))}; 429 and 503 with Retry-After",
        f"{shown}; {silent:,} without Retry-After",
        set(found) <= set(allowed) and not silent,
    )


def right_rewards(outcomes: Collection[Outcome], checked: int) -> Check:
    """No reward is wrong."""
    wrong = sum(outcome.fault.startswith("wrong") for outcome in outcomes)
    return Check(
        "every reward as the float32 reference has it", f"{wrong:,} wrong of {checked:,}", checked > 0 and not wrong
    )


def flat_memory(rss: Sequence[tuple[float, int]], most: float) -> Check:
    """Memory grows by less than a share of itself."""
    peak = max((size for _, size in rss), default=0) / 2**20
    return Check(f"RSS grows by less than {most:.0%}", f"{growth(rss):+.1%}, peak {peak:,.0f} MiB", growth(rss) < most)
