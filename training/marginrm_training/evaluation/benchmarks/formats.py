"""Rows of the published benchmark files -> cases: a prompt with its right and its wrong responses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marginrm.errors import DataError
from marginrm.text import Prompt
from marginrm_training.evaluation.benchmarks.sections import SECTIONS, Benchmark

STYLES = 3  # RM-Bench writes every response three times: concise, detailed, detailed in Markdown


@dataclass(frozen=True, slots=True)
class Case:
    """One question of a benchmark.

    Attributes:
        prompt: One user message, or messages.
        chosen: The right responses, at least one.
        rejected: The wrong ones, at least one.
        subset: The subset in which its result is averaged first.
        source: `path:line`, or the number of the row in the file.
        key: The row's own id, where the score needs it (RewardBench 2's ties).
    """

    prompt: Prompt
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    subset: str
    source: str
    key: str = ""


def recognised(row: Mapping[str, Any]) -> Benchmark | None:
    """Returns the benchmark of a row, by its fields and the name of its subset; None for other data.

    Other pairs may have a column `subset` or `domain` too, so the fields alone do not decide.
    """
    for name, needed in _FIELDS.items():
        if not any(set(row) >= one for one in needed):
            continue
        if name in {"rmb", "judgebench"}:
            return name
        subset = row["domain" if name == "rm-bench" else "subset"]
        known = {part for parts in SECTIONS[name].values() for part in parts}
        if subset in known and isinstance(row["chosen"], str) == (name == "rewardbench"):
            return name
    return None


def parse_cases(benchmark: Benchmark, rows: Iterable[tuple[Mapping[str, Any], str]]) -> list[Case]:
    """Returns the cases of a benchmark's rows.

    Args:
        benchmark: The benchmark.
        rows: Each row and its `path:line`.

    Raises:
        DataError: A row is not of that benchmark, or there are no rows.
    """
    parse = _PARSERS[benchmark]
    cases = []
    for row, source in rows:
        if not any(set(row) >= needed for needed in _FIELDS[benchmark]):
            wanted = " or ".join(str(sorted(needed)) for needed in _FIELDS[benchmark])
            raise DataError(
                f"{source}: is not a row of {benchmark}, which has {wanted}; this one has {sorted(map(str, row))[:12]}."
            )
        cases.append(parse(row, source))
    if not cases:
        raise DataError(f"There is no row to read for {benchmark}. Is the file empty?")
    return cases


def _reward_bench(row: Mapping[str, Any], source: str) -> Case:
    chosen, rejected = (_text(row[name], source, name) for name in ("chosen", "rejected"))
    subset = _text(row["subset"], source, "subset")
    return Case(_prompt(row["prompt"], source), (chosen,), (rejected,), subset, source)


def _reward_bench_2(row: Mapping[str, Any], source: str) -> Case:
    chosen, rejected = (_texts(row[name], source, name) for name in ("chosen", "rejected"))
    subset = _text(row["subset"], source, "subset")
    key = str(row["id"])
    if subset.lower() == "ties":
        kind, _, number = key.partition(":")
        if kind not in {"ref", "tied"} or not number:
            raise DataError(f"{source}: field 'id' of a row of the subset Ties must be ref:NUMBER or tied:NUMBER.")
    elif len(chosen) != 1:
        raise DataError(f"{source}: field 'chosen' has {len(chosen)} texts; outside the subset Ties it has one.")
    return Case(_prompt(row["prompt"], source), chosen, rejected, subset, source, key)


def _rm_bench(row: Mapping[str, Any], source: str) -> Case:
    chosen, rejected = (_texts(row[name], source, name) for name in ("chosen", "rejected"))
    if len(chosen) != STYLES or len(rejected) != STYLES:
        raise DataError(f"{source}: fields 'chosen' and 'rejected' must have {STYLES} texts each, one for each style.")
    return Case(_prompt(row["prompt"], source), chosen, rejected, _text(row["domain"], source, "domain"), source)


def _rmb(row: Mapping[str, Any], source: str) -> Case:
    best = row.get("chosen", row.get("bon_best"))
    losers = [row["reject"]] if "reject" in row else row["loser_list"]
    if not isinstance(losers, Sequence) or not losers:
        raise DataError(f"{source}: field 'loser_list' must be a list of at least one answer.")
    parts = _text(row["category_path"], source, "category_path").split("/")
    if len(parts) < 2:
        raise DataError(f"{source}: field 'category_path' must be SET/GOAL/..., such as BoN_set/Harmlessness/S1.")
    return Case(
        _prompt([{name: turn.get(name) for name in ("role", "content")} for turn in row["conversation_input"]], source),
        (_answer(best, source, "bon_best" if "bon_best" in row else "chosen"),),
        tuple(_answer(loser, source, "loser_list" if "loser_list" in row else "reject") for loser in losers),
        "/".join(parts[:2]),
        source,
    )


def _judge_bench(row: Mapping[str, Any], source: str) -> Case:
    a, b = (_text(row[name], source, name) for name in ("response_A", "response_B"))
    if row["label"] not in {"A>B", "B>A"}:
        raise DataError(f"{source}: field 'label' must be A>B or B>A, not {str(row['label'])[:10]!r}.")
    chosen, rejected = (a, b) if row["label"] == "A>B" else (b, a)
    subset = _text(row["source"], source, "source")
    return Case(_prompt(row["question"], source), (chosen,), (rejected,), subset, source)


def _prompt(value: Any, source: str) -> Prompt:
    if isinstance(value, str):
        return value
    messages = list(value) if isinstance(value, Sequence) else []
    for message in messages:
        if not (isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))):
            messages = []
            break
    if not messages:
        raise DataError(f"{source}: the prompt must be a text or a list of messages with role and content.")
    return messages


def _text(value: Any, source: str, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{source}: field '{name}' must be a text.")
    return value


def _texts(value: Any, source: str, name: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise DataError(f"{source}: field '{name}' must be a list of at least one text.")
    return tuple(_text(one, source, f"{name}[{index}]") for index, one in enumerate(value))


def _answer(value: Any, source: str, name: str) -> str:
    if not isinstance(value, Mapping) or not isinstance(value.get("answer"), str):
        raise DataError(f"{source}: field '{name}' must be an object with the text 'answer'.")
    return str(value["answer"])


# The fields that identify a benchmark's rows, the most specific set first.
_FIELDS: dict[Benchmark, tuple[frozenset[str], ...]] = {
    "judgebench": (frozenset({"question", "response_A", "response_B", "label", "source"}),),
    "rmb": (
        frozenset({"conversation_input", "chosen", "reject", "category_path"}),
        frozenset({"conversation_input", "bon_best", "loser_list", "category_path"}),
    ),
    "rm-bench": (frozenset({"prompt", "chosen", "rejected", "domain"}),),
    "rewardbench2": (frozenset({"id", "prompt", "chosen", "rejected", "num_correct", "subset"}),),
    "rewardbench": (frozenset({"prompt", "chosen", "rejected", "subset"}),),
}
_PARSERS: dict[Benchmark, Callable[[Mapping[str, Any], str], Case]] = {
    "judgebench": _judge_bench,
    "rmb": _rmb,
    "rm-bench": _rm_bench,
    "rewardbench2": _reward_bench_2,
    "rewardbench": _reward_bench,
}
