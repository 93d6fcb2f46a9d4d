"""Rows of published data under other names of fields -> rows with the fields that `marginrm.texts.preferences` parses.

Pairs with the names of a verdict: HelpSteer2 and 3, PKU-SafeRLHF, SHP, Chatbot Arena, WebGPT, AlpacaFarm, JudgeBench.
Pairs with other names of chosen and rejected: Argilla, stack-exchange-paired, OpenAI's and ms-swift's formats. Groups:
UltraFeedback's completions and Nectar's answers. Prompts: as these, Orca pairs, LLaMA-Factory and Axolotl name them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from marginrm.errors import DataError

Row = Mapping[str, Any]

_PREFERRED_FIRST = (
    ("chosen_response", "rejected_response"),
    ("response_j", "response_k"),
    ("preferred_output", "non_preferred_output"),
)
_BATTLES = (
    ("response_0", "response_1"),
    ("response_1", "response_2"),
    ("response1", "response2"),
    ("response_a", "response_b"),
    ("response_A", "response_B"),
    ("conversation_a", "conversation_b"),
    ("human_ref_A", "human_ref_B"),
    ("output_1", "output_2"),
    ("answer_0", "answer_1"),
    ("orig_response_A", "orig_response_B"),
)
_SIGNED = ("overall_preference", "preference_strength")  # below 0: the first response is the better one
_NAMED = ("better_response_id", "winner", "preference", "orig_preference", "label")  # hold the better one's name
_PROMPTS = ("question", "instruction", "orig_instruction", "context", "history", "input", "conversations", "messages")
_OPENINGS = ("system", "user", "human", "prompter")  # roles of a dialogue's first turn
_GROUPS = ("answers", "completions")


def is_pair(row: Row) -> bool:
    """Tells whether a row has the fields of a pair, under any of the names known here."""
    return (
        bool(row.keys() & {"chosen", "rejected"}) or _swift(row) or any(_has(row, names) for names in _all_responses())
    )


def as_pair(row: Row, source: str) -> Row:
    """Returns a row with `prompt`, `chosen` and `rejected`, as far as it has them under any name.

    Args:
        row: The decoded object.
        source: `path:line`, for errors.

    Raises:
        DataError: The row has two responses, and does not say which one is preferred.
    """
    if _swift(row):
        row = _from_swift(row)
    elif not row.keys() & {"chosen", "rejected"}:
        names = next((names for names in _all_responses() if _has(row, names)), None)
        if names is None:
            return row
        if names == ("response_0", "response_1") and "response_2" in row:
            raise DataError.of_row(
                source, "with more than two responses", "has more than two responses; a pair has two."
            )
        first = 0 if names in _PREFERRED_FIRST else _preferred(row, names, source)
        dialogues = _dialogues(row, names)
        responses = dialogues or [row[name] for name in names]
        used = (*names, "prompt") if dialogues else names
        row = {name: value for name, value in row.items() if name not in used}
        row |= {"chosen": responses[first], "rejected": responses[1 - first]}
    return with_prompt(row, source, "chosen", "rejected")


def as_group(row: Row, source: str) -> Row:
    """Returns a row with `prompt` and `candidates` or `responses`, as far as it has them. Arguments as for `as_pair`."""
    name = next((name for name in _GROUPS if isinstance(row.get(name), list)), None)
    if name is None or row.keys() & {"candidates", "responses"}:
        return with_prompt(row, source)
    rest = {key: value for key, value in row.items() if key != name}
    return with_prompt(rest | {"candidates": [_candidate(one) for one in row[name]]}, source)


def with_prompt(row: Row, source: str, *responses: str) -> Row:
    """Returns a row with its prompt under `prompt`, and with its system prompt before it.

    Args:
        row: The row.
        source: `path:line`, for errors.
        responses: Names of the response fields; if one holds a whole dialogue, the prompt is there.

    Raises:
        DataError: The row has a question and a context, which only its author knows how to join.
    """
    given = row.get("prompt")
    name = "prompt" if given else next((name for name in _PROMPTS if row.get(name)), None)
    if name is None or (name != "prompt" and any(_is_dialogue(row.get(one)) for one in responses)):
        return row
    if name in ("question", "instruction") and row.get("context"):
        raise DataError.of_row(
            source, "with a context beside the prompt", f"has the fields '{name}' and 'context'. Join them as 'prompt'."
        )
    prompt = row[name]
    if isinstance(prompt, Mapping):  # OpenAI's {"messages"}, WebGPT's {"full_text"}
        prompt = prompt.get("messages", prompt.get("full_text", prompt))
    if name == "instruction":
        prompt = _alpaca(row)
    system = row.get("system_prompt") or (row.get("system") if name != "prompt" else None)
    if isinstance(system, str) and system.strip():
        prompt = _with_system(system, prompt)
    return {**row, "prompt": prompt}


def _all_responses() -> tuple[tuple[str, str], ...]:
    return (*_PREFERRED_FIRST, *_BATTLES)


def _has(row: Row, names: Sequence[str]) -> bool:
    return all(name in row for name in names)


def _preferred(row: Row, names: tuple[str, str], source: str) -> int:
    """Returns the index of the preferred response.

    Raises:
        DataError: It is a tie, or the row does not say.
    """
    sides = [_side(name) for name in names]
    scores = _numbers(row, [f"score_{side}" for side in sides])
    won = _numbers(row, [f"winner_model_{side}" for side in sides])
    signed = next((row[name] for name in _SIGNED if _is_number(row.get(name))), None)
    named = next((name for name in _NAMED if name in row), None)
    if signed is not None:
        verdict = str(sides[0] if signed < 0 else sides[1] if signed > 0 else "tie")
    elif names[0] == "human_ref_A" and row.get("labels") in (0, 1):
        verdict = sides[0] if row["labels"] == 1 else sides[1]
    elif named is not None:
        verdict = _verdict(row[named])
    elif won:
        verdict = sides[won.index(1)] if sorted(won) == [0, 1] else "tie"
    elif scores:
        verdict = "tie" if scores[0] == scores[1] else sides[0] if scores[0] > scores[1] else sides[1]
    else:
        raise _undecided(source, names)
    if verdict in sides:
        return sides.index(verdict)
    if verdict.startswith(("tie", "both", "neither", "none", "=")) or verdict == "1.5":  # AlpacaEval: between 1 and 2
        raise DataError.of_row(source, "a tie", "is a tie, so no response is preferred.")
    raise _undecided(source, names)


def _undecided(source: str, names: tuple[str, str]) -> DataError:
    known = ", ".join((*_SIGNED, *_NAMED))
    return DataError.of_row(
        source,
        "without a preference",
        f"has the responses {' and '.join(names)}, and no known value says which one is preferred (in {known}).",
    )


def _side(name: str) -> str:
    """Returns the end of a response's name, by which verdicts call it: a, b, 0, 1 or 2."""
    return name[-1].lower()


