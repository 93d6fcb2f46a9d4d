"""Writes down what a checkpoint is and how it is read."""

from __future__ import annotations

import dataclasses
from typing import Any

from marginrm.encoding import Encoder
from marginrm.encoding.rendering import FIXED_DATE, prints_date
from marginrm.forward.module import RewardModule
from marginrm.loading.classifier import LoadedClassifier, Source
from marginrm.loading.files import CheckpointFiles
from marginrm.loading.heads import normalisation
from marginrm.loading.weights import quantisation_of
from marginrm.reading import CheckpointReading, ReadingOptions


def reading_of(
    files: CheckpointFiles,
    source: Source,
    loaded: LoadedClassifier,
    encoder: Encoder,
    module: RewardModule,
    options: ReadingOptions,
) -> CheckpointReading:
    """Returns the record of a loaded checkpoint."""
    config = source.config.get_text_config()
    size = f"{getattr(config, 'num_hidden_layers', '?')} layers of {getattr(config, 'hidden_size', '?')}"
    backbone = type(loaded.classifier.base_model).__name__
    adapter = f", merged with the adapter {files.name}" if source.adapter else ""
    return CheckpointReading(
        checkpoint=files.name,
        usage=loaded.usage,
        architecture="decoder" if loaded.causal else "encoder",
        backbone=f"{backbone}, {size}{adapter}",
        head=loaded.head,
        reward=_reward(source, loaded, encoder),
        template=_template(encoder),
        bos=encoder.policy.bos,
        leading_bos=encoder.special.leading_bos or 0,
        eos=encoder.policy.eos,
        adds_eos=encoder.special.ends_in_eos and loaded.causal,
        max_length=encoder.max_length,
        dtype=str(module.dtype).removeprefix("torch."),
        quantisation=quantisation_of(source.config),
        steps=encoder.policy.steps,
        options=_given(options),
        notes=(*loaded.notes, *_notes(source, encoder)),
    )


def _given(options: ReadingOptions) -> dict[str, Any]:
    defaults = dataclasses.asdict(ReadingOptions())
    given = {name: value for name, value in dataclasses.asdict(options).items() if value != defaults[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def _reward(source: Source, loaded: LoadedClassifier, encoder: Encoder) -> str:
    if loaded.usage == "own-code":
        return "as its own forward pass gives it"
    if not loaded.causal:
        return "as transformers' classifier for this encoder pools it"
    if encoder.policy.steps is not None:
        return encoder.policy.steps.describe()
    place = "at the last token"
    if encoder.policy.unread:
        named = encoder.tokenizer.convert_ids_to_tokens(sorted(encoder.policy.unread))
        place = f"at the last token that is not {' or '.join(map(repr, named))}, the padding token, as transformers reads it"
    if encoder.policy.appended is not None:
        place = f"at {encoder.tokenizer.convert_ids_to_tokens(encoder.policy.appended)!r}, put after the text"
    scale = normalisation(source.files)
    return f"{place}, less {scale[0]:g}, divided by {scale[1]:g}" if scale else place


def _template(encoder: Encoder) -> str:
    if encoder.architecture == "encoder" and encoder.policy.frame is None:
        return "none: prompt and response are a text pair"
    steps = encoder.policy.steps
    if steps is not None and steps.layout == "turns":
        return "the tokenizer's chat template: each step is a user turn, the first one behind the prompt"
    if steps is not None and steps.frame is not None:
        return f"the text {steps.frame!r}; the query is the prompt's last message"
    if encoder.policy.frame is not None:
        return f"the frame {encoder.policy.frame.name}; the query is the prompt's last message"
    return "the tokenizer's chat template" if encoder.chat_template else "none: prompt and response are one text"


def _notes(source: Source, encoder: Encoder) -> list[str]:
    notes = []
    template = encoder.chat_template
    if template and prints_date(template):
        notes.append(f"Its chat template prints today's date; {FIXED_DATE!r} is written in its place, on every day.")
    if encoder.policy.unread and encoder.tokenizer.eos_token_id in encoder.policy.unread:
        eos = encoder.tokenizer.eos_token
        notes.append(f"{eos} is EOS and padding at once: the reward is read before it, as transformers does.")
    return notes
