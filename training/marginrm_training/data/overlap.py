"""Prompts that share a run of words with prompts that training must not see: near-duplicates and benchmark items.

A prompt becomes its lower-case words without punctuation. Two prompts overlap if they share n words in a row, as in the
decontamination of GPT-3 (arXiv 2005.14165, appendix C: n = 13), or if both are shorter and have the same words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from marginrm.errors import DataError
from marginrm.text import Prompt
from marginrm.texts.places import read_raw
from marginrm.texts.preferences import PreferencePair, parse_pair
from marginrm_training.config import expand
from marginrm_training.data.excluded import ExcludedRows

_WORD = re.compile(r"\w+")


class PromptIndex:
    """The runs of words of some prompts.

    Args:
        size: n, the number of words in a run.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._runs: set[tuple[str, ...]] = set()

    def add(self, prompts: Iterable[Prompt]) -> None:
        """Adds prompts."""
        for prompt in prompts:
            self._runs.update(self._runs_of(prompt))

    def overlaps(self, prompt: Prompt) -> bool:
        """Returns whether a prompt overlaps with one of those that were added."""
        return any(run in self._runs for run in self._runs_of(prompt))

    def without(self, pairs: Sequence[PreferencePair], reason: str) -> tuple[list[PreferencePair], ExcludedRows]:
        """Returns the pairs whose prompts do not overlap, and the others as excluded rows with this reason."""
        excluded = ExcludedRows()
        kept = []
        known: dict[int, bool] = {}  # many pairs share one prompt
        for pair in pairs:
            key = hash(_text(pair.prompt))
            if key not in known:
                known[key] = self.overlaps(pair.prompt)
            if known[key]:
                excluded.add(reason, pair.source)
            else:
                kept.append(pair)
        return kept, excluded

    def _runs_of(self, prompt: Prompt) -> Iterable[tuple[str, ...]]:
        words = _WORD.findall(_text(prompt).lower())
        if len(words) <= self._size:
            return [tuple(words)] if words else []
        return (tuple(words[start : start + self._size]) for start in range(len(words) - self._size + 1))


def without_benchmarks(
    pairs: Sequence[PreferencePair], places: Sequence[str], size: int
) -> tuple[list[PreferencePair], ExcludedRows]:
    """Returns the pairs whose prompts overlap with no prompt of the given benchmarks, and the others by benchmark.

    Args:
        pairs: The pairs.
        places: Files, folders or data sets whose rows have a `prompt`, or are preference pairs of another form.
        size: Number of words in a run.

    Raises:
        DataError: A benchmark cannot be read, or a row has no prompt.
    """
    kept, excluded = list(pairs), ExcludedRows()
    for place in places:
        index = PromptIndex(size)
        index.add(_prompt(row, source) for row, source in read_raw(expand(place)))
        kept, found = index.without(kept, f"with a prompt of the benchmark {place}")
        excluded.update(found)
    return kept, excluded


def _prompt(row: dict[str, object], source: str) -> Prompt:
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(isinstance(turn, dict) and "content" in turn for turn in prompt):
        return prompt
    if {"chosen", "rejected"} <= row.keys():
        return parse_pair(row, source).prompt
    raise DataError(
        f"{source}: this row of a benchmark has no 'prompt', as text or messages. Add it, or name its column so."
    )


def _text(prompt: Prompt) -> str:
    """Returns a prompt's text; system messages are left out, since many prompts have the same one."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(turn["content"]) for turn in prompt if turn.get("role") != "system")
