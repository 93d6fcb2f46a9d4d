"""`marginrm score` in shards: formats, columns kept, one row for each row, refusals, processes of a batch system."""

from __future__ import annotations

import csv
import gzip
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import parquet
from typer.testing import CliRunner

from marginrm import RewardModel
from marginrm.bulk.plan import plan_shards, read_shards
from marginrm.bulk.rows import parse_row
from marginrm.bulk.scoring import ModelOptions, RowOptions, score_chunk
from marginrm.bulk.summary import Summary
from marginrm.cli.main import build_app
from marginrm.errors import ConfigError, DataError
from marginrm.reading import ReadingOptions
from support.models import CHATML_TEMPLATE, SENTENCES, tiny_checkpoint

PAIRS = [
    {"prompt": f"Question {number // 3}?", "chosen": SENTENCES[number % 8], "rejected": SENTENCES[(number + 1) % 8]}
    for number in range(30)
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("bulk") / "model", "llama", chat_template=CHATML_TEMPLATE)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[float]:
    """The margin of each pair, scored alone."""
    model = RewardModel.from_pretrained(checkpoint, dtype="float32")
    return [model.compare(row["prompt"], row["chosen"], row["rejected"]).margin for row in PAIRS]


def run(checkpoint: Path, places: list[Path | str], output: str, *options: str, status: int = 0) -> str:
    arguments = ["score", *map(str, places), "-o", output, "-m", str(checkpoint), "--dtype", "float32"]
    result = CliRunner().invoke(build_app(), [*arguments, "--shard-rows", "4", *options], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result.output


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*"))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for part in parts(folder) for line in part.read_text().splitlines()]


def write_input(folder: Path, form: str) -> Path | str:
    path = folder / f"in.{form}"
    match form:
        case "jsonl.gz":
            path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in PAIRS).encode()))
        case "json":
            path.write_text(json.dumps(PAIRS, indent=1))
        case "csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(PAIRS[0]))
                writer.writeheader()
                writer.writerows(PAIRS)
        case "parquet":
            parquet.write_table(pa.Table.from_pylist(PAIRS), path)
        case "saved":
            Dataset.from_list(PAIRS).save_to_disk(path)
        case "folder" | "glob":
            path.mkdir()
            write_jsonl(path / "a.jsonl", PAIRS[:7])
            write_jsonl(path / "b.jsonl", PAIRS[7:])
            return path if form == "folder" else f"{path}/*.jsonl"
    return path


@pytest.mark.parametrize("form", ["jsonl.gz", "json", "csv", "parquet", "saved", "folder", "glob"])
def test_every_format_gives_the_same_margins_with_its_columns(
    checkpoint: Path, expected: list[float], tmp_path: Path, form: str
) -> None:
    run(checkpoint, [write_input(tmp_path, form)], f"{tmp_path}/out/")
    found = rows_of(tmp_path / "out")
    assert [{name: row[name] for name in PAIRS[0]} for row in found] == PAIRS
    assert [row["score"]["margin"] for row in found] == pytest.approx(expected, abs=1e-5)
    assert len(parts(tmp_path / "out")) == 5  # shards of 4 rows and more, which end with the last row of a prompt


def test_a_shard_ends_with_the_last_row_of_a_prompt(tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "in.jsonl", PAIRS))
    plan = plan_shards([source], 4)
    shards = list(read_shards([source], plan, range(len(plan.sizes))))
    assert [row.fields for shard in shards for row in shard.rows] == PAIRS
    prompts = [{row.fields["prompt"] for row in shard.rows if row.fields} for shard in shards]
    assert sum(map(len, prompts)) == len(set().union(*prompts))
    assert plan_shards([str(write_jsonl(tmp_path / "one.jsonl", [PAIRS[0]] * 30))], 4).sizes == (8, 8, 8, 6)


