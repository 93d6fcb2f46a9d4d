"""What is scored: for every round a fresh portion of groups, so that no cache can know it from before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from benchmarks.harness.groups import Group, TextGroup
from benchmarks.harness.texts import Texts
from marginrm.encoding import Architecture, Encoder
from marginrm.errors import EncodingError

LONG_PROMPT = 800
LONG_RESPONSE = 128


@dataclass(frozen=True, slots=True)
class Workload:
    """A kind of work.

    Attributes:
        name: What the report calls it.
        candidates: Responses a group.
        groups: Groups in a portion.
        long: Whether prompts have `LONG_PROMPT` tokens and responses `LONG_RESPONSE`, or both are as they come.
        scaling: Whether it shows how the cost grows with N, for those contenders that share prompts.
    """

    name: str
    candidates: int
    groups: int
    long: bool = False
    scaling: bool = False


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("pairs", 2, 32),
        Workload("bon-short", 16, 4),
        Workload("bon-long", 16, 2, long=True),
        # How the same prompts and responses fare as N grows; N = 16 is bon-long.
        Workload("n-1", 1, 8, long=True, scaling=True),
        Workload("n-4", 4, 4, long=True, scaling=True),
        Workload("n-64", 64, 1, long=True, scaling=True),
    )
}


class Portions:
    """Makes portions for one model.

    Args:
        folder: The model, for its tokenizer.
        texts: What they are made of.
    """

    def __init__(self, folder: Path, texts: Texts) -> None:
        config = AutoConfig.from_pretrained(folder)
        self.architecture: Architecture = "encoder" if config.model_type in {"bert", "modernbert"} else "decoder"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self._encoder = Encoder(tokenizer, max_length=config.max_position_embeddings, architecture=self.architecture)
        self._texts = texts
        self._groups: dict[str, tuple[list[Group], Iterator[Group]]] = {}
        self._backend = tokenizer.backend_tokenizer

    def portion(self, workload: Workload, number: int) -> list[Group]:
        """Returns portion `number`, from 0 on; no sequence is in two of them.

        Raises:
            ValueError: The texts do not hold that many.
        """
        known, source = self._groups.setdefault(workload.name, ([], self._usable(workload)))
        end = (number + 1) * workload.groups
        known.extend(islice(source, max(end - len(known), 0)))
        if len(known) < end:
            raise ValueError(f"the texts hold only {len(known)} groups for {workload.name}: run fewer rounds")
        return known[end - workload.groups : end]

    def long_group(self, prompt_tokens: int, response_tokens: int, candidates: int, number: int) -> Group:
        """Returns one group whose prompt and responses have about these lengths. Raises as `portion` does."""
        encoded = self._encoded(self._joined(prompt_tokens, response_tokens, candidates, number))
        if encoded is None:
            raise ValueError(f"{prompt_tokens} + {response_tokens} tokens are too many for this model")
        return encoded

    def _usable(self, workload: Workload) -> Iterator[Group]:
        """Yields groups that fit the model, none of whose sequences came before: a cache must not know them."""
        seen: set[tuple[int, ...]] = set()
        for texts in self._long(workload.candidates) if workload.long else self._short(workload.candidates):
            group = self._encoded(texts)
            if group is None or len(set(group.ids) - seen) < len(group.ids):
                continue
            seen.update(group.ids)
            yield group

    def _short(self, candidates: int) -> Iterator[TextGroup]:
        pool = self._texts.pairs if candidates == 2 else self._texts.candidates
        for group in pool:
            if len(group.responses) >= candidates:
                yield TextGroup(group.prompt, group.responses[:candidates])

    def _long(self, candidates: int) -> Iterator[TextGroup]:
        for number in count():
            yield self._joined(LONG_PROMPT, LONG_RESPONSE, candidates, number)

    def _joined(self, prompt_tokens: int, response_tokens: int, candidates: int, number: int) -> TextGroup:
        passages = self._texts.passages
        start = number * (2 * candidates + 16) + 1009 * candidates  # a stretch of its own for each number and N
        ring = (passages[(start + place) % len(passages)] for place in range(len(passages)))
        prompt = self._cut(ring, prompt_tokens)
        return TextGroup(prompt, tuple(self._cut(ring, response_tokens) for _ in range(candidates)))

    def _cut(self, texts: Iterator[str], tokens: int) -> str:
        """Joins texts and cuts them after a number of tokens."""
        text = ""
        while True:
            text = f"{text}\n\n{next(texts)}".strip()
            ends = [end for _, end in self._backend.encode(text, add_special_tokens=False).offsets]
            if len(ends) >= tokens:
                return text[: ends[tokens - 1]]

    def _encoded(self, group: TextGroup) -> Group | None:
        """Returns the group with its token ids, or None if it holds a text that the model cannot take."""
        ids, type_ids = [], []
        for outcome in self._encoder.encode_group(group.prompt, group.responses):
            if isinstance(outcome, EncodingError):
                return None
            ids.append(outcome.ids)
            type_ids.append(outcome.type_ids)
        return Group(group.prompt, group.responses, tuple(ids), tuple(type_ids))
