"""The demo's preferences: known margins, no signal in length, disjoint splits, and the same bytes in every process."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from random import Random

import pytest

from marginrm.texts.preferences import read_pairs
from marginrm_training.demo.degradations import ALL, CUTTING, REPLACING, Degradation
from marginrm_training.demo.preferences import (
    DemoData,
    answers_to,
    generate_groups,
    generate_pairs,
    split_prompts,
    spoil,
    write_jsonl,
)
from marginrm_training.demo.texts import LIST_FORMS, Text, parse, texts


@cache
def data() -> DemoData:
    return generate_pairs()


def test_prompts_and_good_answers_are_a_few_hundred_and_distinct() -> None:
    entries = texts()
    assert len(entries) > 250
    assert len({text.prompt for text in entries}) == len({text.answer for text in entries}) == len(entries)


@pytest.mark.parametrize("text", texts(), ids=lambda text: text.prompt[:40])
def test_a_good_answer_has_the_requested_form_and_ends(text: Text) -> None:
    lines = text.answer.split("\n")
    assert text.form in {"plain", "steps", "bullets", "yesno", "definition", "comparison", "email", "poem"}
    if text.form == "steps":
        assert all(re.match(rf"{number}\. ", line) for number, line in enumerate(lines, 1))
    elif text.form == "bullets":
        assert all(line.startswith("- ") for line in lines)
    elif text.form == "yesno":
        assert re.search(r"\b(yes|no)\b", text.answer, re.IGNORECASE)
    if text.form in LIST_FORMS:
        assert len(lines) >= 3
    elif text.form != "email":
        assert text.answer.endswith((".", "!"))
    assert text.answer == text.answer.strip()


def test_pairs_are_enough_and_each_has_its_true_margin() -> None:
    splits = data()
    assert len(splits.train) >= 4000
    for pair in (*splits.train, *splits.calibration, *splits.test):
        assert pair.true_margin >= 0.5
        assert 0.5 < pair.strength < 1
        assert pair.chosen != pair.rejected


def test_no_prompt_and_no_good_answer_is_in_two_splits() -> None:
    splits = data()
    prompts = [{pair.prompt for pair in split} for split in (splits.train, splits.calibration, splits.test)]
    assert not prompts[0] & prompts[1]
    assert not prompts[0] & prompts[2]
    assert not prompts[1] & prompts[2]
    held_out = {text.answer for text in split_prompts(0)[2]}
    assert not held_out & {side for pair in splits.train for side in (pair.chosen, pair.rejected)}


def test_length_carries_no_signal() -> None:
    splits = data()
    for split in (splits.train, splits.calibration, splits.test):
        longer = sum(len(pair.chosen) > len(pair.rejected) for pair in split) / len(split)
        assert 0.48 <= longer <= 0.52


@pytest.mark.parametrize("degradation", ALL, ids=lambda degradation: degradation.name)
def test_every_degradation_changes_the_answer(degradation: Degradation) -> None:
    other = texts()[-1]
    for text in texts()[:40]:
        assert spoil(text, other, [degradation], Random(0)).text != text.answer


def test_severities_add_up() -> None:
    answer = spoil(texts()[0], texts()[-1], ALL[2:5], Random(0))
    assert answer.quality == -sum(degradation.severity for degradation in ALL[2:5])


def test_cuts_come_before_changes() -> None:
    train = split_prompts(0)[0]
    cuts = {degradation.name for degradation in (*REPLACING, *CUTTING)}
    spoilt = [answer.degradations for text in train[:40] for answer in answers_to(text, train, 0)]
    assert any(set(names) & cuts and len(names) > 1 for names in spoilt)
    assert all(not set(names[1:]) & cuts for names in spoilt)


def test_groups_hold_gold_qualities_of_held_out_prompts() -> None:
    groups = generate_groups()
    assert {group.prompt for group in groups} == {text.prompt for text in split_prompts(0)[2]}
    assert all(len(group.candidates) == len(group.quality) == 16 for group in groups)


def test_the_same_seed_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    write_jsonl(data().train, tmp_path / "here.jsonl")
    code = (
        "from pathlib import Path\n"
        "from marginrm_training.demo.preferences import generate_pairs, write_jsonl\n"
        f"write_jsonl(generate_pairs().train, Path({str(tmp_path / 'there.jsonl')!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONHASHSEED": "7"})
    digests = [hashlib.sha256((tmp_path / f"{name}.jsonl").read_bytes()).hexdigest() for name in ("here", "there")]
    assert digests[0] == digests[1]
    rows = list(read_pairs(tmp_path / "here.jsonl"))
    assert len(rows) == len(data().train)
    assert rows[0].extra["true_margin"] == data().train[0].true_margin


def test_text_before_the_first_entry_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"x\.txt:1"):
        parse("stray\nQ[plain]: a\nb", "x")
