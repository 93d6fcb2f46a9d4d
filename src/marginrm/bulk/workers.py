"""A shard of rows -> the bytes of its file and its counts: the work that one process or each actor of a cluster does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from marginrm.bulk.plan import Shard
from marginrm.bulk.rows import parse_row
from marginrm.bulk.scoring import ModelOptions, RowOptions, score_chunk
from marginrm.bulk.summary import Summary
from marginrm.bulk.tables import Format, Schema, encode_rows

if TYPE_CHECKING:
    from marginrm.reward_model import RewardModel


@dataclass(frozen=True, slots=True)
class ScoredShard:
    """A shard that is ready to be written.

    Attributes:
        number: Its place, from 0.
        content: The bytes of its file.
        summary: Its counts.
    """

    number: int
    content: bytes
    summary: Summary


@dataclass(frozen=True, slots=True)
class ShardScorer:
    """Scores shards.

    Attributes:
        options: How rows are scored.
        form: Format of the files.
        schema: The columns, for Parquet.
    """

    options: RowOptions
    form: Format
    schema: Schema | None

    def score(self, model: RewardModel, shard: Shard) -> ScoredShard:
        """Scores a shard as a whole, so that rows with a common prompt are computed together."""
        summary = Summary()
        rows = list(score_chunk(model, [parse_row(row) for row in shard.rows], self.options, summary))
        return ScoredShard(shard.number, encode_rows(rows, self.form, self.schema), summary)


class Workers(Protocol):
    """The processes that score shards."""

    def start(self, options: ModelOptions) -> dict[str, Any]:
        """Loads the model and returns what the rewards depend on, as `model_facts` does."""

    def run(self, shards: Iterable[Shard], scorer: ShardScorer) -> Iterator[ScoredShard]:
        """Yields each shard scored, in any order."""

    def stop(self) -> None:
        """Ends the processes that were started."""


class ThisProcess:
    """Scores shards in this process."""

    _model: RewardModel

    def start(self, options: ModelOptions) -> dict[str, Any]:
        """Loads the model. Errors as for `ModelOptions.load`."""
        self._model = options.load()
        return model_facts(self._model)

    def run(self, shards: Iterable[Shard], scorer: ShardScorer) -> Iterator[ScoredShard]:
        """Yields each shard scored, in order."""
        for shard in shards:
            yield scorer.score(self._model, shard)

    def stop(self) -> None:
        """Does nothing: the model ends with the process."""


def model_facts(model: RewardModel) -> dict[str, Any]:
    """Returns what the rewards of a model depend on, as plain JSON values."""
    return {"revision": model.info.revision, "dtype": model.info.dtype, "temperature": model.info.temperature}
