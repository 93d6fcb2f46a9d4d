"""Loads the weights of transformers' classes, and accounts for every one that is missing or left over."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from marginrm.errors import HeadError, ModelError
from marginrm.loading.files import CheckpointFiles
from marginrm.loading.foreign import translated
from marginrm.loading.heads import is_harmless

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """The place and form of a loaded model.

    Attributes:
        dtype: Of the backbone.
        device: Where its weights go.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        processes: Number of processes, of which each takes a share of every layer (`loading.ranks`); 1 for none.
    """

    dtype: torch.dtype
    device: torch.device
    trust_remote_code: bool = False
    processes: int = 1


def quantisation_of(config: PreTrainedConfig) -> str | None:
    """Returns the method by which a checkpoint's weights are quantised, or None."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    found = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
    return str(getattr(found, "value", found) or "an unknown method")


def load_model(
    auto: Any,
    files: CheckpointFiles,
    config: PreTrainedConfig,
    target: Target,
    *,
    prefix: str = "",
    known: Iterable[str] = (),
    strict: bool = True,
) -> tuple[PreTrainedModel, set[str]]:
    """Loads a model through one of transformers' Auto classes.

    Args:
        auto: The Auto class.
        files: The checkpoint.
        config: Its configuration.
        target: Where and how.
        prefix: What stands before the backbone's names in the checkpoint, where transformers would not expect it.
        known: Names of weights in the checkpoint that this class need not have a place for: the head's.
        strict: Whether other weights without a place are an error; else they are logged.

    Returns:
        The model and the names of the weights that the checkpoint lacks.

    Raises:
        HeadError: The checkpoint holds weights that have no place.
        ModelError: It cannot be read.
    """
    options: dict[str, Any] = {"dtype": target.dtype, "trust_remote_code": target.trust_remote_code}
    options["ignore_mismatched_sizes"] = True  # they are an error below, which names them
    method = quantisation_of(config)
    if method:
        options["device_map"] = {"": target.device}
    if target.processes > 1:
        options["distributed_config"] = DistributedConfig(tp_size=target.processes)
    if prefix:
        options["key_mapping"] = {f"^{re.escape(prefix)}": ""}
    try:
        with translated(files.name, "weights"):
            model, info = auto.from_pretrained(files.folder, config=config, output_loading_info=True, **options)
    except ModelError as error:
        if method is None:
            raise
        reason = str(error).partition(f"{files.name}: ")[2]
        raise ModelError(f"{files.name} is quantised ({method}), and cannot be loaded here: {reason}") from error
    if info["mismatched_keys"]:
        shown = ", ".join(
            f"{name} {list(stored)} in place of {list(wanted)}"
            for name, stored, wanted in sorted(info["mismatched_keys"])[:4]
        )
        raise HeadError(f"{files.name} holds weights of another shape than config.json says: {shown}.")
    _check_left_over(files, config, set(info["unexpected_keys"]) - set(known), strict=strict)
    missing = set(info["missing_keys"])
    if method is None:
        return model.to(target.device), missing
    with translated(files.name, f"quantised weights ({method})"), torch.inference_mode():
        # compressed-tensors unpacks weights at the first forward of the whole model.
        model(input_ids=torch.arange(1, 5, device=model.device)[None])
    return model, missing


def check_missing(files: CheckpointFiles, missing: Iterable[str]) -> None:
    """Checks that nothing would be drawn at random.

    Raises:
        ModelError: There is no file of weights.
        HeadError: Weights are missing.
    """
    names = sorted(missing)
    if names and not files.tensors:
        raise ModelError(
            f"{files.name} has no weights: neither model.safetensors nor pytorch_model.bin, whole or in parts."
        )
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        is_layer = any(re.search(r"\.\d+\.", name) for name in names)
        cure = (
            "Does config.json belong to these weights, and are they complete?"
            if is_layer
            else "Was it saved without its head (LoRA needs modules_to_save)?"
        )
        raise HeadError(f"{files.name} lacks weights: {shown}. Loaded so, they would be random. {cure}")


def _check_left_over(files: CheckpointFiles, config: PreTrainedConfig, unexpected: set[str], *, strict: bool) -> None:
    vocabulary = getattr(config.get_text_config(), "vocab_size", 0) or 0
    names = []
    for name in sorted(unexpected):
        stored = files.tensors.get(name)
        if not is_harmless(name, stored.shape if stored else (), vocabulary):
            names.append(name)
    if names:
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        lora = " LoRA matrices must be merged (peft: merge_and_unload)." if any("lora_" in one for one in names) else ""
        message = f"{files.name} holds weights that its model has no place for: {shown}.{lora}"
        if strict:
            raise HeadError(f"{message} Loaded without them, its rewards would be wrong.")
        _log.warning("%s They are not trained.", message)
