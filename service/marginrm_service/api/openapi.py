"""Completes the OpenAPI document: a sentence, with its unit, for each field without one, and requests that can be sent.

The adapters' fields have names of other servers' choosing, and most of them recur; their sentences are kept here once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_PROMPT, _GOOD, _BAD = "Why does bread rise?", "Yeast eats sugar and gives off gas.", "Bread is bread."
_TEMPLATED = f"{_PROMPT}\n{_GOOD}"
_CONVERSATION = [{"role": "user", "content": _PROMPT}, {"role": "assistant", "content": _GOOD}]
_OUTPUT = {"output": [{"type": "message", "content": [{"type": "output_text", "text": _GOOD}]}]}

# Field -> sentence; `Schema.field` goes before `field`.
FIELDS = {
    "base_model": "The model that training began with.",
    "base_revision": "Its revision.",
    "brier_after": "Brier score at the temperature, from 0 to 1; lower is better.",
    "brier_before": "Brier score at T = 1, from 0 to 1; lower is better.",
    "choices": "The reward as a message; always one.",
    "chosen": "The response that is labelled better.",
    "code": "Stable name of the error.",
    "comparison_results": "Always null: rewards are computed one by one, not by a judge of pairs.",
    "completion_tokens": "Always 0: no text is generated.",
    "content": "The text; in a reply the reward, as a string.",
    "conversation_history": "The conversation before the responses.",
    "count": "Pairs in the bin.",
    "coverage": "Share of pairs that are kept, the surest first.",
    "created": "Time of the reply, in seconds since 1970.",
    "ctx": "Further facts about the fault.",
    "data": "One entry for each input, in order.",
    "detail": "The faults.",
    "dimensions": "1, the length of each embedding.",
    "document": "The document, if it was asked for.",
    "documents": "The responses to rank.",
    "dtype": "Number format of the weights.",
    "ece_after": "Expected calibration error at the temperature, a share from 0 to 1.",
    "ece_before": "Expected calibration error at T = 1, a share from 0 to 1.",
    "embedding": "The reward, as a list of one number or its base64.",
    "encoding_format": "`float` or `base64` of little-endian float32.",
    "error": "What went wrong.",
    "extra_logs": "Numbers by name for the trainer's log, one for each text.",
    "finish_reason": "Always `stop`.",
    "id": "Name of the request or of the entry.",
    "index": "Position of the input, from 0.",
    "input": "The text or texts to score, after the chat template.",
    "label": "Always the same, as there is one output.",
    "loc": "Path to the fault.",
    "logprobs": "Always null.",
    "loss": "Name of the loss.",
    "lower": "Lower edge of the bin, a confidence.",
    "message": "What is wrong and what to do, for people.",
    "messages": "One conversation, which ends with the response.",
    "meta_info": "Facts about the text, such as its tokens.",
    "metrics": "Mean and standard deviation of the rewards.",
    "model": "Name of a served model, or the model that replied.",
    "msg": "What is wrong.",
    "name": "Name that requests use.",
    "nll_after": "Negative log likelihood at the temperature, in nats.",
    "nll_before": "Negative log likelihood at T = 1, in nats.",
    "num_classes": "Number of outputs: 1.",
    "object": "Kind of the object, a constant.",
    "owned_by": "Always `marginrm`.",
    "pairs": "Outcomes of the pairs, in order.",
    "pairs_used": "Pairs that were used.",
    "preset": "Preset of the configuration.",
    "probs": "The score.",
    "prompt": "The prompt.",
    "prompt_tokens": "Tokens of the inputs.",
    "prompts": "Outcomes of the prompts, in order.",
    "query": "The prompt, or the texts to score.",
    "rejected": "The response that is labelled worse.",
    "relevance_score": "The reward, or its sigmoid where that was asked for.",
    "reliability": "Bins of the reliability diagram at the temperature.",
    "response": "The response.",
    "responses_create_params": "The request that the response answers, in OpenAI's form.",
    "results": "Ranked documents, best first.",
    "return_documents": "Whether to repeat the documents.",
    "return_text": "Whether to repeat the texts.",
    "reward": "Unbounded; only differences within one prompt and one model mean something.",
    "rewards": "One reward for each text.",
    "risk": "Share of the kept pairs that is ranked wrong.",
    "risk_coverage": "Error rate against the share of pairs that is kept.",
    "role": "Speaker of the message.",
    "rows": "Rows of the file.",
    "score": "The reward, or its sigmoid.",
    "scores": "One score for each text.",
    "sha256": "Hash of the file.",
    "status": "Status that a plain reply would have had.",
    "temperature": "T of confidence = sigmoid(margin / T).",
    "text": "The text.",
    "texts": "The responses to rank.",
    "total_tokens": "Tokens of the inputs.",
    "truncation_direction": "`left` only: the reward is read at the end.",
    "type": "Kind of the fault.",
    "upper": "Upper edge of the bin, a confidence.",
    "usage": "What the reply cost, in tokens.",
    "verdict": "The response that the model prefers, or `tie`.",
    "BestOfNRequest.prompts": "Prompts with their candidates, one or more.",
    "GetRewardRequest.query": "Texts after the chat template, prompt and response together.",
    "ItemError.id": "Yours, repeated.",
    "ItemOut.id": "Yours, repeated.",
    "PairOut.id": "Yours, repeated.",
    "PromptOut.id": "Yours, repeated.",
    "ModelList.data": "The models that are loaded.",
    "PoolingData.data": "The reward, as a list of one number.",
    "ScoreEvaluationRequest.messages": "Texts after the chat template, prompt and response together.",
    "ScoreResponse.items": "Outcomes of the single responses, in order.",
    "ValidationError.input": "What was found.",
}

# Path of a POST route without an example of its own -> a body that can be sent to any server.
EXAMPLES: dict[str, Any] = {
    "/get_reward": {"query": [_TEMPLATED]},
    "/slime": {"prompt": _PROMPT, "response": _GOOD},
    "/v1/score/evaluation": {"model": "default", "messages": [_TEMPLATED]},
    "/classify": {"model": "default", "input": [_TEMPLATED]},
    "/pooling": {"model": "default", "input": [_TEMPLATED]},
    "/v1/score": {"model": "default", "text_1": _PROMPT, "text_2": [_GOOD, _BAD]},
    "/v1/embeddings": {"model": "default", "input": _TEMPLATED},
    "/v1/rerank": {"model": "default", "query": _PROMPT, "documents": [_BAD, _GOOD], "top_n": 1},
    "/v2/rerank": {"model": "default", "query": _PROMPT, "documents": [_BAD, _GOOD], "top_n": 1},
    "/rerank": {"query": _PROMPT, "texts": [_BAD, _GOOD], "raw_scores": True},
    "/predict": {"inputs": [_PROMPT, _GOOD], "raw_scores": True},
    "/v1/chat/completions": {"model": "default", "messages": _CONVERSATION},
    "/compare": {"conversation_history": _CONVERSATION[:1], "response_objs": [_OUTPUT]},
    "/verify": {"responses_create_params": {"input": _PROMPT}, "response": _OUTPUT},
    "/admin/models": {"name": "default", "path": "checkpoints/demo"},
}


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """Adds what is missing to an OpenAPI document, in place: sentences of fields and examples of bodies."""
    for name, schema in document["components"]["schemas"].items():
        for field, described in schema.get("properties", {}).items():
            sentence = FIELDS.get(f"{name}.{field}", FIELDS.get(field))
            if sentence and "description" not in described:
                described["description"] = sentence
    for path, content in _bodies(document):
        if path in EXAMPLES:
            content["example"] = EXAMPLES[path]
    return document


def _bodies(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, operations in document["paths"].items():
        content = operations.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json")
        if content:
            yield path, content
