"""Checkpoints that are not reward models of one response, told by their true names."""

from __future__ import annotations

import re

from transformers import PreTrainedConfig

from marginrm.errors import HeadError
from marginrm.loading.files import CheckpointFiles

_PAIRWISE = re.compile(r"Pair(RM|wise|Ranker|Ranking|Preference)", re.IGNORECASE)
_PROCESS = re.compile(r"ProcessReward|ForPRM|PRM(Model)?$")


def refuse_by_kind(files: CheckpointFiles, config: PreTrainedConfig, *, reads_steps: bool) -> None:
    """Refuses what cannot give one reward to one response, whatever its weights are called.

    Args:
        files: The checkpoint.
        config: Its configuration.
        reads_steps: Whether it is known how its steps are read.

    Raises:
        HeadError: The checkpoint is a pairwise ranker, a process reward model of an unknown form or a
            sequence-to-sequence language model.
    """
    name = files.class_name
    if _PAIRWISE.search(name):
        raise HeadError(
            f"{files.name} holds a {name}, a pairwise ranker: it reads two responses in one sequence and says which is "
            "better, so no response has a reward of its own. Use a model that scores one response at a time."
        )
    if _PROCESS.search(name) and not reads_steps:
        raise HeadError(
            f"{files.name} holds a {name}, a process reward model, and nothing in it says what ends a step. Say it: "
            "--steps SEPARATOR, or --steps with a known form (Python: ReadingOptions(steps=...)); the code that trained "
            "it has it."
        )
    if config.is_encoder_decoder and name.endswith("ConditionalGeneration"):
        raise HeadError(
            f"{files.name} holds a {name}, a sequence-to-sequence language model without a reward head: its verdict is "
            "text that it generates. Use a model with a reward head."
        )


def no_head(files: CheckpointFiles) -> HeadError:
    """Returns the error for a checkpoint that holds a language model or a bare backbone."""
    name = files.class_name or "model"
    if "CausalLM" in name or "LMHead" in name or "ConditionalGeneration" in name:
        return HeadError(
            f"{files.name} holds a {name}, a causal language model without a reward head. If its reward is the logit of "
            "a token, say of which: --reward-tokens id:0 or --reward-tokens yes,no (Python: "
            "ReadingOptions(reward_tokens=...)); for a reranker with a text of its own add --frame. A judge that "
            "generates its verdict as text cannot be served. To train a head: `marginrm train`."
        )
    return HeadError(
        f"{files.name} holds a {name} without a reward head: no weight of it gives a value per sequence. Train one with "
        "`marginrm train`, or give the folder in which the head was saved (LoRA needs modules_to_save)."
    )


def refuse_token_classes(files: CheckpointFiles, rows: int) -> None:
    """Refuses a token classifier with more classes than two, unless their weights are given.

    Raises:
        HeadError: It is one.
    """
    if files.class_name.endswith("ForTokenClassification") and rows > 2:
        raise HeadError(
            f"{files.name} holds a {files.class_name} with {rows} classes for each token. A process reward model, as TRL "
            "trains them, has two; if this is one, say what ends its steps and how its classes make a value: --steps "
            f"SEPARATOR --label-weights with {rows} numbers."
        )
