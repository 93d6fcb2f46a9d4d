"""The trainers' contracts: the bytes that their clients send, and the fields that they read."""

from __future__ import annotations

import base64
import json
import math
import struct
from pathlib import Path

import httpx
import pytest

from marginrm.reward_model import RewardModel
from marginrm_service.api.adapters import common
from support.models import CHATML_TEMPLATE, tiny_checkpoint
from support.process_rewards import qwen_math
from support.server import serving
from support.service import FakeRewardModel, Gate, reward_of

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def model():
    return FakeRewardModel(nan_token=FakeRewardModel().token_of("~"))


@pytest.fixture(scope="module")
def client(model):
    with serving(model) as running, httpx.Client(base_url=running.url, timeout=120) as http:
        yield http


def text_reward(model, text: str) -> float:
    return reward_of(model.encoder.encode_text(text))


def sent(client, path: str, fixture: str) -> tuple[dict, httpx.Response]:
    content = (FIXTURES / fixture).read_bytes()
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 200, response.text
    return json.loads(content), response


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_openrlhf_reads_rewards_scores_and_logs_of_its_request(client, model):
    # OpenRLHF/OpenRLHF openrlhf/utils/agent.py, _fetch_rewards_via_http: aiohttp's json=
    body, response = sent(client, "/get_reward", "openrlhf_get_reward.json")
    (text,) = body["query"]
    expected = [text_reward(model, text)]
    tokens = float(len(model.encoder.encode_text(text).ids))
    assert response.json() == {"rewards": expected, "scores": expected, "extra_logs": {"reward_tokens": [tokens]}}


def test_openrlhf_scores_a_text_that_was_cut_off_or_padded_as_the_whole_conversation(tmp_path):
    # OpenRLHF's serve_rm strips padding and ends each query with EOS: its reward models were trained on ended texts.
    path = tiny_checkpoint(tmp_path, "llama", chat_template=CHATML_TEMPLATE, bos=False)
    model = RewardModel.from_pretrained(path, dtype="float32")
    expected = model.score("Why is the sky blue?", ["Air scatters blue light."])[0]
    text = "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\nAir scatters blue light."
    queries = [text, f"{text}<|im_end|>", f"{text}<|im_end|>\n", f"<pad><pad>{text}<|im_end|><pad>"]
    with serving(model) as running:
        body = httpx.post(f"{running.url}/get_reward", json={"query": queries}, timeout=120).json()
    assert body["rewards"] == pytest.approx([expected] * len(queries), abs=1e-5)


def test_openrlhf_gets_empty_lists_for_the_empty_lists_of_its_second_url(client):
    _, response = sent(client, "/get_reward", "openrlhf_empty.json")
    assert response.json() == {"rewards": [], "scores": [], "extra_logs": {"reward_tokens": []}}


def test_openrlhf_many_texts_keep_their_order_though_neighbours_share_a_prompt(client, model):
    texts = [f"{'a long prompt ' * 20} {group} and answer {i}" for group in range(3) for i in range(5)]
    texts += ["odd one", texts[0], "odd one"]
    reply = client.post("/get_reward", json={"query": texts}).json()
    assert reply["rewards"] == [text_reward(model, text) for text in texts]


def test_llama_factory_reads_scores_and_its_model_name_means_the_default(client, model):
    # hiyouga/LLaMA-Factory src/llamafactory/train/ppo/ppo_utils.py, get_rewards_from_server: requests' json=
    body, response = sent(client, "/v1/score/evaluation", "llama_factory.json")
    reply = response.json()
    assert set(reply) == {"id", "object", "model", "scores"}
    assert reply["id"].startswith("scoreval-")
    assert (reply["object"], reply["model"]) == ("score.evaluation", "default")
    assert reply["scores"] == [text_reward(model, text) for text in body["messages"]]


