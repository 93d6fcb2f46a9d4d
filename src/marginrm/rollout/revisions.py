"""A revision that scores rows: one that a server serves, or one that is loaded here."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from marginrm.bulk.rows import InputRow
from marginrm.bulk.scoring import ModelOptions, RowOptions, score_chunk
from marginrm.bulk.summary import Summary
from marginrm.client import RewardClient
from marginrm.client.errors import ItemScoreError
from marginrm.errors import ConfigError
from marginrm.scrape import scrape
from marginrm.text import Truncation


@dataclass(frozen=True, slots=True)
class Scored:
    """The result of one row.

    Attributes:
        rewards: One per response.
        confidence: P(chosen is better) of a pair, P(the best beats the runner-up) of a group; None for one response.
        error: The code of the error in place of a result.
    """

    rewards: tuple[float, ...] = ()
    confidence: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """A revision's place, name, revision and temperature, as it states them itself."""

    place: str
    name: str
    revision: str
    temperature: float


class Revision(Protocol):
    """A model that scores rows."""

    @property
    def identity(self) -> Identity:
        """The facts that the model states of itself."""

    def score(self, rows: Sequence[InputRow]) -> list[Scored]:
        """Returns one result per row, in order."""

    def cached(self) -> float:
        """Returns the responses that were answered from a cache so far, other clients' included."""

    def close(self) -> None:
        """Closes connections."""


class ServedRevision:
    """A model of a running server.

    Args:
        url: Address of the server.
        model: Name of the served model.
        api_key: API key, if the server asks for one.
        truncation: What happens to sequences over the limit.

    Raises:
        ConfigError: The server has no model of that name.
        RewardClientError: The server does not answer.
    """

    def __init__(self, url: str, model: str, api_key: str | None, truncation: Truncation) -> None:
        with ExitStack() as unless_found:
            self._client = unless_found.enter_context(
                RewardClient(url, model=model, api_key=api_key, truncation=truncation)
            )
            cards = {card.name: card for card in self._client.models()}
            if not cards or (model not in cards and model != "default"):
                raise ConfigError(f"{url} serves no model {model!r}, but {', '.join(sorted(cards)) or 'none'}.")
            unless_found.pop_all()
        card = cards.get(model) or next(iter(cards.values()))
        self._identity = Identity(url, card.name, card.revision, card.temperature)
        self._url, self._api_key = url, api_key

    @property
    def identity(self) -> Identity:
        """The facts that the server states of its model."""
        return self._identity

    def score(self, rows: Sequence[InputRow]) -> list[Scored]:
        """Returns one result per row, in order.

        Raises:
            RewardClientError: The server refused a request or did not answer, retries included.
        """
        found: dict[int, Scored] = {}
        pairs = [index for index, row in enumerate(rows) if row.kind == "pair"]
        others = [index for index, row in enumerate(rows) if row.kind != "pair"]
        compared = self._client.score_pairs([_pair(rows[index]) for index in pairs])
        for index, pair in zip(pairs, compared, strict=True):
            if isinstance(pair, ItemScoreError):
                found[index] = Scored(error=pair.code)
            else:
                found[index] = Scored((float(pair.chosen), float(pair.rejected)), pair.confidence)
        ranked = self._client.best_of_n_many([_group(rows[index]) for index in others])
        for index, group in zip(others, ranked, strict=True):
            if isinstance(group, ItemScoreError):
                found[index] = Scored(error=group.code)
            else:
                rewards = sorted((one.candidate, float(one.reward)) for one in group.ranking)
                found[index] = Scored(tuple(reward for _, reward in rewards), group.confidence)
        return [found[index] for index in range(len(rows))]

    def cached(self) -> float:
        """Returns the server's hits in the reward cache of this model; 0 where its metrics cannot be read."""
        try:
            samples = scrape(self._url, self._api_key)
        except ConfigError:
            return 0.0
        return sum(
            sample.value
            for sample in samples
            if sample.name == "marginrm_reward_cache_hits_total" and sample.labels.get("model") == self._identity.name
        )

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()


class LoadedRevision:
    """A checkpoint that is loaded in this process; it must reproduce its golden rewards.

    Args:
        options: How it is loaded.
        truncation: What happens to sequences over the limit.

    Raises:
        ModelError: It cannot be loaded, or does not give its golden rewards.
    """

    def __init__(self, options: ModelOptions, truncation: Truncation) -> None:
        self._model = options.load()
        self._options = RowOptions(truncation=truncation)
        info = self._model.info
        self._identity = Identity(options.model, info.name, info.revision, info.temperature)

    @property
    def identity(self) -> Identity:
        """The facts of the checkpoint's manifest."""
        return self._identity

    def score(self, rows: Sequence[InputRow]) -> list[Scored]:
        """Returns one result per row, in order."""
        results = score_chunk(self._model, rows, self._options, Summary())
        return [_scored(given, result) for given, result in zip(rows, results, strict=True)]

    def cached(self) -> float:
        """Returns 0: this process keeps no rewards."""
        return 0.0

    def close(self) -> None:
        """Does nothing: the model leaves memory with the last reference to it."""


def _scored(given: InputRow, result: dict[str, Any]) -> Scored:
    """Returns the result in an output row of `marginrm score`; as on a server, one unusable candidate is the group's error."""
    if "error" in result:
        return Scored(error=result["error"]["code"])
    if given.kind == "pair":
        rewards = [result["chosen"]["reward"], result["rejected"]["reward"]]
    elif given.kind == "group":
        if errors := result.get("errors"):
            return Scored(error=errors[0]["error"]["code"])
        rewards = result["rewards"]
    else:
        rewards = [result["reward"]]
    return Scored(tuple(map(float, rewards)), result.get("confidence"))


def _pair(row: InputRow) -> dict[str, object]:
    chosen, rejected = row.responses
    return {"prompt": row.prompt, "chosen": chosen, "rejected": rejected}


def _group(row: InputRow) -> dict[str, object]:
    return {"prompt": row.prompt, "candidates": list(row.responses)}
