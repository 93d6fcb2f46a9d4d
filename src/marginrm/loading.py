"""Checkpoints from a folder or the Hub -> a `RewardModule` and its `Encoder`; foreign errors are translated here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from marginrm.encoding import Encoder
from marginrm.errors import ConfigError, HeadError, MarginRMError, ModelError
from marginrm.forward.eligibility import build_module
from marginrm.forward.module import RewardModule
from marginrm.text import Dtype
from marginrm.tuning.timing import best_seconds
from marginrm.tuning.tune import Purpose, tune

_log = logging.getLogger(__name__)
_UNBOUNDED = 1_000_000  # tokenizers without a limit say 1e30
_DROPOUTS = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "classifier_dropout",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "mlp_dropout",
    "resid_pdrop",
)


def load_for_scoring(
    path: str | Path,
    *,
    dtype: Dtype = "auto",
    device: str = "auto",
    max_length: int | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    purpose: Purpose | None = "scoring",
) -> tuple[RewardModule, Encoder]:
    """Loads a trained reward model; weights must be safetensors and the head must be in them.

    Args:
        path: A folder that `save_pretrained` wrote, or a name on the Hugging Face Hub.
        dtype: Of the backbone; `auto` takes what a short measurement finds faster on this device.
        device: `cpu`, `cuda`, ...; `auto` takes CUDA where there is one.
        max_length: The most tokens a sequence may have; by default what model and tokenizer allow.
        trust_remote_code: Whether code that comes with the checkpoint may run. Off unless the user asks.
        revision: Branch, tag or commit on the Hub.
        purpose: As for `tune`; None leaves the module as it was built. Packed weights can be neither trained nor saved.

    Raises:
        ModelError: There is no such checkpoint, or it cannot be read.
        HeadError: It has no trained head with one label.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    target = _device(device)
    config = _config(path, options)
    architecture = (config.architectures or ["?"])[0]
    if not architecture.endswith("ForSequenceClassification"):
        raise HeadError(
            f"{path} holds a {architecture}, which has no reward head. Train one with `marginrm train`, or give a "
            "sequence-classification checkpoint with num_labels = 1."
        )
    classifier, missing = _classifier(path, config, resolve_dtype(dtype, target), options)
    if missing:
        raise HeadError(
            f"{path} lacks weights: {', '.join(sorted(missing)[:5])}. Loaded so, they would be random. Was it saved "
            "without its head (LoRA needs modules_to_save)?"
        )
    tokenizer = _tokenizer(path, options)
    limit = length_limit(config, tokenizer, max_length)
    classifier.to(target)  # type: ignore[arg-type]  # transformers wraps it untyped
    module = build_module(classifier, max_length=limit).eval()
    if purpose:
        tune(module, purpose)
    return module, Encoder(tokenizer, max_length=limit, architecture=module.architecture)


