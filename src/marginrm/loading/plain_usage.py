"""A plain loop in transformers, as a model's documentation has it: the reference that rewards are held against.

It loads the checkpoint afresh and computes one response at a time, in float32 with eager attention, by other code than
scoring does: no packing, no `Encoder`, no classifier put together from parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from marginrm.encoding.frames import SEAM, frame_of
from marginrm.encoding.rendering import FIXED_DATE, dateless, own_template, transcript
from marginrm.forward.rope import forget_lengths
from marginrm.loading.adapters import base_of, on_base, tokenizer_folder
from marginrm.loading.classifier import Source, plan_by_weights
from marginrm.loading.config import load_config
from marginrm.loading.files import CheckpointFiles, find_checkpoint
from marginrm.loading.heads import normalisation
from marginrm.loading.own_code import own_code_of
from marginrm.loading.plain_steps import plain_steps
from marginrm.loading.process_reward import with_steps
from marginrm.loading.token_logits import token_reward_of
from marginrm.reading import CheckpointReading, ReadingOptions

PlainReward = Callable[[Any, str], float]
_Score = Callable[[Tensor], Tensor]
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}


def plain_reward(path: str | Path, reading: CheckpointReading) -> PlainReward:
    """Returns a function from prompt and response to the reward that plain transformers gives.

    Args:
        path: The checkpoint.
        reading: How marginrm reads it: says which of transformers' classes documents its use, and the options.
    """
    given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in reading.options.items()}
    files = find_checkpoint(path)
    weights = on_base(files, base_of(files)) if files.is_adapter else files
    steps, options = with_steps(weights, ReadingOptions(**given), files)
    folder = tokenizer_folder(files, base_of(files) if files.is_adapter else files)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    score = {
        "classifier": _classifier,
        "value-head": _value_head,
        "token-logits": _token_logits,
        "own-code": _own_code,
    }[reading.usage](files, tokenizer, options)

    def reward(prompt: Any, response: str) -> float:
        with torch.inference_mode():
            if steps is not None:
                return steps.reward(
                    [float(score(_tensors(ids))) for ids in plain_steps(tokenizer, steps, prompt, response)]
                )
            return float(score(_inputs(tokenizer, reading, options, files, prompt, response)))

    return reward


def _inputs(
    tokenizer: PreTrainedTokenizerBase,
    reading: CheckpointReading,
    options: ReadingOptions,
    files: CheckpointFiles,
    prompt: Any,
    response: str,
) -> dict[str, Tensor]:
    """Tokenizes as cards do: a text pair, a conversation by the chat template, or plain text and EOS."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(one) for one in prompt]
    if reading.architecture == "encoder" and options.frame:
        return dict(tokenizer(frame_of(options.frame).render(messages, response), return_tensors="pt"))
    if reading.architecture == "encoder":
        return dict(tokenizer(transcript(messages), response, return_tensors="pt"))
    ids = _decoder_ids(tokenizer, reading, options, messages, response)
    appended = files.config.get("reward_token_id")
    if appended is not None and ids[-1] != appended:
        ids = [*ids, appended]
    return _tensors(ids)


def _tensors(ids: list[int]) -> dict[str, Tensor]:
    given = torch.tensor([ids])
    return {"input_ids": given, "attention_mask": torch.ones_like(given)}


def _decoder_ids(
    tokenizer: PreTrainedTokenizerBase,
    reading: CheckpointReading,
    options: ReadingOptions,
    messages: list[dict[str, Any]],
    response: str,
) -> list[int]:
    turns = [*messages, {"role": "assistant", "content": response}]
    frame = frame_of(options.frame) if options.frame else None
    if reading.template.startswith("the frame query-document"):
        turns = [{"role": "query", "content": messages[-1]["content"]}, {"role": "document", "content": response}]
    elif frame is not None:
        parts = frame.render(messages, response).split(SEAM)
        return [one for n, part in enumerate(parts) for one in tokenizer(part, add_special_tokens=n == 0)["input_ids"]]
    if not tokenizer.chat_template:
        end = str(tokenizer.eos_token) if reading.adds_eos else ""
        start = transcript(messages) + ("\n\nAssistant: " if len(messages) > 1 else "")
        text = start + response
        return list(tokenizer(text if text.endswith(end) else text + end)["input_ids"])
    template = dateless(own_template(tokenizer))
    given: dict[str, Any] = {"chat_template": template, "date_string": FIXED_DATE}
    if reading.bos == "auto" and reading.eos == "auto":
        return list(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, **given))
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, **given))
    if reading.eos == "on":
        text = text.rstrip("\n")
        text = text if text.endswith(str(tokenizer.eos_token)) else text + str(tokenizer.eos_token)
    bos = str(tokenizer.bos_token or "")
    while bos and reading.bos != "auto" and text.startswith(bos):
        text = text.removeprefix(bos)
    return list(tokenizer(bos * reading.leading_bos + text, add_special_tokens=False)["input_ids"])


