"""Rewards that are logits of a language model: rows of its vocabulary as a linear head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from marginrm.encoding.frames import QUERY_DOCUMENT, Frame, frame_of
from marginrm.errors import ConfigError, HeadError, ModelError
from marginrm.loading.adapters import with_adapter
from marginrm.loading.backbone import classifier_around
from marginrm.loading.files import CheckpointFiles
from marginrm.loading.heads import float32_linear
from marginrm.loading.weights import Target, check_missing, load_model
from marginrm.reading import ReadingOptions

_LOGIT_SCORE = "LogitScore"
# A float32 head on the backbone's hidden states against the model's own logits, relative to the larger of 1 and the logit.
_TOLERANCE = 1e-3
_TOLERANCE_OF_HALF = 0.1  # models in half precision round their logits


@dataclass(frozen=True, slots=True)
class TokenReward:
    """The logits that are the reward, and the text they are read after.

    Attributes:
        tokens: Vocabulary entries: the first one's logit, minus the second one's if there are two.
        words: The same as text, for messages.
        frame: A reranker's text, or None for a conversation.
    """

    tokens: tuple[int, ...]
    words: str
    frame: Frame | None


class SoftCapped(nn.Module):
    """Logits as language models with capped outputs give them: cap x tanh(logit / cap), weighed into one value."""

    def __init__(self, rows: nn.Linear, cap: float) -> None:
        super().__init__()
        self.rows = rows
        self.cap = cap

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns one value per hidden state, [..., 1]."""
        capped = self.cap * torch.tanh(self.rows(hidden) / self.cap)
        return (capped * _signs(self.rows.out_features).to(hidden.device)).sum(-1, keepdim=True)


def reads_tokens(files: CheckpointFiles, options: ReadingOptions) -> bool:
    """Returns whether options or sentence-transformers' files say that the reward is the logit of a token."""
    return bool(options.reward_tokens or _logit_score(files))


def frame_reads_tokens(options: ReadingOptions) -> bool:
    """Returns whether the frame is one whose score is the logit of a token, in checkpoints that have no head."""
    return bool(options.frame and frame_of(options.frame).reward_tokens)


def token_reward_of(files: CheckpointFiles, tokenizer: PreTrainedTokenizerBase, options: ReadingOptions) -> TokenReward:
    """Returns the tokens whose logits are the reward, as options or sentence-transformers' files say.

    Raises:
        ConfigError: An option is not a valid one for this tokenizer.
        ModelError: The files of sentence-transformers say what marginrm does not know.
    """
    frame = frame_of(options.frame) if options.frame else None
    if options.reward_tokens is not None:
        ids = tuple(_token_id(tokenizer, word) for word in options.reward_tokens)
        return TokenReward(ids, " - ".join(options.reward_tokens), frame)
    if written := _logit_score(files):
        words = " - ".join(str(tokenizer.convert_ids_to_tokens(index)) for index in written)
        return TokenReward(written, words, frame or QUERY_DOCUMENT)
    assert frame is not None  # reads_tokens says so
    assert frame.reward_tokens is not None
    ids = tuple(_first_id(tokenizer, word) for word in frame.reward_tokens)
    return TokenReward(ids, " - ".join(frame.reward_tokens), frame)


def load_token_logits(
    reward: TokenReward,
    files: CheckpointFiles,
    config: PreTrainedConfig,
    target: Target,
    adapter: CheckpointFiles | None = None,
) -> PreTrainedModel:
    """Loads a causal language model and puts the rows of its vocabulary on its backbone as the head.

    Raises:
        HeadError: Its logits are not what the rows give.
        ModelError: It cannot be loaded.
    """
    model, missing = load_model(AutoModelForCausalLM, files, config, target)
    check_missing(files, missing)
    model = with_adapter(model, adapter)
    output = model.get_output_embeddings()
    if not isinstance(output, nn.Linear):
        raise HeadError(
            f"{files.name}: the output layer of {type(model).__name__} is not linear, so it has no rows to read."
        )
    if max(reward.tokens) >= output.weight.shape[0]:
        raise ConfigError(f"reward_tokens: {files.name} has {output.weight.shape[0]:,} vocabulary entries.")
    backbone = cast("PreTrainedModel", model.base_model)
    head = _head(model, backbone, output, reward)
    if head is None:
        raise HeadError(
            f"{files.name}: the logits of {type(model).__name__} are not a linear or soft-capped function of its hidden "
            "states, so marginrm cannot read rewards from them."
        )
    return classifier_around(backbone, head)


