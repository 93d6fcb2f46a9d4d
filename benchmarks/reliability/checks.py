"""The requirements, as pure functions of the outcomes of requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from benchmarks.reliability.report import Check

OVERLOADED = frozenset({429, 503})


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one request.

    Attributes:
        kind: The kind of request, such as "best-of-n" or "oversized".
        status: Status of the reply; None without a reply.
        seconds: From the planned start to the last byte of the reply, or to the fault.
        fault: Why there is no reply ("refused", "reset", "timeout"), or why it is wrong; empty for a correct reply.
        retry_after: Whether the reply has a `Retry-After`.
        at: Planned start, in seconds after the start of the run.
    """

    kind: str
    status: int | None
    seconds: float
    fault: str = ""
    retry_after: bool = False
    at: float = 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the smallest value that at least this share of the values do not exceed; 0 without values."""
    if not values:
        return 0.0
    rank = max(1, -(-len(values) * share // 1))  # ceil
    return sorted(values)[int(rank) - 1]


def growth(rss: Sequence[tuple[float, int]]) -> float:
    """Returns the growth of memory from the second quarter of the time to the last, as a share.

    The first quarter is left out, because pools, caches and the allocator's arenas fill in it.
    """
    if len(rss) < 8:
        return 0.0
    quarter = len(rss) // 4
    before = [size for _, size in rss[quarter : 2 * quarter]]
    after = [size for _, size in rss[-quarter:]]
    return (sum(after) / len(after)) / (sum(before) / len(before)) - 1


def memory_course(rss: Sequence[tuple[float, int]]) -> str:
    """Returns the memory at each tenth of the time, as text."""
    tenths = rss[:: max(1, len(rss) // 10)]
    return ", ".join(f"{size / 2**20:,.0f}" for _, size in tenths) + " MiB"


def goodput(outcomes: Collection[Outcome], deadline: float, start: float, seconds: float) -> float:
    """Returns the correct replies within the deadline that arrived in an interval of the run, per second.

    Args:
        outcomes: Outcomes of requests.
        deadline: Seconds from the planned start of a request.
        start: Start of the interval, in seconds after the start of the run.
        seconds: Length of the interval.
    """
    arrivals = [outcome.at + outcome.seconds for outcome in outcomes if good(outcome, deadline)]
    return sum(start <= at < start + seconds for at in arrivals) / seconds


def good(outcome: Outcome, deadline: float) -> bool:
    """Returns whether a request has a correct reply within the deadline."""
    return outcome.status == 200 and not outcome.fault and outcome.seconds <= deadline


def answered_once(outcomes: Sequence[Outcome], sent: int) -> Check:
    """Checks that every request has exactly one reply."""
    none = Counter(outcome.fault or "none" for outcome in outcomes if outcome.status is None)
    seen = f"{len(outcomes):,} outcomes of {sent:,} requests, {sum(none.values()):,} without a reply {dict(none) or ''}"
    return Check("every request gets exactly one reply", seen.strip(), len(outcomes) == sent and not none)


def only_statuses(outcomes: Collection[Outcome], allowed: Collection[int]) -> Check:
    """Checks that no reply has another status, and that every 429 and 503 has a `Retry-After`."""
    found = Counter(outcome.status for outcome in outcomes if outcome.status is not None)
    silent = sum(outcome.status in OVERLOADED and not outcome.retry_after for outcome in outcomes)
    shown = ", ".join(f"{status}: {count:,}" for status, count in sorted(found.items()))
    return Check(
        f"only {', '.join(map(str, sorted(allowed)))}; 429 and 503 with Retry-After",
        f"{shown}; {silent:,} without Retry-After",
        set(found) <= set(allowed) and not silent,
    )


def right_rewards(outcomes: Collection[Outcome], checked: int) -> Check:
    """Checks that no reward is wrong, and that at least one was compared."""
    wrong = sum(outcome.fault.startswith("wrong") for outcome in outcomes)
    return Check(
        "every reward equals the float32 reference", f"{wrong:,} wrong of {checked:,}", checked > 0 and not wrong
    )


def flat_memory(rss: Sequence[tuple[float, int]], most: float) -> Check:
    """Checks that memory grows by less than a share."""
    peak = max((size for _, size in rss), default=0) / 2**20
    return Check(f"RSS grows by less than {most:.0%}", f"{growth(rss):+.1%}, peak {peak:,.0f} MiB", growth(rss) < most)
