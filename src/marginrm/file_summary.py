"""The counts of one run of `marginrm score`, and the rows that it could not score, by reason with their lines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from marginrm.calibration import correctness
from marginrm.errors import DataError, EncodingError, MarginRMError

if TYPE_CHECKING:
    from marginrm.encoding import EncodedResponse

_SHOWN = 3  # places of unusable rows, for each reason


@dataclass(slots=True)
class Summary:
    """Counts of one run; `skipped` rows were in the output before it, and more than `max_bad_rows` errors end it."""

    skipped: int = 0
    max_bad_rows: int | None = None
    rows: int = 0
    unusable: dict[str, list[str]] = field(default_factory=dict)  # `path:line` by reason
    candidates: dict[str, list[str]] = field(default_factory=dict)  # of groups that were scored without them
    responses: int = 0
    tokens: int = 0
    truncated: int = 0
    pairs: int = 0
    right: float = 0.0
    margin_sum: float = 0.0

    def add_error(self, error: MarginRMError, source: str) -> None:
        """Counts an unusable row by its reason.

        Raises:
            DataError: There are more than the run allows.
        """
        self.rows += 1
        self.unusable.setdefault(_reason(error), []).append(source)
        count = sum(map(len, self.unusable.values()))
        if self.max_bad_rows is None or count <= self.max_bad_rows:
            return
        message = str(error)
        place = "" if message.startswith(source) else f"{source}: "
        others = f" The rows that cannot be scored: {'; '.join(_counted(self.unusable))}." if count > 1 else ""
        raise DataError(
            f"{place}{message} More than max_bad_rows = {self.max_bad_rows:,} rows cannot be scored.{others} The rows "
            "before this one are in the output. Mend the input and run the command again, or allow more."
        )

    def add_candidate_error(self, error: EncodingError, source: str, index: int) -> None:
        """Counts a candidate that cannot be scored, in a group that has others."""
        self.candidates.setdefault(_reason(error), []).append(f"{source} candidate {index}")

    def add_result(self, result: dict[str, Any], group: list[EncodedResponse]) -> None:
        """Counts a scored row."""
        self.rows += 1
        self.responses += len(group)
        self.tokens += sum(len(response.ids) for response in group)
        self.truncated += sum(response.truncated for response in group)
        if "verdict" in result:
            self.pairs += 1
            self.right += float(correctness(result["margin"]))
            self.margin_sum += result["margin"]

    def lines(self, seconds: float) -> list[str]:
        """Returns the summary as text."""
        failed = sum(map(len, self.unusable.values()))
        text = [
            f"{self.rows:,} rows in {seconds:.1f} s ({self.skipped:,} were done before), {failed:,} with errors",
            f"{self.responses:,} responses, {self.tokens:,} tokens, {self.responses / max(seconds, 1e-9):.1f} responses/s",
        ]
        text += [f"  {line}" for line in _counted(self.unusable)]
        if self.candidates:
            text.append(f"{sum(map(len, self.candidates.values())):,} candidates of scored groups with errors")
            text += [f"  {line}" for line in _counted(self.candidates)]
        if self.truncated:
            text.append(f"{self.truncated:,} prompts were cut")
        if self.pairs:
            text.append(
                f"pairs: accuracy {self.right / self.pairs:.4f}, mean margin {self.margin_sum / self.pairs:.4f}"
            )
        return text


def _reason(error: MarginRMError) -> str:
    return error.reason if isinstance(error, DataError | EncodingError) else error.code.replace("_", " ")


def _counted(places: dict[str, list[str]]) -> list[str]:
    """Returns each reason with its count and its first places, the most frequent first."""
    return [
        f"{len(sources):,} {reason} ({', '.join(sources[:_SHOWN])}{', ...' if len(sources) > _SHOWN else ''})"
        for reason, sources in sorted(places.items(), key=lambda entry: -len(entry[1]))
    ]
