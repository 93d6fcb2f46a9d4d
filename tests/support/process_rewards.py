"""Tiny process reward models of five published forms, and their step rewards as their cards compute them.

Each function writes a checkpoint and returns its documented usage in plain transformers: from a prompt and a list of
steps to one probability per step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForTokenClassification,
    Qwen2Model,
)

from support.models import CHATML_TEMPLATE, decoder_tokenizer

Documented = Callable[[str, list[str]], list[float]]


def qwen_math(folder: Path) -> Documented:
    """Qwen2.5-Math-PRM: a head of two layers and two classes, read at each `<extra_0>`. Its own code must not run."""
    tokenizer = _tokenizer(["<extra_0>"])
    torch.manual_seed(0)
    backbone = Qwen2Model(_sizes(Qwen2Config, tokenizer)).eval()
    score = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    nn.init.normal_(score[2].weight)
    weights = {f"model.{name}": value for name, value in backbone.state_dict().items()}
    weights |= {f"score.{name}": value for name, value in score.state_dict().items()}
    tokenizer.save_pretrained(folder)
    backbone.config.save_pretrained(folder)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    _patch(
        folder,
        architectures=["Qwen2ForProcessRewardModel"],
        auto_map={"AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel"},
        num_labels=2,
    )
    (folder / "modeling_qwen2_rm.py").write_text("raise RuntimeError('own code was run')\n")

    def documented(prompt: str, steps: list[str]) -> list[float]:
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": "<extra_0>".join(steps) + "<extra_0>"},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        ids = tokenizer.encode(text, return_tensors="pt")
        mask = ids == tokenizer.encode("<extra_0>")[0]
        with torch.no_grad():
            logits = score(backbone(ids).last_hidden_state)
        return list(logits.softmax(-1)[mask][:, 1].tolist())

    return documented


def math_shepherd(folder: Path) -> Documented:
    """math-shepherd: a causal language model whose `+` and `-` are compared at each step tag."""
    tokenizer = _tokenizer(["ки"], bos=True)
    tokenizer.chat_template = None
    torch.manual_seed(1)
    model = LlamaForCausalLM(_sizes(LlamaConfig, tokenizer)).eval()
    nn.init.normal_(model.lm_head.weight)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    candidates = [tokenizer.encode("+")[-1], tokenizer.encode("-")[-1]]
    tag = tokenizer.encode("ки")[-1]

    def documented(prompt: str, steps: list[str]) -> list[float]:
        output = " ки\n".join(steps) + " ки"
        ids = torch.tensor([tokenizer.encode(f"{prompt} {output}")])
        with torch.no_grad():
            scores = model(ids).logits[:, :, candidates].softmax(-1)[:, :, 0]
        return list(scores[ids == tag].tolist())

    return documented


def trl(folder: Path, *, separator: str = "\n") -> Documented:
    """TRL's PRMTrainer: a token classifier of two labels, read at the separator after each step."""
    tokenizer = _tokenizer([])
    torch.manual_seed(2)
    model = Qwen2ForTokenClassification(_sizes(Qwen2Config, tokenizer, num_labels=2)).eval()
    nn.init.normal_(model.score.weight)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)

    def documented(prompt: str, steps: list[str]) -> list[float]:
        found = []
        for count in range(1, len(steps) + 1):
            text = separator.join((prompt, *steps[:count])) + separator
            with torch.no_grad():
                logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
            found.append(float(logits.softmax(-1)[1]))
        return found

    return documented


def rlhflow(folder: Path) -> Documented:
    """RLHFlow: each step is a user turn, and `+` against `-` is read where the assistant's answer is predicted."""
    tokenizer = _tokenizer([])
    torch.manual_seed(3)
    model = LlamaForCausalLM(_sizes(LlamaConfig, tokenizer)).eval()
    nn.init.normal_(model.lm_head.weight)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    plus, minus = tokenizer.encode("+")[-1], tokenizer.encode("-")[-1]

    def documented(prompt: str, steps: list[str]) -> list[float]:
        conversation: list[dict[str, str]] = []
        found = []
        for number, step in enumerate(steps):
            text = f"{prompt} {step}" if number == 0 else step
            conversation += [{"role": "user", "content": text}, {"role": "assistant", "content": "+"}]
            ids = tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)["input_ids"]
            behind = len(tokenizer.encode("<|im_end|>\n"))  # what this template puts after the answer
            assert ids[0, -behind - 1] == plus
            with torch.no_grad():
                scores = model(ids).logits[:, -behind - 2, [plus, minus]].softmax(-1)[:, 0]
            found.append(float(scores[0]))
        return found

    return documented


def skywork(folder: Path) -> Documented:
    """Skywork-o1-Open-PRM: a value head, read at a line break after each step, every part tokenized alone."""
    tokenizer = _tokenizer([])
    torch.manual_seed(4)
    model = Qwen2ForCausalLM(_sizes(Qwen2Config, tokenizer)).eval()
    weight, bias = torch.randn(1, 32), torch.randn(1)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    held = load_file(folder / "model.safetensors") | {"v_head.summary.weight": weight, "v_head.summary.bias": bias}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    _patch(folder, architectures=["Qwen2ForPrmModel"])

    def documented(prompt: str, steps: list[str]) -> list[float]:
        ids = tokenizer.encode((tokenizer.bos_token or "") + prompt + "\n")
        read = []
        for step in steps:
            ids = [*ids, *tokenizer.encode(step), tokenizer.encode("\n")[-1]]
            read.append(len(ids) - 1)
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0, read]
        return list(torch.sigmoid(hidden @ weight[0] + bias[0]).tolist())

    return documented


FORMS: dict[str, tuple[Callable[[Path], Documented], dict[str, Any]]] = {
    "qwen2.5-math-prm": (qwen_math, {}),
    "math-shepherd": (math_shepherd, {"steps": "math-shepherd"}),
    "trl-prm": (trl, {}),
    "rlhflow-prm": (rlhflow, {"steps": "rlhflow-prm"}),
    "skywork-o1-prm": (skywork, {}),
}


def _tokenizer(added: list[str], *, bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = decoder_tokenizer(bos=bos, pad=True, chat_template=CHATML_TEMPLATE, max_length=512)
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer


def _sizes(config: Any, tokenizer: PreTrainedTokenizerFast, **fields: Any) -> Any:
    return config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,
        **fields,
    )


def _patch(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
