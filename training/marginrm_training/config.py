"""A training run as a TOML file: every key is checked, and every default names its source.

Sources of the defaults: *paper* is arXiv 2404.04932. *OpenRLHF* and *Llama 2* (arXiv 2307.09288) fill its gaps. *ours*
is a choice of this project.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from marginrm.errors import ConfigError
from marginrm_training.method.margins import ESTIMATED, POOLED, Estimator, MarginMethod, named


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraSection(_Section):
    """[model.lora]: train small matrices beside frozen weights; the checkpoint has them merged in."""

    rank: int = Field(16, ge=1, description="r: inner dimension of the matrices. ours")
    alpha: int = Field(32, ge=1, description="They are scaled by alpha / rank. ours")
    targets: tuple[str, ...] = Field((), description="Names of layers, such as q_proj; all linear layers if empty.")


class ModelConfig(_Section):
    """[model]: the model to train."""

    path: str = Field(description="Folder or Hub name of a language model, an encoder or a reward model.")
    max_length: int | None = Field(None, description="Most tokens a sequence may have; the model's own limit if unset.")
    positions: int | None = Field(
        None, ge=8, description="Repeat a BERT's learned positions up to here, so that it reads longer texts."
    )
    head_std: float | None = Field(
        None, gt=0, description="Standard deviation of a new head's weights; 1/(hidden + 1) if unset."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of matrix products. With bfloat16, weights, head and loss stay float32. ours"
    )
    lora: LoraSection | None = Field(None, description="Absent: all weights are trained.")
    gradient_checkpointing: bool | Literal["auto", "mlp"] = Field(
        "auto",
        description="Activations that are computed again in the backward pass: those of the MLPs (mlp), of whole layers "
        "(true: least memory, up to a third more time) or none (false). auto: mlp on CPUs, none on GPUs. ours",
    )
    trust_remote_code: bool = Field(False, description="Allow code that comes with the checkpoint to run.")


class SourceConfig(_Section):
    """[[data.sources]]: one of several sources of training pairs."""

    path: str = Field(description="As data.train.")
    name: str | None = Field(None, description="Name in figures and manifest; the path if unset.")
    format: Literal["pairs", "hh_rlhf", "shp"] | None = Field(None, description="data.format if unset.")
    weight: float | None = Field(
        None,
        gt=0,
        description="Share of the training pairs, relative to the other weights. All sources have one, or none has: then "
        "all pairs are used.",
    )
    limit: int | None = Field(None, ge=1, description="Use this many of its pairs at most, drawn at random.")
    stream: int | None = Field(None, ge=1, description="As data.stream.")
    columns: dict[str, str] = Field(
        {}, description='Names of the rows for the format\'s fields, e.g. { prompt = "question" }.'
    )

    @property
    def label(self) -> str:
        """The source's name."""
        return self.name or self.path


