"""`reward_manifest.json`: the record of a checkpoint, by which a server checks that it computes as training did.

The file lies beside the weights. `Manifest.save` writes it atomically, `Manifest.load` refuses unknown fields and
versions, and `revision_of` hashes the content of the whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from marginrm.atomic_file import replace_file
from marginrm.confidence.group_temperature import GroupTemperature
from marginrm.errors import ManifestError
from marginrm.process_rewards import Aggregate, StepValue
from marginrm.schemas import ModelInfo

MANIFEST_NAME = "reward_manifest.json"
SCHEMA_VERSION: Literal[1] = 1

# The files that determine a reward: weights, tokenizer, template, configuration and calibration.
_REVISION_GLOBS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.jinja",
    "added_tokens.json",
    "config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer*",
    "vocab.json",
    "vocab.txt",
    MANIFEST_NAME,
)
_CHUNK_BYTES = 1 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class EncodingInfo(_Strict):
    """The encoding of texts, and the position at which the reward is read."""

    architecture: Literal["decoder", "encoder"]
    template_hash: str | None = Field(
        description="Hash of the chat template, `sha256:<12 hex>`; null without a template."
    )
    max_length: int = Field(ge=1, description="Most tokens of a sequence, special tokens included.")
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    pooling: Literal["last", "first"] = Field(description="The position whose hidden state gives the reward.")
    truncation: Literal["error", "drop", "prompt_left"] = Field(
        default="error", description="Treatment of sequences that were too long in training."
    )
    bos: Literal["single", "auto", "on", "off", "double"] = Field(
        default="single", description="How sequences begin; `single` is one BOS where tokenizer or template put one."
    )
    eos: Literal["auto", "on", "off"] = Field(default="auto", description="How sequences end.")
    unread_token_ids: list[int] = Field(
        default_factory=list, description="Ids at the end of a sequence that are left out, since they are not read."
    )
    appended_token_id: int | None = Field(default=None, description="Put after the text; the reward is read at it.")
    frame: str | None = Field(
        default=None, description="A reranker's text around query and document: a known frame's name, or a template."
    )


class HeadInfo(_Strict):
    """Facts that the user stated about a head that does not state them itself (`ReadingOptions`)."""

    label_weights: list[float] | None = Field(default=None, description="Weights of the rows of a head with several.")
    reward_tokens: list[str] | None = Field(default=None, description="Vocabulary entries whose logits are the reward.")
    head_activation: Literal["relu", "gelu", "silu", "tanh"] | None = Field(
        default=None, description="The activation between the layers of a head with two."
    )
    steps: str | None = Field(default=None, description="A process reward model's form, or its separator of steps.")
    step_value: StepValue | None = Field(default=None, description="What a step's reward is.")
    aggregate: Aggregate | None = Field(default=None, description="How step rewards make a response's reward.")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> HeadInfo | None:
        """Returns what options say about a head, or None if they say nothing.

        Args:
            options: `CheckpointReading.options`.
        """
        said = {name: options[name] for name in cls.model_fields if name in options}
        return cls(**said) if said else None


class MethodInfo(_Strict):
    """The loss that the checkpoint was trained with, and statistics of its target margins."""

    preset: str
    loss: str
    estimator: str | None = Field(default=None, description="Source of the target margin.")
    filter: str | None = Field(default=None, description="Rule for the pairs of a batch that get one.")
    scale: float | None = Field(default=None, description="lambda, the factor on the estimated margin.")
    cap: float | None = Field(default=None, description="The largest target margin (m_max); null without one.")
    options: dict[str, Any] = Field(default_factory=dict, description="Label smoothing, centring, EMA and similar.")
    fire_rate: float | None = Field(default=None, description="Share of training pairs that got a target margin.")
    mean_target_margin: float | None = Field(default=None, description="Mean target margin over all training pairs.")


class DataFile(_Strict):
    """One file that the checkpoint was trained, calibrated or evaluated on."""

    path: str = Field(description="File name as given in the configuration.")
    sha256: str
    rows: int = Field(ge=0)
    pairs_used: int = Field(ge=0)


class ReliabilityBin(_Strict):
    """One bar of a reliability diagram. Empty bins have no means."""

    lower: float
    upper: float
    count: int = Field(ge=0)
    confidence: float | None = Field(description="Mean confidence of the bin's pairs.")
    accuracy: float | None = Field(description="Share of the pairs that the model ranked right.")


class RiskCoveragePoint(_Strict):
    """The error rate among the `coverage` most confident pairs."""

    coverage: float = Field(ge=0, le=1)
    risk: float = Field(ge=0, le=1)
    confidence: float = Field(description="The smallest confidence among those pairs.")


class BestOfNMeasure(_Strict):
    """Mean quality of the pick among n candidates, by an independent judge of quality."""

    n: int = Field(ge=1, description="Number of candidates.")
    kl: float = Field(description="log n - (n - 1) / n: the most KL from the base policy, in nats.")
    model: float = Field(description="Quality of the model's pick.")
    model_low: float = Field(description="Lower end of its 95% interval over prompts.")
    model_high: float = Field(description="Upper end of its 95% interval.")
    longest: float = Field(description="Quality of the longest candidate.")
    oracle: float = Field(description="Quality of the best candidate.")
    random: float = Field(description="Mean quality of all candidates.")


class Calibration(_Strict):
    """The temperature and the quality of its confidences. `before` is T = 1, `after` is this temperature.

    `ece` is on confidence = sigmoid(abs(margin) / T) against "ranked right"; `brier` and `nll` are on P(chosen).
    """

    temperature: float = Field(gt=0)
    temperature_interval: tuple[float, float] | None = Field(
        default=None, description="95% interval; null if T was given or is a bound."
    )
    n: int = Field(ge=1, description="Pairs that T was fitted or measured on.")
    ece_before: float
    ece_after: float
    brier_before: float
    brier_after: float
    nll_before: float
    nll_after: float
    reliability: list[ReliabilityBin] = Field(default_factory=list)
    reliability_before: list[ReliabilityBin] = Field(default_factory=list, description="The same at T = 1.")
    risk_coverage: list[RiskCoveragePoint] = Field(default_factory=list)
    margin_quantiles: dict[str, float] = Field(
        default_factory=dict, description="Quantile, such as `0.05`, to margin; the reference for drift."
    )
    note: str | None = Field(default=None, description="Caution about the temperature, if any.")
    style: dict[str, float] | None = Field(
        default=None,
        description="Weights of style (length, markdown) in the logit that T was fitted with; null without. They are not "
        "part of a served confidence.",
    )


class GroupMeasure(_Strict):
    """The quality of confidences in choices among N candidates. `before` is the temperature of given pairs."""

    n: int = Field(ge=2, description="Number of candidates.")
    prompts: int = Field(ge=1, description="Prompts with so many candidates.")
    sets: int = Field(ge=1, description="Sets of N candidates that were drawn from them.")
    accuracy: float = Field(description="Share of the sets whose best candidate beats the runner-up.")
    ece_before: float = Field(description="ECE of P(the best beats the runner-up).")
    ece: float = Field(description="The same with the temperature of groups.")
    chance: float = Field(
        description="The ECE that perfect confidences would show on so many prompts, by chance alone."
    )
    best_share: float = Field(
        description="Share of the sets whose candidate with the highest reward is the best of all."
    )
    p_best_ece_before: float = Field(description="ECE of that candidate's p_best.")
    p_best_ece: float = Field(description="The same with the temperature of groups.")
    reliability: list[ReliabilityBin] = Field(default_factory=list, description="Of P(the best beats the runner-up).")
    p_best_reliability: list[ReliabilityBin] = Field(default_factory=list, description="Of that candidate's p_best.")


class GroupCalibration(_Strict):
    """Temperatures for choices among N candidates, and the quality of their confidences on held-out groups."""

    temperature: GroupTemperature
    prompts: int = Field(ge=1, description="Prompts that the temperatures were fitted on.")
    by_n: list[GroupMeasure] = Field(
        default_factory=list, description="By N, each prompt measured with temperatures fitted on the others."
    )


class Uncertainty(_Strict):
    """The posterior of the head's weights, in a file beside them, and what it does to confidences of held-out pairs."""

    file: str = Field(description="Name of the file.")
    sha256: str = Field(description="Of that file, in hex.")
    pairs: int = Field(ge=1, description="Pairs that the posterior was computed from.")
    prior_precision: float = Field(gt=0, description="Of the head's weights, by the greatest marginal likelihood.")
    margin_std: float = Field(ge=0, description="Root mean square of the standard deviation of calibration margins.")
    temperature_alone: float = Field(gt=0, description="T that fits best without the uncertainty of margins.")
    ece_alone: float = Field(
        description="ECE of the calibration pairs with that T; `calibration.ece_after` is with both."
    )
    nll_alone: float = Field(description="The same of the NLL.")


