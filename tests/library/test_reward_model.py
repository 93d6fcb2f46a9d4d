"""Loading and scoring: the same reward however it is asked for, and a clear refusal of what is no reward model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from marginrm import RewardModel
from marginrm.errors import (
    ConfigError,
    EmptyTextError,
    GoldenMismatchError,
    HeadError,
    ManifestError,
    MarginRMError,
    ModelError,
    NonFiniteRewardError,
)
from marginrm.loading import load_for_training
from marginrm.manifest import MANIFEST_NAME, GoldenSample, Manifest
from support.models import CHATML_TEMPLATE, tiny_checkpoint

PROMPT = "Name three primary colours."
RESPONSES = ["Red, yellow and blue.", "No.", "Red, yellow and green, I do not know.", "The sea."]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model", "llama", chat_template=CHATML_TEMPLATE)


def load(path: Path, **options: object) -> RewardModel:
    return RewardModel.from_pretrained(path, **({"dtype": "float32"} | options))  # type: ignore[arg-type]


def with_manifest(path: Path) -> Manifest:
    model = load(path)
    samples = [
        GoldenSample(prompt=PROMPT, response=text, ids=list(model.encoder.encode(PROMPT, text).ids), reward=reward)
        for text, reward in zip(RESPONSES, model.score(PROMPT, RESPONSES), strict=True)
    ]
    manifest = Manifest(
        name="tiny",
        created="2026-01-01T00:00:00+00:00",
        base_model="tiny",
        encoding=model.encoder.describe(),
        golden=samples,
        golden_tolerance={"float32": 1e-4, "bfloat16": 0.1},
    )
    manifest.save(path)
    return manifest


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_rows_have_few_lengths_and_what_fills_them_changes_no_reward(tmp_path: Path, family: str) -> None:
    model = load(tiny_checkpoint(tmp_path, family))
    together = [model.encoder.encode(PROMPT * 20, text) for text in RESPONSES]
    for encoded in (
        *([[model.encoder.encode(PROMPT, text) for text in texts]] for texts in (RESPONSES[:1], RESPONSES)),
        [[model.encoder.encode(PROMPT, text) for text in [*RESPONSES, "word " * 40]]],
        [together, together[::-1], together[:1]],  # of several requests, which start alike
    ):
        bare = model.module.collate(encoded)
        filled = model.module.collate(encoded, multiple=model.row_multiple)
        assert filled.ids.shape[1] % 64 == 0
        assert 0 <= filled.ids.shape[1] - bare.ids.shape[1] < 64
        with torch.inference_mode():
            alone = model.module(bare).tolist()
        result = model.run_step(encoded)
        assert [len(rewards) for rewards in result.rewards] == [len(group) for group in encoded]
        assert [reward for rewards in result.rewards for reward in rewards] == pytest.approx(alone, abs=1e-5)
        assert sum(result.computed) == bare.tokens


def test_rewards_are_those_of_transformers_own_forward(checkpoint: Path) -> None:
    reference = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    expected = []
    for text in RESPONSES:
        turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        with torch.no_grad():
            expected.append(float(reference(torch.tensor([ids])).logits))
    assert load(checkpoint).score(PROMPT, RESPONSES) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3", "bert", "modernbert"])
def test_a_reward_does_not_depend_on_its_neighbours_or_on_the_budget(tmp_path: Path, family: str) -> None:
    path = tiny_checkpoint(tmp_path, family)
    together = load(path).score(PROMPT, RESPONSES)
    assert [load(path).score(PROMPT, [text])[0] for text in RESPONSES] == pytest.approx(together, abs=1e-5)
    assert load(path, token_budget=24).score(PROMPT, RESPONSES) == pytest.approx(together, abs=1e-5)


@pytest.mark.parametrize("how", ["no pad token", "left padding"])
def test_padding_settings_do_not_touch_a_reward(tmp_path: Path, how: str) -> None:
    path = tiny_checkpoint(tmp_path / "model", "gpt_neox")
    expected = load(path).score(PROMPT, RESPONSES)
    tokenizer = AutoTokenizer.from_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    if how == "no pad token":
        tokenizer.pad_token = None
        config["pad_token_id"] = None
    else:
        tokenizer.padding_side = "left"
    tokenizer.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(config))
    model = load(path)
    assert model.score(PROMPT, RESPONSES) == pytest.approx(expected, abs=1e-5)
    model.module.forward_path = "padded"
    assert model.score(PROMPT, RESPONSES) == pytest.approx(expected, abs=1e-5)


def test_compare_and_best_of_n_say_what_the_rewards_say(checkpoint: Path) -> None:
    model = load(checkpoint)
    rewards = model.score(PROMPT, RESPONSES)
    comparison = model.compare(PROMPT, RESPONSES[0], RESPONSES[1])
    assert comparison.margin == pytest.approx(rewards[0] - rewards[1], abs=1e-5)
    assert comparison.confidence == pytest.approx(1 / (1 + 2.718281828**-comparison.margin), abs=1e-5)
    ranking = model.best_of_n(PROMPT, RESPONSES, top_k=2)
    assert ranking.best == rewards.index(max(rewards))
    assert len(ranking.ranking) == 2


def test_a_bad_response_is_named_by_its_index(checkpoint: Path) -> None:
    with pytest.raises(EmptyTextError, match=r"^responses\[1\] is empty") as caught:
        load(checkpoint).score(PROMPT, ["fine", ""])
    assert caught.value.param == "responses[1]"


def test_an_empty_list_of_responses_is_an_error_that_says_so(checkpoint: Path) -> None:
    model = load(checkpoint)
    for score in (model.score, model.best_of_n):
        with pytest.raises(EmptyTextError, match="responses is an empty list"):
            score(PROMPT, [])


def test_a_plain_checkpoint_is_uncalibrated(checkpoint: Path) -> None:
    model = load(checkpoint)
    assert not model.info.calibrated
    assert model.temperature == 1.0
    assert model.info.revision.startswith("sha256:")
    assert model.verify_golden() is None


def test_golden_samples_are_reproduced(checkpoint: Path) -> None:
    with_manifest(checkpoint)
    assert load(checkpoint).verify_golden() == pytest.approx(0, abs=1e-5)
    assert load(checkpoint, dtype="bfloat16").verify_golden() is not None


def test_other_weights_fail_the_golden_samples(checkpoint: Path) -> None:
    with_manifest(checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    weights["score.weight"] = weights["score.weight"] * 2
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GoldenMismatchError, match=r"golden\[\d\]: reward"):
        load(checkpoint).verify_golden()


def test_another_template_fails_the_golden_samples(checkpoint: Path) -> None:
    with_manifest(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = CHATML_TEMPLATE.replace("<|im_end|>", "")
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(GoldenMismatchError, match="chat template"):
        load(checkpoint).verify_golden()


def test_a_model_that_gives_nan_gives_no_reward(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    weights["score.weight"][:] = float("nan")
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteRewardError, match=r"responses\[0\]"):
        load(checkpoint).score(PROMPT, RESPONSES)


def test_a_checkpoint_without_its_head_is_refused(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HeadError, match=r"score\.weight"):
        load(checkpoint)


def test_a_language_model_is_refused_as_one(tmp_path: Path, checkpoint: Path) -> None:
    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    with pytest.raises(HeadError, match="LlamaForCausalLM, a causal language model without a reward head"):
        load(tmp_path / "lm")


def test_two_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HeadError, match="2 values per sequence"):
        load(tiny_checkpoint(tmp_path, "llama", num_labels=2))


@pytest.mark.parametrize("part", ["weights", "truncated weights", "tokenizer", "configuration", "everything"])
def test_a_missing_or_broken_part_is_named(checkpoint: Path, part: str) -> None:
    if part == "weights":
        (checkpoint / "model.safetensors").unlink()
    elif part == "truncated weights":
        whole = (checkpoint / "model.safetensors").read_bytes()
        (checkpoint / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    elif part == "tokenizer":
        (checkpoint / "tokenizer.json").write_text("{")
    elif part == "configuration":
        (checkpoint / "config.json").unlink()
    else:
        shutil.rmtree(checkpoint)
    with pytest.raises(ModelError, match=str(checkpoint)):
        load(checkpoint)


def test_a_limit_beyond_the_models_positions_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="max_length"):
        load(checkpoint, max_length=100_000)


def test_an_unknown_device_is_refused(checkpoint: Path) -> None:
    with pytest.raises(MarginRMError, match="auto, cpu, cuda"):
        load(checkpoint, device="gpu")


@pytest.fixture
def language_model(tmp_path: Path, checkpoint: Path) -> Path:
    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def new_head(path: Path, seed: int, std: float | None = None) -> torch.Tensor:
    return load_for_training(path, seed=seed, max_length=64, head_std=std)[0].base.score.weight.detach()


def test_training_starts_from_the_same_head_for_the_same_seed(language_model: Path) -> None:
    heads = [new_head(language_model, seed) for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_new_head_is_as_wide_as_asked(language_model: Path, checkpoint: Path) -> None:
    usual = new_head(language_model, 1)
    assert float(usual.std()) == pytest.approx(1 / 33, rel=0.5)
    torch.testing.assert_close(new_head(language_model, 1, 33**-0.5), usual * 33**0.5)  # the same draw, wider
    with pytest.raises(ConfigError, match=r"head_std = 0\.1: .* has a reward head.*Take the setting out"):
        load_for_training(checkpoint, seed=1, head_std=0.1)


def test_training_needs_a_padding_token_that_is_not_eos(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "gpt_neox", pad=False)
    module, encoder = load_for_training(path, seed=0)
    pad = encoder.tokenizer.pad_token_id
    assert pad is not None
    assert pad != encoder.tokenizer.eos_token_id
    assert module.base.config.pad_token_id == pad


def test_a_checkpoint_with_a_broken_manifest_loads_without_it(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_NAME).write_text("{")
    with pytest.raises(ManifestError, match="is not valid JSON"):
        load(checkpoint)
    model = load(checkpoint, ignore_manifest=True)
    assert model.manifest is None
    assert not model.info.calibrated
