"""Files in which every twentieth row is odd in one of 15 ways that published data has, through every command.

A run ends, each odd row is counted by its reason with its line, and the others are used.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.models import CHATML_TEMPLATE, tiny_checkpoint
from support.training import BAD, GOOD, config_file, rows

NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
USER = {"role": "user", "content": "What is it?"}
GOOD_TURN, BAD_TURN = ({"role": "assistant", "content": text} for text in ("Red.", "No."))
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
PAIR = {"prompt": "What is it?", "chosen": "Red.", "rejected": "No."}
EVERY = 20

# (reason, row); bytes are the line itself.
ODD_PAIRS: list[tuple[str, Any]] = [
    ("with a null response", PAIR | {"rejected": None}),
    ("ending before the answer", {"chosen": [USER, GOOD_TURN, USER], "rejected": [USER, BAD_TURN, USER]}),
    (
        "answers to different prompts",
        {
            "winner": "model_a",
            "conversation_a": [USER, GOOD_TURN, USER, GOOD_TURN],
            "conversation_b": [USER, BAD_TURN, USER, BAD_TURN],
        },
    ),
    ("a tie", {"prompt": "What is it?", "response_1": "Red.", "response_2": "No.", "preference_strength": 0}),
    ("with a tool call as the response", PAIR | {"prompt": [USER], "chosen": [CALL]}),
    ("with malformed messages", PAIR | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}),
    ("with other fields", {"message_id": "x", "text": "Red.", "role": "assistant"}),
    ("without a prompt", {"chosen": "Red.", "rejected": "No."}),
    ("with a dialogue of another prompt", PAIR | {"chosen": [{"role": "user", "content": "Else?"}, GOOD_TURN]}),
    ("not valid JSON", b'{"prompt": "What is it?", "chosen": "Red.", "rej'),
    ("not a JSON object", ["What is it?", "Red.", "No."]),
    ("with an invalid number", PAIR | {"margin": "large"}),
    ("empty text", PAIR | {"rejected": "\n"}),
    ("too long", PAIR | {"chosen": "word " * 300}),
    ("refused by the chat template", PAIR | {"prompt": [{"role": "system", "content": "Be brief."}, USER]}),
]
CANDIDATES = [{"text": "Red.", "gold": 1.0}, {"text": "No.", "gold": 0.0}]
GROUP = {"prompt": "What is it?", "candidates": CANDIDATES}
ODD_GROUPS: list[tuple[str, Any]] = [
    ("without gold qualities", {"prompt": "What is it?", "candidates": ["Red.", "No."]}),
    ("without candidates", GROUP | {"candidates": []}),
    ("without candidates", GROUP | {"candidates": None}),
    ("with uneven gold values", GROUP | {"candidates": [CANDIDATES[0], "No."]}),
    ("with uneven gold values", {"prompt": "What is it?", "responses": ["Red.", "No."], "rewards": [1]}),
    ("with a null response", GROUP | {"candidates": [CANDIDATES[0], {"text": None, "gold": 0}]}),
    ("with an invalid number", GROUP | {"candidates": [CANDIDATES[0], {"text": "No.", "gold": "low"}]}),
    ("with other fields", PAIR),
    ("not valid JSON", b'{"prompt": "What is it?", "candidates": [{"te'),
    ("not a JSON object", 7),
    ("with malformed messages", GROUP | {"prompt": [{"role": "user"}]}),
    ("ending before the answer", {"prompt": [USER], "responses": [[GOOD_TURN, USER], "No."], "rewards": [1, 0]}),
    ("without a readable candidate: empty text", GROUP | {"prompt": " "}),
    (
        "without a readable candidate: too long",
        GROUP | {"candidates": [{"text": one * 300, "gold": 1} for one in ("red ", "no ")]},
    ),
    (
        "without a readable candidate: refused by the chat template",
        GROUP | {"prompt": [{"role": "system", "content": "Be brief."}, USER]},
    ),
]


def with_odd_rows(path: Path, usual: list[dict[str, Any]], odd: list[tuple[str, Any]]) -> list[str]:
    """Writes a file of which every twentieth row is odd; returns the entry of each reason in a summary."""
    lines: list[bytes] = []
    places: dict[str, list[str]] = {}
    rest = iter(usual)
    for reason, row in odd:
        lines += [json.dumps(next(rest)).encode() for _ in range(EVERY - 1)]
        lines.append(row if isinstance(row, bytes) else json.dumps(row).encode())
        places.setdefault(reason, []).append(f"{path}:{len(lines)}")
    path.write_bytes(b"\n".join(lines) + b"\n")
    return [f"{len(found)} {reason} ({', '.join(found)})" for reason, found in places.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    tiny_checkpoint(root / "base", "gpt_neox", chat_template=NO_SYSTEM + CHATML_TEMPLATE, max_length=96)
    return root


def marginrm(*arguments: str | Path, status: int = 0) -> str:
    """Runs the command as a user does, and returns what it prints."""
    command = [Path(sys.executable).parent / "marginrm", *arguments]
    done = subprocess.run([str(one) for one in command], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_every_command_counts_odd_pairs_and_uses_the_others(folder: Path) -> None:
    path = folder / "odd.jsonl"
    usual = rows(len(ODD_PAIRS) * (EVERY - 1))
    expected = with_odd_rows(path, usual, ODD_PAIRS)
    config = config_file(folder, 8, optim={"epochs": 0.1}, data={"train": str(path)})
    checkpoint = folder / "run"
    for arguments in (
        ["train", config],
        ["evaluate", "--model", checkpoint, "--data", path],
        ["calibrate", "--model", checkpoint, "--data", path],
        ["compare", "--first", checkpoint, "--second", checkpoint, "--data", path],
    ):
        printed = marginrm(*arguments)
        assert f": {len(usual)} pairs; left out: " in printed, printed
        assert not [entry for entry in expected if entry not in printed]

    left_out = json.loads((checkpoint / "left_out.json").read_text(encoding="utf-8"))
    assert left_out == {
        "train": {reason: [f"{path}:{EVERY * place}"] for place, (reason, _) in enumerate(ODD_PAIRS, 1)}
    }
    output = folder / "scored.jsonl"
    printed = marginrm("score", path, "-o", output, "--model", checkpoint, status=3)
    assert not [entry for entry in expected if entry not in printed]
    scored = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [number for number, row in enumerate(scored, start=1) if "error" in row] == list(range(EVERY, 301, EVERY))
    assert sum("margin" in row for row in scored) == len(usual)

    first = f"{path}:{EVERY}: field 'rejected' is null"
    options = ("evaluate", "--model", checkpoint, "--data", path, "--max-bad-rows")
    malformed = expected[:12]  # the others are well-formed, and this model cannot read them
    assert first in marginrm("train", config, "--set", "data.max_bad_rows=0", status=1)
    assert first in marginrm(*options, "0", status=1)
    printed = marginrm(*options, "11", status=1)
    assert "12 malformed rows, and max_bad_rows is 11" in printed
    assert not [entry for entry in malformed if entry not in printed]
    assert "accuracy" in marginrm(*options, "12")


def test_best_of_n_counts_odd_groups_and_uses_the_others(folder: Path) -> None:
    path = folder / "groups.jsonl"
    usual = [
        {"prompt": f"Task {index}?", "candidates": [{"text": GOOD[index % 4], "gold": 1}, {"text": BAD[0], "gold": 0}]}
        for index in range(len(ODD_GROUPS) * (EVERY - 1))
    ]
    usual[0]["candidates"] += [{"text": "", "gold": 0}, {"text": "word " * 300, "gold": 0}]
    expected = with_odd_rows(path, usual, ODD_GROUPS)
    printed = marginrm("best-of-n", "--model", folder / "base", "--data", path)
    assert f"{len(usual)} prompts, " in printed
    assert not [entry for entry in expected if entry not in printed]
    assert f"1 empty text ({path}:1 candidate 2)" in printed
    assert f"1 too long ({path}:1 candidate 3)" in printed
    assert f"{path}:{EVERY}: the candidates have no gold quality" in marginrm(
        "best-of-n", "--model", folder / "base", "--data", path, "--max-bad-rows", "0", status=1
    )
