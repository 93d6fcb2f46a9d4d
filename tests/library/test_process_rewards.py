"""Process reward models: step rewards against the documented usage of each form, aggregates, sharing, options."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2ForTokenClassification
from typer.testing import CliRunner

from marginrm.bulk.rows import parse_row, read_places
from marginrm.bulk.scoring import RowOptions, score_chunk
from marginrm.bulk.summary import Summary
from marginrm.cli.inspect import inspect
from marginrm.encoding import EncodedResponse
from marginrm.errors import ConfigError, EmptyTextError, HeadError, InvalidTextError
from marginrm.packing import plan_row
from marginrm.process_rewards import FORMS as READINGS
from marginrm.process_rewards import StepReading, StepReward, aggregated, steps_of
from marginrm.reading import ReadingOptions
from marginrm.reward_model import RewardModel
from support.models import CHATML_TEMPLATE, tiny_checkpoint
from support.process_rewards import FORMS, Documented, qwen_math, trl

PROMPT = "How many eggs are 3 + 4 eggs?"
STEPS = ["There are 3 eggs in the first bowl.", "There are 4 in the other.", "So there are 7 eggs."]


@pytest.fixture(scope="module", params=FORMS)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, RewardModel, Documented]:
    make, options = FORMS[request.param]
    folder = tmp_path_factory.mktemp("prm") / request.param
    documented = make(folder)
    return (
        request.param,
        RewardModel.from_pretrained(folder, dtype="float32", reading=ReadingOptions(**options)),
        documented,
    )


def test_step_rewards_are_those_of_the_documented_usage(case: tuple[str, RewardModel, Documented]) -> None:
    name, model, documented = case
    responses = [STEPS, [*STEPS[:2], "So there are 8."], ["Seven."], [*STEPS, "Wait.", "Yes, 7 = 3 + 4."]]
    rewards = model.score(PROMPT, responses)
    for reward, steps in zip(rewards, responses, strict=True):
        expected = documented(PROMPT, steps)
        assert steps_of(reward) == pytest.approx(expected, abs=1e-4)
        assert reward == pytest.approx(aggregated(expected, READINGS[name].aggregate), abs=1e-4)
    assert len({round(one, 3) for one in documented(PROMPT, STEPS)}) > 1  # the steps differ visibly
    assert model.forward_path == "packed"
    assert model.reading is not None
    assert f"process reward model ({name})" in model.reading.reward


def test_a_text_is_cut_at_the_separator_or_at_blank_lines(case: tuple[str, RewardModel, Documented]) -> None:
    _, model, documented = case
    assert model.steps is not None
    expected = documented(PROMPT, STEPS)
    for text in (model.steps.separator.join([*STEPS, ""]), model.steps.separator.join(STEPS), "\n\n".join(STEPS)):
        (reward,) = model.score(PROMPT, [text])
        assert steps_of(reward) == pytest.approx(expected, abs=1e-4)


def test_steps_of_a_cut_prompt_and_of_lone_responses(case: tuple[str, RewardModel, Documented]) -> None:
    name, model, _ = case
    long = "The quick brown fox jumps over the lazy dog. " * 60
    (encoded,) = model.encoder.encode_group(long, [STEPS], "prompt_left")
    (whole,) = model.encoder.encode_group(PROMPT, [STEPS])
    assert encoded.truncated
    assert len(encoded.ids) == model.encoder.max_length
    assert [encoded.ids[at] for at in encoded.read_at] == [whole.ids[at] for at in whole.read_at], name
    together = model.score(PROMPT, [STEPS, STEPS[:1]])
    alone = [model.score(PROMPT, [steps])[0] for steps in (STEPS, STEPS[:1])]
    assert together == pytest.approx(alone, abs=1e-5)


def test_the_padded_path_reads_the_same_steps(tmp_path: Path) -> None:
    documented = qwen_math(tmp_path)
    model = RewardModel.from_pretrained(tmp_path, dtype="float32")
    model.module.forward_path = "padded"
    model.module.base.set_attn_implementation("sdpa")
    rewards = model.score(PROMPT, [STEPS, STEPS[:1]])
    assert steps_of(rewards[0]) == pytest.approx(documented(PROMPT, STEPS), abs=1e-4)
    assert steps_of(rewards[1]) == pytest.approx(documented(PROMPT, STEPS[:1]), abs=1e-4)


@pytest.mark.parametrize("aggregate", ["min", "product", "last", "mean"])
def test_best_of_n_ranks_by_the_aggregate(tmp_path: Path, aggregate: str) -> None:
    documented = qwen_math(tmp_path)
    model = RewardModel.from_pretrained(tmp_path, dtype="float32", reading=ReadingOptions(aggregate=aggregate))
    candidates = [STEPS, STEPS[:2], [STEPS[2], STEPS[0]], ["I do not know."], [STEPS[1], "No.", STEPS[2], "7."]]
    how = {"min": min, "product": math.prod, "last": lambda one: one[-1], "mean": lambda one: sum(one) / len(one)}
    expected = [how[aggregate](documented(PROMPT, steps)) for steps in candidates]
    ranked = model.best_of_n(PROMPT, candidates)
    assert ranked.best == expected.index(max(expected))
    for entry in ranked.ranking:
        assert entry.reward == pytest.approx(expected[entry.candidate], abs=1e-4)
        assert steps_of(entry.reward) == pytest.approx(documented(PROMPT, candidates[entry.candidate]), abs=1e-4)


def test_candidates_share_their_prompt_and_their_first_steps(tmp_path: Path) -> None:
    documented = qwen_math(tmp_path)
    model = RewardModel.from_pretrained(tmp_path, dtype="float32")
    candidates = [[*STEPS, f"Number {number}."] for number in range(64)]
    group = model.encoder.encode_group(PROMPT * 10, candidates)
    result = model.run_step([group])
    shared = plan_row([[one.array for one in group]], causal=True).costs[0]
    assert result.computed == [shared]
    assert shared < 64 * len(group[0].ids) / 4
    assert steps_of(result.rewards[0][63]) == pytest.approx(documented(PROMPT * 10, candidates[63]), abs=1e-4)


def test_reads_lie_in_the_runs_that_hold_them() -> None:
    plan = plan_row([[[1, 2, 3, 4], [1, 2, 5]]], causal=True)
    assert plan.read_at([(0, 3), None]) == ([0, 3, 4], [0, 0, 0])


def test_raw_values_are_the_heads_own(tmp_path: Path) -> None:
    trl(tmp_path)
    plain = RewardModel.from_pretrained(tmp_path, dtype="float32")
    raw = RewardModel.from_pretrained(tmp_path, dtype="float32", reading=ReadingOptions(step_value="raw"))
    for value, probability in zip(
        raw.score(PROMPT, [STEPS])[0].steps, plain.score(PROMPT, [STEPS])[0].steps, strict=True
    ):
        assert 1 / (1 + math.exp(-value)) == pytest.approx(probability, abs=1e-6)
    with pytest.raises(ConfigError, match="product"):
        RewardModel.from_pretrained(tmp_path, reading=ReadingOptions(step_value="raw", aggregate="product"))


def test_any_reward_model_reads_steps_at_a_separator(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "llama", chat_template=CHATML_TEMPLATE)
    whole = RewardModel.from_pretrained(folder, dtype="float32")
    model = RewardModel.from_pretrained(folder, dtype="float32", reading=ReadingOptions(steps="\\n\\n"))
    (encoded,) = model.encoder.encode_group("Hi?", ["Yes.\n\nNo."])
    assert len(encoded.read_at) == 2
    (reward,) = model.score("Hi?", ["Yes.\n\nNo."])
    first = [type(encoded)(encoded.ids[: at + 1]) for at in encoded.read_at]
    assert list(reward.steps) == pytest.approx(whole.score_encoded([first])[0], abs=1e-5)  # raw, for one row
    assert reward == min(reward.steps)


def test_options_without_a_process_reward_model_are_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "rm", "llama")
    with pytest.raises(ConfigError, match="--steps SEPARATOR"):
        RewardModel.from_pretrained(folder, reading=ReadingOptions(aggregate="min"))
    with pytest.raises(InvalidTextError, match="list of steps"):
        RewardModel.from_pretrained(folder).score("Hi?", [["Yes.", "No."]])
    with pytest.raises(HeadError, match="encoder"):
        RewardModel.from_pretrained(tiny_checkpoint(tmp_path / "bert", "bert"), reading=ReadingOptions(steps="[SEP]"))
    with pytest.raises(ConfigError, match="chat template"):
        RewardModel.from_pretrained(folder, reading=ReadingOptions(steps="rlhflow-prm"))


def test_responses_without_a_step_are_item_errors(tmp_path: Path) -> None:
    qwen_math(tmp_path)
    encoder = RewardModel.from_pretrained(tmp_path, dtype="float32").encoder
    outcomes = encoder.encode_group(PROMPT, ["<extra_0><extra_0>", [], ["Yes.", " "], ["Yes.", 3], STEPS])
    assert [type(one) for one in outcomes[:4]] == [EmptyTextError, EmptyTextError, EmptyTextError, InvalidTextError]
    assert len(outcomes[4].read_at) == 3


def test_a_step_that_the_template_changes_is_an_error(tmp_path: Path) -> None:
    qwen_math(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = CHATML_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]")
    tokenizer.save_pretrained(tmp_path)
    encoder = RewardModel.from_pretrained(tmp_path, dtype="float32").encoder
    first, second, other = encoder.encode_group(PROMPT, [["<think>A</think>Yes."], ["<think>B</think>Yes."], ["No."]])
    assert [type(one) for one in (first, second, other)] == [InvalidTextError, InvalidTextError, EncodedResponse]
    assert "template removes the part in which" in str(first)
    alike, text = encoder.encode_group(PROMPT, [["Yes.", "No."], "Yes.<extra_0>No.<extra_0>"])
    assert alike == text  # the same steps in two forms
    (lost,) = encoder.encode_group(PROMPT, [["Yes.", "No.</think>", "Well."]])
    assert "changes the steps" in str(lost)


def test_inspect_says_how_steps_are_read(tmp_path: Path) -> None:
    qwen_math(tmp_path)
    app = typer.Typer()
    app.command()(inspect)
    result = CliRunner().invoke(app, [str(tmp_path), "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "process reward model (qwen2.5-math-prm), read at '<extra_0>' after each step" in said
    assert "aggregate product" in said


def test_aggregates_of_steps() -> None:
    steps = (0.5, 0.2, 0.4)
    assert aggregated(steps, "min") == 0.2
    assert aggregated(steps, "product") == pytest.approx(0.04)
    assert aggregated(steps, "last") == 0.4
    assert aggregated(steps, "mean") == pytest.approx(1.1 / 3)
    assert math.isnan(aggregated((0.5, math.nan), "min"))


def test_a_step_reward_is_a_number_with_steps() -> None:
    reward = StepReward(0.5, [0.5, 0.7])
    assert reward == 0.5
    assert steps_of(reward) == (0.5, 0.7)
    assert steps_of(0.5) is None
    for made in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert (made, made.steps) == (0.5, (0.5, 0.7))


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (["a\nb", "c"], ["a\nb", "c"]),
        ("a ки\nb ки\n", ["a", "b"]),
        ("a киb ки", ["a", "b"]),
        ("a\n \nb\n\n\nc\nd", ["a", "b", "c\nd"]),
        ("\n\n a \n\n", ["\n\n a \n\n"]),
        ("a", ["a"]),
    ],
)
def test_how_a_response_is_cut(response: str | list[str], expected: list[str]) -> None:
    assert READINGS["math-shepherd"].split(response) == expected


def test_a_line_break_as_separator_keeps_the_steps_as_they_are() -> None:
    reading = StepReading(form="custom", separator="\n", value="raw", aggregate="min")
    assert reading.split(" a\n\n b \n") == [" a", " b "]


@pytest.mark.parametrize("form", FORMS)
def test_inspect_verifies_steps_against_a_plain_loop(tmp_path: Path, form: str) -> None:
    make, options = FORMS[form]
    make(tmp_path / "prm")
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"What is {number} + 1?", "chosen": f"Add 1.\n\nSo {number + 1}.", "rejected": "I do not know."}
        for number in range(4)
    ]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    app = typer.Typer()
    app.command()(inspect)
    arguments = [f"--{name}={value}" for name, value in options.items()]
    result = CliRunner().invoke(app, [str(tmp_path / "prm"), "--json", "--verify", str(pairs), *arguments])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["verified"]["responses"] == 8
    assert found["verified"]["agrees"]
    assert found["steps"]["form"] == form


def test_deterministic_steps_do_not_depend_on_what_is_beside_them(tmp_path: Path) -> None:
    documented = qwen_math(tmp_path)
    model = RewardModel.from_pretrained(tmp_path, dtype="float32", deterministic=True)
    alone = model.score(PROMPT, [STEPS])[0]
    among = model.score(PROMPT, [STEPS[:1], STEPS, ["No."], [*STEPS, "Yes."]])[1]
    assert steps_of(alone) == steps_of(among)
    assert steps_of(alone) == pytest.approx(documented(PROMPT, STEPS), abs=1e-4)


def test_the_last_layer_runs_at_the_steps_alone(case: tuple[str, RewardModel, Documented]) -> None:
    assert case[1].module.execution.last_layer == "reward_tokens"


def test_a_file_is_scored_with_steps(tmp_path: Path) -> None:
    documented = qwen_math(tmp_path / "prm")
    model = RewardModel.from_pretrained(tmp_path / "prm", dtype="float32")
    text = "<extra_0>".join(STEPS)
    rows = [
        {"prompt": PROMPT, "response": text},
        {"prompt": PROMPT, "chosen": text, "rejected": "I do not know."},
        {"prompt": PROMPT, "candidates": ["No.", text]},
        {"prompt": PROMPT, "response": STEPS},
        {"prompt": PROMPT, "chosen": STEPS, "rejected": ["I do not know."]},
        {"prompt": PROMPT, "candidates": [["No."], {"text": STEPS}]},
        {"prompt": PROMPT, "completions": STEPS, "labels": [True, True, False]},
    ]
    given = tmp_path / "rows.jsonl"
    given.write_text("\n".join(map(json.dumps, rows)))
    parsed = [parse_row(row) for row in read_places([str(given)])]
    found = list(score_chunk(model, parsed, RowOptions(), Summary()))
    expected = pytest.approx(documented(PROMPT, STEPS), abs=1e-4)
    for single, pair, group in (found[:3], found[3:6]):  # steps as text, and as lists
        assert single["steps"] == expected
        assert pair["chosen"]["steps"] == expected
        assert group["steps"][1] == expected
        assert len(group["steps"][0]) == 1
    assert found[6]["steps"] == expected  # TRL's rows


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft's own use of transformers
def test_an_adapter_of_a_token_classifier_is_a_process_reward_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    trl(tmp_path / "whole")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    Qwen2ForCausalLM(Qwen2Config.from_pretrained(tmp_path / "whole")).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = Qwen2ForTokenClassification.from_pretrained(tmp_path / "base", num_labels=2)
    lora = peft.LoraConfig(task_type="TOKEN_CLS", r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    tuned = peft.get_peft_model(model, lora).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    (reward,) = RewardModel.from_pretrained(tmp_path / "adapter", dtype="float32").score("What?", [["One.", "Two."]])
    with torch.inference_mode():
        for found, text in zip(reward.steps, ("What?\nOne.\n", "What?\nOne.\nTwo.\n"), strict=True):
            logits = tuned(**tokenizer(text, return_tensors="pt")).logits[0, -1]
            assert found == pytest.approx(float(logits.softmax(-1)[1]), abs=1e-4)
