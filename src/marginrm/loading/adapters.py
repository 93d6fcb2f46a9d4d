"""Checkpoints that are a LoRA adapter alone: its base model is loaded, and the adapter merged into it."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from marginrm.errors import HeadError, ModelError
from marginrm.loading.files import ADAPTER_CONFIG, CheckpointFiles, StoredTensor, find_checkpoint
from marginrm.loading.foreign import translated

_PREFIX = "base_model.model."


def base_of(files: CheckpointFiles) -> CheckpointFiles:
    """Finds the checkpoint that an adapter was trained on.

    Raises:
        ModelError: peft is not installed, or the base cannot be found.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError(
            f'{files.name} is a LoRA adapter, and peft is not installed. Run: pip install "peft>=0.19", or merge the adapter '
            "into its base model and save that."
        )
    name = files.adapter.get("base_model_name_or_path")
    if not name:
        raise ModelError(
            f"{files.name}/{ADAPTER_CONFIG} does not name the base_model_name_or_path that the adapter is for."
        )
    beside = files.folder / str(name)
    try:
        return find_checkpoint(beside if beside.is_dir() else str(name), files.adapter.get("revision"))
    except ModelError as error:
        raise ModelError(f"{files.name} is a LoRA adapter whose base model cannot be found: {error}") from error


def on_base(files: CheckpointFiles, base: CheckpointFiles) -> CheckpointFiles:
    """Returns the base model's files under the adapter's name, with the weights that the adapter adds to them."""
    return replace(base, name=files.name, added=_whole_weights(files))


def merge_adapter(model: PreTrainedModel, files: CheckpointFiles, *, without: Iterable[str] = ()) -> PreTrainedModel:
    """Merges an adapter into the model that it was trained on.

    Args:
        model: A classifier whose modules are called as in training.
        files: The adapter.
        without: Names of weights in the adapter that the model has already: those of a head of another form.

    Raises:
        ModelError: peft cannot apply it.
        HeadError: Weights of it have no place in the model.
    """
    from peft import PeftConfig, PeftModel
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    known = tuple(f"{_PREFIX}{name}" for name in without)
    with translated(files.name, "adapter"), warnings.catch_warnings():
        # peft 0.21 asks for gradient checkpointing by a name that transformers 5.23 calls deprecated.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        config = PeftConfig.from_pretrained(str(files.folder))
        config.inference_mode = True
        if known and config.modules_to_save:
            here = {part for name in without for part in name.split(".")}
            config.modules_to_save = [module for module in config.modules_to_save if module not in here] or None
        wrapped = PeftModel(model, config)
        weights = load_peft_weights(str(files.folder), device="cpu")
        result: Any = set_peft_model_state_dict(
            wrapped, {key: value for key, value in weights.items() if key not in known}
        )
        # peft writes embeddings twice where they were resized: by their own name and as modules_to_save.
        left = sorted(key for key in result.unexpected_keys if key.replace(".modules_to_save", "") not in weights)
        if left:
            shown = ", ".join(left[:6])
            raise HeadError(f"{files.name} holds weights that its base model has no place for: {shown}.")
        return cast("PreTrainedModel", wrapped.to(model.device).merge_and_unload())


def with_adapter(model: PreTrainedModel, adapter: CheckpointFiles | None) -> PreTrainedModel:
    """Returns a model of the class that an adapter was trained on, with the adapter merged into it, if there is one."""
    if adapter is None:
        return model
    resize(model, embedding_rows(adapter))
    return merge_adapter(model, adapter)


def _whole_weights(files: CheckpointFiles) -> dict[str, StoredTensor]:
    """Returns an adapter's weights that are not LoRA matrices, by the names that they have in the model."""
    return {
        name.removeprefix(_PREFIX).replace(".modules_to_save.", "."): stored
        for name, stored in files.tensors.items()
        if "lora_" not in name and ".original_module." not in name
    }


def embedding_rows(files: CheckpointFiles) -> int | None:
    """Returns how many token embeddings an adapter was trained with, if it holds them."""
    for name, stored in _whole_weights(files).items():
        if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight")):
            return stored.shape[0]
    return None


def resize(model: PreTrainedModel, rows: int | None) -> None:
    """Gives a base model as many token embeddings as its adapter was trained with."""
    embeddings = cast("nn.Embedding", model.get_input_embeddings())
    if rows and rows != embeddings.num_embeddings:
        model.resize_token_embeddings(rows)


def tokenizer_folder(files: CheckpointFiles, base: CheckpointFiles) -> Path:
    """Returns the folder whose tokenizer is meant: the adapter's where it has one."""
    own = any(files.has(name) for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"))
    return files.folder if own else base.folder
