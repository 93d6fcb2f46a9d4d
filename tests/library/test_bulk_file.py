"""`marginrm score`: one output row per input row, errors in their place, and runs that are stopped and continued."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from marginrm import RewardModel
from marginrm.cli.main import build_app
from marginrm.errors import ConfigError, DataError, MarginRMError
from support.models import CHATML_TEMPLATE, tiny_checkpoint

ROWS: list[Any] = [
    {"id": "pair", "prompt": "Hi?", "chosen": "Yes, hello.", "rejected": "No."},
    {"id": "item", "prompt": [{"role": "user", "content": "Hi?"}], "response": "Yes, hello."},
    {"id": "group", "prompt": "Hi?", "candidates": ["No.", "Yes, hello.", "What?"]},
    {"id": "empty", "prompt": "Hi?", "response": ""},
    {"id": "long", "prompt": "Hi?", "chosen": "word " * 600, "rejected": "No."},
    {"prompt": "neither"},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("bulk") / "model", "llama", chat_template=CHATML_TEMPLATE)


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows) + "{not json\n"


def score(checkpoint: Path, source: Path, output: Path, *options: str) -> list[dict[str, Any]]:
    arguments = ["score", str(source), "-o", str(output), "--model", str(checkpoint), "--dtype", "float32", *options]
    result = CliRunner().invoke(build_app(), arguments, catch_exceptions=False)
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert result.exit_code == (3 if any("error" in row for row in found) else 0), result.output
    return found


def test_each_row_gets_its_result_or_its_error_in_order(checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl.gz"
    source.write_bytes(gzip.compress(lines(ROWS).encode()))
    pair, item, group, empty, long, unknown, broken = score(checkpoint, source, tmp_path / "out.jsonl")
    model = RewardModel.from_pretrained(checkpoint, dtype="float32")
    yes, no, what = model.score("Hi?", ["Yes, hello.", "No.", "What?"])
    assert pair["margin"] == pytest.approx(yes - no, abs=1e-5)
    assert pair["chosen"]["reward"] == pytest.approx(yes, abs=1e-5)
    assert item["reward"] == pytest.approx(yes, abs=1e-5)
    assert group["rewards"] == pytest.approx([no, yes, what], abs=1e-5)
    assert [row["id"] for row in (pair, item, group, empty, long)] == ["pair", "item", "group", "empty", "long"]
    assert empty["error"]["code"] == "empty_text"
    assert (long["error"]["code"], long["error"]["param"]) == ("sequence_too_long", "chosen")
    assert "in.jsonl.gz:6" in unknown["error"]["message"]
    assert "in.jsonl.gz:7" in broken["error"]["message"]
    assert len({row["revision"] for row in (pair, item, group)}) == 1


def test_unusable_rows_are_counted_by_reason_with_their_lines(checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(lines([*ROWS, *[{"prompt": "Hi?", "chosen": "Yes.", "rejected": None}] * 4]))
    arguments = ["score", str(source), "-o", str(tmp_path / "out"), "--model", str(checkpoint), "--dtype", "float32"]
    summary = CliRunner().invoke(build_app(), arguments, catch_exceptions=False).output
    assert "8 with errors" in summary
    assert f"4 with a null response ({source}:7, {source}:8, {source}:9, ...)" in summary
    for reason, line in (("empty text", 4), ("too long", 5), ("with other fields", 6), ("not valid JSON", 11)):
        assert f"1 {reason} ({source}:{line})" in summary


def test_a_group_is_ranked_without_its_unusable_candidates(checkpoint: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "Hi?", "candidates": ["", "No.", "word " * 600, "Yes, hello."]},
        {"prompt": "Hi?", "responses": ["", " "]},
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["score", str(source), "-o", str(output), "--model", str(checkpoint), "--dtype", "float32"]
    summary = CliRunner().invoke(build_app(), arguments, catch_exceptions=False).output
    group, hopeless = (json.loads(line) for line in output.read_text().splitlines())
    model = RewardModel.from_pretrained(checkpoint, dtype="float32")
    no, yes = model.score("Hi?", ["No.", "Yes, hello."])
    assert group["rewards"] == [None, pytest.approx(no, abs=1e-5), None, pytest.approx(yes, abs=1e-5)]
    assert group["best"] == (3 if yes > no else 1)
    found = [(one["candidate"], one["error"]["code"], one["error"]["param"]) for one in group["errors"]]
    assert found == [(0, "empty_text", "responses[0]"), (2, "sequence_too_long", "responses[2]")]
    assert hopeless["error"]["code"] == "empty_text"
    assert "2 candidates of scored groups with errors" in summary
    assert f"1 too long ({source}:1 candidate 2)" in summary


def test_a_limit_of_unusable_rows_ends_the_run_with_their_reasons(checkpoint: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(lines(ROWS))
    with pytest.raises(DataError, match=r"in\.jsonl:4: .*More than max_bad_rows = 0 rows"):
        score(checkpoint, source, output, "--max-bad-rows", "0")
    assert len(output.read_text().splitlines()) == 3
    with pytest.raises(DataError, match=r"in\.jsonl:6: .*1 empty text \(.*:4\); 1 too long \(.*:5\); 1 with other"):
        score(checkpoint, source, output, "--max-bad-rows", "2")
    assert len(score(checkpoint, source, output, "--max-bad-rows", "4")) == len(ROWS) + 1


def test_a_stopped_run_continues_even_after_half_a_row(checkpoint: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(lines(ROWS))
    whole = score(checkpoint, source, output)
    whole_text = output.read_text()
    text = output.read_text().splitlines(keepends=True)
    output.write_text("".join(text[:2]) + text[2][:20])
    again = score(checkpoint, source, output)
    assert output.read_text().splitlines()[:2] == whole_text.splitlines()[:2]
    assert [row["input"] for row in again] == [row["input"] for row in whole]
    assert again[2]["rewards"] == pytest.approx(whole[2]["rewards"], abs=1e-5)


def test_output_of_another_input_is_not_continued(checkpoint: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(lines(ROWS))
    score(checkpoint, source, output)
    source.write_text(lines(ROWS[1:]))
    with pytest.raises(ConfigError, match=r"out\.jsonl:1: belongs to another input row"):
        score(checkpoint, source, output)
    assert len(score(checkpoint, source, output, "--restart")) == len(ROWS)
    with pytest.raises(ConfigError, match="is the input"):
        score(checkpoint, source, source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.jsonl", json.dumps(ROWS[:3]).encode(), "none of its first 1 rows can be scored"),
        ("in.txt", b"prompt,chosen,rejected\nHi?,Yes.,No.\n", "none of its first 2 rows can be scored"),
        ("in.json", b"prompt,chosen,rejected\nHi?,Yes.,No.\n", "cannot be read as JSON"),
        ("in.parquet", b"PAR1\x15\x04\x15\xb0\n\x8a\x00\nPAR1", "cannot be read as Parquet"),
        ("in.csv", b"question,answer\nHi?,Yes.\n", "none of its first 1 rows can be scored.*with|the fields"),
        ("in.json", json.dumps({"question": "Hi?", "answer": "Yes."}).encode(), "none of its first 1 rows"),
    ],
    ids=["a list in jsonl", "csv in txt", "csv in json", "binary", "other columns", "other fields"],
)
@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet", "out/"])
def test_a_file_in_another_format_is_refused_before_a_model_is_loaded(
    tmp_path: Path, name: str, content: bytes, message: str, output: str
) -> None:
    source = tmp_path / name
    source.write_bytes(content)
    arguments = ["score", str(source), "-o", f"{tmp_path}/{output}", "--model", str(tmp_path / "no model")]
    with pytest.raises(DataError, match=message):
        CliRunner().invoke(build_app(), arguments, catch_exceptions=False)
    assert list(tmp_path.iterdir()) == [source]


def test_rows_of_an_earlier_run_count_as_failed(checkpoint: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(lines(ROWS))
    score(checkpoint, source, output)
    kept = output.read_text().splitlines(keepends=True)
    output.write_text("".join(kept[:-1]))
    arguments = ["score", str(source), "-o", str(output), "--model", str(checkpoint), "--dtype", "float32"]
    with pytest.raises(DataError, match=r"More than max_bad_rows = 2 rows .*1 empty text \(.*in\.jsonl:4\)"):
        CliRunner().invoke(build_app(), [*arguments, "--max-bad-rows", "2"], catch_exceptions=False)
    again = CliRunner().invoke(build_app(), arguments, catch_exceptions=False)
    assert again.exit_code == 3
    assert "7 rows, 4 with errors" in again.output
    assert "1 rows scored" in again.output


def test_the_input_is_read_once(checkpoint: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "pipe", tmp_path / "out.jsonl"
    os.mkfifo(source)
    for content in (lines(ROWS[:2]), lines(ROWS)):  # the second run continues the first
        writer = threading.Thread(target=source.write_text, args=(content,))
        writer.start()
        found = score(checkpoint, source, output)
        writer.join()
        output.write_text("".join(json.dumps(row) + "\n" for row in found[:2]))
    assert len(found) == len(ROWS) + 1


@pytest.mark.parametrize("content", ["my notes", '{"prompt": "mine"}', "first line\nsecond"])
def test_a_file_of_something_else_is_never_cut(checkpoint: Path, tmp_path: Path, content: str) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "notes"
    source.write_text(lines(ROWS))
    output.write_text(content)
    for options in ((), ("--keep-columns",)):
        with pytest.raises(ConfigError, match="cannot be continued"):
            score(checkpoint, source, output, *options)
    assert output.read_text() == content


@pytest.mark.parametrize("options", [(), ("--keep-columns",)])
def test_a_run_continues_wherever_a_row_was_cut(checkpoint: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        "".join(json.dumps(row) + "\n" for row in ({"prompt": "Hi é?", "response": "Yes.", "big": 1e400}, ROWS[0]))
    )
    whole = score(checkpoint, source, output, *options)
    first, rest = (line + b"\n" for line in output.read_bytes().split(b"\n", 2)[:2])
    for cut in (first[:1], first[:9], first[:-1], first + rest[:25]):
        output.write_bytes(cut)
        assert score(checkpoint, source, output, *options) == whole


def test_two_runs_never_write_one_output(checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(lines(ROWS))
    for name, lock in (("out.jsonl", "out.jsonl"), ("out.parquet", "out.parquet.shards/.marginrm/0-of-1.lock")):
        held = tmp_path / lock
        held.parent.mkdir(parents=True, exist_ok=True)
        with held.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # as another process holds it
            arguments = ["score", str(source), "-o", str(tmp_path / name), "--model", str(checkpoint)]
            for options in ([], ["--restart"]):
                with pytest.raises(ConfigError, match="another `marginrm score` is writing it"):
                    CliRunner().invoke(build_app(), [*arguments, *options], catch_exceptions=False)
        CliRunner().invoke(build_app(), arguments, catch_exceptions=False)
        assert (tmp_path / name).stat().st_size > 0


def test_a_restart_that_fails_leaves_the_output(checkpoint: Path, tmp_path: Path) -> None:
    source, broken = tmp_path / "in.jsonl", tmp_path / "broken.jsonl"
    source.write_text(lines(ROWS))
    broken.write_text("not rows\n")
    for name in ("out.jsonl", "out.parquet", "out/"):
        arguments = ["-o", f"{tmp_path}/{name}", "--dtype", "float32"]
        CliRunner().invoke(
            build_app(), ["score", str(source), *arguments, "-m", str(checkpoint)], catch_exceptions=False
        )
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        for given, model in ((broken, checkpoint), (source, tmp_path / "no-model")):
            with pytest.raises(MarginRMError):
                CliRunner().invoke(
                    build_app(),
                    ["score", str(given), *arguments, "-m", str(model), "--restart"],
                    catch_exceptions=False,
                )
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("output", ["data/out.jsonl", "data/scored/", "data/out.parquet"])
@pytest.mark.parametrize("place", ["data", "data/*"])
def test_an_output_among_its_inputs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, output: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "in.jsonl").write_text(lines(ROWS))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="would read its own rows"):
        CliRunner().invoke(build_app(), ["score", place, "-o", output, "-m", "no-model"], catch_exceptions=False)
