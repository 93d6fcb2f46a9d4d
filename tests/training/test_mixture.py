"""Several sources of training pairs, near-duplicate prompts and decontamination."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from marginrm.errors import ConfigError
from marginrm.loading import load_for_training
from marginrm_training.config import DataConfig, SourceConfig, parse_config
from marginrm_training.data.mixture import SOURCE_NAME, draw_by_weight, read_training
from marginrm_training.data.overlap import PromptIndex
from marginrm_training.data.splits import Splits, load_splits
from marginrm_training.evaluation.pairs import by_source
from marginrm_training.method.margins import PRESETS
from support.models import tiny_checkpoint

_LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows(count: int, word: str) -> list[dict[str, Any]]:
    return [{"prompt": f"{word} {index}", "chosen": f"yes {index}", "rejected": "no"} for index in range(count)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("model"), "llama")
    return load_for_training(str(folder), seed=0)[1]


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    first = write(tmp_path / "first.jsonl", rows(60, "blue"))
    other = [{"question": f"red {index}", "good": f"yes {index}", "rejected": "no"} for index in range(40)]
    return first, write(tmp_path / "second.jsonl", other)


def two_sources(files: tuple[str, str], weights: tuple[float | None, float | None] = (None, None)) -> DataConfig:
    columns = {"prompt": "question", "chosen": "good"}
    return DataConfig(
        sources=(
            SourceConfig(path=files[0], name="first", weight=weights[0]),
            SourceConfig(path=files[1], name="second", weight=weights[1], columns=columns),
        )
    )


def by_name(splits: Splits) -> Counter[str]:
    return Counter(pair.pair.extra[SOURCE_NAME] for pair in splits.train.pairs)


def test_without_weights_all_pairs_of_all_sources_are_used(files: tuple[str, str], encoder: Any) -> None:
    splits = load_splits(two_sources(files), encoder, PRESETS["bt"], 0)
    assert len(splits.train.pairs) + len(splits.calibration.pairs) + len(splits.test.pairs) == 100
    assert {file.path: file.pairs_used for file in splits.files} == dict(by_name(splits))
    assert {pair.pair.prompt.split()[0] for pair in splits.train.pairs} == {"blue", "red"}


def test_weights_give_the_shares_and_the_seed_decides_the_draw(files: tuple[str, str], encoder: Any) -> None:
    drawn = [load_splits(two_sources(files, (1, 3)), encoder, PRESETS["bt"], seed) for seed in (0, 0, 1)]
    counts = by_name(drawn[0])
    assert counts["second"] in (3 * counts["first"], 3 * counts["first"] + 1, 3 * counts["first"] + 2)
    assert counts["second"] >= 30  # the scarce source is used whole
    order = [[pair.pair.source for pair in splits.train.pairs] for splits in drawn]
    assert order[0] == order[1] != order[2]


def test_weights_never_take_a_pair_twice(files: tuple[str, str]) -> None:
    config = two_sources(files, (1, 9))
    pairs = [pair for source in read_training(config, 0) for pair in source.pairs]
    drawn = draw_by_weight(pairs, config.sources, 0)
    assert len({pair.source for pair in drawn}) == len(drawn) == 44


def test_a_limit_caps_one_source(files: tuple[str, str]) -> None:
    capped = SourceConfig(path=files[0], limit=7)
    assert [len(source.pairs) for source in read_training(DataConfig(sources=(capped,)), 0)] == [7]


def test_rows_without_a_mapped_column_are_counted(tmp_path: Path, encoder: Any) -> None:
    content = [{"question": f"q {index}", "chosen": "a", "rejected": f"b {index}"} for index in range(30)]
    path = write(tmp_path / "rows.jsonl", [*content, {"chosen": "a", "rejected": "b"}])
    config = DataConfig(sources=(SourceConfig(path=path, columns={"prompt": "question"}),))
    splits = load_splits(config, encoder, PRESETS["bt"], 0)
    assert splits.train.excluded.sources == {"without the column question": [f"{path}:31"]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "give either data.train or"),
        ({"train": "a", "sources": [{"path": "b"}]}, "give either data.train or"),
        ({"sources": [{"path": "a", "weight": 1}, {"path": "b"}]}, "only some of data.sources have a weight"),
        ({"sources": [{"path": "a"}, {"path": "a"}]}, "two of data.sources have one name"),
        ({"sources": [{"path": "a"}], "stream": 3}, "data.stream is for data.train"),
    ],
)
def test_contradicting_sources_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"output": "o", "model": {"path": "m"}, "data": data}, "run.toml")


def test_prompts_overlap_by_a_run_of_words_whatever_case_and_punctuation() -> None:
    index = PromptIndex(13)
    index.add(
        [
            f"Please: {_LONG}!",
            [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": "Hi you"}],
        ]
    )
    assert index.overlaps(_LONG.upper().replace(" ", ", "))
    assert not index.overlaps(_LONG.removesuffix(" thirteen"))
    assert not index.overlaps(_LONG.replace("seven", "7"))
    assert index.overlaps("hi, YOU?")
    assert not index.overlaps("You are helpful.")


def test_training_pairs_of_a_benchmark_are_left_out_and_listed(tmp_path: Path, encoder: Any) -> None:
    train = write(
        tmp_path / "train.jsonl", [*rows(40, "blue"), {"prompt": f"Now {_LONG}.", "chosen": "a", "rejected": "b"}]
    )
    benchmark = write(
        tmp_path / "benchmark.jsonl", [{"prompt": [{"role": "user", "content": _LONG}], "candidates": []}]
    )
    config = DataConfig(train=train, test=write(tmp_path / "test.jsonl", rows(5, "green")), benchmarks=(benchmark,))
    excluded = load_splits(config, encoder, PRESETS["bt"], 0).train.excluded
    assert excluded.sources == {f"with a prompt of the benchmark {benchmark}": [f"{train}:41"]}


@pytest.mark.parametrize(("treatment", "left_out"), [("keep", []), ("drop", ["41"])])
def test_prompts_close_to_held_out_ones(tmp_path: Path, encoder: Any, treatment: Any, left_out: list[str]) -> None:
    near = {"prompt": f"Now {_LONG}.", "chosen": "a", "rejected": "b"}
    train = write(tmp_path / "train.jsonl", [*rows(40, "blue"), near])
    test = write(tmp_path / "test.jsonl", [near | {"prompt": f"And {_LONG}?"}])
    calibration = write(tmp_path / "calibration.jsonl", rows(5, "green"))
    config = DataConfig(train=train, test=test, calibration=calibration, near_duplicates=treatment)
    found = load_splits(config, encoder, PRESETS["bt"], 0).train.excluded.sources
    places = [place.rpartition(":")[2] for place in found.get("with a prompt close to a held-out one", [])]
    assert places == left_out


def test_accuracy_and_calibration_by_source(files: tuple[str, str], encoder: Any) -> None:
    pairs = load_splits(two_sources(files), encoder, PRESETS["bt"], 0).train.pairs
    d = np.array([2.0 if pair.pair.extra[SOURCE_NAME] == "first" else -2.0 for pair in pairs])
    found = by_source(d, pairs, temperature=1.0)
    assert (found["accuracy_source_first"], found["accuracy_source_second"]) == (1.0, 0.0)
    sure = 1 / (1 + np.exp(-2))  # the confidence in each pair; all of the second source are wrong
    assert found["ece_source_first"] == pytest.approx(1 - sure)
    assert found["ece_source_second"] == pytest.approx(sure)
    assert found["pairs_source_first"] + found["pairs_source_second"] == len(pairs)