def _verdict(value: Any) -> str:
    """Returns a verdict as `a`, `1`, `tie` or the like, of `model_a`, `A>B`, `[[A]]`, `1.0` and others."""
    if _is_number(value) and float(value).is_integer():
        return str(int(value))
    text = str(value).strip().strip("[]").lower()
    if ">" in text:
        text = text.split(">")[0]
    elif "=" in text:
        return "tie"
    for prefix in ("model_", "response_", "response ", "assistant_", "output_"):
        text = text.removeprefix(prefix)
    return text


def _numbers(row: Row, names: Sequence[str]) -> list[float]:
    """Returns the numbers in these fields; none unless all of them hold one."""
    values = [row.get(name) for name in names]
    return [float(value) for value in values if value is not None] if all(map(_is_number, values)) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _dialogues(row: Row, names: tuple[str, str]) -> list[Any] | None:
    """Returns two dialogues where prompt and responses are JSON lists of turns (Arena's 55k battles); None elsewhere."""
    texts = [row.get("prompt"), *(row[name] for name in names)]
    if not all(map(_is_encoded, texts)):
        return None
    prompts, *answers = (json.loads(text) for text in texts)
    return [
        [
            turn
            for asked, answer in zip(prompts, side, strict=False)
            for turn in ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
        ]
        for side in answers
    ]


def _is_encoded(value: Any) -> bool:
    if not isinstance(value, str) or not value.startswith("["):
        return False
    try:
        return isinstance(json.loads(value), list)
    except (ValueError, RecursionError):
        return False


def _is_dialogue(value: Any) -> bool:
    if isinstance(value, str):
        return value.startswith(("\n\nHuman:", "\n\nAssistant:"))
    first = value[0] if isinstance(value, list) and len(value) > 1 else None
    role = first.get("role", first.get("from")) if isinstance(first, Mapping) else None
    return isinstance(role, str) and role.lower() in _OPENINGS


def _swift(row: Row) -> bool:
    return isinstance(row.get("messages"), list) and bool(row.keys() & {"rejected_response", "rejected_messages"})


def _from_swift(row: Row) -> Row:
    """Returns ms-swift's row: the messages end with the preferred response, and the other one stands beside them."""
    rejected = row.get("rejected_messages", row.get("rejected_response"))
    rest = {
        name: value for name, value in row.items() if name not in ("messages", "rejected_response", "rejected_messages")
    }
    if isinstance(rejected, str):
        rejected = [*row["messages"][:-1], {"role": "assistant", "content": rejected}]
    return rest | {"chosen": row["messages"], "rejected": rejected}


def _alpaca(row: Row) -> Any:
    """Returns an instruction with its input on the next line, after the turns in `history`, as LLaMA-Factory has it."""
    texts = [row[name] for name in ("instruction", "input") if row.get(name)]
    if not all(isinstance(text, str) for text in texts):
        return row["instruction"]
    asked, earlier = "\n".join(texts), row.get("history")
    if not isinstance(earlier, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in earlier):
        return asked
    turns = [
        {"role": role, "content": text}
        for pair in earlier
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return [*turns, {"role": "user", "content": asked}] if turns else asked


def _with_system(system: str, prompt: Any) -> Any:
    opening = {"role": "system", "content": system}
    if isinstance(prompt, str):
        return [opening, {"role": "user", "content": prompt}]
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    known = isinstance(first, Mapping) and first.get("role", first.get("from")) == "system"
    return prompt if known or not isinstance(prompt, list) else [opening, *prompt]


def _candidate(value: Any) -> Any:
    """Returns UltraFeedback's completion or Nectar's answer as a candidate with its gold quality."""
    if not isinstance(value, Mapping):
        return value
    text = value.get("response", value.get("answer", value.get("text")))
    quality = value.get("overall_score", value.get("fine-grained_score", value.get("gold")))
    if quality is None and _is_number(value.get("rank")):
        quality = -value["rank"]
    return {"text": text, "gold": quality}
