"""Checkpoints whose class comes with them (`auto_map` in config.json): their own forward pass is the truth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from marginrm.errors import HeadError, ModelError
from marginrm.loading.backbone import is_causal
from marginrm.loading.files import CheckpointFiles
from marginrm.loading.weights import Target, check_missing, load_model

# Own classes whose published forward passes are what marginrm makes of their weights: one head, read at the last token.
_READABLE = frozenset(
    {
        "INFORMForSequenceClassification",  # infly/INF-ORM-Llama3.1-70B
        "InternLM2ForRewardModel",  # internlm/internlm2-7b-reward; reads the reward token that is put at the end
        "LlamaRewardModel",  # openbmb/UltraRM-13b, Eurus-RM-7b
        "Qwen2ForPrmModel",  # Skywork/Skywork-o1-Open-PRM-Qwen-2.5-7B
        "Qwen2ForProcessRewardModel",  # Qwen/Qwen2.5-Math-PRM-7B; reads the token after each step
        "Qwen2ForRewardModel",  # Qwen/Qwen2.5-Math-RM-72B, WorldPM-72B
    }
)


@dataclass(frozen=True, slots=True)
class OwnCode:
    """A class that comes with a checkpoint.

    Attributes:
        auto: The Auto class of transformers that loads it.
        class_name: Its name.
        file: Where it is, as config.json says.
    """

    auto: str
    class_name: str
    file: str


def own_code_of(files: CheckpointFiles) -> OwnCode | None:
    """Returns the class of its own that computes a checkpoint's rewards, or None where transformers has the class.

    A language model's own class is not one: it gives no reward, and only its backbone is used.
    """
    name = files.class_name
    if hasattr(transformers, name):
        return None
    for entry in _entries(files):
        if entry.class_name == name or not name:
            return None if entry.auto == "AutoModelForCausalLM" else entry
    return None


def check_trusted(files: CheckpointFiles, *, trusted: bool) -> None:
    """Checks that a class of its own may run, or that its weights can be read without.

    Raises:
        ModelError: Neither.
    """
    own = own_code_of(files)
    if own is None or trusted or own.class_name in _READABLE:
        return
    raise ModelError(
        f"{files.name} holds a {own.class_name}, whose forward pass is own code ({own.file}). Look at it, and if you trust "
        "it, let it run: --trust-remote-code (Python: trust_remote_code=True)."
    )


def unknown_type(files: CheckpointFiles) -> ModelError:
    """Returns the error for a model type that transformers does not know."""
    kind, name = files.config.get("model_type"), files.class_name or "model"
    if files.config.get("auto_map"):
        return ModelError(
            f"{files.name} holds a {name} of type {kind!r}, which transformers {transformers.__version__} does not have: it "
            "is own code that comes with the checkpoint. Look at it, and if you trust it, let it run: "
            "--trust-remote-code (Python: trust_remote_code=True)."
        )
    return ModelError(
        f"{files.name} holds a {name} of type {kind!r}, which transformers {transformers.__version__} does not know. A "
        "newer transformers may."
    )


def load_own_code(own: OwnCode, files: CheckpointFiles, config: PreTrainedConfig, target: Target) -> PreTrainedModel:
    """Loads the class that comes with a checkpoint.

    Raises:
        ModelError: It cannot be loaded.
        HeadError: Weights are missing or left over.
    """
    model, missing = load_model(getattr(transformers, own.auto), files, config, target)
    check_missing(files, missing)
    model.eval()
    _name_head(model)
    return model


def _name_head(model: PreTrainedModel) -> None:
    """Calls a lone linear layer beside the backbone `score`, too, so that the probe tries it at the last token."""
    beside = [part for part in model.children() if part is not model.base_model]
    lone = beside[0] if len(beside) == 1 and model.base_model is not model else None
    if isinstance(lone, nn.Linear) and lone.out_features == 1 and not hasattr(model, "score"):
        model.score = lone


def weigh_values(model: PreTrainedModel, weights: tuple[float, ...]) -> None:
    """Makes one reward of the several values that an own class gives, in place: sum of weight x value.

    Raises:
        HeadError: At a forward pass: it gives another number of values.
    """
    factors = torch.tensor(weights, device=model.device)

    def weigh(_: nn.Module, inputs: Any, output: Any) -> SequenceClassifierOutput:
        values = output.logits if hasattr(output, "logits") else output[0]
        if values.shape[-1] != len(weights):
            raise HeadError(f"label_weights has {len(weights)} numbers; the model gives {values.shape[-1]} values.")
        return SequenceClassifierOutput(logits=values.float() @ factors[:, None])

    model.register_forward_hook(weigh)


def seems_causal(model: PreTrainedModel, config: PreTrainedConfig, *, has_template: bool) -> bool:
    """Returns whether a class of its own is a decoder: by its backbone, or by the chat template where that is hidden."""
    backbone = model.base_model
    if backbone is model or not isinstance(backbone, nn.Module):
        return has_template
    try:
        return is_causal(backbone, config)
    except Exception:  # noqa: BLE001 - own code may raise anything, and this is only a look at it
        return has_template


def _entries(files: CheckpointFiles) -> Iterator[OwnCode]:
    given = files.config.get("auto_map") or {}
    order = (
        "AutoModelForSequenceClassification",
        "AutoModel",
        "AutoModelForTokenClassification",
        "AutoModelForCausalLM",
    )
    for auto in sorted((key for key in given if key in order), key=order.index):
        reference = given[auto][0] if isinstance(given[auto], list) else given[auto]
        module, _, class_name = str(reference).rpartition(".")
        yield OwnCode(auto, class_name, f"{module.rpartition('--')[2]}.py")
