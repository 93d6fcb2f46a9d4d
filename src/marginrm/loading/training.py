"""A checkpoint -> what is trained: a backbone in float32, with the head it has or a fresh one, and its encoder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from marginrm.encoding import Encoder
from marginrm.errors import ConfigError, ModelError
from marginrm.forward.eligibility import build_module
from marginrm.forward.module import RewardModule
from marginrm.loading.backbone import has_backbone, map_weights
from marginrm.loading.config import load_config
from marginrm.loading.files import find_checkpoint
from marginrm.loading.tokenizer import length_limit, load_tokenizer
from marginrm.loading.weights import Target, load_model

_log = logging.getLogger(__name__)
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
    files = find_checkpoint(path, revision)
    if files.is_adapter:
        raise ModelError(
            f"{path} is a LoRA adapter. Merge it into its base model (peft: merge_and_unload) and train that."
        )
    config = load_config(files, trust_remote_code=trust_remote_code)
    head = map_weights(files, config).label_weights if has_backbone(config) else ()
    has_head = bool(head) and head[0] in files.tensors
    config.num_labels = files.tensors[head[0]].shape[0] if has_head else 1
    for name in _DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    target = Target(torch.float32, torch.device("cpu"), trust_remote_code=trust_remote_code)
    classifier, missing = load_model(AutoModelForSequenceClassification, files, config, target, strict=False)
    tokenizer = load_tokenizer(files.folder, files.name, trust_remote_code=trust_remote_code)
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
    limit = length_limit(classifier.config, tokenizer, max_length, classifier)
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


def _ensure_padding(classifier: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        _log.info("Added a padding token, since this tokenizer has none of its own")
        if len(tokenizer) > cast("nn.Embedding", classifier.get_input_embeddings()).num_embeddings:
            classifier.resize_token_embeddings(len(tokenizer))
    classifier.config.pad_token_id = tokenizer.pad_token_id
