"""The progress bar of a training run."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from marginrm.progress import progress_bar


class PairProgress(TrainerCallback):
    """A progress bar over optimiser steps, with loss, accuracy and fire rate beside it."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._held_out = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Draws the bar, at the first step of a resumed run."""
        if state.is_world_process_zero:
            self._bar = progress_bar("training", state.max_steps, "step", initial=state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Shows the last log's quantities beside the bar."""
        if logs and "eval_accuracy" in logs:
            self._held_out = f" held out {logs['eval_accuracy']:.2f}"
        if self._bar is not None and logs and "bt_nll" in logs:
            self._bar.set_postfix_str(
                f"loss {logs['loss']:.3f} accuracy {logs['accuracy']:.2f} "
                f"mu {logs['mu_B']:.2f} fired {logs['fire_rate']:.2f}{self._held_out}",
                refresh=False,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()
