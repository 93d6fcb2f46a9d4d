"""The plan of an ablation: its TOML file, and the training runs that it asks for."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from marginrm.errors import ConfigError
from marginrm_training.config import assign, parse_config

FLIP = "flip"  # the one axis that is not a training setting: the share of training labels to swap
RESULTS = "results.jsonl.gz"
SPEC, RESULT = "spec.json", "result.json"  # in a run's folder: the input and the output of its process


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Evaluation(_Section):
    """[[evaluations]]: a file on which every run is measured."""

    name: str
    path: str = Field(description="Preference pairs or candidate groups.")
    kind: Literal["pairs", "best_of_n"] = "pairs"
    format: Literal["pairs", "hh_rlhf", "shp"] = "pairs"
    limit: int | None = Field(None, ge=1, description="Use the first rows only.")
    max_length: int | None = Field(None, description="Most tokens a sequence may have here; the checkpoint's if unset.")


class Ablation(_Section):
    """An ablation: variants x axes x seeds of one base configuration.

    Attributes:
        output: Folder of the runs, `results.jsonl`, `table.md` and `report.html`.
        results: Folder for `results.jsonl.gz` and `differences.svg`; `output` if unset. The two are small enough for
            version control, and another machine that has them continues where this one stopped.
        baseline: The variant that the others are compared with, pair by pair.
        seeds: Seeds of head, split and order. Equal seeds give all variants the same head, split and order.
        variants: By name, the settings (`section.key`) that make it.
        axes: Settings with several values each, crossed with the variants; `flip` swaps that share of training labels.
        base: The training configuration that they change.
        evaluations: The files on which every run is measured.
        demo: Whether to write the demo's data and untrained model to `output`/demo first.
        keep_checkpoints: Whether a run's weights stay after it was measured.
    """

    output: str
    results: str | None = None
    baseline: str
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    axes: dict[str, tuple[Any, ...]] = {}
    base: dict[str, Any]
    evaluations: tuple[Evaluation, ...] = Field(min_length=1)
    demo: bool = False
    keep_checkpoints: bool = False

    @property
    def results_folder(self) -> Path:
        """The folder of `results.jsonl.gz` and `differences.svg`."""
        return Path(self.results or self.output)

    @property
    def results_file(self) -> Path:
        """The file that holds one row for each finished run."""
        return self.results_folder / RESULTS


@dataclass(frozen=True, slots=True)
class Run:
    """One training run of an ablation.

    Attributes:
        variant: The variant's name.
        axes: Its place on the axes.
        seed: Its seed.
        config: The training configuration, without `output`.
        digest: SHA-256 of everything that decides its result.
    """

    variant: str
    axes: dict[str, Any]
    seed: int
    config: dict[str, Any]
    digest: str

    @property
    def label(self) -> str:
        """The run's name, which is also its folder's."""
        places = [f"{key.rpartition('.')[2]}={value}" for key, value in self.axes.items()]
        return "-".join([self.variant, *places, f"seed{self.seed}", self.digest[:8]]).replace("/", "_")


def load_ablation(path: Path) -> Ablation:
    """Reads an ablation from a TOML file.

    Raises:
        ConfigError: The file, a key or a value is wrong.
    """
    try:
        ablation = Ablation.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}. Give the path of a TOML file.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ConfigError(f"{path}: {'; '.join(faults)}. examples/ablation_alpaca.toml has every key.") from None
    if ablation.baseline not in ablation.variants:
        names = ", ".join(ablation.variants)
        raise ConfigError(f"{path}: baseline = {ablation.baseline!r} is not a variant. Choose one of: {names}.")
    return ablation


def plan(ablation: Ablation) -> list[Run]:
    """Returns all runs, seed by seed, so that an ablation that is cut short has compared all variants on some seeds.

    Raises:
        ConfigError: A variant or an axis makes a training configuration that is wrong.
    """
    runs = []
    for seed, values in itertools.product(ablation.seeds, itertools.product(*ablation.axes.values())):
        axes = dict(zip(ablation.axes, values, strict=True))
        for variant, changes in ablation.variants.items():
            settings = {key: value for key, value in (axes | changes).items() if key != FLIP}
            config = _changed(ablation.base, settings | {"seed": seed})
            parse_config(config | {"output": "-"}, f"variant {variant}")
            decisive = [config, axes.get(FLIP), [item.model_dump() for item in ablation.evaluations]]
            digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
            runs.append(Run(variant, axes, seed, config, digest))
    return runs


def _changed(base: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(dict(base))
    for key, value in settings.items():
        assign(config, key, value)
    return config
