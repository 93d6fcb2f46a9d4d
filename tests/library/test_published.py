"""Rows as published, under their own names of fields: each is read as its data card says, or refused by its reason.

The shapes follow the data cards of the sets that the ids name; the texts are made up.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from marginrm.errors import DataError
from marginrm.texts.preferences import parse_group, parse_pair, parse_single

USER = {"role": "user", "content": "Name a colour."}
ANSWER = {"role": "assistant", "content": "Red."}
WORSE = {"role": "assistant", "content": "No."}
SYSTEM = {"role": "system", "content": "Be brief."}
TEXT = "Name a colour."
READ = ("Name a colour.", "Red.", "No.")
AS_MESSAGES = ([USER], "Red.", "No.")
WITH_SYSTEM = ([SYSTEM, USER], "Red.", "No.")

PAIRS: dict[str, tuple[dict[str, Any], tuple[Any, str, str]]] = {
    "nvidia/HelpSteer2 preference": (
        {"prompt": TEXT, "response_1": "No.", "response_2": "Red.", "preference_strength": 2, "split": "train"},
        READ,
    ),
    "nvidia/HelpSteer3": (
        {"context": [USER], "response1": "Red.", "response2": "No.", "overall_preference": -1, "domain": "general"},
        AS_MESSAGES,
    ),
    "PKU-Alignment/PKU-SafeRLHF": (
        {
            "prompt": TEXT,
            "response_0": "No.",
            "response_1": "Red.",
            "is_response_0_safe": True,
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        READ,
    ),
    "stanfordnlp/SHP": ({"history": TEXT, "human_ref_A": "No.", "human_ref_B": "Red.", "labels": 0}, READ),
    "lmsys/chatbot_arena_conversations": (
        {
            "model_a": "x",
            "model_b": "y",
            "winner": "model_b",
            "conversation_a": [USER, WORSE],
            "conversation_b": [USER, ANSWER],
        },
        AS_MESSAGES,
    ),
    "lmarena-ai/arena-human-preference-140k": (
        {
            "winner": "model_a",
            "conversation_a": [
                {"role": turn["role"], "content": [{"type": "text", "text": turn["content"], "image": None}]}
                for turn in (USER, ANSWER)
            ],
            "conversation_b": [USER, WORSE],
        },
        AS_MESSAGES,
    ),
    "lmarena-ai/arena-human-preference-55k": (
        {
            "prompt": json.dumps([TEXT]),
            "response_a": json.dumps(["Red."]),
            "response_b": json.dumps(["No."]),
            "winner_model_a": 1,
            "winner_model_b": 0,
            "winner_tie": 0,
        },
        AS_MESSAGES,
    ),
    "lmarena-ai/PPE-Human-Preference-V1": (
        {"prompt": TEXT, "response_1": "Red.", "response_2": "No.", "winner": "model_1"},
        READ,
    ),
    "openai/webgpt_comparisons": (
        {
            "question": {"dataset": "eli5", "id": "x", "full_text": TEXT},
            "answer_0": "No.",
            "answer_1": "Red.",
            "score_0": -0.5,
            "score_1": 0.5,
        },
        READ,
    ),
    "tatsu-lab/alpaca_farm": (
        {"instruction": "Name", "input": "a colour.", "output_1": "No.", "output_2": "Red.", "preference": 2},
        ("Name\na colour.", "Red.", "No."),
    ),
    "ScalerLab/JudgeBench": ({"question": TEXT, "response_A": "Red.", "response_B": "No.", "label": "A>B"}, READ),
    "prometheus-eval/Preference-Collection": (
        {
            "orig_instruction": TEXT,
            "orig_response_A": "No.",
            "orig_response_B": "Red.",
            "orig_preference": "B",
        },
        READ,
    ),
    "lvwerra/stack-exchange-paired": ({"question": TEXT, "response_j": "Red.", "response_k": "No.", "qid": 1}, READ),
    "Intel/orca_dpo_pairs": (
        {"system": "Be brief.", "question": TEXT, "chosen": "Red.", "rejected": "No."},
        WITH_SYSTEM,
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        {"system": "", "input": TEXT, "chosen": "Red.", "rejected": "No.", "generations": ["Red.", "No."]},
        READ,
    ),
    "argilla/ultrafeedback-binarized-preferences": (
        {"instruction": TEXT, "chosen_response": "Red.", "rejected_response": "No.", "chosen_avg_rating": 4.0},
        READ,
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        {
            "prompt": TEXT,
            "chosen": [USER, ANSWER],
            "rejected": [USER, WORSE],
            "messages": [USER, ANSWER],
            "score_chosen": 8.0,
            "score_rejected": 6.0,
        },
        READ,
    ),
    "argilla/distilabel-capybara-dpo-7k-binarized": (
        {
            "source": "x",
            "conversation": [{"input": TEXT, "output": "Red."}],
            "prompt": TEXT,
            "chosen": [USER, ANSWER],
            "rejected": [USER, WORSE],
        },
        READ,
    ),
    "mlabonne/orpo-dpo-mix-40k": (
        {"source": "x", "chosen": [USER, ANSWER], "rejected": [USER, WORSE], "prompt": TEXT, "question": TEXT},
        READ,
    ),
    "Skywork/Skywork-Reward-Preference-80K": (
        {"chosen": [USER, ANSWER], "rejected": [USER, WORSE], "source": "x"},
        AS_MESSAGES,
    ),
    "LLaMA-Factory, ShareGPT": (
        {
            "conversations": [{"from": "human", "value": TEXT}],
            "chosen": {"from": "gpt", "value": "Red."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        AS_MESSAGES,
    ),
    "LLaMA-Factory, Alpaca": (
        {
            "instruction": TEXT,
            "input": "",
            "chosen": "Red.",
            "rejected": "No.",
            "history": [["Hi.", "Hello."]],
            "system": "Be brief.",
        },
        (
            [SYSTEM, {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}, USER],
            "Red.",
            "No.",
        ),
    ),
    "Axolotl": ({"messages": [SYSTEM, USER], "chosen": ANSWER, "rejected": WORSE}, WITH_SYSTEM),
    "ms-swift": ({"messages": [USER, ANSWER], "rejected_response": "No."}, AS_MESSAGES),
    "ms-swift, messages": ({"messages": [USER, ANSWER], "rejected_messages": [USER, WORSE]}, AS_MESSAGES),
    "OpenAI": (
        {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [WORSE]},
        AS_MESSAGES,
    ),
    "a system prompt beside the prompt": (
        {"system_prompt": "Be brief.", "prompt": TEXT, "chosen": "Red.", "rejected": "No."},
        WITH_SYSTEM,
    ),
    "messages as JSON and as Python": (
        {"prompt": json.dumps([USER]), "chosen": str([USER, ANSWER]), "rejected": json.dumps([WORSE])},
        AS_MESSAGES,
    ),
    "lists of roles and of contents": (
        {
            "chosen": {"role": ["user", "assistant"], "content": [TEXT, "Red."]},
            "rejected": {"from": ["human", "gpt"], "value": [TEXT, "No."]},
        },
        AS_MESSAGES,
    ),
    "sanderland/arena-expert-5k": (
        {
            "winner": "model_a",
            "conversation_a": json.dumps([USER, ANSWER]),
            "conversation_b": json.dumps([USER, WORSE]),
        },
        AS_MESSAGES,
    ),
    "lists of one text": ({"prompt": TEXT, "chosen": ["Red."], "rejected": ["No."]}, READ),
    "TRL with tools": (
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE], "tools": [{"type": "function", "function": {}}]},
        AS_MESSAGES,
    ),
}

BATTLE = {"prompt": "p", "response_0": "a", "response_1": "b"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a tie of HelpSteer": ({"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": 0}, "a tie"),
    "a tie of the Arena": (
        {"winner": "tie (bothbad)", "conversation_a": [USER, WORSE], "conversation_b": [USER, ANSWER]},
        "a tie",
    ),
    "both bad": ({"winner": "both_bad", "conversation_a": [USER, WORSE], "conversation_b": [USER, ANSWER]}, "a tie"),
    "no winner of 55k": (
        {
            "prompt": "p",
            "response_a": "a",
            "response_b": "b",
            "winner_model_a": 0,
            "winner_model_b": 0,
            "winner_tie": 1,
        },
        "a tie",
    ),
    "equal scores": ({"question": "p", "answer_0": "a", "answer_1": "b", "score_0": 0.0, "score_1": 0.0}, "a tie"),
    "no verdict": (BATTLE, "without a preference"),
    "an unknown verdict": (BATTLE | {"better_response_id": 7}, "without a preference"),
    "three responses": (BATTLE | {"response_2": "c", "better_response_id": 0}, "with more than two responses"),
    "other earlier answers": (
        {
            "winner": "model_a",
            "conversation_a": [USER, ANSWER, USER, ANSWER],
            "conversation_b": [USER, WORSE, USER, WORSE],
        },
        "answers to different prompts",
    ),
    "messages as numpy prints them": (
        {
            "prompt": "p",
            "chosen": "[{'role': 'assistant', 'content': 'a'}\n {'role': 'user', 'content': 'b'}]",
            "rejected": "b",
        },
        "with messages as a broken text",
    ),
    "a function call of old": (
        {"prompt": [USER, {"role": "assistant", "content": None, "function_call": {}}], "chosen": "a", "rejected": "b"},
        "with malformed messages",
    ),
    "a context": (
        {"question": "p", "context": "c", "chosen": "a", "rejected": "b"},
        "with a context beside the prompt",
    ),
    "KTO": ({"prompt": "p", "completion": "a", "label": True}, "with one response"),
    "HelpSteer2": ({"prompt": "p", "response": "a", "helpfulness": 3}, "with one response"),
    "Nectar": ({"prompt": "p", "answers": [{"answer": "a", "rank": 1}]}, "with a list of responses"),
    "OASST": ({"message_id": "x", "parent_id": None, "text": "a", "role": "prompter"}, "with other fields"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_published_pairs_are_read(name: str) -> None:
    row, expected = PAIRS[name]
    pair = parse_pair(row, "f:1")
    assert (pair.prompt, pair.chosen, pair.rejected) == expected


@pytest.mark.parametrize("name", REFUSED)
def test_rows_without_a_preferred_response_are_refused_by_their_reason(name: str) -> None:
    row, reason = REFUSED[name]
    with pytest.raises(DataError, match=r"^f:1: ") as caught:
        parse_pair(row, "f:1")
    assert caught.value.reason == reason


def test_other_fields_are_kept() -> None:
    pair = parse_pair(PAIRS["nvidia/HelpSteer2 preference"][0], "f:1")
    assert pair.extra == {"preference_strength": 2, "split": "train"}


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        (
            {
                "instruction": TEXT,
                "completions": [
                    {"response": "Red.", "overall_score": 8.5, "model": "x"},
                    {"response": "No.", "overall_score": 1.0, "model": "y"},
                ],
            },
            [8.5, 1.0],
        ),
        ({"prompt": TEXT, "answers": [{"answer": "Red.", "rank": 1.0}, {"answer": "No.", "rank": 7.0}]}, [-1.0, -7.0]),
    ],
    ids=["openbmb/UltraFeedback", "berkeley-nest/Nectar"],
)
def test_published_groups_are_read(row: dict[str, Any], gold: list[float]) -> None:
    group = parse_group(row, "f:1")
    assert (group.prompt, group.candidates, group.gold) == (TEXT, ["Red.", "No."], gold)


def test_single_responses_are_read() -> None:
    assert parse_single({"question": TEXT, "completion": "Red."}, "f:1") == (TEXT, "Red.")
    assert parse_single({"prompt": [USER], "response": [ANSWER]}, "f:1") == ([USER], "Red.")