def _classifier(
    files: CheckpointFiles, tokenizer: PreTrainedTokenizerBase, options: ReadingOptions
) -> Callable[..., Tensor]:
    weights = torch.tensor(options.label_weights or (1.0,))
    base = base_of(files) if files.is_adapter else files
    model = _load("AutoModelForSequenceClassification", base, files, options, num_labels=len(weights))
    return lambda inputs: model(**inputs).logits[0] @ weights


def _value_head(
    files: CheckpointFiles, tokenizer: PreTrainedTokenizerBase, options: ReadingOptions
) -> Callable[..., Tensor]:
    base = base_of(files) if files.is_adapter else files
    merged = on_base(files, base) if files.is_adapter else files
    config = load_config(base, trust_remote_code=options.trust_remote_code)
    plan = plan_by_weights(Source(merged, config))
    assert plan.weights is not None
    names = [(one.weight, one.bias) for one in plan.head.layers] if plan.head else [("score.weight", "score.bias")]
    layers = [(merged.read(w), merged.read(b) if b and b in merged.tensors else None) for w, b in names]
    model = _load(
        "AutoModelForCausalLM" if files.is_adapter else "AutoModel", base, files, options, prefix=plan.weights.prefix
    )
    skipped = config.get_text_config().pad_token_id if base.class_name.endswith("ForSequenceClassification") else None
    mean, std = normalisation(merged) or (0.0, 1.0)
    activation = _ACTIVATIONS[options.head_activation or "relu"]

    def score(inputs: dict[str, Tensor]) -> Tensor:
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
        ids = inputs["input_ids"][0].tolist()
        value = hidden[max(index for index, one in enumerate(ids) if one != skipped)]
        for number, (weight, bias) in enumerate(layers):
            value = weight @ (activation(value) if number else value) + (0.0 if bias is None else bias)
        total: Tensor = (value @ torch.tensor(options.label_weights or (1.0,)) - mean) / std
        return total

    return score


def _token_logits(
    files: CheckpointFiles, tokenizer: PreTrainedTokenizerBase, options: ReadingOptions
) -> Callable[..., Tensor]:
    tokens = token_reward_of(files, tokenizer, options).tokens
    model = _load("AutoModelForCausalLM", base_of(files) if files.is_adapter else files, files, options)

    def score(inputs: dict[str, Tensor]) -> Tensor:
        last = model(**inputs).logits[0, -1]
        return cast("Tensor", last[tokens[0]] - last[tokens[1]] if len(tokens) > 1 else last[tokens[0]])

    return score


def _own_code(
    files: CheckpointFiles, tokenizer: PreTrainedTokenizerBase, options: ReadingOptions
) -> Callable[..., Tensor]:
    base = base_of(files) if files.is_adapter else files
    own = own_code_of(base)
    assert own is not None  # the reading says that its own code computes the rewards
    model = _load(own.auto, base, files, options)

    def score(inputs: dict[str, Tensor]) -> Tensor:
        given = model(**inputs)
        found: Any = getattr(given, "logits", given[0] if isinstance(given, tuple) else given)
        return cast("Tensor", found.flatten()[0])

    return score


def _load(
    auto: str, base: CheckpointFiles, files: CheckpointFiles, options: ReadingOptions, *, prefix: str = "", **more: Any
) -> Any:
    given: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", **more}
    if base.config.get("model_type") not in transformers.CONFIG_MAPPING and not options.trust_remote_code:
        given["config"] = load_config(base, trust_remote_code=False)
    if prefix not in ("", "model."):
        given["key_mapping"] = {f"^{prefix}": ""}
    own = options.trust_remote_code and own_code_of(base) is not None
    model = getattr(transformers, auto).from_pretrained(base.folder, trust_remote_code=own, **given).eval()
    forget_lengths(model)  # else a response's reward would depend on those before it
    if not files.is_adapter:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(files.folder)).eval()
