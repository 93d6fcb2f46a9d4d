"""The encoder of a checkpoint: how its texts become token ids, read from its configuration, tokenizer and manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from marginrm.encoding import Encoder
from marginrm.encoding.frames import frame_of
from marginrm.encoding.special_tokens import EncodingPolicy
from marginrm.errors import ConfigError, ModelError
from marginrm.loading.adapters import base_of, tokenizer_folder
from marginrm.loading.config import load_config
from marginrm.loading.files import CheckpointFiles, find_checkpoint
from marginrm.loading.foreign import translated
from marginrm.loading.process_reward import with_steps
from marginrm.loading.token_logits import TokenReward, reads_tokens, token_reward_of
from marginrm.loading.tokenizer import length_limit, load_tokenizer
from marginrm.manifest import Manifest
from marginrm.reading import ReadingOptions


def load_encoder(
    path: str | Path | CheckpointFiles,
    *,
    most_tokens: int,
    max_length: int | None = None,
    reading: ReadingOptions | None = None,
    manifest: Manifest | None = None,
) -> Encoder:
    """Loads the encoder of a decoder whose forward pass another program runs. Weights are not read, and need not exist.

    Args:
        path: A folder, a name on the Hugging Face Hub, or what `find_checkpoint` found.
        most_tokens: The most tokens of a sequence that the other program takes.
        max_length: The most tokens that are asked for; by default what the model, the manifest and that program allow.
        reading: What the user says about the checkpoint.
        manifest: What marginrm recorded of it.

    Raises:
        ModelError: There is no such checkpoint, or its rewards need more than the token ids of one sequence: it is an
            encoder, or a process reward model.
        ConfigError: An option is not a valid one for it.
    """
    files = path if isinstance(path, CheckpointFiles) else find_checkpoint(path, weights=False)
    if max_length is not None and max_length > most_tokens:
        raise ConfigError(
            f"max_length = {max_length:,}: the server that computes the rewards takes {most_tokens:,} tokens."
        )
    options = with_manifest(reading or ReadingOptions(), manifest)
    base = base_of(files) if files.is_adapter else files
    config = load_config(base, trust_remote_code=options.trust_remote_code)
    _check_kind(base, config, options, manifest)
    with translated(files.name, "model"):
        folder = tokenizer_folder(files, base)
        tokenizer = load_tokenizer(folder, files.name, trust_remote_code=options.trust_remote_code)
        tokens = token_reward_of(base, tokenizer, options) if reads_tokens(base, options) else None
    recorded = manifest.encoding.max_length if manifest else None
    limit = min(length_limit(config, tokenizer, max_length or recorded), most_tokens)
    # transformers' classifiers pass over padding at the end; models of other classes are read at the last token.
    skips = base.class_name.endswith("ForSequenceClassification") and "value_head_prefix" not in base.config
    policy = policy_of(base, config, options, tokens, manifest, skips_padding=skips)
    return Encoder(tokenizer, max_length=limit, architecture="decoder", policy=policy)


def with_manifest(options: ReadingOptions, manifest: Manifest | None) -> ReadingOptions:
    """Returns the options with what a manifest recorded of the head and the frame.

    Raises:
        ConfigError: An option says otherwise.
    """
    if manifest is None:
        return options
    head, encoding = manifest.head, manifest.encoding
    recorded: dict[str, Any] = {
        "label_weights": tuple(head.label_weights) if head and head.label_weights else None,
        "reward_tokens": tuple(head.reward_tokens) if head and head.reward_tokens else None,
        "head_activation": head.head_activation if head else None,
        "steps": head.steps if head else None,
        "step_value": head.step_value if head else None,
        "aggregate": head.aggregate if head else None,
        "frame": encoding.frame,
        "bos": encoding.bos if encoding.bos != "single" else "auto",
        "eos": encoding.eos,
    }
    defaults = ReadingOptions()
    said = [name for name, value in recorded.items() if getattr(options, name) not in (getattr(defaults, name), value)]
    if said:
        raise ConfigError(
            f"{', '.join(said)}: reward_manifest.json records how this checkpoint is read, and says otherwise. Leave the "
            "option out, or remove the manifest and calibrate again."
        )
    return replace(options, **recorded)


def policy_of(
    files: CheckpointFiles,
    config: PreTrainedConfig,
    options: ReadingOptions,
    tokens: TokenReward | None,
    manifest: Manifest | None,
    *,
    skips_padding: bool,
) -> EncodingPolicy:
    """Returns how a decoder's sequences begin and end: as recorded with a manifest, else as the author's library has them.

    Args:
        files: The checkpoint; an adapter's base.
        config: Its configuration.
        options: What the user and the manifest say.
        tokens: The vocabulary entries whose logits are the rewards, if they are.
        manifest: What marginrm recorded of it.
        skips_padding: Whether its library reads the last token that is not padding, and not the last one.
    """
    frame = tokens.frame if tokens else frame_of(options.frame) if options.frame else None
    if manifest is not None:
        said = manifest.encoding
        return EncodingPolicy(said.bos, said.eos, frozenset(said.unread_token_ids), said.appended_token_id, frame)
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    unread = frozenset({pad} if skips_padding and pad is not None and pad >= 0 else ())
    return EncodingPolicy(options.bos, options.eos, unread, files.config.get("reward_token_id"), frame)


def _check_kind(
    files: CheckpointFiles, config: PreTrainedConfig, options: ReadingOptions, manifest: Manifest | None
) -> None:
    """Checks that a reward follows from the token ids of one sequence.

    Raises:
        ModelError: The checkpoint is an encoder or a process reward model.
    """
    kind = type(config)
    generates = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    decoder = manifest.encoding.architecture == "decoder" if manifest else generates
    if not decoder:
        raise ModelError(
            f"{files.name} holds a {files.class_name or config.model_type}, which may be an encoder: those take segment ids "
            "beside token ids. Only decoders can be computed by another server; serve this one without --upstream."
        )
    steps, _ = with_steps(files, options)
    if steps is not None:
        raise ModelError(
            f"{files.name} is a process reward model, whose rewards are values at several tokens. Another server gives one "
            "value for each sequence; serve this one without --upstream."
        )