def test_llama_factory_max_length_refuses_and_never_cuts(client):
    body = {"model": "model", "messages": ["short", "a text of some more tokens"], "max_length": 6}
    response = client.post("/v1/score/evaluation", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (422, "sequence_too_long")
    assert response.json()["error"]["param"] == "messages[1]"


def test_slime_reads_one_bare_number(client, model):
    # THUDM/slime slime/rollout/rm_hub/__init__.py, remote_rm: aiohttp's json=
    body, response = sent(client, "/slime", "slime.json")
    assert response.json() == model.expect("Hi", body["response"])
    assert response.json() == client.post("/slime", json={**body, "prompt": "Hi"}).json()


def test_slime_gets_a_reward_for_a_turn_that_ended_at_once(client):
    # A refusal would end the run after ten tries.
    for response in ("", "<|endoftext|>"):
        assert isinstance(client.post("/slime", json={"prompt": "Hi", "response": response}).json(), float)


def test_verl_reads_the_last_prob_of_vllms_classify(client, model):
    # verl-project/verl verl/experimental/reward_loop/reward_loop.py: vLLM's branch
    body, response = sent(client, "/classify", "verl_vllm_classify.json")
    reply = response.json()
    assert set(reply) == {"id", "object", "created", "model", "data", "usage"}
    assert reply["data"] == [
        {"index": 0, "label": "LABEL_0", "probs": [text_reward(model, body["input"])], "num_classes": 1}
    ]
    tokens = len(model.encoder.encode_text(body["input"]).ids)
    assert reply["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_verl_reads_the_embedding_of_sglang(client, model):
    body, response = sent(client, "/v1/embeddings", "verl_sglang_embeddings.json")
    (data,) = response.json()["data"]
    assert data == {"object": "embedding", "index": 0, "embedding": [text_reward(model, body["input"])]}
    packed = client.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()["data"][0]["embedding"]
    (value,) = struct.unpack("<f", base64.b64decode(packed))
    assert value == pytest.approx(data["embedding"][0], rel=1e-6)


@pytest.mark.parametrize("name", ["use_activation", "activation", "softmax"])
def test_an_activation_that_is_off_is_off_under_vllms_older_names(client, model, name):
    # verl b178a3c sends "activation", the name before vLLM 0.11.2
    reply = client.post("/classify", json={"model": "m", "input": "Hi", name: False}).json()
    assert reply["data"][0]["probs"] == [text_reward(model, "Hi")]


def test_sglang_classify_is_told_from_vllms_by_its_fields(client, model):
    # sgl-project/sglang docs/basic_usage/native_api.ipynb, and the cards of reward models: requests' json=
    content = (FIXTURES / "sglang_classify.json").read_bytes()
    texts = json.loads(content)["text"]
    reply = client.post("/classify", content=content, headers={"Content-Type": "application/json"}).json()
    assert [one["embedding"] for one in reply] == [[text_reward(model, text)] for text in texts]
    assert reply[0]["meta_info"]["prompt_tokens"] == len(model.encoder.encode_text(texts[0]).ids)
    ids = [list(model.encoder.encode_text(text).ids) for text in texts]
    assert client.post("/classify", json={"text": texts[0]}).json()["embedding"] == reply[0]["embedding"]
    for single in ({"input_ids": ids[0]}, {"input_ids": ids[0], "model": "m"}):
        assert client.post("/classify", json=single).json()["embedding"] == reply[0]["embedding"]
    many = client.post("/classify", json={"input_ids": ids}).json()
    assert [one["embedding"] for one in many] == [one["embedding"] for one in reply]
    pairs = client.post("/classify", json={"text": [["Hi", "No."], ["Hi", "Yes."]]}).json()
    assert [one["embedding"] for one in pairs] == [[model.expect("Hi", text)] for text in ("No.", "Yes.")]


def test_vllm_and_openai_inputs_may_be_token_ids(client, model):
    ids = list(model.encoder.encode_text("Hi No.").ids)
    raw = {"use_activation": False}
    for path, read in (("/classify", "probs"), ("/pooling", "data"), ("/v1/embeddings", "embedding")):
        expected = client.post(path, json={"input": "Hi No."} | raw).json()["data"][0][read]
        for given in (ids, [ids]):
            (data,) = client.post(path, json={"input": given} | raw).json()["data"]
            assert data[read] == expected


def test_vllm_token_classify_gives_the_steps_of_a_process_reward_model(tmp_path, client):
    # vllm/entrypoints/pooling; Qwen2.5-Math-PRM's pooler: softmax over two classes at each <extra_0>
    documented = qwen_math(tmp_path)
    steps = ["There are 3 eggs.", "There are 4 more.", "So there are 8."]
    model = RewardModel.from_pretrained(tmp_path, dtype="float32")
    whole = [
        {"role": "user", "content": "How many eggs?"},
        {"role": "assistant", "content": "<extra_0>".join([*steps, ""])},
    ]
    text = model.encoder.tokenizer.apply_chat_template(whole, tokenize=False)
    expected = [
        [pytest.approx(1 - p, abs=1e-4), pytest.approx(p, abs=1e-4)] for p in documented("How many eggs?", steps)
    ]
    with serving(model) as running, httpx.Client(base_url=running.url, timeout=120) as http:
        for given in ({"input": text}, {"messages": whole}):
            (data,) = http.post("/pooling", json={**given, "task": "token_classify"}).json()["data"]
            assert data["data"] == expected
        assert http.post("/classify", json={"input": text, "task": "token_classify"}).status_code == 422
        raw = {"input": text, "task": "token_classify", "use_activation": False}
        assert http.post("/pooling", json=raw).status_code == 422
    refused = client.post("/pooling", json={"input": "Hi", "task": "token_classify"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "task")


def test_a_reward_as_chat_completion(client, model):
    # modelscope/ms-swift swift/infer_engine/infer_client.py, InferClient.infer_async: aiohttp's json=
    body, response = sent(client, "/v1/chat/completions", "ms_swift_chat.json")
    reply = response.json()
    prompt, answer = body["messages"]
    (choice,) = reply["choices"]
    assert float(choice["message"]["content"].strip("[]")) == model.expect(prompt["content"], answer["content"])
    assert (reply["object"], choice["finish_reason"], reply["usage"]["completion_tokens"]) == (
        "chat.completion",
        "stop",
        0,
    )
    parts = {**answer, "content": [{"type": "text", "text": answer["content"]}]}
    again = client.post("/v1/chat/completions", json={"messages": [prompt, parts]}).json()
    assert again["choices"] == reply["choices"]


def test_nemo_gym_compares_and_verifies_with_raw_rewards(client, model):
    # NVIDIA-NeMo/Gym resources_servers/genrm_compare: comparison_strategies.py, app.py
    body, response = sent(client, "/compare", "nemo_gym_compare.json")
    prompt = body["conversation_history"]
    rewards = [model.expect(prompt, text) for text in ("Paris is the capital.", "The capital of France is Paris.")]
    reply = response.json()
    assert reply["rewards"] == rewards
    assert reply["comparison_results"] is None
    assert reply["metrics"]["mean_individual_score"] == pytest.approx(sum(rewards) / 2)
    empty = {"output": [{"type": "reasoning", "summary": []}]}
    with_empty = client.post("/compare", json={**body, "response_objs": [*body["response_objs"], empty]}).json()
    assert with_empty["rewards"][:2] == rewards
    assert len(with_empty["rewards"]) == 3
    rollout = {
        "responses_create_params": {"input": [{"type": "message", "id": "m", **one} for one in prompt]},
        "response": body["response_objs"][0],
    }
    assert client.post("/verify", json=rollout).json() == {**rollout, "reward": rewards[0]}


def test_classify_and_pooling_put_a_sigmoid_on_by_default(client, model):
    # vllm/entrypoints/pooling/{classify,pooling}/protocol.py
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    reward = model.expect("Hi", "Hello")
    for path, read in (("/classify", lambda d: d["probs"]), ("/pooling", lambda d: d["data"])):
        for activation, expected in ((None, sigmoid(reward)), (True, sigmoid(reward)), (False, reward)):
            body = {"model": "m", "messages": messages, "use_activation": activation}
            (data,) = client.post(path, json=body).json()["data"]
            assert read(data) == [pytest.approx(expected)]


@pytest.mark.parametrize(
    "names", [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")]
)
def test_vllm_score_under_its_four_names(client, model, names):
    # vllm/entrypoints/pooling/scoring/protocol.py
    body = {names[0]: "Hi", names[1]: ["one", "two"], "use_activation": False}
    reply = client.post("/v1/score", json=body).json()
    assert reply["data"] == [
        {"index": i, "object": "score", "score": model.expect("Hi", text)} for i, text in enumerate(("one", "two"))
    ]
    many = {names[0]: ["a", "b", "b"], names[1]: ["one", "two", "three"], "use_activation": False}
    scores = [data["score"] for data in client.post("/v1/score", json=many).json()["data"]]
    assert scores == [model.expect(*pair) for pair in (("a", "one"), ("b", "two"), ("b", "three"))]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/get_reward", {"query": ["fine", ""]}, "query[1]"),
        ("/get_reward", {"query": ["fine", 7]}, "query[1]"),
        ("/get_reward", {"query": ["word " * 2000]}, "query[0]"),
        ("/v1/score/evaluation", {"messages": ["  "]}, "messages[0]"),
        ("/slime", {"prompt": "", "response": "a"}, "prompt"),
        ("/slime", {"prompt": "a", "response": None}, "response"),
        ("/classify", {"input": [1, 2, -3]}, "input[0]"),
        ("/classify", {"text": ["a", ""]}, "text[1]"),
        ("/classify", {"text": ""}, "text"),
        ("/classify", {"input_ids": [[1], [10**9]]}, "input_ids[1]"),
        (
            "/compare",
            {"conversation_history": [{"role": "user", "content": "a"}], "response_objs": [{}]},
            "response_objs[0]",
        ),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "messages[0]"),
        ("/classify", {"messages": [{"role": "user", "content": "a"}]}, "messages[0]"),
        ("/v1/embeddings", {"input": ["a", "\ud800"]}, "input[1]"),
        ("/v1/score", {"text_1": ["a", ""], "text_2": ["b", "c"]}, "text_1[1]"),
    ],
)
def test_an_unusable_text_refuses_the_request_and_names_the_field(client, path, body, param):
    response = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/classify", {"input": "a", "messages": [{"role": "assistant", "content": "a"}]}),
        ("/classify", {"input": "a", "truncate_prompt_tokens": 7}),
        ("/classify", {"text": "a", "input_ids": [1]}),
        ("/pooling", {"input": "a", "task": "token_embed"}),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "a"}], "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "a"}], "n": 2}),
        ("/classify", {"input": "a", "chat_template": "{{ messages }}"}),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]}),
        ("/v1/score", {"text_1": "a", "text_2": "b", "max_tokens_per_doc": 9}),
        ("/v1/embeddings", {"input": "a", "dimensions": 8}),
        ("/get_reward", {"queries": ["a"]}),
    ],
)
def test_an_unsupported_field_that_would_change_a_reward_is_refused(client, path, body):
    response = client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (422, "invalid_request")