def load_for_training(
    path: str | Path,
    *,
    seed: int,
    max_length: int | None = None,
    positions: int | None = None,
    head_std: float | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> tuple[RewardModule, Encoder]:
    """Loads any backbone in float32, with a fresh reward head where the checkpoint has none, ready to be trained.

    The seed is set before the head is drawn, and every dropout is off. A padding token that is missing or equal to EOS
    is added and saved, since other software pools by it.

    Args:
        path: A folder or a name on the Hub: a language model, an encoder or a reward model.
        seed: Of the new head's weights.
        max_length: As for `load_for_scoring`.
        positions: As for `repeat_positions`; None leaves them as they are.
        head_std: As for `draw_head`.
        trust_remote_code: As for `load_for_scoring`.
        revision: As for `load_for_scoring`.

    Raises:
        ModelError: As for `load_for_scoring`.
        ConfigError: `max_length` or `positions` does not suit the model, or it has a head and `head_std` is given.
    """
    set_seed(seed)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    config = _config(path, options)
    has_head = (config.architectures or ["?"])[0].endswith("ForSequenceClassification")
    if not has_head:
        config.num_labels = 1
    for name in _DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    classifier, missing = _classifier(path, config, torch.float32, options)
    tokenizer = _tokenizer(path, options)
    _ensure_padding(classifier, tokenizer)
    if positions is not None:
        repeat_positions(classifier, positions)
        tokenizer.model_max_length = positions
    if missing:
        _log.info("New weights, not in %s: %s", path, ", ".join(sorted(missing)))
    if not draw_head(classifier, missing, seed, head_std) and head_std is not None:
        raise ConfigError(
            f"head_std = {head_std:g}: {path} has a reward head, which stays as it is. Take the setting out."
        )
    for part in classifier.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    limit = length_limit(classifier.config, tokenizer, max_length)
    module = build_module(classifier, max_length=limit)
    return module, Encoder(tokenizer, max_length=limit, architecture=module.architecture)


def draw_head(classifier: PreTrainedModel, missing: set[str], seed: int, std: float | None = None) -> bool:
    """Draws the final linear layer if it is among the weights that were missing, its bias 0.

    Args:
        classifier: The model.
        missing: Names of the weights that its checkpoint lacks.
        seed: Of the draw.
        std: Standard deviation of the weights; by default 1 / (hidden + 1), as OpenRLHF has it. A wider one learns
            faster what is in the training prompts, and no better what is in others: docs/experiments.md.

    Returns:
        Whether it was drawn.
    """
    for name in ("score", "classifier"):
        head = getattr(classifier, name, None)
        if isinstance(head, nn.Linear) and f"{name}.weight" in missing:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                head.weight.normal_(0.0, std or 1.0 / (head.in_features + 1), generator=generator)
                if head.bias is not None:
                    head.bias.zero_()
            return True
    return False


def repeat_positions(classifier: PreTrainedModel, positions: int) -> None:
    """Lets an encoder with learned positions read longer texts: its position embeddings are repeated.

    So Longformer started from RoBERTa (arXiv 2004.05150, section 5). The new positions have to be trained.

    Args:
        classifier: A BERT; it is changed in place, its configuration too.
        positions: How many it shall have, more than now.

    Raises:
        ConfigError: Its positions are not learned, or it has that many.
    """
    embeddings = getattr(getattr(classifier, "bert", None), "embeddings", None)
    if embeddings is None:
        raise ConfigError(
            f"model.positions: {type(classifier).__name__} has no learned positions of BERT's kind to repeat. Take the "
            "setting out; rotary positions reach as far as model.max_length says."
        )
    now = embeddings.position_embeddings.weight
    if positions <= len(now):
        raise ConfigError(
            f"model.positions = {positions:,}: the model has {len(now):,} already. Give more, or nothing."
        )
    repeated = now.detach().repeat(-(-positions // len(now)), 1)[:positions]
    embeddings.position_embeddings = nn.Embedding(positions, repeated.shape[1], _weight=repeated)
    embeddings.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)
    embeddings.register_buffer("token_type_ids", torch.zeros(1, positions, dtype=torch.long), persistent=False)
    classifier.config.max_position_embeddings = positions


def length_limit(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, requested: int | None) -> int:
    """Returns the most tokens a sequence may have.

    Raises:
        ConfigError: More was requested than the model has positions for.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if requested is not None:
        if requested < 8 or (positions and requested > positions):
            raise ConfigError(f"max_length = {requested:,}: this model takes 8 to {positions or _UNBOUNDED:,} tokens.")
        return requested
    stated = tokenizer.model_max_length
    limits = [limit for limit in (positions, stated) if limit and limit < _UNBOUNDED]
    return min(limits) if limits else 4096


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Returns the torch dtype; `auto` is bfloat16 where a matrix product of it is measurably faster, else float32."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    kinds = torch.float32, torch.bfloat16
    seconds = dict(zip(kinds, best_seconds(*(_matmul(kind, device) for kind in kinds), times=4), strict=True))
    faster = seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]
    chosen = torch.bfloat16 if faster else torch.float32
    _log.info(
        "dtype %s: a matrix product takes %.2f ms in float32 and %.2f ms in bfloat16 on %s",
        str(chosen).removeprefix("torch."),
        seconds[torch.float32] * 1e3,
        seconds[torch.bfloat16] * 1e3,
        device,
    )
    return chosen


def _matmul(dtype: torch.dtype, device: torch.device) -> Callable[[], float]:
    left, right = (torch.ones(512, 512, dtype=dtype, device=device) for _ in range(2))
    return lambda: float((left @ right)[0, 0])  # reading the result waits for the device


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device = {name!r} is unknown. Use auto, cpu, cuda or cuda:N.") from error


@contextmanager
def _translated(path: str | Path, what: str) -> Iterator[None]:
    """Turns what transformers, tokenizers and safetensors raise into a ModelError that names path and part."""
    try:
        yield
    except MarginRMError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ImportError, TypeError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ModelError(f"Cannot load the {what} of {path}: {reason}") from error
    except Exception as error:
        # The tokenizers library raises bare Exception for a broken tokenizer.json; anything else is a bug and goes on.
        if type(error) is not Exception:
            raise
        raise ModelError(f"Cannot load the {what} of {path}: {error}") from error


def _config(path: str | Path, options: dict[str, Any]) -> PreTrainedConfig:
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"{path} has no config.json, so it is no model folder. Give what save_pretrained wrote.")
    if not folder.exists() and (folder.is_absolute() or str(path).count("/") != 1):
        raise ModelError(f"{path}: no such folder, and no name on the Hugging Face Hub (those look like owner/model).")
    with _translated(path, "configuration"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, **options)
    return config


def _classifier(
    path: str | Path, config: PreTrainedConfig, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[PreTrainedModel, set[str]]:
    """Returns the classifier and the names of the weights that the checkpoint does not have."""
    with _translated(path, "weights"):
        classifier, info = AutoModelForSequenceClassification.from_pretrained(
            path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    if info["mismatched_keys"]:
        raise HeadError(f"{path}: weights of another shape than config.json says: {sorted(info['mismatched_keys'])}")
    return classifier, set(info["missing_keys"])


def _tokenizer(path: str | Path, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    with _translated(path, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **options)
    if not getattr(tokenizer, "vocab_size", 0):
        raise ModelError(f"{path} has no tokenizer. Copy tokenizer.json and tokenizer_config.json beside the weights.")
    return tokenizer


def _ensure_padding(classifier: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        _log.info("Added a padding token, since this tokenizer has none of its own")
        if len(tokenizer) > cast("nn.Embedding", classifier.get_input_embeddings()).num_embeddings:
            classifier.resize_token_embeddings(len(tokenizer))
    classifier.config.pad_token_id = tokenizer.pad_token_id
