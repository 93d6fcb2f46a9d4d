"""Sources of pairs, the rows that are excluded, and splits without a common prompt."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from marginrm.errors import DataError
from marginrm.loading import load_for_training
from marginrm.texts.preferences import PreferencePair
from marginrm_training.config import DataConfig
from marginrm_training.data.formats import parse_hh_rlhf, parse_shp
from marginrm_training.data.label_noise import flip_labels
from marginrm_training.data.sources import Stream, read_source
from marginrm_training.data.splits import check_margins, encode_pairs, load_splits, prompt_key, read, split_by_prompt
from marginrm_training.method.margins import PRESETS, MarginMethod, named
from support.models import tiny_checkpoint

HH = Path(__file__).parents[3] / "shared" / "data" / "hh_harmless_test.jsonl.gz"
ROWS: list[dict[str, Any]] = [
    {"prompt": 'say "a",\nplease', "chosen": f"a{index}", "rejected": "b", "margin": 0.5 * index} for index in range(4)
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    Dataset.from_list(rows).to_parquet(path)
    return path


def plain(pairs: list[PreferencePair]) -> list[dict[str, Any]]:
    return [{name: getattr(pair, name) for name in ("prompt", "chosen", "rejected", "margin")} for pair in pairs]


def lines(pairs: list[PreferencePair]) -> list[str]:
    return [pair.source.rpartition(":")[2] for pair in pairs]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tiny_checkpoint(tmp_path_factory.mktemp("base"), "gpt_neox", max_length=64)
    return load_for_training(path, seed=0)[1]


def test_jsonl_csv_and_parquet_hold_the_same_pairs(tmp_path: Path) -> None:
    written = {
        write_jsonl(tmp_path / "x.jsonl", ROWS): ["1", "2", "3", "4"],
        write_csv(tmp_path / "x.csv", ROWS): ["2", "4", "6", "8"],  # a row of two lines is named by its first
        write_parquet(tmp_path / "x.parquet", ROWS): ["1", "2", "3", "4"],
    }
    for path, expected in written.items():
        pairs = read(str(path))
        assert plain(pairs) == ROWS
        assert lines(pairs) == expected
        assert pairs[0].source.startswith(f"{path}:")


@pytest.mark.parametrize("write", [write_jsonl, write_csv])
def test_gzip_files_are_read_by_the_suffix_before_gz(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / ("x.jsonl" if write is write_jsonl else "x.csv"), ROWS)
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert plain(read(str(packed))) == ROWS


def test_parquet_keeps_messages(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "hi"}], "chosen": "a", "rejected": "b", "margin": None}
    assert plain(read(str(write_parquet(tmp_path / "x.parquet", [row])))) == [row]


def test_a_folder_is_read_as_all_its_files_in_order(tmp_path: Path) -> None:
    write_parquet(tmp_path / "b.parquet", ROWS[2:])
    write_jsonl(tmp_path / "a.jsonl", ROWS[:2])
    (tmp_path / "README.md").write_text("not data")
    assert plain(read(str(tmp_path))) == ROWS


def test_a_saved_data_set_and_a_stream_of_it_are_read(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    whole = read_source("saved", str(tmp_path / "saved"))
    assert (plain(whole.pairs), lines(whole.pairs), whole.rows) == (ROWS, ["1", "2", "3", "4"], 4)
    part = read_source("saved", str(tmp_path / "saved"), stream=Stream(rows=3, seed=1))
    assert part.rows == 3
    assert {pair.chosen for pair in part.pairs} < {row["chosen"] for row in ROWS}
    assert part == read_source("saved", str(tmp_path / "saved"), stream=Stream(rows=3, seed=1))
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"holds the splits train\. Give one of them: .*splits/train"):
        read(str(tmp_path / "splits"))
    assert plain(read(str(tmp_path / "splits" / "train"))) == ROWS


@pytest.mark.parametrize("stream", [None, Stream(rows=2, seed=0)])
def test_a_name_is_loaded_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: Stream | None) -> None:
    # The same loader takes names and folders; "owner/name" with a split is a folder beside us here, as the Hub is far.
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write_jsonl(tmp_path / "owner" / "name" / "test.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = read_source("owner/name:test", "owner/name:test", stream=stream)
    assert source.rows == (2 if stream else 4)
    assert all(row in ROWS for row in plain(source.pairs))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"prompt,chosen,rejected\np,a,b\np,a\n", r"x\.csv:3: has another number of cells"),
        (
            "x.csv",
            b"prompt,chosen,rejected,margin\np,a,b,\np,a,b,large\n",
            r"x\.csv:3: field 'margin' must be a number",
        ),
        ("x.csv", b"prompt,chosen,rejected,margin\np,a,b,nan\n", r"x\.csv:2: field 'margin' must be a finite"),
        ("x.csv", b"prompt,chosen\np,\xff\n", r"x\.csv:2: is not valid UTF-8"),
        ("x.csv", b'prompt,chosen\np,"a\nb\n', r"x\.csv:2: .* a quote that opens in this row is never closed"),
        ("x.parquet", b"nothing of the kind", "cannot be read as Parquet"),
        ("x.json", b'{"prompt": "p"}\n{"prompt": "q"}\n', r"x\.json:1: has the fields"),
        ("x.json", b'{"prompt":\n"p"}\n{"prompt":\n"q"}\n', r"x\.json: cannot be read as JSON .*Name it \.jsonl"),
        ("x.json", b'{\n"prompt": "p"}', r"x\.json: a \.json file must be one list"),
        ("x.json", b'[{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p"}]', r"x\.json:2: has the fields"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(str(tmp_path / name), max_bad_rows=0)


ODD: dict[str, tuple[bytes, list[str]]] = {  # files with two pairs, and the reasons and lines of their other rows
    "x.jsonl": (
        (
            b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": \n[1]\n\n{"prompt": "q"}\n'
            b'{"prompt": "q", "chosen": "a", "rejected": "\xff"}\n{"prompt": "q", "chosen": "a", "rejected": "b"}\n'
        ),
        ["not valid JSON 2", "not a JSON object 3", "with other fields 5", "not valid JSON 6"],
    ),
    "x.json": (
        b'[{"prompt": "p", "chosen": "a", "rejected": "b"}, 3, null, {"prompt": "q", "chosen": "a", "rejected": "b"}]',
        ["not a JSON object 2", "not a JSON object 3"],
    ),
    "x.csv": (
        b'prompt,chosen,rejected,margin\np,a,b,\np,a\np,"a"x,b,\np,a,b,large\n"p\nq",a,\xff,\nq,a,b,0.5\n',
        ["not valid CSV 3", "not valid CSV 4", "with an invalid number 5", "not valid UTF-8 6"],
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_rows_are_counted_by_reason_with_their_lines_and_the_others_are_used(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    content, odd = ODD[name]
    path = tmp_path / name
    path.write_bytes(content)
    source = read_source("x", str(path))
    found = sorted(f"{reason} {place}" for reason, places in source.excluded.sources.items() for place in places)
    assert found == sorted(entry.replace(" " + entry.split()[-1], f" {path}:{entry.split()[-1]}") for entry in odd)
    assert [pair.prompt for pair in source.pairs] == ["p", "q"]
    assert source.rows == 2 + len(odd)
    with caplog.at_level(logging.WARNING):
        assert read(str(path)) == source.pairs
    assert str(source.excluded) in caplog.text
    assert len(read(str(path), max_bad_rows=len(odd))) == 2
    with pytest.raises(DataError, match=rf"{len(odd)} malformed rows, and max_bad_rows is 1: .*The first: .*{name}:"):
        read(str(path), max_bad_rows=1)
    with pytest.raises(DataError, match=rf"^{path}:{min(int(entry.split()[-1]) for entry in odd)}: "):
        read(str(path), max_bad_rows=0)


def test_odd_rows_of_parquet_and_saved_data_sets_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": [{"role": "assistant", "content": one}], "rejected": "b"} for one in ("a", None)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for path in (write_parquet(tmp_path / "x.parquet", rows), tmp_path / "saved"):
        source = read_source("x", str(path))
        assert source.excluded.sources == {"with malformed messages": [f"{path}:2"]}
        assert (len(source.pairs), source.rows) == (1, 2)


def test_a_file_without_a_usable_row_is_an_error_with_the_first_rows_fault(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "q", "answer": "a"}] * 3)
    with pytest.raises(DataError, match=r"none of its rows can be used: 3 with other fields .*The first: .*x\.jsonl:1"):
        read(str(path))


def test_messages_in_a_csv_file_are_read(tmp_path: Path) -> None:
    user, one, two = ({"role": role, "content": role} for role in ("user", "assistant", "assistant"))
    rows = [{"prompt": json.dumps([user]), "chosen": str([one]), "rejected": '{"not": "messages"}'}]
    pair = read(str(write_csv(tmp_path / "x.csv", rows)))[0]
    assert (pair.prompt, pair.chosen, pair.rejected) == ([user], two["content"], '{"not": "messages"}')


def test_the_names_for_code_of_other_projects() -> None:
    from marginrm_training.data import encode_pairs as encoding
    from marginrm_training.data import read as reading
    from marginrm_training.margins import MarginMethod as Method

    assert (encoding, reading, Method) == (encode_pairs, read, MarginMethod)


def test_a_missing_place_is_named_with_the_cure(tmp_path: Path) -> None:
    for place in (str(tmp_path / "none.jsonl"), "data/none.jsonl.gz", "none", "../none/here"):
        with pytest.raises(DataError, match="no such file, folder or data set"):
            read(place)
    with pytest.raises(DataError, match=r"no file in this folder ends in \.jsonl, \.json, \.parquet, \.csv"):
        read(str(tmp_path))
    with pytest.raises(DataError, match=r"data\.limit"):
        read_source("x", str(write_jsonl(tmp_path / "x.jsonl", ROWS)), stream=Stream(1, 0))


def test_a_files_hash_equals_sha256sum(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ROWS)
    assert read_source("x", str(path)).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_hh_rlhf_dialogues_become_messages() -> None:
    head = "\n\nHuman: Hi.\n\nAssistant: Hello: there.\n\nHuman: A colour?\n\nAssistant:"
    pair = parse_hh_rlhf({"chosen": head + " Red.", "rejected": head + " No."}, "f:1")
    assert pair.prompt == [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello: there."},
        {"role": "user", "content": "A colour?"},
    ]
    assert (pair.chosen, pair.rejected) == ("Red.", "No.")
    with pytest.raises(DataError, match="answer different prompts"):
        parse_hh_rlhf({"chosen": head + " Red.", "rejected": "\n\nHuman: Else?\n\nAssistant: No."}, "f:1")
    with pytest.raises(DataError, match="field 'chosen' is not an HH-RLHF dialogue"):
        parse_hh_rlhf({"chosen": "Red.", "rejected": "No."}, "f:1")


@pytest.mark.skipif(not HH.is_file(), reason="needs ../shared/data/hh_harmless_test.jsonl.gz")
def test_published_hh_rlhf_is_read_and_its_unusable_rows_are_counted() -> None:
    source = read_source("hh", str(HH), "hh_rlhf")
    assert source.excluded.counts == {"answers to different prompts": 5}
    assert (len(source.pairs), source.rows) == (2307, 2312)


def test_shp_labels_choose_the_preferred_comment() -> None:
    row = {"history": "post", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_ratio": 2.0}
    pair = parse_shp(row, "f:1")
    assert (pair.prompt, pair.chosen, pair.rejected, pair.margin, pair.extra) == (
        "post",
        "a",
        "b",
        None,
        {"score_ratio": 2.0},
    )
    assert parse_shp(row | {"labels": 0}, "f:1").chosen == "b"
    for wrong in ({"labels": 2}, {"labels": None}):
        with pytest.raises(DataError, match="not an SHP row"):
            parse_shp(row | wrong, "f:1")
    with pytest.raises(DataError, match="lacks human_ref_A, human_ref_B, labels"):
        parse_shp({"history": "post"}, "f:1")


def test_pairs_without_a_training_signal_are_excluded_and_counted_by_reason(tmp_path: Path, encoder: Any) -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    rows = [
        pair | {"rejected": "a"},
        pair | {"chosen": "word " * 100},
        pair | {"chosen": "  "},
        pair,
        pair,
        pair,
    ]
    split = encode_pairs("train", read(str(write_jsonl(tmp_path / "x.jsonl", rows))), encoder, MarginMethod())
    assert len(split.pairs) == 1
    assert split.excluded.counts == {"duplicates": 2, "with equal responses": 1, "too long": 1, "empty text": 1}
    assert f"2 duplicates ({tmp_path}/x.jsonl:5, {tmp_path}/x.jsonl:6)" in split.summary()


def test_trap_pairs_equal_after_encoding_are_excluded(tmp_path_factory: pytest.TempPathFactory) -> None:
    # A lower-casing tokenizer makes these two responses the same: loss ln 2, no gradient.
    _, encoder = load_for_training(tiny_checkpoint(tmp_path_factory.mktemp("bert"), "bert"), seed=0)
    split = encode_pairs("train", [PreferencePair("p", "Red", "red", source="f:1")], encoder, MarginMethod())
    assert split.excluded.sources == {"equal after encoding": ["f:1"]}


def test_pairs_that_the_template_makes_equal_are_excluded_by_that_reason(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m['content'].split('</think>')[-1] }}<|im_end|>{% endfor %}"
    _, encoder = load_for_training(tiny_checkpoint(tmp_path / "r1", "llama", chat_template=template), seed=0)
    pair = PreferencePair("p", "<think>a</think>four", "<think>b</think>four", source="f:1")
    split = encode_pairs("train", [pair], encoder, MarginMethod())
    assert split.excluded.sources == {"removed by the chat template": ["f:1"]}


def test_cut_prompts_are_counted_and_responses_are_kept(encoder: Any) -> None:
    pair = PreferencePair("word " * 100, "Red.", "No.", source="f:1")
    split = encode_pairs("train", [pair], encoder, MarginMethod(), "prompt_left")
    assert (split.truncated, len(split.pairs[0].chosen.ids)) == (1, 64)
    whole = encoder.encode("x", "Red.").ids
    assert split.pairs[0].chosen.ids[-3:] == whole[-3:]


@pytest.mark.parametrize("missing", [0, 3])
@pytest.mark.parametrize(("preset", "column"), [("column", "margin"), ("scaled_bt", "strength")])
def test_trap_a_margin_missing_in_any_row_is_named_by_its_line(
    tmp_path: Path, encoder: Any, missing: int, preset: str, column: str
) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", column: 0.7} for i in range(4)]
    del rows[missing][column]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    # Even if that row would be split off, or lie beyond the limit.
    config = DataConfig(train=str(path), limit=1, calibration_share=0.3, test_share=0.3)
    with pytest.raises(DataError, match=rf"x\.jsonl:{missing + 1}: this row has no '{column}'"):
        load_splits(config, encoder, PRESETS[preset], 0)


def test_a_margin_has_one_source() -> None:
    pairs = [PreferencePair("p", "a", "b"), PreferencePair("p", "a", "b", margin=1.0, source="f:2")]
    for method in (PRESETS["margin"], named("bt", estimator="fixed", fixed=1.0)):
        with pytest.raises(DataError, match=r"f:2: this row has a 'margin'.*ignore_margins = true"):
            check_margins(pairs, method)
        check_margins(pairs, method, ignore=True)
    check_margins(pairs, PRESETS["bt"])
    check_margins(pairs[1:], PRESETS["column"])


prompts = st.lists(st.integers(0, 9), min_size=12, max_size=40).filter(lambda drawn: len(set(drawn)) > 4)


@given(prompts, st.integers(0, 9))
def test_a_split_by_prompt_separates_prompts_and_loses_no_pair(drawn: list[int], seed: int) -> None:
    pairs = [PreferencePair(f"p{prompt}", str(index), "b") for index, prompt in enumerate(drawn)]
    off, rest = split_by_prompt(pairs, 0.25, seed=str(seed))
    assert sorted(pair.chosen for pair in off + rest) == sorted(pair.chosen for pair in pairs)
    assert not {prompt_key(pair.prompt) for pair in off} & {prompt_key(pair.prompt) for pair in rest}
    assert off


def test_prompts_never_leak_between_splits(tmp_path: Path, encoder: Any) -> None:
    def rows(*numbers: int) -> list[dict[str, Any]]:
        return [{"prompt": f"p{number}", "chosen": f"a{number}", "rejected": "b"} for number in numbers]

    config = DataConfig(
        train=str(write_jsonl(tmp_path / "train.jsonl", rows(1, 2, 3, 4, 5))),
        calibration=str(write_jsonl(tmp_path / "calibration.jsonl", rows(3, 6, 7))),
        test=str(write_jsonl(tmp_path / "test.jsonl", rows(4, 6, 8))),
    )
    splits = load_splits(config, encoder, PRESETS["bt"], 0)
    kept = [{pair.pair.prompt for pair in split.pairs} for split in (splits.train, splits.calibration, splits.test)]
    assert kept == [{"p1", "p2", "p5"}, {"p3", "p7"}, {"p4", "p6", "p8"}]
    assert splits.train.excluded.counts == {"with a held-out prompt": 2}
    assert splits.calibration.excluded.sources == {"with a held-out prompt": [f"{tmp_path}/calibration.jsonl:2"]}
    assert [(file.rows, file.pairs_used) for file in splits.files] == [(5, 3), (3, 2), (3, 3)]


def test_a_split_without_usable_pairs_is_an_error_with_the_reasons(tmp_path: Path, encoder: Any) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": f"p{i}", "chosen": "a", "rejected": "a"} for i in range(3)])
    with pytest.raises(DataError, match=r"no usable pairs are left\. test: 0 pairs; left out: 1 with equal responses"):
        load_splits(DataConfig(train=str(path)), encoder, PRESETS["bt"], 0)


def test_label_noise_flips_exactly_the_share_and_keeps_strengths(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "chosen": f"c{i}", "rejected": f"r{i}", "strength": 0.9, "true_margin": 2.0} for i in range(10)
    ]
    source, target = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    odd = {"prompt": "p", "response": "a"}
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, odd]) + "{cut off\n")
    flip_labels(source, target, 0.3, seed=1)
    *after, last = [json.loads(line) for line in target.read_text().splitlines()]
    assert last == odd
    swapped = [row for row in after if row["chosen"].startswith("r")]
    assert len(swapped) == 3
    assert all(row["true_margin"] == -2.0 and row["rejected"].startswith("c") for row in swapped)
    assert {row["strength"] for row in after} == {0.9}
    assert [row for row in after if row not in swapped] == [rows[i] for i in range(10) if after[i] not in swapped]