class GoldenSample(_Strict):
    """A text whose token ids and reward a server must reproduce before it reports ready."""

    prompt: str | list[dict[str, Any]]
    response: str
    ids: list[int]
    reward: float


class Manifest(_Strict):
    """The record of a checkpoint."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    created: str = Field(description="UTC, ISO 8601.")
    base_model: str
    base_revision: str | None = None
    method: MethodInfo | None = Field(default=None, description="Null for a model that was trained elsewhere.")
    data: list[DataFile] = Field(default_factory=list)
    encoding: EncodingInfo
    head: HeadInfo | None = Field(default=None, description="Null where the checkpoint says it all itself.")
    reward_mean: float | None = None
    reward_std: float | None = None
    calibration: Calibration | None = None
    groups: GroupCalibration | None = Field(default=None, description="Null without candidates to calibrate on.")
    uncertainty: Uncertainty | None = Field(default=None, description="Null where rewards do not carry theirs.")
    metrics: dict[str, float] = Field(default_factory=dict)
    best_of_n: list[BestOfNMeasure] = Field(default_factory=list, description="The Best-of-N curve, if measured.")
    versions: dict[str, str] = Field(default_factory=dict, description="Library to version.")
    golden: list[GoldenSample] = Field(default_factory=list)
    golden_tolerance: dict[str, float] = Field(
        default_factory=dict, description="dtype to the largest allowed difference of a golden reward."
    )
    training: dict[str, Any] = Field(default_factory=dict, description="The configuration, as it was run.")

    @classmethod
    def load(cls, directory: str | Path) -> Manifest | None:
        """Reads a checkpoint's manifest.

        Args:
            directory: The checkpoint.

        Returns:
            The manifest, or None if the checkpoint has none.

        Raises:
            ManifestError: The file cannot be read, or another version of marginrm wrote it.
        """
        path = Path(directory) / MANIFEST_NAME
        try:
            raw = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ManifestError(f"{path}: cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise ManifestError(
                f"{path}: is not valid JSON ({error}). Write it again with `marginrm calibrate`."
            ) from error
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION:
            raise ManifestError(
                f"{path}: schema_version is {version!r}; this marginrm reads {SCHEMA_VERSION}. "
                "Upgrade marginrm, or write the manifest again with `marginrm calibrate`."
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
            raise ManifestError(
                f"{path}: {faults}. It was edited, or written by another marginrm: upgrade, or write it again with "
                "`marginrm calibrate`."
            ) from error

    def save(self, directory: str | Path) -> Path:
        """Writes the manifest into a checkpoint atomically: a reader never sees half a file.

        Returns:
            The file's path.

        Raises:
            OSError: The folder cannot be written to.
        """
        folder = Path(directory)
        text = json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False)
        target = folder / MANIFEST_NAME
        replace_file(target, text + "\n")
        return target


def model_info(manifest: Manifest | None, *, name: str, revision: str, base_model: str, dtype: str) -> ModelInfo:
    """Returns a model's part of replies, with what its manifest says of confidence; T = 1 without a calibration."""
    calibration = manifest.calibration if manifest else None
    return ModelInfo(
        name=name,
        revision=revision,
        base_model=base_model,
        dtype=dtype,
        calibrated=calibration is not None,
        temperature=calibration.temperature if calibration else 1.0,
        groups=manifest.groups.temperature if manifest and manifest.groups else None,
    )


def template_hash(text: str) -> str:
    """Returns a short content hash of a chat template, `sha256:<12 hex>`."""
    return f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"


def revision_of(directory: str | Path) -> str:
    """Returns a content hash of a checkpoint: equal hashes mean equal rewards and confidences.

    Streams a SHA-256 over the sorted names and the bytes of weights, configuration, tokenizer, templates and manifest.

    Args:
        directory: The checkpoint.

    Returns:
        `sha256:<12 hex>`.

    Raises:
        ManifestError: The folder holds no such file, or one cannot be read.
    """
    folder = Path(directory)
    files = sorted({path for pattern in _REVISION_GLOBS for path in folder.glob(pattern) if path.is_file()})
    if not files:
        raise ManifestError(f"{folder}: is not a checkpoint (no weights, configuration or tokenizer).")
    digest = hashlib.sha256()
    try:
        for path in files:
            # Name and size precede the bytes, so that different folders cannot give the same stream.
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
    except OSError as error:
        raise ManifestError(f"{error.filename}: cannot be read: {error.strerror}.") from error
    return f"sha256:{digest.hexdigest()[:12]}"
