"""The step log of a run: the method's quantities between two log lines, the learning curve, and warnings."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

_FLAT = 0.01  # a smaller gain of accuracy counts as no gain


@dataclass(slots=True)
class StepLog:
    """Sums since the last log line, and all log lines; it is saved with every step that a run can resume from.

    Attributes:
        sums: Each quantity, summed over the micro-steps since the last log line.
        micro_steps: Number of those micro-steps.
        history: All log lines: the learning curve.
        calm: Standard deviation of d and accuracy when accuracy last rose, or the spread last was warned of.
    """

    sums: dict[str, float] = field(default_factory=dict)
    micro_steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    calm: tuple[float, float] | None = None

    def add(self, values: dict[str, float]) -> None:
        """Adds one micro-step."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.micro_steps += 1

    def line(self, step: int, logs: dict[str, float]) -> dict[str, float]:
        """Ends a log line: returns `logs` with the means since the last one, and adds it to the history."""
        logs = logs | {name: total / self.micro_steps for name, total in self.sums.items()}
        self.sums, self.micro_steps = {}, 0
        self.history.append({"step": float(step)} | logs)
        return logs

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Adds the metrics of an evaluation to the log line of its step, or as a log line of its own."""
        if not self.history or self.history[-1]["step"] != step:
            self.history.append({"step": float(step)})
        self.history[-1] |= metrics

    def warnings(self, line: dict[str, float], *, filtered: bool, unbounded: bool) -> list[str]:
        """Returns the warnings that a log line calls for.

        Args:
            line: The last log line.
            filtered: Whether the method has a filter.
            unbounded: Whether its margins follow the model's own differences without a cap.
        """
        found = []
        if filtered and line["fire_rate"] == 0.0:
            found.append("the filter selected no pair since the last log, so this is plain Bradley-Terry.")
        spread, accuracy = line["d_std"], line["accuracy"]
        if self.calm is None or accuracy > self.calm[1] + _FLAT:
            self.calm = (spread, accuracy)
        elif unbounded and spread > 2 * self.calm[0]:
            found.append(
                f"the spread of d went from {self.calm[0]:.2f} to {spread:.2f} while accuracy stayed at "
                f"{accuracy:.2f}: margins feed on themselves. Set a cap (method.cap) or stop earlier."
            )
            self.calm = (spread, self.calm[1])
        return found

    def state(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> StepLog:
        """Makes a log from what `state` returned."""
        calm = state["calm"]
        return cls(**(state | {"calm": None if calm is None else tuple(calm)}))
