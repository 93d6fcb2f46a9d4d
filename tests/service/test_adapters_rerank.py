"""Reranking contracts: Cohere's, Jina's, vLLM's and TEI's requests and answers; their SDKs where they are installed."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path

import httpx
import pytest
import torch

from marginrm.reward_model import RewardModel
from support.models import tiny_checkpoint
from support.server import serving
from support.service import FakeRewardModel

FIXTURES = Path(__file__).parent / "fixtures"
SDK_VENV = os.environ.get("MARGINRM_TEST_SDK_VENV")


@pytest.fixture(scope="module")
def model():
    return FakeRewardModel()


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as running:
        yield running


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=120) as http:
        yield http


def sent(client, path: str, fixture: str) -> tuple[dict, dict | list]:
    content = (FIXTURES / fixture).read_bytes()
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 200, response.text
    return json.loads(content), response.json()


def best_first(rewards: list[float]) -> list[int]:
    return sorted(range(len(rewards)), key=lambda i: (-rewards[i], i))


def test_cohere_v2_ranks_by_raw_reward_and_keeps_the_order_of_equals(client, model):
    # cohere 7.3.1, cohere/v2/raw_client.py and cohere/v2/types/v2rerank_response.py
    body, reply = sent(client, "/v2/rerank", "cohere_v2_rerank.json")
    rewards = [model.expect("Hi", text) for text in body["documents"]]
    assert reply["results"] == [
        {"index": i, "relevance_score": rewards[i]} for i in best_first(rewards)[: body["top_n"]]
    ]
    assert reply["id"].startswith("rerank-")
    assert reply["usage"]["total_tokens"] == reply["usage"]["prompt_tokens"] > 0


def test_cohere_v1_and_jina_take_objects_and_return_documents(client, model):
    body, reply = sent(client, "/v1/rerank", "cohere_v1_rerank.json")
    texts = ["No.", "Hello é"]
    rewards = [model.expect("Hi", text) for text in texts]
    assert reply["results"] == [
        {"index": i, "relevance_score": rewards[i], "document": {"text": texts[i]}} for i in best_first(rewards)
    ]
    assert sent(client, "/rerank", "cohere_v1_rerank.json")[1]["results"] == reply["results"]
    assert body["return_documents"] is True


def test_tei_rerank_is_a_bare_list(client, model):
    # huggingface/text-embeddings-inference router/src/http/types.rs: RerankRequest, Rank
    body, reply = sent(client, "/rerank", "tei_rerank.json")
    rewards = [model.expect("Hi", text) for text in body["texts"]]
    assert reply == [{"index": i, "score": rewards[i], "text": body["texts"][i]} for i in best_first(rewards)]
    plain = client.post("/rerank", json={"query": "Hi", "texts": ["No."]}).json()
    assert plain == [{"index": 0, "score": pytest.approx(1 / (1 + math.exp(-rewards[0])))}]


def test_tei_predict_takes_pairs_and_templated_texts(client, model):
    body, reply = sent(client, "/predict", "tei_predict.json")
    assert reply == [[{"score": model.expect(*pair), "label": "LABEL_0"}] for pair in body["inputs"]]
    single = client.post("/predict", json={"inputs": ["Hi", "No."], "raw_scores": True}).json()
    assert single == reply[0]
    text = client.post("/predict", json={"inputs": "Hi No.", "raw_scores": True}).json()
    assert client.post("/get_reward", json={"query": ["Hi No."]}).json()["rewards"] == [text[0]["score"]]


def test_tei_cuts_long_texts_unless_truncate_is_false(client):
    # TEI's --auto-truncate is on by default (router/src/main.rs); its clients count on it
    body = {"query": "word " * 800, "texts": ["fine", "No.", "word " * 800]}
    for options in ({}, {"truncate": None}, {"truncate": True}, {"truncate": True, "truncation_direction": "right"}):
        reply = client.post("/rerank", json=body | options).json()
        assert sorted(one["index"] for one in reply) == [0, 1, 2]
        assert all(one["truncated"] for one in reply)
    refused = client.post("/rerank", json=body | {"truncate": False})
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "sequence_too_long")
    left = {"truncate": True, "truncation_direction": "left"}
    assert client.post("/rerank", json=body | left).json()["error"]["param"] == "texts[2]"
    assert client.post("/rerank", json={**body, "texts": ["fine"]} | left).status_code == 200
    assert client.post("/predict", json={"inputs": "word " * 800}).json()[0]["truncated"]
    assert client.post("/rerank", json={"query": "word " * 20000, "texts": ["fine"]}).json()[0]["truncated"]


@pytest.mark.parametrize("bad", ["", " ", "word " * 3000, "word " * 30000], ids=["empty", "blank", "long", "huge"])
def test_one_document_among_fifty_does_not_refuse_the_others(client, model, bad):
    texts = [f"document {i}" for i in range(50)]
    rewards = {i: model.expect("Hi", text) for i, text in enumerate(texts)}
    texts[17] = bad
    tei = client.post("/rerank", json={"query": "Hi", "texts": texts, "raw_scores": True}).json()
    cohere = client.post("/v2/rerank", json={"query": "Hi", "documents": texts}).json()["results"]
    for found, name in ((tei, "score"), (cohere, "relevance_score")):
        scores = {one["index"]: one[name] for one in found}
        assert len(scores) == 50
        assert {i: score for i, score in scores.items() if i != 17} == {i: rewards[i] for i in rewards if i != 17}
        assert [one["index"] for one in found if one.get("truncated")] == [17] * (len(bad) > 1000)


def test_a_document_that_is_no_text_is_listed_and_the_others_are_ranked(client, model):
    documents = ["No.", None, {"title": "b"}, "Hello", "a\ud800"]
    content = json.dumps({"query": "Hi", "documents": documents, "top_n": 5})
    reply = client.post("/v2/rerank", content=content, headers={"Content-Type": "application/json"}).json()
    assert sorted(one["index"] for one in reply["results"]) == [0, 3]
    assert [(one["index"], one["error"]["param"]) for one in reply["errors"]] == [
        (i, f"documents[{i}]") for i in (1, 2, 4)
    ]
    assert {one["error"]["code"] for one in reply["errors"]} == {"invalid_text"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v2/rerank", {"query": "a", "documents": [None, 3]}, "documents[0]"),
        ("/v2/rerank", {"query": "", "documents": ["b"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": [{"title": "b"}]}, "documents[0]"),
        ("/rerank", {"query": "a", "texts": ["b", 3]}, "texts[1]"),
        ("/predict", {"inputs": 5}, "inputs[0]"),
        ("/predict", {"inputs": [["", "a"]]}, "inputs[0]"),
    ],
)
def test_an_unusable_text_refuses_the_request_and_names_the_field(client, path, body, param):
    response = client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (422, param)


@pytest.mark.parametrize(
    "more", [{"max_tokens_per_doc": -1}, {"rank_fields": ["title"]}, {"max_chunks_per_doc": 2}, {"top_n": -1}]
)
def test_cutting_documents_is_refused(client, more):
    response = client.post("/v2/rerank", json={"query": "a", "documents": ["b"], **more})
    assert (response.status_code, response.json()["error"]["code"]) == (422, "invalid_request")


def test_documents_are_cut_to_the_tokens_that_the_client_allows(client, model):
    # Haystack's CohereRanker sends max_tokens_per_doc, 4096 by default
    documents = ["one two three four five six", "one"]
    first = len(model.encoder.tokenizer.encode("one two three", add_special_tokens=False))
    for most, expected in ((first, "one two three"), (4096, documents[0]), (0, documents[0])):
        body = {"query": "Hi\n", "documents": documents, "max_tokens_per_doc": most}
        scores = {one["index"]: one for one in client.post("/v2/rerank", json=body).json()["results"]}
        assert scores[0]["relevance_score"] == model.expect("Hi\n", expected)
        assert scores[0].get("truncated", False) == (expected != documents[0])
        assert scores[1]["relevance_score"] == model.expect("Hi\n", "one")


def test_models_by_name(client):
    card = client.get("/v1/models/default").json()
    assert card.items() >= client.get("/v1/models").json()["data"][0].items()
    assert (card["id"], card["object"]) == ("default", "model")
    assert client.get("/v1/models/other").status_code == 404


COHERE = """
import json, sys, cohere
url = sys.argv[1]
asked = dict(model="rerank-v3.5", query="Hi", documents=["No.", "Hello", "Maybe"])
v2 = cohere.ClientV2("any-key", base_url=url).rerank(**asked, top_n=2)
v1 = cohere.Client("any-key", base_url=url).rerank(**asked, return_documents=True)
try:
    cohere.ClientV2("any-key", base_url=url).rerank(**asked | {"documents": ["a"], "query": ""})
    error = None
