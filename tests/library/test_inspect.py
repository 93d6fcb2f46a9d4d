"""`marginrm inspect`: what a checkpoint is, in a table and as JSON, held against a plain loop in transformers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from marginrm.cli.inspect import compare_with_plain, inspect
from marginrm.cli.main import build_app
from marginrm.reading import ReadingOptions
from marginrm.reward_model import RewardModel
from support import zoo
from support.zoo import BOS_TEMPLATE, CAUSAL, SEQUENCE, config_of, model_of, tokenizer, write


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tok = tokenizer(BOS_TEMPLATE, bos=True)
    write(tmp_path / "model", model_of(SEQUENCE, config_of("Llama", tok)), tok)
    return tmp_path / "model"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": prompt, "chosen": first, "rejected": second} for prompt, (first, second, *_) in zoo.PROMPTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), ["inspect", *map(str, arguments)])


def test_a_table_says_what_the_checkpoint_is(checkpoint: Path) -> None:
    done = run(checkpoint)
    assert done.exit_code == 0, done.output
    rows = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert rows["backbone"] == "LlamaModel, 2 layers of 32"
    assert rows["head"] == "score (1 row)"
    assert rows["leading_bos"] == "1"
    assert rows["forward_path"] == "packed"
    assert rows["template"] == "the tokenizer's chat template"


def test_json_and_verification(checkpoint: Path, pairs: Path) -> None:
    done = run(checkpoint, "--json", "--verify", pairs, "--bos", "double")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["options"] == {"bos": "double"}
    assert found["verified"]["responses"] == 6
    assert found["verified"]["largest_difference"] <= 1e-4


def test_rewards_that_differ_are_shown(checkpoint: Path, pairs: Path) -> None:
    model = RewardModel.from_pretrained(checkpoint, dtype="float32", reading=ReadingOptions(bos="off"))
    assert model.reading is not None
    told = dataclasses.replace(model.reading, bos="auto")  # as if it had been read with the BOS of the template
    found = compare_with_plain(model, told, str(checkpoint), pairs, limit=10)
    assert not found["agrees"]
    assert found["largest_difference"] > 1e-4
    assert set(found["there"]) == {"index", "marginrm", "transformers"}


def kinds(folder: Path) -> Iterator[tuple[Path, ReadingOptions]]:
    """Yields a checkpoint of each usage."""
    tok = tokenizer()
    write(folder / "value", model_of(CAUSAL, config_of("Qwen2", tok, num_labels=...)), tok)
    zoo.change_weights(folder / "value", lambda old: old | {"v_head.weight": zoo.rows(2)})
    yield folder / "value", ReadingOptions(label_weights=(0.5, 1.0))
    write(folder / "logits", model_of(CAUSAL, config_of("Qwen3", tok, num_labels=..., head_dim=16)), tok)
    yield folder / "logits", ReadingOptions(reward_tokens=("id:3", "id:4"), frame="mxbai-rerank-v2")
    zoo.write_own_code(folder / "own", "GatedReward", {"rewards": (32, 3), "gate": (32, 3)})
    yield folder / "own", ReadingOptions(trust_remote_code=True)
    pair = zoo.pair_tokenizer()
    write(folder / "bert", model_of(SEQUENCE, config_of("Bert", pair, num_key_value_heads=..., num_labels=2)), pair)
    yield folder / "bert", ReadingOptions(label_weights=(-1.0, 1.0))
    model = zoo.transformers.AutoModelForSequenceClassification.from_pretrained(folder / "logits", num_labels=1)
    zoo.write_adapter(folder / "lora", folder / "logits", task="SEQ_CLS", base_model=model, tok=tok)
    yield folder / "lora", ReadingOptions()


def test_every_usage_has_a_plain_loop(tmp_path: Path, pairs: Path) -> None:
    seen = set()
    for folder, options in kinds(tmp_path):
        model = RewardModel.from_pretrained(folder, dtype="float32", reading=options)
        assert model.reading is not None
        found = compare_with_plain(model, model.reading, str(folder), pairs, limit=10)
        assert found["agrees"], (folder.name, found)
        seen.add(model.reading.usage)
    assert seen == {"classifier", "value-head", "token-logits", "own-code"}


def test_its_options_are_those_of_every_command() -> None:
    assert {"bos", "eos", "label_weights", "reward_tokens", "frame"} <= set(inspect.__signature__.parameters)  # type: ignore[attr-defined]
