"""A checkpoint of any trainer -> a module, an encoder, and a record of how it is read."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from marginrm.encoding import Architecture, Encoder
from marginrm.encoding.frames import frame_of
from marginrm.encoding.special_tokens import EncodingPolicy
from marginrm.errors import ModelError
from marginrm.forward.eligibility import build_module
from marginrm.forward.module import RewardModule
from marginrm.forward.own_forward import vocabulary_of
from marginrm.forward.self_check import conversations, step_conversations
from marginrm.loading.adapters import base_of, on_base, tokenizer_folder
from marginrm.loading.backbone import has_backbone
from marginrm.loading.classifier import (
    LoadedClassifier,
    Plan,
    Source,
    check_of_use,
    has_head,
    load_classifier,
    plan_by_weights,
)
from marginrm.loading.config import load_config
from marginrm.loading.device import resolve_device, resolve_dtype
from marginrm.loading.encoder import policy_of, with_manifest
from marginrm.loading.files import ADAPTER_CONFIG, CheckpointFiles, find_checkpoint
from marginrm.loading.foreign import translated
from marginrm.loading.own_code import check_trusted, own_code_of
from marginrm.loading.process_reward import check_steps, with_steps
from marginrm.loading.record import reading_of
from marginrm.loading.refusals import refuse_by_kind
from marginrm.loading.token_logits import frame_reads_tokens, reads_tokens, token_reward_of
from marginrm.loading.tokenizer import length_limit, load_tokenizer
from marginrm.loading.weights import Target, quantisation_of
from marginrm.manifest import Manifest
from marginrm.process_rewards import StepReading
from marginrm.reading import CheckpointReading, ReadingOptions
from marginrm.text import Dtype
from marginrm.tuning.tune import Purpose, tune

_log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A checkpoint ready to score.

    Attributes:
        module: The forward pass.
        encoder: Texts to token ids.
        reading: What the checkpoint is and how it is read.
    """

    module: RewardModule
    encoder: Encoder
    reading: CheckpointReading


def load_for_scoring(
    path: str | Path | CheckpointFiles,
    *,
    dtype: Dtype | torch.dtype = "auto",
    device: str = "auto",
    max_length: int | None = None,
    reading: ReadingOptions | None = None,
    manifest: Manifest | None = None,
    revision: str | None = None,
    purpose: Purpose | None = "scoring",
    processes: int = 1,
) -> Loaded:
    """Loads a trained reward model.

    Args:
        path: A folder, a name on the Hugging Face Hub, or what `find_checkpoint` found.
        dtype: Of the backbone; `auto` takes what a short measurement finds faster on this device.
        device: `cpu`, `cuda`, ...; `auto` takes CUDA where there is one.
        max_length: The most tokens a sequence may have; by default what model and tokenizer allow.
        reading: What the user says about the checkpoint.
        manifest: What marginrm recorded of it: with one, it is read as recorded.
        revision: Branch, tag or commit on the Hub.
        purpose: As for `tune`; None leaves the module as it was built. Packed weights can be neither trained nor saved.
        processes: Number of processes that share the model, this one included (`loading.ranks`). They must take the same
            decisions, so nothing may depend on timing: give a dtype, and no purpose.

    Raises:
        ModelError: There is no such checkpoint, or it cannot be read.
        HeadError: It has no trained head that gives one reward.
        ConfigError: An option is not a valid one for it.
    """
    files = path if isinstance(path, CheckpointFiles) else find_checkpoint(path, revision)
    given = with_manifest(reading or ReadingOptions(), manifest)
    with translated(files.name, "model"):
        source, plan, tokenizer, options, steps = _read(files, given)
    on = resolve_device(device)
    if processes > 1 and (plan.own is not None or plan.tokens is not None):
        raise ModelError(
            f"{files.name} cannot be shared among {processes} processes (tensor_parallel): its rewards are those of "
            f"{'its own code' if plan.own else 'a language model' + chr(39) + 's vocabulary'}."
        )
    # transformers' own class is preferred to a copy of it that an older checkpoint brings along.
    own_code = options.trust_remote_code and (plan.own is not None or not has_backbone(source.config))
    target = Target(_dtype(dtype, on, source, own_code=own_code), on, trust_remote_code=own_code, processes=processes)
    with translated(files.name, "model"):
        loaded = load_classifier(source, plan, target, options, has_template=bool(tokenizer.chat_template))
    check_of_use(options, loaded)
    check_steps(files, steps, causal=loaded.causal, has_template=bool(tokenizer.chat_template))
    limit = length_limit(source.config, tokenizer, max_length, loaded.classifier)
    if loaded.causal:
        policy = policy_of(
            source.files, source.config, options, plan.tokens, manifest, skips_padding=loaded.skips_padding
        )
    else:
        frame = frame_of(options.frame) if options.frame else None
        policy = EncodingPolicy("auto", frame=frame) if frame else EncodingPolicy()
    if steps:
        policy = replace(policy, unread=frozenset(), steps=steps)
    architecture: Architecture = "decoder" if loaded.causal else "encoder"
    encoder = Encoder(tokenizer, max_length=limit, architecture=architecture, policy=policy)
    probe = [*conversations(encoder), *step_conversations(encoder)]
    _check_vocabulary(files, loaded, tokenizer, max((max(one.ids) for group in probe for one in group), default=0))
    module = build_module(loaded.classifier, max_length=limit, architecture=architecture, probe=probe).eval()
    if purpose:
        tune(module, purpose)
    record = reading_of(files, source, loaded, encoder, module, given)
    for note in record.notes:
        _log.warning("%s: %s", files.name, note)
    return Loaded(module, encoder, record)


