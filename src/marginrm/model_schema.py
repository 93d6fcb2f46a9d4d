"""The wire shape of `GET /v1/models/{name}`: what a served model is, and what its checkpoint says of itself."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from marginrm.manifest import BestOfNMeasure, Calibration, DataFile, MethodInfo
from marginrm.schemas import ModelCard


class _Part(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


class GoldenTest(_Part):
    """The self-test at load: texts whose rewards the checkpoint records, scored on this machine."""

    samples: int = Field(description="Texts in the manifest.")
    difference: float = Field(description="The largest difference to a recorded reward, in units of reward.")
    tolerance: float | None = Field(description="The difference allowed in this dtype, in units of reward.")


class DriftState(_Part):
    """Margins that were served last, in the bins between the calibration's quantiles."""

    margins: int = Field(description="Served margins that are counted, 10,000 at most.")
    needed: int = Field(description="Margins from which on the index is given.")
    psi: float | None = Field(description="Population stability index, in nats: below 0.1 stable, above 0.25 a shift.")
    edges: list[float] = Field(description="Margins between the bins, in units of reward.")
    expected: list[float] = Field(description="Share of calibration pairs in each bin; one bin more than edges.")
    seen: list[float] = Field(description="Share of served margins in each bin; zeros before the first.")


class ModelDetail(ModelCard):
    """A served model in full. Parts that its checkpoint does not record are null or empty."""

    reading: dict[str, Any] = Field(description="How a text becomes a reward: fact by name.")
    trained: str | None = Field(default=None, description="When the manifest was made: UTC, ISO 8601.")
    base_revision: str | None = Field(default=None, description="Revision of the base model.")
    method: MethodInfo | None = Field(default=None, description="The loss that it was trained with.")
    data: list[DataFile] = Field(default_factory=list, description="Files behind it, by name without their folders.")
    reward_mean: float | None = Field(default=None, description="Mean reward of the calibration texts.")
    reward_std: float | None = Field(default=None, description="Standard deviation of those rewards.")
    calibration: Calibration | None = Field(default=None, description="Temperature, and how far to trust it.")
    metrics: dict[str, float] = Field(
        default_factory=dict, description="Measured on test pairs; `NAME_low` and `NAME_high` are 95% intervals."
    )
    best_of_n: list[BestOfNMeasure] = Field(default_factory=list, description="The Best-of-N curve, by N.")
    golden: GoldenTest | None = Field(default=None, description="Null for a checkpoint without golden samples.")
    drift: DriftState | None = Field(default=None, description="Null for a checkpoint without margin quantiles.")
    versions: dict[str, str] = Field(default_factory=dict, description="Library to version, at training.")
    figures: list[str] = Field(description="Figures at `/v1/models/{name}/figures/{figure}`, as SVG.")
    documents: list[str] = Field(description="Files at `/v1/models/{name}/documents/{document}`.")