except cohere.UnprocessableEntityError as refused:
    error = refused.body["error"]["param"]
print(json.dumps([
    [[r.index, r.relevance_score] for r in v2.results],
    [[r.index, r.relevance_score, r.document.text] for r in v1.results],
    error,
]))
"""
OPENAI = """
import json, sys, openai
client = openai.OpenAI(api_key="any-key", base_url=sys.argv[1] + "/v1")
embedded = client.embeddings.create(model="rm", input="Hi No.")
messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}]
chat = client.chat.completions.create(model="default", messages=messages).choices[0].message.content
names = [m.id for m in client.models.list()], client.models.retrieve("default").id
print(json.dumps([*names, embedded.data[0].embedding, float(chat)]))
"""


def run_sdk(code: str, url: str) -> list:
    if not SDK_VENV:
        pytest.skip("MARGINRM_TEST_SDK_VENV names no environment with the cohere and openai packages")
    python = Path(SDK_VENV) / "bin" / "python"
    done = subprocess.run([python, "-c", code, url], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_cohere_sdk_reranks(server, model):
    v2, v1, error = run_sdk(COHERE, server.url)
    texts = ["No.", "Hello", "Maybe"]
    rewards = [model.expect("Hi", text) for text in texts]
    assert v2 == [[i, rewards[i]] for i in best_first(rewards)[:2]]
    assert v1 == [[i, rewards[i], texts[i]] for i in best_first(rewards)]
    assert error == "query"


def test_the_openai_sdk_lists_models_and_embeds(server, client, model):
    ids, one, embedding, chat = run_sdk(OPENAI, server.url)
    assert chat == model.expect("Hi", "No.")
    assert (ids, one) == (["default"], "default")
    (reward,) = client.post("/get_reward", json={"query": ["Hi No."]}).json()["rewards"]
    assert embedding == [pytest.approx(reward, rel=1e-6)]


def test_sentence_transformers_predicts_what_rerank_answers(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    query, texts = "Why does bread rise?", ["Yeast eats sugar.", "", "word " * 200, "Bread " * 40]
    for family in ("bert", "modernbert"):
        path = tiny_checkpoint(tmp_path / family, family, max_length=64)
        encoder = sentence_transformers.CrossEncoder(str(path), max_length=64, activation_fn=torch.nn.Identity())
        expected = encoder.predict([(query, text) for text in texts])
        with serving(RewardModel.from_pretrained(path, dtype="float32")) as running:
            body = {"query": query, "texts": texts, "raw_scores": True}
            reply = httpx.post(running.url + "/rerank", json=body, timeout=120).json()
        assert {one["index"]: one["score"] for one in reply} == pytest.approx(dict(enumerate(expected)), abs=1e-5)
