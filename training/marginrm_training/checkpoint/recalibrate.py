"""`marginrm calibrate`: temperatures for any reward model, written into its manifest."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from marginrm.calibration import calibrate
from marginrm.errors import ConfigError, ManifestError, ModelError
from marginrm.head_posterior import FILE_NAME
from marginrm.manifest import MANIFEST_NAME, Calibration, GroupCalibration, HeadInfo, Manifest, Uncertainty
from marginrm.reading import ReadingOptions
from marginrm.reward_model import RewardModel
from marginrm_training.checkpoint.export import library_versions, utc_now
from marginrm_training.checkpoint.golden import GOLDEN_PAIRS, golden_samples, tolerances
from marginrm_training.checkpoint.uncertainty import fit_uncertainty
from marginrm_training.data.splits import EncodedPair
from marginrm_training.evaluation.measure import measure_candidates, usable_pairs
from marginrm_training.evaluation.pairs import score_pairs
from marginrm_training.evaluation.style import calibrate_beside_style

BROKEN = f"{MANIFEST_NAME}.broken"  # the copy of a manifest that could not be read


@dataclass(frozen=True, slots=True)
class Recalibrated:
    """The outcome of a calibration.

    Attributes:
        calibration: The calibration as the manifest has it.
        notes: Lines for people: the pairs, the candidates, and a manifest that could not be read.
        groups: The calibration of choices among candidates; None without any.
        uncertainty: The posterior of the head; None if it was not asked for.
    """

    calibration: Calibration
    notes: Sequence[str]
    groups: GroupCalibration | None = None
    uncertainty: Uncertainty | None = None


def recalibrate(
    folder: Path,
    data: str,
    reading: ReadingOptions | None = None,
    max_bad_rows: int | None = None,
    *,
    style_control: bool = False,
    candidates: str | None = None,
    uncertainty: bool = False,
) -> Recalibrated:
    """Fits the temperature of a checkpoint on preference pairs and writes it into the checkpoint's manifest.

    A checkpoint without a manifest gets one. So does a checkpoint whose manifest cannot be read: the new one lacks what
    the old one recorded of the training, so the old file is kept as `BROKEN`.

    Args:
        folder: The checkpoint.
        data: Preference pairs: a file, a folder or a data set.
        reading: What the user says about the checkpoint; a new manifest records it.
        max_bad_rows: Most malformed rows of each file; None for any number, 0 to stop at the first.
        style_control: Let style explain labels while T is fitted; see `calibrate_beside_style`.
        candidates: Candidate groups with gold qualities, of prompts that the model was not trained on. Without them a
            calibration of choices that the manifest has is removed, since it was fitted beside another temperature.
        uncertainty: Compute the posterior of the head from these pairs, so that rewards carry their uncertainty. Without
            it, one that the checkpoint has is no longer used.

    Raises:
        ConfigError: Both style control and uncertainty are asked for.
        ModelError: It is not a folder, does not hold a reward model, or its head does not end in a linear layer.
        DataError: No pair is usable, or too few groups are.
    """
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is not a folder. The manifest is written beside the weights, so save the model first."
        )
    if style_control and uncertainty:
        raise ConfigError("--style-control and --uncertainty each fit T in their own way. Leave one of them out.")
    model, fault = _load(folder, reading)
    split = usable_pairs(model, data, max_bad_rows=max_bad_rows)
    notes = [split.summary()]
    fitted = None
    model.readout = None
    if uncertainty:
        fitted = fit_uncertainty(model, split.pairs)
        calibration = fitted.calibration
        model.read_uncertainty(fitted.posterior)
    else:
        d = score_pairs(model, split.pairs, progress=True).d
        calibration = calibrate_beside_style(d, split.pairs) if style_control else calibrate(d.tolist())
    groups = None
    if candidates:
        scored = measure_candidates(model, candidates, max_bad_rows=max_bad_rows)
        notes.append(scored.summary())
        groups = scored.calibrate(calibration.temperature)
    manifest = recalibrated(model, folder.resolve().name, calibration, split.pairs).model_copy(
        update={"groups": groups, "uncertainty": fitted.save(folder) if fitted else None}
    )
    if fault:
        shutil.copyfile(folder / MANIFEST_NAME, folder / BROKEN)
        notes.append(
            f"the old manifest could not be read, so a new one was begun, without a record of the training; the old "
            f"one is kept as {folder / BROKEN}"
        )
    notes += _removed(model.manifest, manifest)
    manifest.save(folder)
    if not fitted:  # only now, since the manifest before names the file
        (folder / FILE_NAME).unlink(missing_ok=True)
    return Recalibrated(calibration, notes, groups, manifest.uncertainty)


def recalibrated(model: RewardModel, name: str, calibration: Calibration, pairs: Sequence[EncodedPair]) -> Manifest:
    """Returns a checkpoint's manifest with another calibration, or a new manifest if the checkpoint has none.

    Args:
        model: The checkpoint.
        name: The checkpoint's name in a new manifest.
        calibration: The calibration.
        pairs: Pairs whose responses become the golden samples of a new manifest.
    """
    if model.manifest:
        return model.manifest.model_copy(update={"calibration": calibration})
    rewards = score_pairs(model, pairs[:GOLDEN_PAIRS])
    return Manifest(
        name=name,
        created=utc_now(),
        base_model=model.info.base_model,
        encoding=model.encoder.describe(),
        head=HeadInfo.of(model.reading.options) if model.reading else None,
        versions=library_versions(),
        golden=golden_samples(rewards, pairs),
        golden_tolerance=tolerances(rewards),
        calibration=calibration,
    )


def _removed(before: Manifest | None, after: Manifest) -> list[str]:
    """Returns what a manifest no longer has, because it belonged to the temperature before, with the option to keep it."""
    parts = (("groups", "calibration of choices", "--candidates"), ("uncertainty", "uncertainty", "--uncertainty"))
    return [
        f"the {name} that the checkpoint had belonged to its former temperature and was removed; {option} fits it anew"
        for part, name, option in parts
        if before and getattr(before, part) and not getattr(after, part)
    ]


def _load(folder: Path, reading: ReadingOptions | None) -> tuple[RewardModel, ManifestError | None]:
    """Returns the model, and the fault of its manifest if that cannot be read."""
    try:
        return RewardModel.from_pretrained(folder, dtype="float32", reading=reading), None
    except ManifestError as error:
        model = RewardModel.from_pretrained(folder, dtype="float32", reading=reading, ignore_manifest=True)
        return model, error