@pytest.mark.parametrize("suffix", ["jsonl.gz", "parquet"])
def test_shards_are_joined_into_one_file(checkpoint: Path, expected: list[float], tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"out.{suffix}"
    run(checkpoint, [write_jsonl(tmp_path / "in.jsonl", PAIRS)], str(output))
    if suffix == "parquet":
        found = parquet.read_table(output).to_pylist()
    else:
        found = [json.loads(line) for line in gzip.decompress(output.read_bytes()).splitlines()]
    assert [{name: row[name] for name in PAIRS[0]} for row in found] == PAIRS
    assert [row["score"]["margin"] for row in found] == pytest.approx(expected, abs=1e-5)
    assert not (tmp_path / f"out.{suffix}.shards").exists()
    with pytest.raises(ConfigError, match="is complete, or of another run"):
        run(checkpoint, [tmp_path / "in.jsonl"], str(output))


ODD: list[Any] = [
    {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No.", "tags": ["a"], "n": 1},
    {"prompt": [{"role": "user", "content": "Hi?"}], "response": "Yes.", "tags": "b", "n": 1.5},
    {"prompt": "Hi?", "candidates": ["No.", "Yes.", ""], "empty": {}, "big": 10**30},
    {"prompt": "Hi?", "response": "\ud800", "nan": float("nan")},
    b"{not json",
    {"prompt": "Hi?", "response": ""},
    [1],
]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_odd_rows_keep_their_place_and_columns_and_are_counted(checkpoint: Path, tmp_path: Path, form: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in ODD))
    printed = run(checkpoint, [source], f"{tmp_path}/out/", "--format", form, status=3)
    if form == "parquet":
        found = parquet.read_table(tmp_path / "out").to_pylist()
        assert found[0]["tags"] == '["a"]'  # a column of several types is text
        assert found[1]["tags"] == "b"
        assert json.loads(found[1]["prompt"]) == ODD[1]["prompt"]
        assert (found[0]["n"], found[1]["n"]) == (1.0, 1.5)
        assert (found[2]["empty"], found[2]["big"]) == ("{}", str(10**30))
    else:
        found = rows_of(tmp_path / "out")
        assert [{name: value for name, value in row.items() if name != "score"} for row in found[:3]] == ODD[:3]
        assert found[3]["nan"] is None
    errors = [row["score"].get("error") for row in found]
    assert [error and error["code"] for error in errors] == [
        None, None, None, "invalid_text", "invalid_data", "empty_text", "invalid_data",
    ]  # fmt: skip
    assert found[2]["score"]["rewards"][2] is None
    assert "7 rows, 4 with errors" in printed
    assert f"1 not valid JSON ({source}:5)" in printed
    again = run(checkpoint, [source], f"{tmp_path}/out/", "--format", form, status=3)  # all is done
    assert "0 rows scored" in again
    assert f"1 not valid JSON ({source}:5)" in again
    with pytest.raises(DataError, match=r"More than max_bad_rows = 3 rows cannot be scored: .*not valid JSON"):
        run(checkpoint, [source], f"{tmp_path}/out/", "--format", form, "--max-bad-rows", "3")


def test_processes_of_a_batch_system_fill_one_folder_with_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", PAIRS)
    run(checkpoint, [source], f"{tmp_path}/whole/")
    assert "left to other processes" in run(checkpoint, [source], f"{tmp_path}/out/", "--shard", "1/2")
    run(checkpoint, [source], f"{tmp_path}/out/", "--shard", "0/2")
    assert [part.read_bytes() for part in parts(tmp_path / "out")] == [
        part.read_bytes() for part in parts(tmp_path / "whole")
    ]
    with pytest.raises(ConfigError, match="give I/N"):
        run(checkpoint, [source], f"{tmp_path}/out/", "--shard", "2/2")
    with pytest.raises(ConfigError, match=r"Give -o .*x\.parquet/ instead"):
        run(checkpoint, [source], f"{tmp_path}/x.parquet", "--shard", "0/2")


def test_another_input_model_or_option_is_refused_with_the_reason(checkpoint: Path, tmp_path: Path) -> None:
    source, output = write_jsonl(tmp_path / "in.jsonl", PAIRS), f"{tmp_path}/out/"
    run(checkpoint, [source], output, "--shard", "0/2")
    other = tiny_checkpoint(tmp_path / "other", "llama", chat_template=CHATML_TEMPLATE, seed=1)
    with pytest.raises(ConfigError, match=r"model\.revision was .*, and is "):
        run(other, [source], output)
    with pytest.raises(ConfigError, match=r"options\.truncation was \"error\", and is \"prompt_left\""):
        run(checkpoint, [source], output, "--truncation", "prompt_left")
    write_jsonl(source, [*PAIRS[:-1], PAIRS[0]])
    with pytest.raises(ConfigError, match=r"input\.sha256 was .*--restart to replace it"):
        run(tmp_path / "no model", [source], output)  # found before a model is loaded
    run(checkpoint, [source], output, "--restart")
    assert len(rows_of(tmp_path / "out")) == len(PAIRS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    for option in ((), ("--restart",)):
        with pytest.raises(ConfigError, match=r"none of a run of `marginrm score`|not an output of `marginrm score`"):
            run(checkpoint, [source], f"{tmp_path}/full/", *option)
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"


def test_columns_and_suffixes_that_cannot_be_written_are_refused_first(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [row | {"score": 1} for row in PAIRS])
    with pytest.raises(ConfigError, match="has a column 'score' already"):
        run(tmp_path / "no model", [source], f"{tmp_path}/out/")
    with pytest.raises(ConfigError, match=r"the output is \.jsonl, \.jsonl\.gz or \.parquet"):
        run(tmp_path / "no model", [source], f"{tmp_path}/out.csv")


def test_the_least_certain_pairs_come_first(checkpoint: Path, expected: list[float], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [*PAIRS, {"prompt": "Hi?", "response": "Yes."}])
    by_margin = sorted(range(len(PAIRS)), key=lambda number: abs(expected[number]))
    for output, order in (("out/", "out"), ("out.jsonl", "out"), ("b.parquet", "b")):
        printed = run(checkpoint, [source], f"{tmp_path}/{output}", "--rank-by", "uncertainty")
        lines = (tmp_path / f"{order}.by-uncertainty.jsonl").read_text().splitlines()
        ranked = [json.loads(line) for line in lines]
        assert [row["rank"] for row in ranked] == list(range(1, 31))
        found = [abs(expected[row["row"]]) for row in ranked]
        assert found == pytest.approx([abs(expected[number]) for number in by_margin], abs=1e-5)
        assert "30 rows by uncertainty; 1 rows have no confidence" in printed


def kill_moments(count: int) -> Iterator[float]:
    draw = random.Random(0)
    return (draw.uniform(0.0, 1.0) for _ in range(count))


def test_a_run_that_is_killed_at_any_moment_continues_to_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", PAIRS * 40)
    run(checkpoint, [source], f"{tmp_path}/whole/")
    whole = [part.read_bytes() for part in parts(tmp_path / "whole")]
    command = [Path(sys.executable).with_name("marginrm"), "score", source, "-o", f"{tmp_path}/out/", "-m", checkpoint]
    command += ["--dtype", "float32", "--shard-rows", "4"]
    for moment in kill_moments(2):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            before = len(parts(tmp_path / "out"))
            while len(parts(tmp_path / "out")) <= before + round(moment * len(whole) / 3):
                assert process.poll() is None
                time.sleep(0.001)
            process.kill()
        left = parts(tmp_path / "out")
        assert before < len(left) < len(whole)
        assert [part.read_bytes() for part in left] == [whole[int(part.stem[5:])] for part in left]
    run(checkpoint, [source], f"{tmp_path}/out/")
    assert [part.read_bytes() for part in parts(tmp_path / "out")] == whole
    assert [one.name for one in (tmp_path / "out" / ".marginrm").glob("*.new")] == []


def test_a_prompt_that_returns_shards_later_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    prompts = ["Explain in detail. " * 20 + f"Question {number}?" for number in range(3)]
    places = [
        str(
            write_jsonl(
                tmp_path / "in.jsonl",
                [{"prompt": prompts[number % 3], "response": SENTENCES[number % 8]} for number in range(12)],
            )
        )
    ]
    rewards = {}
    for mebibytes in (0, 64):
        model = ModelOptions(
            model=str(checkpoint), dtype="float32", prefix_cache_mib=mebibytes, reading=ReadingOptions()
        ).load()
        rewards[mebibytes] = []
        for shard in read_shards(places, plan_shards(places, 3), range(4)):
            rows = score_chunk(model, [parse_row(row) for row in shard.rows], RowOptions(), Summary())
            rewards[mebibytes] += [row["reward"] for row in rows]
            first = model.encoder.encode_group(prompts[0], ["Yes."], "error")[0]
            kept = model.cached_tokens(first.array, "")
            assert kept > len(first.array) - 32 if mebibytes else kept == 0
    assert rewards[64] == pytest.approx(rewards[0], abs=1e-5)