def test_a_nan_is_an_error_in_every_contract(client):
    response = client.post("/get_reward", json={"query": ["fine", "not ~ fine"]})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "non_finite_reward")


def test_one_model_answers_to_any_name_and_several_do_not():
    with serving(FakeRewardModel("a"), FakeRewardModel("b")) as running, httpx.Client(base_url=running.url) as http:
        body = {"input": "text", "use_activation": False}
        assert http.post("/classify", json={**body, "model": "b"}).json()["model"] == "b"
        assert http.post("/classify", json=body).json()["model"] == "a"
        assert http.post("/classify", json={**body, "model": "c"}).status_code == 404
        assert http.post("/v1/score/evaluation", json={"model": "model", "messages": ["x"]}).json()["model"] == "a"


@pytest.mark.parametrize("status", [503, 429])
def test_a_full_queue_has_the_overload_status_of_the_route(status):
    gate = Gate()
    fake = FakeRewardModel(on_forward=gate)
    with serving(max_queue_requests=1, adapter_overload_status=status) as running:
        gate.open(2)  # for the warm-up
        running.on_loop(running.service.registry.add(fake))
        with httpx.Client(base_url=running.url, timeout=120) as http:
            gate.entered.acquire()
            with running.service.registry.get("default").admission.acquire(1):
                adapter = http.post("/get_reward", json={"query": ["a"]})
                native = http.post("/score", json={"items": [{"prompt": "a", "response": "b"}]})
    assert (adapter.status_code, native.status_code) == (status, 429)
    assert adapter.json()["error"]["code"] == "overloaded"
    assert int(adapter.headers["retry-after"]) >= 1


def test_templated_texts_group_with_neighbours_that_begin_alike():
    groups = [list(group.responses) for group in common.templated(["prompt: a", "prompt: b", "other", 7, "", ""])]
    assert groups == [["prompt: a", "prompt: b"], ["other"], [7], [""], [""]]
