"""Groups to run, and transformers' own rewards of them, one sequence at a time: the reference of the forward tests."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from marginrm.encoding import EncodedResponse
from support.models import DECODERS

CASES = [
    ("gpt_neox", {}),
    *[(family, {"kv_heads": heads}) for family in DECODERS if family != "gpt_neox" for heads in (4, 2)],
    ("mistral", {"sliding_window": 6}),
    ("bert", {}),
    ("modernbert", {}),
    ("modernbert", {"classifier_pooling": "mean", "local_attention": 8}),
]


def groups_of(vocabulary: int, *, typed: bool = False) -> list[list[EncodedResponse]]:
    generator = torch.Generator().manual_seed(1)

    def some(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, vocabulary, (count,), generator=generator).tolist())

    def response(ids: tuple[int, ...]) -> EncodedResponse:
        return EncodedResponse(ids, tuple(int(i > len(ids) // 2) for i in range(len(ids))) if typed else None)

    prompt = some(20)
    return [
        [response(prompt + some(count)) for count in (3, 7, 15, 7)],
        [response(some(60)), response(some(55))],
        [response(some(30))],
        [response((*prompt, 6, 7))] * 2,
    ]


def one_by_one(model: PreTrainedModel, groups: list[list[EncodedResponse]]) -> torch.Tensor:
    rewards = []
    for response in (response for group in groups for response in group):
        inputs = {"input_ids": torch.tensor([response.ids])}
        if response.type_ids:
            inputs["token_type_ids"] = torch.tensor([response.type_ids])
        rewards.append(model(**inputs).logits[0, 0])
    return torch.stack(rewards)


def load(path: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    return model.eval()
