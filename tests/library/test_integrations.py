"""Reward functions of trainers, as TRL and verl call them, against a real server."""

from __future__ import annotations

import asyncio
import inspect
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from marginrm.client import ItemScoreError, RewardClientError
from marginrm.encoding import EncodedResponse
from marginrm.errors import ConfigError
from marginrm.integrations import verl
from marginrm.integrations.trl import reward_function
from support.server import serving
from support.service import FakeRewardModel, reward_of


@pytest.fixture(scope="module")
def model():
    return FakeRewardModel()


@pytest.fixture(scope="module")
def url(model):
    with serving(model) as running:
        yield running.url
        verl._client(running.url, "default", None, "error").close()


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def test_trl_texts_get_their_rewards_in_order(url, model):
    prompts = ["a", "a", "b", "a"]
    completions = ["one", "two", "three", "four"]
    reward = reward_function(url, name="helpfulness")
    assert inspect.iscoroutinefunction(reward)  # TRL runs those concurrently
    assert reward.__name__ == "helpfulness"
    rewards = asyncio.run(reward(prompts=prompts, completions=completions, completion_ids=[[1]] * 4, column=[0] * 4))
    assert rewards == [model.expect(*pair) for pair in zip(prompts, completions, strict=True)]


def test_trl_messages_are_scored_at_the_last_turn(url, model):
    reward = reward_function(url)
    rewards = asyncio.run(reward(prompts=[user("a"), "a"], completions=[assistant("one"), assistant("one")]))
    assert rewards == [model.expect("a", "one")] * 2
    turns = [*assistant("first"), *user("more"), *assistant("second")]
    (several,) = asyncio.run(reward(prompts=[user("a")], completions=[turns]))
    assert several == model.expect([*user("a"), *assistant("first"), *user("more")], "second")


def test_trl_completions_with_tools_are_scored_whole(url, model):
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    result = {"role": "tool", "name": "add", "content": "4"}
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "four"}]}]
    completions = [
        [call, result, *assistant("four")],
        [call | {"content": ""}, result, *parts],
        [*assistant("four")],
        [call, result],
        [call],
    ]
    rewards = asyncio.run(reward_function(url)(prompts=[user("2 + 2?")] * 5, completions=completions))
    expected = model.expect([*user("2 + 2?"), call, result], "four")
    assert rewards[:3] == [expected, expected, model.expect(user("2 + 2?"), "four")]
    tokenizer = model.encoder.tokenizer
    without_answer = 'User: 2 + 2?\n\nAssistant: {"name": "add"}'  # the tokenizer has no template
    for text, reward in zip([f"{without_answer}\n\nTool: 4", without_answer], rewards[3:], strict=True):
        ids = tokenizer(text + tokenizer.eos_token, add_special_tokens=False).input_ids
        assert reward == reward_of(EncodedResponse(tuple(ids)))


def test_trl_gets_none_only_for_unusable_completions(url, model, caplog):
    completions = ["one", "", "two", "word " * 600, ""]
    with caplog.at_level(logging.WARNING):
        rewards = asyncio.run(reward_function(url)(prompts=["a"] * 4 + ["b"], completions=completions))
    assert rewards == [model.expect("a", "one"), None, model.expect("a", "two"), None, None]
    assert [record.getMessage().split(";")[0] for record in caplog.records if record.name.startswith("marginrm.")] == [
        "2 of 4 completions get no reward",
        "1 of 1 completions get no reward",
    ]
    assert "word word" not in caplog.text


def test_trl_raises_without_a_server():
    with pytest.raises(RewardClientError):
        asyncio.run(reward_function("http://127.0.0.1:1", deadline=0.2)(prompts=["a"], completions=["b"]))


def test_verl_calls_with_keywords_from_many_threads(url, model):
    def call(number: int) -> dict[str, float]:
        prompt = "a" if number % 2 else user("a")
        return verl.compute_score(
            data_source="d",
            solution_str=f"answer {number}",
            ground_truth=None,
            extra_info={"prompt": prompt, "num_turns": 2},
            reward_router_address="ignored",
            base_url=url,
        )

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(call, range(40)))
    assert results == [{"score": model.expect("a", f"answer {number}")} for number in range(40)]


def test_verl_without_a_prompt_or_a_reward_raises(url):
    with pytest.raises(ConfigError, match="prompt_key"):
        verl.compute_score("d", "answer", None, {"question": "a"}, base_url=url)
    with pytest.raises(ItemScoreError) as failed:
        verl.compute_score("d", "", None, {"question": "a"}, base_url=url, prompt_key="question")
    assert failed.value.code == "empty_text"
    chosen = verl.compute_score("d", "", None, {"prompt": "a"}, base_url=url, unscorable=-5.0)
    assert chosen == {"score": -5.0}


def test_the_integrations_import_no_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
        "import marginrm.integrations.trl, marginrm.integrations.verl"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
