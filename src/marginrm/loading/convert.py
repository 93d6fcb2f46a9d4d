"""Checkpoints of other forms -> a plain folder of safetensors that every command takes: GGUF, `.bin`, LoRA adapters."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from marginrm.atomic_file import share_weights
from marginrm.errors import ConfigError, ModelError
from marginrm.loading.adapters import base_of, tokenizer_folder, with_adapter
from marginrm.loading.files import CheckpointFiles, find_checkpoint
from marginrm.loading.foreign import translated
from marginrm.loading.heads import is_harmless
from marginrm.loading.scoring import load_for_scoring
from marginrm.loading.tokenizer import load_tokenizer
from marginrm.manifest import MANIFEST_NAME

_GGUF = ".gguf"


def convert(path: str | Path, output: str | Path, *, dtype: torch.dtype = torch.float32) -> str:
    """Writes a checkpoint as a plain folder: weights as safetensors, configuration and tokenizer.

    Args:
        path: A `.gguf` file or a folder with one, a folder or Hub name with weights in `.bin` files, or a LoRA adapter,
            which is merged into its base model.
        output: The folder to write; it must not exist, or be empty.
        dtype: Of the written weights. Quantised weights of GGUF are dequantised.

    Returns:
        The class of the written model.

    Raises:
        ModelError: There is no such checkpoint, it cannot be read, or its class lacks weights or has no place for them.
        ConfigError: A package is missing, the folder to write holds files, or marginrm wrote the checkpoint.
    """
    folder = Path(output)
    if (Path(path) / MANIFEST_NAME).is_file():
        raise ConfigError(f"{path} has a {MANIFEST_NAME}, so it is a plain folder already, and a copy would lose that.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} holds files already. Give another folder, or remove it.")
    gguf = _gguf_file(Path(path))
    model, tokenizer = _from_gguf(gguf) if gguf else _from_folder(find_checkpoint(path))
    nn.Module.to(model, dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    share_weights(folder)
    return type(model).__name__


def _gguf_file(path: Path) -> Path | None:
    """Returns the GGUF file that is meant: the path itself, or the only one in a folder without a configuration."""
    if path.is_file() and path.suffix == _GGUF:
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    found = sorted(path.glob(f"*{_GGUF}"))
    if len(found) > 1:
        raise ModelError(f"{path} holds {len(found)} GGUF files. Give the path of one, such as {found[0]}.")
    return found[0] if found else None


def _from_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{file}: GGUF needs the package gguf. Run: pip install gguf")
    with translated(str(file), "model"):
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        model: Any = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name)
    # The weights are plain now; transformers would write the configuration of the quantised ones.
    model.hf_quantizer = None
    del model.config.quantization_config
    return cast("PreTrainedModel", model), tokenizer


def _from_folder(files: CheckpointFiles) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if files.is_adapter:
        return _from_adapter(files)
    names: list[str] = files.config.get("architectures") or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise ModelError(
            f"{files.name}: config.json names no class of transformers in `architectures` ({json.dumps(names)}), so the "
            "kind of model is not known. Add the name of its class."
        )
    with translated(files.name, "model"):
        model, loaded = kind.from_pretrained(files.folder, dtype=torch.float32, output_loading_info=True)
    _check_complete(files, names[0], loaded)
    return model, load_tokenizer(files.folder, files.name, trust_remote_code=False)


def _check_complete(files: CheckpointFiles, kind: str, loaded: dict[str, Any]) -> None:
    """Checks that a class has read every weight that rewards may depend on, and that it made up none.

    Raises:
        ModelError: It has not, such as a value head beside a language model.
    """
    stored, vocabulary = files.tensors, int(files.config.get("vocab_size") or 0)
    beside = {name for name, one in stored.items() if one.file.name.startswith("value_head")}
    lost = sorted(
        name
        for name in beside | set(loaded["unexpected_keys"])
        if not is_harmless(name, stored[name].shape if name in stored else (), vocabulary)
    )
    if lost:
        raise ModelError(
            f"{files.name}: {kind} has no place for {', '.join(lost[:4])}, so the written model would lack it. Give the "
            "folder itself to `marginrm serve`, which finds a head by its weights."
        )
    made_up = sorted(loaded["missing_keys"])
    if made_up:
        raise ModelError(
            f"{files.name}: the files have no {', '.join(made_up[:4])}, which {kind} needs, so the written model would have "
            "random weights. Fetch the checkpoint again, or correct `architectures` in its config.json."
        )


def _from_adapter(files: CheckpointFiles) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if files.adapter.get("task_type") != "CAUSAL_LM":
        loaded = load_for_scoring(files, dtype="float32", device="cpu", purpose=None)
        return loaded.module.base, loaded.encoder.tokenizer
    base = base_of(files)
    with translated(base.name, "model"):
        model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    folder = tokenizer_folder(files, base)
    return with_adapter(model, files), load_tokenizer(folder, files.name, trust_remote_code=False)
