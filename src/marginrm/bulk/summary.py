"""Counts of scored rows, and the rows that could not be scored, by reason with their first lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from marginrm.calibration import correctness
from marginrm.errors import DataError, EncodingError, MarginRMError

if TYPE_CHECKING:
    from marginrm.encoding import EncodedResponse

_SHOWN = 3  # places of unusable rows, for each reason


@dataclass(slots=True)
class Faults:
    """One reason and its rows.

    Attributes:
        count: Number of rows.
        places: `path:line` of the first ones.
    """

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, count: int, places: Sequence[str]) -> None:
        """Adds rows of this reason."""
        self.count += count
        self.places.extend(places[: max(0, _SHOWN - len(self.places))])


@dataclass(slots=True)
class Summary:
    """Counts of rows.

    Attributes:
        rows: Number of rows, unusable ones included.
        unusable: The rows that could not be scored, by reason.
        candidates: The candidates that could not be scored, of groups that were scored without them.
        responses: Number of scored responses.
        tokens: Their tokens, prompts included.
        truncated: Responses whose prompt was cut.
        pairs: Number of scored pairs.
        right: Pairs whose margin is above 0; a tie counts half.
        margin_sum: Sum of their margins.
        max_bad_rows: Most unusable rows; None for any number.
    """

    rows: int = 0
    unusable: dict[str, Faults] = field(default_factory=dict)
    candidates: dict[str, Faults] = field(default_factory=dict)
    responses: int = 0
    tokens: int = 0
    truncated: int = 0
    pairs: int = 0
    right: float = 0.0
    margin_sum: float = 0.0
    max_bad_rows: int | None = None

    @property
    def failed(self) -> int:
        """Number of rows that could not be scored."""
        return sum(faults.count for faults in self.unusable.values())

    def add_error(self, error: MarginRMError, source: str) -> None:
        """Counts an unusable row by its reason. Raises as `check` does."""
        self.add_failed(reason_of(error), source)
        message = str(error)
        self.check(f"{message} " if message.startswith(source) else f"{source}: {message} ")

    def add_failed(self, reason: str, source: str) -> None:
        """Counts an unusable row whose reason is known."""
        self.rows += 1
        self.unusable.setdefault(reason, Faults()).add(1, [source])

    def add_candidate_error(self, error: EncodingError, source: str, index: int) -> None:
        """Counts a candidate that cannot be scored, in a group that has others."""
        self.candidates.setdefault(reason_of(error), Faults()).add(1, [f"{source} candidate {index}"])

    def add_result(self, result: dict[str, Any], group: list[EncodedResponse]) -> None:
        """Counts a scored row."""
        self.rows += 1
        self.responses += len(group)
        self.tokens += sum(response.tokens for response in group)
        self.truncated += sum(response.truncated for response in group)
        if "verdict" in result:
            self.pairs += 1
            self.right += float(correctness(result["margin"]))
            self.margin_sum += result["margin"]

    def merge(self, other: Summary) -> None:
        """Adds the counts of other rows, which come after these."""
        for name in ("rows", "responses", "tokens", "truncated", "pairs", "right", "margin_sum"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("unusable", "candidates"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for reason, faults in theirs.items():
                mine.setdefault(reason, Faults()).add(faults.count, faults.places)

    def check(self, last: str = "") -> None:
        """Checks the number of unusable rows, those of earlier runs of the same output included.

        Args:
            last: The last one's error, for the message.

        Raises:
            DataError: There are more than `max_bad_rows`.
        """
        if self.max_bad_rows is None or self.failed <= self.max_bad_rows:
            return
        raise DataError(
            f"{last}More than max_bad_rows = {self.max_bad_rows:,} rows cannot be scored: "
            f"{'; '.join(_counted(self.unusable))}. The rows before are in the output. Mend the input and run the command "
            "again (with --restart if the output has rows with errors or is one of shards), or allow more."
        )

    def lines(self) -> list[str]:
        """Returns the counts as text for people."""
        text = [
            f"{self.rows:,} rows, {self.failed:,} with errors; {self.responses:,} responses, {self.tokens:,} tokens",
            *(f"  {line}" for line in _counted(self.unusable)),
        ]
        if self.candidates:
            count = sum(faults.count for faults in self.candidates.values())
            text.append(f"{count:,} candidates of scored groups with errors")
            text += [f"  {line}" for line in _counted(self.candidates)]
        if self.truncated:
            text.append(f"{self.truncated:,} prompts were cut")
        if self.pairs:
            accuracy, margin = self.right / self.pairs, self.margin_sum / self.pairs
            text.append(f"pairs: accuracy {accuracy:.4f}, mean margin {margin:.4f}")
        return text

    def as_dict(self) -> dict[str, Any]:
        """Returns the counts as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Returns the counts that `as_dict` gave."""
        faults = {
            name: {reason: Faults(**found) for reason, found in values[name].items()}
            for name in ("unusable", "candidates")
        }
        return cls(**(values | faults))


def reason_of(error: MarginRMError) -> str:
    """Returns the kind of fault in a few words, by which rows are counted."""
    return error.reason if isinstance(error, DataError | EncodingError) else error.code.replace("_", " ")


def _counted(reasons: dict[str, Faults]) -> list[str]:
    """Returns each reason with its count and its first places, the most frequent first."""
    return [
        f"{faults.count:,} {reason} ({', '.join(faults.places)}{', ...' if faults.count > len(faults.places) else ''})"
        for reason, faults in sorted(reasons.items(), key=lambda entry: -entry[1].count)
    ]
