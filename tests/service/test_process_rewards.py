"""Process reward models over HTTP: step rewards against each form's documented usage, cached, shared and ranked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from marginrm.client import RewardClient
from marginrm.process_rewards import FORMS as READINGS
from marginrm.process_rewards import aggregated, steps_of
from marginrm.reading import ReadingOptions
from marginrm.reward_model import RewardModel
from marginrm_service.engine.reward_cache import ENTRY_BYTES, STEP_BYTES
from support.process_rewards import FORMS, Documented, qwen_math
from support.server import AppServer, serving
from support.service import FakeRewardModel

PROMPT = "How many eggs are 3 + 4 eggs?"
STEPS = ["There are 3 eggs in the first bowl.", "There are 4 in the other.", "So there are 7 eggs."]
OTHER = [*STEPS[:2], "So there are 8."]


def post(server: AppServer, path: str, body: dict, status: int = 200) -> dict:
    response = httpx.post(f"{server.url}{path}", json=body, timeout=120)
    assert response.status_code == status, response.text
    return response.json()


@pytest.fixture(scope="module")
def prm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[AppServer, Documented]]:
    """A server of Qwen2.5-Math-PRM's form."""
    folder = tmp_path_factory.mktemp("prm")
    documented = qwen_math(folder)
    with serving(RewardModel.from_pretrained(folder, dtype="float32")) as server:
        yield server, documented


@pytest.mark.parametrize("form", FORMS)
def test_steps_of_items_and_pairs_are_the_documented_ones(form: str, tmp_path: Path) -> None:
    make, options = FORMS[form]
    documented = make(tmp_path)
    model = RewardModel.from_pretrained(tmp_path, dtype="float32", reading=ReadingOptions(**options))
    body = {
        "pairs": [{"prompt": PROMPT, "chosen": STEPS, "rejected": OTHER}],
        "items": [{"prompt": PROMPT, "response": STEPS}, {"prompt": PROMPT, "response": "\n\n".join(OTHER)}],
    }
    with serving(model) as server:
        reply = post(server, "/score", body)
    assert not reply["model"]["calibrated"]
    assert reply["model"]["temperature"] == 1
    (pair,) = reply["pairs"]
    for found, steps in zip([pair["chosen"], pair["rejected"], *reply["items"]], [STEPS, OTHER] * 2, strict=True):
        expected = documented(PROMPT, steps)
        assert found["steps"] == pytest.approx(expected, abs=1e-4)
        assert found["reward"] == pytest.approx(aggregated(expected, READINGS[form].aggregate), abs=1e-4)
    assert pair["margin"] == pytest.approx(pair["chosen"]["reward"] - pair["rejected"]["reward"])
    assert pair["confidence"] == pytest.approx(1 / (1 + math.exp(-pair["margin"])))


@pytest.mark.parametrize("aggregate", ["min", "product", "last", "mean"])
def test_best_of_n_ranks_by_the_aggregate(tmp_path: Path, aggregate: str) -> None:
    documented = qwen_math(tmp_path)
    candidates = [STEPS, OTHER[:2], [STEPS[2]], "I do not know.", [*OTHER, "Or 7."]]
    expected = [aggregated(documented(PROMPT, [one] if isinstance(one, str) else one), aggregate) for one in candidates]
    model = RewardModel.from_pretrained(tmp_path, dtype="float32", reading=ReadingOptions(aggregate=aggregate))
    with serving(model) as server:
        body = {"prompts": [{"prompt": PROMPT, "candidates": candidates}], "return_text": True}
        (prompt,) = post(server, "/best-of-n", body)["prompts"]
        streamed = httpx.post(f"{server.url}/best-of-n", json=body, headers={"Accept": "application/x-ndjson"})
    assert prompt["best"] == expected.index(max(expected))
    for entry in prompt["ranking"]:
        assert entry["reward"] == pytest.approx(expected[entry["candidate"]], abs=1e-4)
        assert entry["text"] == candidates[entry["candidate"]]
        assert aggregated(entry["steps"], aggregate) == pytest.approx(entry["reward"])
    assert json.loads(streamed.text.splitlines()[0])["ranking"] == prompt["ranking"]


def test_64_candidates_cost_one_prompt(prm: tuple[AppServer, Documented]) -> None:
    server, documented = prm
    prompt = PROMPT * 12
    candidates = [[f"{number} and {number + 1}.", "Seven."] for number in range(64)]
    reply = post(server, "/best-of-n", {"prompts": [{"prompt": prompt, "candidates": candidates}]})
    alone = post(server, "/score", {"items": [{"prompt": prompt, "response": "No."}]})["items"][0]["tokens"]
    usage = reply["usage"]
    assert usage["tokens"] > 64 * alone
    assert usage["tokens_computed"] < alone + 64 * 20
    found = {entry["candidate"]: entry["steps"] for entry in reply["prompts"][0]["ranking"]}
    assert found[63] == pytest.approx(documented(prompt, candidates[63]), abs=1e-4)


