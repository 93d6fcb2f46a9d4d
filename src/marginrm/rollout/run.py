"""The same rows through both revisions, batch by batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from marginrm.bulk.rows import InputRow
from marginrm.rollout.comparison import Results
from marginrm.rollout.revisions import Revision, Scored


def score_both(
    old: Revision, new: Revision, rows: Iterable[InputRow], batch: int, progress: Callable[[int], None]
) -> Results:
    """Scores rows with both revisions, which take turns in being first.

    The time of the first batch does not count, because it includes connecting and warming up.

    Args:
        old: The present revision.
        new: The new one.
        rows: The traffic.
        batch: Responses in a batch, at least.
        progress: Called with the number of rows that are done.
    """
    results = Results()
    for number, together in enumerate(_batches(rows, batch)):
        usable = [row for row in together if row.error is None]
        results.unreadable += len(together) - len(usable)
        if usable:
            scored: dict[Revision, list[Scored]] = {}
            seconds: dict[Revision, float] = {}
            for one in (old, new) if number % 2 == 0 else (new, old):
                started = time.perf_counter()
                scored[one] = one.score(usable)
                seconds[one] = time.perf_counter() - started
            results.add(usable, scored[old], scored[new])
            if number:
                results.seconds.append((seconds[old], seconds[new]))
        progress(len(together))
    return results


def _batches(rows: Iterable[InputRow], responses: int) -> Iterator[list[InputRow]]:
    batch: list[InputRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.responses)
        if size >= responses:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
