"""Steps that a run can resume from: the last one that was saved completely, of a run with the same configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from accelerate.state import PartialState
from pydantic import ValidationError

from marginrm.atomic_file import replace_file
from marginrm.errors import ConfigError
from marginrm_training.config import TrainConfig
from marginrm_training.run.distributed import print_once

MARGIN_STATE = "margin_state.json"  # in a saved step: running mean and step log; written last
_CONFIG = "run.json"


def resume_checkpoint(config: TrainConfig, run_dir: Path, *, resume: bool) -> str | None:
    """Returns the saved step to resume from, or None, and records the run's configuration beside the steps.

    Args:
        config: The run.
        run_dir: The folder of the saved steps.
        resume: Resume if possible; otherwise the saved steps are removed.

    Raises:
        ConfigError: The saved steps belong to another configuration.
    """
    record = run_dir / _CONFIG
    if resume and record.is_file() and _saved_config(record) != config:
        raise ConfigError(
            f"{run_dir} holds the steps of a run with other settings. Continue with those, choose another output, or "
            "start over with --no-resume."
        )
    PartialState().wait_for_everyone()  # every process has read the record before one writes it
    if PartialState().is_main_process:
        if not resume:
            shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir(parents=True, exist_ok=True)
        replace_file(record, config.model_dump_json())
    PartialState().wait_for_everyone()
    for step in sorted(run_dir.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        if _is_complete(step):
            print_once(f"resuming from {step}")
            return str(step)
        print_once(f"passed over {step}: it was being saved when the run ended")
    return None


def _saved_config(record: Path) -> TrainConfig | None:
    """Returns the configuration that the saved steps belong to, or None if this version cannot read it.

    Settings that did not exist when the run began have their defaults.
    """
    try:
        return TrainConfig.model_validate_json(record.read_text(encoding="utf-8"))
    except ValidationError:
        return None


def _is_complete(step: Path) -> bool:
    """Tells whether a step was saved completely: Trainer writes its state last, and then follows `MARGIN_STATE`."""
    try:
        json.loads((step / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (step / MARGIN_STATE).is_file()
