"""LoRA: small trained matrices beside frozen weights; the head is trained itself, and export merges the matrices."""

from __future__ import annotations

from typing import cast

from peft import LoraConfig, TaskType, get_peft_model
from transformers import PreTrainedModel

from marginrm.errors import ConfigError
from marginrm.forward.eligibility import build_module
from marginrm.forward.module import RewardModule
from marginrm_training.config import LoraSection


def with_lora(module: RewardModule, section: LoraSection, max_length: int) -> RewardModule:
    """Freezes a module's backbone, and puts LoRA matrices (arXiv 2106.09685) beside its linear layers.

    Dropout stays off. The head is among `modules_to_save`: it is trained itself, and is in the saved weights.

    Raises:
        ConfigError: A target is not a layer of this model.
    """
    settings = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=0.0,
        target_modules=list(section.targets) if section.targets else "all-linear",
    )
    try:
        wrapped = get_peft_model(module.base, settings)
    except ValueError as error:
        raise ConfigError(f"model.lora.targets: {' '.join(str(error).split())[:300]}") from error
    return build_module(cast("PreTrainedModel", wrapped), max_length=max_length)


def merge_lora(module: RewardModule) -> None:
    """Adds the LoRA matrices to the weights that they belong to, in place; does nothing without LoRA."""
    merge = getattr(module.classifier, "merge_and_unload", None)
    if merge is not None:
        module.classifier = merge()