def _dtype(dtype: Dtype | torch.dtype, device: torch.device, source: Source, *, own_code: bool) -> torch.dtype:
    """Returns a dtype; for `auto`, own code and quantised weights keep the one that they were saved in.

    Their authors wrote for that one, and no other may work.
    """
    saved = getattr(source.config, "dtype", None)
    keeps = own_code or quantisation_of(source.config) is not None
    if str(dtype) == "auto" and keeps and isinstance(saved, torch.dtype):
        return saved
    return resolve_dtype(dtype, device)


def _check_vocabulary(
    files: CheckpointFiles, loaded: LoadedClassifier, tokenizer: PreTrainedTokenizerBase, highest: int
) -> None:
    """Checks that the model has an embedding for each token that conversations have.

    Raises:
        ModelError: It lacks one.
    """
    known = vocabulary_of(loaded.classifier)
    if highest >= known:
        raise ModelError(
            f"{files.name}: the tokenizer gives the token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}), and the "
            f"model has {known:,} embeddings. Is it the tokenizer of another model, or was resize_token_embeddings left out "
            "when a token was added?"
        )


class _Read(NamedTuple):
    """Facts of a checkpoint before any weight is read; the options are the user's and those of its form."""

    source: Source
    plan: Plan
    tokenizer: PreTrainedTokenizerBase
    options: ReadingOptions
    steps: StepReading | None


def _read(files: CheckpointFiles, given: ReadingOptions) -> _Read:
    """Reads configuration and tokenizer, and finds the head, before any weight is read."""
    if files.adapter and not files.is_adapter:
        raise ModelError(
            f"{files.name} holds a whole model and an adapter ({ADAPTER_CONFIG}), so it is not clear whether the adapter is "
            "merged into these weights. If it is, delete the adapter's files; else move them to a folder of their own."
        )
    base = base_of(files) if files.is_adapter else files
    check_trusted(base, trusted=given.trust_remote_code)
    config = load_config(base, trust_remote_code=given.trust_remote_code)
    source = Source(on_base(files, base), config, adapter=files) if files.is_adapter else Source(files, config)
    steps, options = with_steps(source.files, given, source.adapter)
    refuse_by_kind(base, config, reads_steps=steps is not None)
    folder = tokenizer_folder(files, base)
    if options.trust_remote_code and steps is None and (own := own_code_of(base)):
        plan = Plan(own=own)
    elif reads_tokens(source.files, options) or (frame_reads_tokens(options) and not has_head(source)):
        tokenizer = load_tokenizer(folder, files.name, trust_remote_code=options.trust_remote_code)
        tokens = token_reward_of(source.files, tokenizer, options)
        return _Read(source, Plan(tokens=tokens), tokenizer, options, steps)
    else:
        plan = plan_by_weights(source, options)
    tokenizer = load_tokenizer(folder, files.name, trust_remote_code=options.trust_remote_code)
    return _Read(source, plan, tokenizer, options, steps)
