"""Workloads, and their samples: fresh groups for every round, so that no cache knows a text from an earlier round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Literal

from transformers import AutoConfig, AutoTokenizer

from benchmarks.harness.texts import Sample, TextGroup, Texts, TokenizedGroup
from benchmarks.models import ENCODERS
from marginrm.encoding import Architecture, Encoder
from marginrm.errors import EncodingError

LONG_PROMPT = 800
LONG_RESPONSE = 128
CLIENTS = 16
_Parts = tuple[TokenizedGroup, ...]  # a group, cut into the parts that a request holds
_CHAT_TURNS = 8
_CHAT_TOKENS = 96  # of each message


@dataclass(frozen=True, slots=True)
class Workload:
    """A kind of work.

    Attributes:
        name: Its name in the report.
        candidates: Responses in a group.
        groups: Groups in a sample.
        texts: `short`: texts as they come. `long`: prompts of `LONG_PROMPT` tokens, responses of `LONG_RESPONSE`.
            `chat`: conversations of eight turns.
        use: `comparison`: for all contenders. `scaling`: shows the cost as N grows, for those that share prompts.
            `requests`: one response in a request to `/classify`, for servers.
        clients: Requests in flight, for servers.
        grouped: With `requests`, whether the responses of a prompt follow each other; by default prompts take turns.
    """

    name: str
    candidates: int
    groups: int
    texts: Literal["short", "long", "chat"] = "short"
    use: Literal["comparison", "scaling", "requests"] = "comparison"
    clients: int = CLIENTS
    grouped: bool = False

    @property
    def turns(self) -> int:
        """Consecutive requests of which each waits for the reply to the one before."""
        return _CHAT_TURNS if self.texts == "chat" else 1


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("pairs", 2, 32),
        Workload("bon-short", 16, 4),
        Workload("bon-long", 16, 2, "long"),
        # The same prompts and responses as N grows; N = 16 is bon-long.
        Workload("n-1", 1, 8, "long", "scaling"),
        Workload("n-4", 4, 4, "long", "scaling"),
        Workload("n-64", 64, 1, "long", "scaling"),
        # RL trainers such as OpenRLHF and verl send one response in a request.
        Workload("trainer", 16, 8, "long", "requests", clients=8),
        Workload("trainer-64", 16, 8, "long", "requests", clients=64),
        Workload("trainer-grouped", 16, 8, "long", "requests", clients=8, grouped=True),
        Workload("chat", _CHAT_TURNS, 4, "chat", "requests", clients=4),
    )
}


class Samples:
    """Makes samples of workloads for one model.

    Args:
        folder: The model's folder; its tokenizer is used.
        texts: The texts to make them of.

    Attributes:
        architecture: Whether the model is a decoder or an encoder.
    """

    def __init__(self, folder: Path, texts: Texts) -> None:
        config = AutoConfig.from_pretrained(folder)
        self.architecture: Architecture = "encoder" if config.model_type in ENCODERS else "decoder"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self._encoder = Encoder(tokenizer, max_length=config.max_position_embeddings, architecture=self.architecture)
        self._texts = texts
        self._made: dict[str, tuple[list[_Parts], Iterator[_Parts]]] = {}
        self._backend = tokenizer.backend_tokenizer

    def sample(self, workload: Workload, number: int) -> Sample:
        """Returns sample `number`, counted from 0; no sequence is in two samples.

        Raises:
            ValueError: The texts are too few for this number.
        """
        made, source = self._made.setdefault(workload.name, ([], self._usable(workload)))
        end = (number + 1) * workload.groups
        made.extend(islice(source, max(end - len(made), 0)))
        if len(made) < end:
            raise ValueError(f"the texts hold only {len(made)} groups for {workload.name}: run fewer rounds")
        chosen = made[end - workload.groups : end]
        single = workload.use == "requests"
        if single and workload.turns == 1 and not workload.grouped:
            chosen = list(zip(*chosen, strict=True))
        groups = tuple(group for parts in chosen for group in parts)
        return Sample(groups, classify=single, clients=workload.clients, turns=workload.turns)

    def long_group(self, prompt_tokens: int, response_tokens: int, candidates: int, number: int) -> TokenizedGroup:
        """Returns one group whose prompt and responses have about these lengths.

        Raises:
            ValueError: The model takes fewer tokens.
        """
        encoded = self._encoded(self._joined(prompt_tokens, response_tokens, candidates, f"{candidates} {number}"))
        if encoded is None:
            raise ValueError(f"{prompt_tokens} + {response_tokens} tokens are too many for this model")
        return encoded

    def _usable(self, workload: Workload) -> Iterator[_Parts]:
        """Yields groups that fit the model and repeat no sequence."""
        seen: set[tuple[int, ...]] = set()
        for texts in self._source(workload):
            parts = [self._encoded(part) for part in texts]
            found = [part for part in parts if part is not None]
            new = {ids for part in found for ids in part.ids} - seen
            if len(found) < len(parts) or len(new) < sum(len(part.ids) for part in found):
                continue
            seen |= new
            yield tuple(found)

    def _source(self, workload: Workload) -> Iterator[list[TextGroup]]:
        single = workload.use == "requests"
        if workload.texts == "chat":
            yield from (self._conversation(number) for number in count())
        for group in self._long(workload) if workload.texts == "long" else self._short(workload.candidates):
            yield [TextGroup(group.prompt, (one,)) for one in group.responses] if single else [group]

    def _short(self, candidates: int) -> Iterator[TextGroup]:
        pool = self._texts.pairs if candidates == 2 else self._texts.candidates
        for group in pool:
            if len(group.responses) >= candidates:
                yield TextGroup(group.prompt, group.responses[:candidates])

    def _long(self, workload: Workload) -> Iterator[TextGroup]:
        for number in count():
            yield self._joined(LONG_PROMPT, LONG_RESPONSE, workload.candidates, f"{workload.name} {number}")

    def _conversation(self, number: int) -> list[TextGroup]:
        """Returns one conversation after each of its turns: the messages before a response, and the response."""
        passages = self._passages(f"chat {number}")
        messages: list[dict[str, str]] = []
        turns = []
        for _ in range(_CHAT_TURNS):
            question, answer = self._cut(passages, _CHAT_TOKENS), self._cut(passages, _CHAT_TOKENS)
            messages.append({"role": "user", "content": question})
            turns.append(TextGroup(list(messages), (answer,)))
            messages.append({"role": "assistant", "content": answer})
        return turns

    def _joined(self, prompt_tokens: int, response_tokens: int, candidates: int, seed: str) -> TextGroup:
        passages = self._passages(seed)
        prompt = self._cut(passages, prompt_tokens)
        return TextGroup(prompt, tuple(self._cut(passages, response_tokens) for _ in range(candidates)))

    def _passages(self, seed: str) -> Iterator[str]:
        """Yields passages at random, without end."""
        generator = Random(seed)
        while True:
            yield generator.choice(self._texts.passages)

    def _cut(self, texts: Iterator[str], tokens: int) -> str:
        """Joins texts and cuts them after a number of tokens."""
        text = ""
        while True:
            text = f"{text}\n\n{next(texts)}".strip()
            ends = [end for _, end in self._backend.encode(text, add_special_tokens=False).offsets]
            if len(ends) >= tokens:
                return text[: ends[tokens - 1]]

    def _encoded(self, group: TextGroup) -> TokenizedGroup | None:
        """Returns the group with its token ids, or None if the model cannot take one of its texts."""
        ids, type_ids = [], []
        for outcome in self._encoder.encode_group(group.prompt, group.responses):
            if isinstance(outcome, EncodingError):
                return None
            ids.append(outcome.ids)
            type_ids.append(outcome.type_ids)
        return TokenizedGroup(group.prompt, group.responses, tuple(ids), tuple(type_ids))
