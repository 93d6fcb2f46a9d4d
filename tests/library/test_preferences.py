"""Files of pairs and groups: every published form, every fault by its path:line and reason, and rows unchanged by reading."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marginrm.errors import DataError
from marginrm.texts.json_lines import read_rows
from marginrm.texts.preferences import PreferencePair, parse_group, parse_pair, parse_single, read_groups, read_pairs

USER = {"role": "user", "content": "Name a colour."}
ANSWER = {"role": "assistant", "content": "Red."}
WORSE = {"role": "assistant", "content": "No."}
SYSTEM = {"role": "system", "content": "Be brief."}
DIALOGUE = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Name a colour.\n\nAssistant:"
EARLIER = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
CALLED = CALL | {"content": ""}  # as it is read
RESULT = {"role": "tool", "name": "f", "content": "sunny"}
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}

texts = st.text(st.characters(codec="utf-8"))
turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": texts}), min_size=1
)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parsed(row: dict[str, Any]) -> tuple[Any, str, str]:
    pair = parse_pair(row, "f:1")
    return pair.prompt, pair.chosen, pair.rejected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PAIR, ("p", "a", "b")),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, ([USER], "a", "b")),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]}, ([USER], "Red.", "No.")),
        # RLHFlow repeats the prompt's messages before the answer.
        ({"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, ([USER], "Red.", "No.")),
        (
            {"prompt": "Name a colour.", "chosen": [USER, ANSWER], "rejected": [WORSE]},
            ("Name a colour.", "Red.", "No."),
        ),
        # HH-RLHF: no prompt, two whole dialogues.
        ({"chosen": DIALOGUE + " Red.", "rejected": DIALOGUE + " No."}, ([*EARLIER, USER], "Red.", "No.")),
        (
            {"prompt": None, "chosen": DIALOGUE + "Red.", "rejected": DIALOGUE + "No."},
            ([*EARLIER, USER], "Red.", "No."),
        ),
        ({"prompt": DIALOGUE, "chosen": DIALOGUE + "a", "rejected": DIALOGUE + "b"}, ([*EARLIER, USER], "a", "b")),
        ({"chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, ([USER], "Red.", "No.")),
        # The prompt is the user's text, and the dialogues begin with a system turn or go on for more turns.
        (
            {"prompt": "Name a colour.", "chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, WORSE]},
            ([SYSTEM, USER], "Red.", "No."),
        ),
        (
            {"prompt": "Hi.", "chosen": [*EARLIER, USER, ANSWER], "rejected": [*EARLIER, USER, WORSE]},
            ([*EARLIER, USER], "Red.", "No."),
        ),
        (
            {"prompt": [USER], "chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, WORSE]},
            ([SYSTEM, USER], "Red.", "No."),
        ),
        # The prompt differs from the dialogues by white space, or is empty.
        ({"prompt": "Name a colour.\n", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, ([USER], "Red.", "No.")),
        ({"prompt": "", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, ([USER], "Red.", "No.")),
        ({"prompt": [], "chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, ([USER], "Red.", "No.")),
        # Responses are one message each, or continue the prompt after turns with a tool.
        ({"prompt": [USER], "chosen": ANSWER, "rejected": WORSE}, ([USER], "Red.", "No.")),
        (
            {"prompt": [USER], "chosen": [CALL, RESULT, ANSWER], "rejected": [CALL, RESULT, WORSE]},
            ([USER, CALLED, RESULT], "Red.", "No."),
        ),
        # Contents are lists of parts, or null beside a tool call; fields that are null are left out.
        (
            {
                "prompt": [{"role": "user", "content": [{"type": "text", "text": "Name a "}, "colour."]}],
                "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "Red."}]}],
                "rejected": "No.",
            },
            ([USER], "Red.", "No."),
        ),
        (
            {"prompt": [USER, CALL, RESULT], "chosen": [ANSWER], "rejected": "No."},
            ([USER, CALLED, RESULT], "Red.", "No."),
        ),
        (
            {"prompt": [{**USER, "tool_calls": None, "name": None}], "chosen": ANSWER, "rejected": WORSE},
            ([USER], "Red.", "No."),
        ),
        (
            {"prompt": [{"role": "system", "content": ""}, USER], "chosen": ANSWER, "rejected": "No."},
            ([{"role": "system", "content": ""}, USER], "Red.", "No."),
        ),
        # The dialogues leave out the system turn of the prompt.
        (
            {"prompt": [SYSTEM, USER], "chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
            ([SYSTEM, USER], "Red.", "No."),
        ),
        # The dialogue opens with the assistant.
        (
            {"prompt": "Name a colour.", "chosen": [WORSE, USER, ANSWER], "rejected": [WORSE, USER, WORSE]},
            ([WORSE, USER], "Red.", "No."),
        ),
        # One message as the prompt, other names of roles, one part as the content.
        (
            {
                "prompt": {"role": "Human", "content": {"type": "text", "text": "Name a colour."}},
                "chosen": {"role": "model", "content": "Red."},
                "rejected": {"role": "ASSISTANT", "content": "No."},
            },
            ([USER], "Red.", "No."),
        ),
        # ShareGPT's messages.
        (
            {
                "prompt": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Name a colour."}],
                "chosen": {"from": "gpt", "value": "Red."},
                "rejected": {"from": "gpt", "value": "No."},
            },
            ([SYSTEM, USER], "Red.", "No."),
        ),
    ],
)
def test_every_form_of_a_pair(row: dict[str, Any], expected: tuple[Any, str, str]) -> None:
    assert parsed(row) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (PAIR | {"rejected": None}, "with a null response"),
        ({"chosen": [*EARLIER, USER, ANSWER], "rejected": [USER, WORSE]}, "answers to different prompts"),
        ({"chosen": [USER, ANSWER, USER], "rejected": [USER, WORSE, USER]}, "ending before the answer"),
        ({"chosen": DIALOGUE + "a\n\nHuman: Bye.", "rejected": DIALOGUE + "b"}, "ending before the answer"),
        ({"prompt": [USER], "chosen": [CALL], "rejected": [ANSWER]}, "with a tool call as the response"),
        ({"prompt": [{"role": "user", "content": None}], "chosen": "a", "rejected": "b"}, "with malformed messages"),
        ({"prompt": "Else?", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, "with a dialogue of another prompt"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image_url"}]}], "chosen": "a", "rejected": "b"},
            "with malformed messages",
        ),
        ({"question": "p", "answer": "a"}, "with other fields"),
        ({"chosen": "a", "rejected": "b"}, "without a prompt"),
        (PAIR | {"margin": "1"}, "with an invalid number"),
        ([PAIR], "not a JSON object"),
    ],
)
def test_an_unusable_row_has_its_reason_and_its_line(tmp_path: Path, row: Any, reason: str) -> None:
    path = write(tmp_path / "x.jsonl", PAIR, row, PAIR)
    errors: list[DataError] = []
    assert len(list(read_pairs(path, errors.append))) == 2
    assert [(error.reason, error.source) for error in errors] == [(reason, f"{path}:2")]


def test_a_pair_keeps_margin_strength_and_other_fields() -> None:
    pair = parse_pair(PAIR | {"margin": 2, "strength": 0.75, "id": 7, "prompt_id": None}, "f:1")
    assert pair == PreferencePair("p", "a", "b", 2.0, 0.75, "f:1", {"id": 7, "prompt_id": None})
    bare = parse_pair(PAIR | {"margin": None}, "f:1")
    assert (bare.margin, bare.strength) == (None, None)


@given(prompt=texts | turns, chosen=texts, rejected=texts)
def test_a_row_with_a_prompt_is_read_unchanged(prompt: Any, chosen: str, rejected: str) -> None:
    assert parsed({"prompt": prompt, "chosen": chosen, "rejected": rejected}) == (prompt, chosen, rejected)


names = st.sampled_from(
    ["role", "content", "from", "value", "text", "type", "tool_calls", "function", "arguments", "x"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from(["user", "assistant", DIALOGUE]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)
fields = st.sampled_from(
    [
        "prompt",
        "chosen",
        "rejected",
        "margin",
        "strength",
        "responses",
        "rewards",
        "candidates",
        "response",
        "response_0",
        "response_1",
        "better_response_id",
        "winner",
        "conversation_a",
        "conversation_b",
        "messages",
        "rejected_response",
        "instruction",
        "input",
        "history",
        "system",
        "completions",
        "answers",
        "score_0",
        "score_1",
    ]
)


@given(row=st.dictionaries(fields, values), parse=st.sampled_from([parse_pair, parse_group, parse_single]))
def test_a_row_of_any_shape_is_read_or_refused_with_its_line(row: dict[str, Any], parse: Any) -> None:
    refusal = None
    try:
        parse(row, "f:1")
    except DataError as error:
        refusal = error
    assert refusal is None or (str(refusal).startswith("f:1: ") and refusal.source == "f:1")


@given(before=turns, chosen=texts, rejected=texts)
def test_message_dialogues_are_split_at_the_last_assistant_turn(before: Any, chosen: str, rejected: str) -> None:
    answers = [[*before, {"role": "assistant", "content": text}] for text in (chosen, rejected)]
    assert parsed({"chosen": answers[0], "rejected": answers[1]}) == (before, chosen, rejected)


@given(turns=st.lists(texts.filter(lambda text: "Assistant:" not in text), min_size=1), chosen=texts, rejected=texts)
def test_text_dialogues_are_split_at_the_last_assistant_turn(turns: list[str], chosen: str, rejected: str) -> None:
    if any(marker in text for marker in ("\n\nAssistant:", "\n\nHuman:") for text in (*turns, chosen, rejected)):
        return  # the text has more turns
    head = "".join(f"\n\nHuman: {turn}\n\nAssistant: Yes." for turn in turns).removesuffix(" Yes.")
    prompt, *responses = parsed({"chosen": head + chosen, "rejected": head + rejected})
    assert [turn["content"] for turn in prompt if turn["role"] == "user"] == [turn.strip() for turn in turns]
    assert [turn["content"] for turn in prompt if turn["role"] == "assistant"] == ["Yes."] * (len(turns) - 1)
    assert responses == [chosen.strip(), rejected.strip()]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a"}, "has the fields 'chosen'; expected"),
        ({}, "has the fields none"),
        (PAIR | {"prompt": 3}, "field 'prompt' must be a text or a list of messages, not a number"),
        (PAIR | {"prompt": []}, "must be a whole dialogue, since there is no 'prompt'"),
        (PAIR | {"prompt": [{"role": "user"}]}, r"field 'prompt\[0\]' must be a message"),
        (PAIR | {"chosen": None}, "field 'chosen' is null"),
        (PAIR | {"chosen": 3}, "field 'chosen' must be a text or a list of messages, not a number"),
        (PAIR | {"chosen": [USER, ANSWER]}, "field 'chosen' is a dialogue that does not contain the row's 'prompt'"),
        (PAIR | {"rejected": [USER]}, "field 'rejected' must end with the assistant's answer"),
        ({"chosen": "Red.", "rejected": "No."}, "field 'chosen' must be a whole dialogue, since there is no 'prompt'"),
        ({"chosen": "\n\nAssistant: Red.", "rejected": "\n\nAssistant: No."}, "must be a whole dialogue"),
        ({"chosen": [ANSWER], "rejected": [WORSE]}, "must be a whole dialogue"),
        ({"chosen": [USER], "rejected": [USER]}, "must end with the assistant's answer"),
        ({"chosen": DIALOGUE + "a", "rejected": "\n\nHuman: Else?\n\nAssistant: b"}, "answer different prompts"),
        (PAIR | {"margin": "1"}, "field 'margin' must be a finite number, not a text"),
        (PAIR | {"margin": True}, "not a boolean"),
        (PAIR | {"margin": float("nan")}, "field 'margin' must be a finite number, not nan"),
        (PAIR | {"margin": 10**400}, "field 'margin' is too large"),
        (PAIR | {"strength": 1.5}, r"field 'strength' is 1\.5; it must be 0 to 1"),
    ],
)
def test_every_fault_of_a_row_is_named_with_its_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "x.jsonl", PAIR, row)
    with pytest.raises(DataError, match=rf"x\.jsonl:2: .*{message}"):
        list(read_pairs(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "is not valid JSON: .*column 2"),
        (b"[1]", "must be a JSON object, not a list"),
        (b"\xff{}", "is not valid UTF-8"),
        (b'{"margin": ' + b"9" * 5000 + b"}", "too long to read"),
        (b"[" * 200_000, "too many nested brackets"),
    ],
)
def test_every_fault_of_a_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b"\n\n" + line)  # an empty line counts, too
    with pytest.raises(DataError, match=rf"x\.jsonl:3: .*{message}"):
        list(read_pairs(path))


def test_no_message_holds_a_text_of_the_file() -> None:
    secret = "a very private thing"
    for row in (
        {"chosen": secret, "rejected": secret},
        {"prompt": {secret: secret}, "chosen": secret, "rejected": secret},
        {"prompt": secret, "chosen": [{"role": "user", "content": secret}], "rejected": secret},
        PAIR | {"margin": secret},
    ):
        with pytest.raises(DataError) as caught:
            parse_pair(row, "f:1")
        assert secret not in str(caught.value)


def test_gzip_is_recognised_by_its_bytes_and_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n"
    for name in ("x.jsonl", "x.jsonl.gz", "x.txt"):
        for data in (content, gzip.compress(content)):
            (tmp_path / name).write_bytes(data)
            (pair,) = read_pairs(tmp_path / name)
            assert (pair.prompt, pair.source) == ("p", f"{tmp_path / name}:1")


@pytest.mark.parametrize("damage", [lambda data: data[:-12], lambda data: data[:12] + b"\0\0\0\0" + data[16:]])
def test_a_damaged_gzip_file_is_an_error(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(damage(gzip.compress(json.dumps(PAIR).encode() * 50, mtime=0)))
    with pytest.raises(DataError, match=r"x\.jsonl\.gz: cannot be read"):
        list(read_pairs(path))


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            list(read_pairs(path))


def test_unusable_rows_are_collected_while_the_others_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", PAIR, {}, PAIR, [])
    errors: list[DataError] = []
    assert [pair.source.rpartition(":")[2] for pair in read_pairs(path, errors.append)] == ["1", "3"]
    assert [str(error).split(": ")[0].rpartition(":")[2] for error in errors] == ["2", "4"]


def test_rows_are_read_unchanged(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"any": 1}, {"thing": [2]})
    assert list(read_rows(path)) == [({"any": 1}, f"{path}:1"), ({"thing": [2]}, f"{path}:2")]


@pytest.mark.parametrize(
    ("row", "candidates", "gold"),
    [
        ({"prompt": "p", "responses": ["a", "b"]}, ["a", "b"], None),
        ({"prompt": "p", "responses": ["a", "b"], "rewards": [1, 0.5]}, ["a", "b"], [1.0, 0.5]),
        ({"prompt": "p", "candidates": ["a"]}, ["a"], None),
        ({"prompt": "p", "candidates": [{"text": "a", "win_prob": 0.25}]}, ["a"], [0.25]),
        ({"prompt": "p", "candidates": [{"text": "a", "gold": 1}, {"text": "b", "quality": 2}]}, ["a", "b"], [1, 2]),
    ],
)
def test_every_form_of_a_group(row: dict[str, Any], candidates: list[str], gold: list[float] | None) -> None:
    group = parse_group(row | {"id": "x"}, "f:1")
    assert (group.prompt, group.candidates, group.gold, group.extra) == ("p", candidates, gold, {"id": "x"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, "has the fields 'prompt'; expected"),
        ({"responses": ["a"]}, "has the fields 'responses'; expected"),
        ({"prompt": "p", "responses": []}, "must be a list of at least one response, not an empty list"),
        ({"prompt": "p", "responses": "a"}, "not a text"),
        ({"prompt": "p", "responses": ["a", 1]}, r"field 'responses\[1\]' must be a text"),
        ({"prompt": "p", "responses": ["a"], "rewards": [1, 2]}, "field 'rewards' must be a list of 1 numbers"),
        ({"prompt": "p", "responses": ["a"], "rewards": ["x"]}, r"field 'rewards\[0\]' must be a finite number"),
        ({"prompt": "p", "candidates": [{"words": "a"}]}, r"field 'candidates\[0\]\[0\]' must be a message"),
        ({"prompt": "p", "candidates": ["a", {"text": "b", "gold": 1}]}, "a gold value for only 1 of 2 candidates"),
    ],
)
def test_every_fault_of_a_group_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"g\.jsonl:1: .*{message}"):
        list(read_groups(write(tmp_path / "g.jsonl", row)))
