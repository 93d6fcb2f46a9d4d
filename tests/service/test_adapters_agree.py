"""One conversation has one reward through every contract, whatever the model's template."""

from __future__ import annotations

import httpx
import pytest

from marginrm.reward_model import RewardModel
from support.models import CHATML_TEMPLATE, tiny_checkpoint
from support.server import serving

# With a BOS, and nothing after the end marker.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_start|>\n\n{{ m['content'] | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_start|>\n\n{% endif %}"
)
MODELS = {
    "line break after the end marker": {"family": "qwen3", "chat_template": CHATML_TEMPLATE},
    "BOS in the template": {"family": "llama", "chat_template": HEADERS},
    "BOS of the tokenizer, none in the template": {"family": "mistral", "chat_template": CHATML_TEMPLATE},
    "no template": {"family": "gpt_neox"},
    "no template, with BOS": {"family": "llama"},
    "encoder": {"family": "bert"},
}
MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]
QUESTION, ANSWER = MESSAGES[0]["content"], "Air scatters blue light é."
RAW = {"use_activation": False}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def served(request, tmp_path_factory):
    model = RewardModel.from_pretrained(
        tiny_checkpoint(tmp_path_factory.mktemp("model"), **request.param), dtype="float32"
    )
    with (
        serving(model, reward_cache_mib=0) as running,  # each contract's reward is to come from the model
        httpx.Client(base_url=running.url, timeout=120) as http,
    ):

        def ask(path: str, body: dict):
            response = http.post(path, json=body)
            assert response.status_code == 200, (path, response.text)
            return response.json()

        yield model, ask


def by_contract(ask) -> dict[str, float]:
    """The reward from the contracts that take the conversation."""
    whole = [*MESSAGES, {"role": "assistant", "content": ANSWER}]
    output = {"output": [{"type": "message", "content": [{"type": "output_text", "text": ANSWER}]}]}
    return {
        "slime": ask("/slime", {"prompt": MESSAGES, "response": ANSWER}),
        "slime, plain": ask("/slime", {"prompt": QUESTION, "response": ANSWER}),
        "classify": ask("/classify", {"messages": whole, **RAW})["data"][0]["probs"][0],
        "pooling": ask("/pooling", {"messages": whole, **RAW})["data"][0]["data"][0],
        "pairs": ask("/v1/score", {"text_1": QUESTION, "text_2": ANSWER, **RAW})["data"][0]["score"],
        "sglang pair": ask("/classify", {"text": [[QUESTION, ANSWER]]})[0]["embedding"][0],
        "rerank": ask("/v2/rerank", {"query": QUESTION, "documents": [ANSWER]})["results"][0]["relevance_score"],
        "tei": ask("/rerank", {"query": QUESTION, "texts": [ANSWER], "raw_scores": True})[0]["score"],
        "predict": ask("/predict", {"inputs": [QUESTION, ANSWER], "raw_scores": True})[0]["score"],
        "chat": float(ask("/v1/chat/completions", {"messages": whole})["choices"][0]["message"]["content"]),
        "compare": ask("/compare", {"conversation_history": MESSAGES, "response_objs": [output]})["rewards"][0],
        "verify": ask("/verify", {"responses_create_params": {"input": QUESTION}, "response": output})["reward"],
    }


def by_text(ask, text: str, ids: list[int]) -> dict[str, float]:
    """The reward from the contracts that take the rendered conversation, or its token ids."""
    return {
        "openrlhf": ask("/get_reward", {"query": [text]})["rewards"][0],
        "llama_factory": ask("/v1/score/evaluation", {"messages": [text]})["scores"][0],
        "verl on vllm": ask("/classify", {"input": text, **RAW})["data"][0]["probs"][0],
        "verl on sglang": ask("/v1/embeddings", {"input": text})["data"][0]["embedding"][0],
        "pooling": ask("/pooling", {"input": [text], **RAW})["data"][0]["data"][0],
        "sglang": ask("/classify", {"text": [text]})[0]["embedding"][0],
        "tei": ask("/predict", {"inputs": text, "raw_scores": True})[0]["score"],
        "sglang ids": ask("/classify", {"input_ids": [ids]})[0]["embedding"][0],
        "vllm ids": ask("/classify", {"input": ids, **RAW})["data"][0]["probs"][0],
        "openai ids": ask("/v1/embeddings", {"input": [ids]})["data"][0]["embedding"][0],
    }


def test_every_contract_gives_the_reward_of_score(served):
    model, ask = served
    (item,) = ask("/score", {"items": [{"prompt": MESSAGES, "response": ANSWER}]})["items"]
    rewards = by_contract(ask)
    tokenizer = model.encoder.tokenizer
    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template([*MESSAGES, {"role": "assistant", "content": ANSWER}], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        rewards |= by_text(ask, text, ids)
        bare = text.removeprefix(tokenizer.bos_token or "<none>")  # verl takes the BOS away
        rewards["verl, no BOS"] = ask("/classify", {"input": bare, **RAW})["data"][0]["probs"][0]
        end = text[text.index(ANSWER) + len(ANSWER) :].strip()
        rewards["slime, rendered"] = ask("/slime", {"prompt": prompt, "response": ANSWER + end})
        rewards["slime, end marker"] = ask("/slime", {"prompt": MESSAGES, "response": ANSWER + end})
        for name, sent in {"decoded": text.strip(), "padded": f"<pad>{text}<pad>", "cut off": prompt + ANSWER}.items():
            rewards[f"openrlhf, {name}"] = ask("/get_reward", {"query": [sent]})["rewards"][0]
            rewards[f"llama_factory, {name}"] = ask("/v1/score/evaluation", {"messages": [sent]})["scores"][0]
    elif model.encoder.architecture == "decoder":
        text = QUESTION + ANSWER
        ids = tokenizer(text + tokenizer.eos_token, add_special_tokens=True)["input_ids"]
        rewards |= by_text(ask, text, ids) | by_text(ask, text + tokenizer.eos_token, ids)
    assert rewards == dict.fromkeys(rewards, pytest.approx(item["reward"], abs=1e-5))