def test_cached_rewards_keep_their_steps(prm: tuple[AppServer, Documented]) -> None:
    server, _ = prm
    body = {"items": [{"prompt": "Once?", "response": STEPS}, {"prompt": "Once?", "response": STEPS}]}
    first, second = post(server, "/score", body), post(server, "/score", body)
    assert first["usage"]["tokens_computed"] > 0
    assert second["usage"]["tokens_computed"] == 0
    assert second["items"] == first["items"]
    assert len({tuple(item["steps"]) for item in first["items"]}) == 1
    assert len(first["items"][0]["steps"]) == 3


def test_the_cache_counts_the_memory_of_steps(tmp_path: Path) -> None:
    qwen_math(tmp_path)
    with serving(RewardModel.from_pretrained(tmp_path, dtype="float32")) as server:
        post(server, "/score", {"items": [{"prompt": PROMPT, "response": STEPS}]})
        assert server.service.registry.get("default").queue_state().cache_bytes == ENTRY_BYTES + 3 * STEP_BYTES


def test_the_client_returns_steps_too(prm: tuple[AppServer, Documented]) -> None:
    server, documented = prm
    with RewardClient(server.url) as client:
        rewards = client.score(PROMPT, [STEPS, OTHER])
        compared = client.compare(PROMPT, STEPS, OTHER)
    assert steps_of(rewards[1]) == pytest.approx(documented(PROMPT, OTHER), abs=1e-4)
    assert steps_of(compared.chosen) == pytest.approx(documented(PROMPT, STEPS), abs=1e-4)


def test_a_list_without_steps_is_an_error_of_its_item(prm: tuple[AppServer, Documented]) -> None:
    server, _ = prm
    body = {"items": [{"prompt": PROMPT, "response": one} for one in ([], ["Yes.", " "], ["Yes.", 3], STEPS)]}
    *failed, good = post(server, "/score", body)["items"]
    assert [item["error"]["code"] for item in failed] == ["empty_text", "empty_text", "invalid_text"]
    assert len(good["steps"]) == 3


def test_other_models_take_no_steps_and_answer_none() -> None:
    with serving(FakeRewardModel()) as server:
        good, failed = post(
            server, "/score", {"items": [{"prompt": "a", "response": one} for one in ("b", ["b", "c"])]}
        )["items"]
    assert "steps" not in good
    assert "process" in failed["error"]["message"] or failed["error"]["code"] == "invalid_text"


def test_the_model_page_says_how_steps_are_read(prm: tuple[AppServer, Documented]) -> None:
    server, _ = prm
    reading = httpx.get(f"{server.url}/v1/models/default").json()["reading"]
    assert reading["steps"]["separator"] == "<extra_0>"
    assert reading["steps"]["aggregate"] == "product"


def test_vllms_clients_read_the_steps_from_pooling(prm: tuple[AppServer, Documented]) -> None:
    # BooMinSeong/prm-toolkit 6f43efd reward_qwen_prm_server.py: {"input": prompts}; reads data[i]["data"][step][class]
    server, documented = prm
    user = {"role": "user", "content": PROMPT}
    texts = [
        server.service.registry.get("default").encoder.tokenizer.apply_chat_template(
            [user, {"role": "assistant", "content": "<extra_0>".join([*steps, ""])}], tokenize=False
        )
        for steps in (STEPS, OTHER)
    ]
    for more in ({}, {"task": "token_classify"}):
        reply = post(server, "/pooling", {"input": texts, **more})
        for entry, steps in zip(reply["data"], (STEPS, OTHER), strict=True):
            assert [good for _, good in entry["data"]] == pytest.approx(documented(PROMPT, steps), abs=1e-4)
            assert [bad + good for bad, good in entry["data"]] == pytest.approx([1.0] * 3)
    turns = [user, {"role": "assistant", "content": "\n\n".join(STEPS)}]
    (entry,) = post(server, "/pooling", {"messages": turns})["data"]
    assert [good for _, good in entry["data"]] == pytest.approx(documented(PROMPT, STEPS), abs=1e-4)
    (whole,) = post(server, "/classify", {"messages": turns})["data"]
    expected = aggregated(documented(PROMPT, STEPS), "product")
    assert whole["probs"] == pytest.approx([1 / (1 + math.exp(-expected))], abs=1e-4)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": "no separator"}, "input[0]"),
        ({"input": [1, 2]}, "input[0]"),
        ({"use_activation": False, "task": "token_classify"}, "task"),
    ],
)
def test_pooling_says_what_it_cannot_do_for_steps(prm: tuple[AppServer, Documented], body: dict, param: str) -> None:
    reply = post(prm[0], "/pooling", {"input": "a<extra_0>"} | body, 422)
    assert reply["error"]["param"] == param
