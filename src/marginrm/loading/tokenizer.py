"""A checkpoint's tokenizer, and the most tokens that its sequences may have."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from marginrm.errors import ConfigError, ModelError
from marginrm.forward.rope import scaled_context
from marginrm.loading.foreign import translated

_UNBOUNDED = 1_000_000  # tokenizers without a limit say 1e30
_USUAL_LENGTH = 4096
_VOCABULARIES = (
    "tokenizer.json",
    "tekken.json",
    "vocab*",
    "*.model",
    "*.tiktoken",
)  # files that tokenizers are read from


def load_tokenizer(folder: Path, name: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a checkpoint.

    Raises:
        ModelError: There is none, or a package that it needs is not installed.
    """
    try:
        with translated(name, "tokenizer"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
            empty = not len(tokenizer) or _lacks_files(tokenizer, folder)
    except ModelError as error:
        if not any(next(folder.glob(pattern), None) for pattern in _VOCABULARIES):
            raise _no_tokenizer(name) from error
        if not _is_sentencepiece(folder):
            raise
        missing = _missing_packages()
        cure = f"Run: pip install {' '.join(missing)}, or save" if missing else "Save"
        raise ModelError(
            f"{name} has a SentencePiece tokenizer without a tokenizer.json, and "
            f"{' and '.join(missing) + ' is not installed' if missing else 'transformers cannot convert it here'}. {cure} "
            f"the tokenizer again where it can be read (save_pretrained writes tokenizer.json). {error}"
        ) from error
    if empty:
        raise _no_tokenizer(name)
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        raise ModelError(
            f"{name} has several chat templates ({', '.join(tokenizer.chat_template)}), and none of them is called default. "
            "Give that name to the one that the rewards were trained with."
        )
    return tokenizer


def length_limit(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, requested: int | None, model: nn.Module | None = None
) -> int:
    """Returns the most tokens a sequence may have.

    Args:
        config: The model's configuration.
        tokenizer: Its tokenizer.
        requested: What the user asks for, or None.
        model: The model, to see whether its first positions are kept for padding (RoBERTa and kin).

    Raises:
        ConfigError: More was requested than the model has positions for.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    positions = max(positions, scaled_context(config) or 0) if positions and positions > 0 else None
    if positions and model is not None:
        positions -= _reserved_positions(model, positions)
    if requested is not None:
        if requested < 8 or (positions and requested > positions):
            raise ConfigError(f"max_length = {requested:,}: this model takes 8 to {positions or _UNBOUNDED:,} tokens.")
        return requested
    limits = [limit for limit in (positions, tokenizer.model_max_length) if limit and limit < _UNBOUNDED]
    return min(limits) if limits else _USUAL_LENGTH


def _reserved_positions(model: nn.Module, positions: int) -> int:
    """Returns how many of the learned positions no token gets: those up to the padding's, as in RoBERTa."""
    for name, part in model.named_modules():
        learned = isinstance(part, nn.Embedding) and part.num_embeddings == positions and "position" in name
        if learned and isinstance(part, nn.Embedding) and part.padding_idx is not None:
            return part.padding_idx + 1
    return 0


def _is_sentencepiece(folder: Path) -> bool:
    return any(folder.glob("*.model")) and not (folder / "tokenizer.json").is_file()


def _missing_packages() -> list[str]:
    """Returns the packages without which SentencePiece tokenizers cannot be read, as far as they are missing."""
    needed = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    return [name for name, module in needed.items() if not _has(module)]


def _no_tokenizer(name: str) -> ModelError:
    return ModelError(f"{name} has no tokenizer. Copy tokenizer.json and tokenizer_config.json beside the weights.")


def _lacks_files(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Returns whether none of a tokenizer's files is there: transformers then makes one of a token or two."""
    wanted = set(tokenizer.vocab_files_names.values())
    return bool(wanted) and not any((folder / one).is_file() for one in {*wanted, "tokenizer.json", "tekken.json"})


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