class DataConfig(_Section):
    """[data]: the preference pairs."""

    train: str | None = Field(
        None,
        description="Preference pairs: a .jsonl, .parquet or .csv file (.gz too), a folder of them, or a data set: "
        "a folder that save_to_disk wrote, owner/name, owner/name:split or owner/name:subset:split.",
    )
    sources: tuple[SourceConfig, ...] = Field((), description="Several sources in place of `train`.")
    format: Literal["pairs", "hh_rlhf", "shp"] = Field("pairs", description="Format of the rows of every source.")
    stream: int | None = Field(
        None, ge=1, description="Read only this many rows of the training data set, as they come."
    )
    ignore_margins: bool = Field(
        False, description="Accept rows with a `margin` that the method does not read; otherwise they are an error."
    )
    calibration: str | None = Field(
        None, description="Pairs to fit the temperature on; if unset, they are split off by prompt."
    )
    test: str | None = Field(None, description="Pairs to report on; if unset, they are split off by prompt.")
    best_of_n: str | None = Field(
        None,
        description="Candidate groups with gold qualities (.jsonl, .gz too): the report then has a Best-of-N curve.",
    )
    calibration_groups: str | None = Field(
        None,
        description="Candidate groups with gold qualities (.jsonl, .gz too), to calibrate the confidence of the best of N "
        "on. Prompts of training pairs are left out and counted.",
    )
    calibration_share: float = Field(0.05, gt=0, lt=0.5, description="Share of the prompts to calibrate on. ours")
    test_share: float = Field(0.05, gt=0, lt=0.5, description="Share of the prompts to report on. ours")
    limit: int | None = Field(None, ge=1, description="Use this many training pairs at most, drawn at random.")
    benchmarks: tuple[str, ...] = Field(
        (), description="Files of rows with a `prompt`: training pairs whose prompts overlap with one are left out."
    )
    near_duplicates: Literal["keep", "drop"] = Field(
        "keep",
        description="Treatment of training pairs whose prompts overlap with a held-out one. Equal ones always go.",
    )
    overlap_words: int = Field(
        13,
        ge=3,
        description="Prompts overlap if they share so many words in a row, or are shorter and equal. GPT-3: 13",
    )
    max_bad_rows: int | None = Field(
        None,
        ge=0,
        description="Most malformed rows of each source. They are left out and counted by reason with their lines; above "
        "this number the run stops, and 0 stops at the first. Unset: any number, but not all.",
    )
    too_long: Literal["drop", "prompt_left"] = Field(
        "drop", description="Treatment of pairs over max_length: drop and count them, or cut the prompt (prompt_left)."
    )

    @model_validator(mode="after")
    def _one_kind_of_source(self) -> Self:
        if (self.train is None) == (not self.sources):
            raise ValueError("give either data.train or [[data.sources]]")
        labels = [source.label for source in self.sources]
        if len(set(labels)) < len(labels):
            raise ValueError("two of data.sources have one name; give each a `name`")
        if len({source.weight is None for source in self.sources}) > 1:
            raise ValueError("only some of data.sources have a weight; give all of them one, or none")
        if self.sources and self.stream is not None:
            raise ValueError("data.stream is for data.train; each of data.sources has a `stream` of its own")
        return self


class MethodConfig(_Section):
    """[method]: a preset and changes to it."""

    preset: str = Field(
        "margin", description="One of `marginrm_training.method.margins.PRESETS`, see docs/training.md."
    )
    loss: Literal["margin", "scaled_bt", "soft_label"] | None = None
    estimator: Estimator | None = Field(
        None,
        description="Source of the target margin. From later papers: zscore_exp (AMaPO), transport (APLOT), small_margin "
        "(MARS, weights for the loss scaled_bt).",
    )
    filter: Literal["none", "below_mean"] | None = None
    scale: float | None = Field(None, description="lambda. paper: 1")
    cap: float | None = Field(None, ge=0, description="m_max. paper: none; preset `margin`: 1, Llama 2's small top.")
    fixed: float | None = Field(None, ge=0, description="The margin of the `fixed` estimator.")
    threshold_std: float | None = Field(None, description="c in mu_B + c * std. paper: 0")
    ema: float | None = Field(None, gt=0, lt=1, description="Decay of the running mean for small batches, e.g. 0.9.")
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="Share of the steps over which the margin fades in.")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of labels taken to be wrong.")
    centring: float = Field(0.0, ge=0, description="Factor on (r_c + r_r)^2, which pins the rewards' offset.")
    style_control: bool = Field(
        False, description="Let length and markdown explain labels in training only, so that rewards need not. ours"
    )

    def method(self) -> MarginMethod:
        """Returns the preset with this section's changes.

        Raises:
            ConfigError: The preset is unknown, or a setting has no effect with this method.
        """
        names = {field.name for field in fields(MarginMethod)}
        changes = {name: value for name, value in self.model_dump(exclude_none=True).items() if name in names}
        method = named(self.preset, **changes)
        estimated, no_margin = method.estimator in ESTIMATED, method.estimator == "none"
        idle = {
            "fixed": self.fixed is not None and method.estimator != "fixed",
            "scale": self.scale is not None and not estimated,
            "ema": self.ema is not None and (not estimated or method.estimator in POOLED),
            "cap": self.cap is not None and no_margin,
            "threshold_std": bool(self.threshold_std) and method.filter == "none",
            "warmup_ratio": bool(self.warmup_ratio) and (no_margin or method.loss != "margin"),
            "label_smoothing": bool(self.label_smoothing) and method.loss != "margin",
        }
        without_effect = [name for name, useless in idle.items() if useless]
        if without_effect:
            raise ConfigError(
                f"method.{', method.'.join(without_effect)}: no effect with preset {self.preset!r} (loss "
                f"{method.loss!r}, estimator {method.estimator!r}, filter {method.filter!r}). Remove it, or change those."
            )
        return method