def _head(model: PreTrainedModel, backbone: nn.Module, output: nn.Linear, reward: TokenReward) -> nn.Module | None:
    """Returns the head that reproduces the model's own logits, or None."""
    chosen = list(reward.tokens)
    ids = torch.arange(1, 9, device=model.device)[None] % output.weight.shape[0]
    with torch.inference_mode():
        own = model(input_ids=ids).logits[0, :, chosen].float()
        hidden = backbone(input_ids=ids).last_hidden_state[0].float()
    wanted = (own * _signs(len(chosen)).to(own.device)).sum(-1, keepdim=True)
    weight = output.weight.detach()[chosen].float()
    bias = None if output.bias is None else output.bias.detach()[chosen].float()
    config = model.config.get_text_config()
    tolerance = _TOLERANCE if model.dtype == torch.float32 else _TOLERANCE_OF_HALF
    # Cohere and Granite scale their logits; Gemma 2 caps them.
    for factor in (1.0, getattr(config, "logit_scale", None), _inverse(getattr(config, "logits_scaling", None))):
        if factor:
            rows = float32_linear(weight * factor, None if bias is None else bias * factor)
            for head in (_difference(rows), _capped(rows, getattr(config, "final_logit_softcapping", None))):
                if head is not None and _reproduces(head, hidden, wanted, tolerance):
                    return head
    return None


def _reproduces(head: nn.Module, hidden: Tensor, wanted: Tensor, tolerance: float) -> bool:
    with torch.inference_mode():
        found = head.to(hidden.device)(hidden)
    return bool(((found - wanted).abs() <= tolerance * wanted.abs().clamp(min=1)).all())


def _difference(rows: nn.Linear) -> nn.Linear:
    signs = _signs(rows.out_features).to(rows.weight.device)
    bias = None if rows.bias is None else (signs @ rows.bias.detach())[None]
    return float32_linear((signs @ rows.weight.detach())[None], bias)


def _capped(rows: nn.Linear, cap: float | None) -> SoftCapped | None:
    return SoftCapped(rows, cap) if cap else None


def _signs(count: int) -> Tensor:
    return torch.tensor([1.0, -1.0][:count])


def _inverse(value: float | None) -> float | None:
    return 1 / value if value else None


def _logit_score(files: CheckpointFiles) -> tuple[int, ...] | None:
    """Reads sentence-transformers' `modules.json`: a Transformer and a LogitScore behind it."""
    path = files.folder / "modules.json"
    if not path.is_file():
        return None
    modules = files.json_list("modules.json")
    scores = [one for one in modules if str(one.get("type", "")).endswith(_LOGIT_SCORE)]
    if not scores:
        return None
    said = files.json(f"{scores[0].get('path', '')}/config.json")
    if said.get("module_input_name", "causal_logits") != "causal_logits" or said.get("true_token_id") is None:
        raise ModelError(
            f"{files.name}: {scores[0].get('path')}/config.json says {said}, which marginrm does not know."
        )
    return tuple(said[key] for key in ("true_token_id", "false_token_id") if said.get(key) is not None)


def _token_id(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    if word.startswith("id:") and word[3:].isdigit():
        return int(word[3:])
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    known = tokenizer.convert_tokens_to_ids(word)
    if len(ids) == 1:
        return int(ids[0])
    if isinstance(known, int) and known != tokenizer.unk_token_id:
        return known
    raise ConfigError(
        f"reward_tokens: {word!r} is {len(ids)} tokens of this tokenizer, with the ids {list(ids)}. Give one vocabulary "
        "entry, such as id:N."
    )


def _first_id(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    return int(tokenizer(word, add_special_tokens=False)["input_ids"][0])