class OptimConfig(_Section):
    """[optim]: the optimiser."""

    epochs: float = Field(1.0, gt=0, description="paper: 1; more overfits (Llama 2)")
    learning_rate: float = Field(9e-6, gt=0, description="paper, OpenRLHF: 9e-6. Small encoders need about 5e-5.")
    pairs_per_step: int = Field(128, ge=1, description="Pairs per optimiser step. OpenRLHF: 128")
    train_batch: int = Field(16, ge=1, description="Pairs per forward pass: the reference batch of mu_B. ours")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW. OpenRLHF")
    weight_decay: float = Field(0.0, ge=0, description="OpenRLHF: 0")
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="Llama 2, OpenRLHF: 0.03")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="The cosine ends here. Llama 2: 0.1")
    clip: float = Field(1.0, gt=0, description="Largest gradient norm. OpenRLHF: 1")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="Learning rate of a layer over that of the layer above it; 1: all alike. ours"
    )


class CalibrationConfig(_Section):
    """[calibration]: what is fitted after training, on held-out data."""

    uncertainty: bool = Field(
        False, description="Rewards carry their uncertainty by the head's weights, which confidence integrates. ours"
    )


class TrainConfig(_Section):
    """A training run."""

    output: str = Field(description="Folder for the checkpoint; it is written when training ends.")
    seed: int = Field(0, ge=0)
    log_every: int = Field(10, ge=1, description="Steps between log lines.")
    save_every: int = Field(200, ge=1, description="Steps between checkpoints to resume from.")
    eval_every: int = Field(
        0, ge=0, description="Steps between evaluations on the calibration pairs; 0: no evaluation."
    )
    loggers: tuple[str, ...] = Field((), description='transformers loggers: "tensorboard", "wandb", ...')
    model: ModelConfig
    data: DataConfig
    method: MethodConfig = MethodConfig()
    optim: OptimConfig = OptimConfig()
    calibration: CalibrationConfig = CalibrationConfig()


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a run from a TOML file.

    Args:
        path: The file.
        overrides: `section.key=value` settings that override the file; values are TOML, or plain text.

    Raises:
        ConfigError: The file cannot be read, or a key or value is wrong; the message names file, key and cure.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}. Give the path of a TOML file.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        apply_override(raw, override)
    return parse_config(raw, str(path))


def parse_config(raw: Mapping[str, Any], source: str) -> TrainConfig:
    """Checks a run given as nested tables; every message begins with `source`."""
    try:
        config = TrainConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {_explained(detail)}" for detail in error.errors())) from None
    config.method.method()
    return config


def expand(path: str) -> str:
    """Expands `~` and environment variables in a path of the config.

    Raises:
        ConfigError: A variable is not set.
    """
    expanded = os.path.expandvars(path)
    if "$" in expanded:
        raise ConfigError(f"{path}: the environment variable is not set. Export it, or write the path itself.")
    return str(Path(expanded).expanduser()) if expanded.startswith("~") else expanded


def assign(raw: dict[str, Any], key: str, value: object) -> None:
    """Sets a `section.key` of nested tables in place; missing tables are created.

    Raises:
        ConfigError: A section of the key is a value and not a table.
    """
    *sections, name = key.split(".")
    table = raw
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{key}: {section} is a value, not a table of settings.")
    table[name] = value


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Sets `section.key=value` in nested tables in place; the value is TOML, or plain text.

    Raises:
        ConfigError: It is not of that form, or a section is a value.
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: write it as section.key=value.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    assign(raw, key.strip(), value)


def _explained(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        known = _keys_at(detail["loc"][:-1])
        near = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known here: {', '.join(known)}."
        return f"{where} is not a setting. {hint}"
    if detail["type"] == "missing":
        return f"{where} is missing: {detail['msg'].lower()}."
    return f"{where}: {detail['msg']} (got {detail['input']!r})"


def _keys_at(sections: Sequence[str | int]) -> list[str]:
    section: Any = TrainConfig
    for name in sections:
        annotation = section.model_fields[str(name)].annotation
        section = next((kind for kind in get_args(annotation) if kind is not type(None)), annotation)
    return list(section.model_fields)
