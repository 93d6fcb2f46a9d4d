"""The worked examples that the OpenAPI page shows beside the wire shapes."""

from __future__ import annotations

from pydantic.config import JsonDict

MODEL: JsonDict = {
    "name": "default",
    "revision": "sha256:3f2a9c01d4be",
    "base_model": "marginrm-demo",
    "dtype": "float32",
    "calibrated": True,
    "temperature": 1.31,
}

SCORE_REQUEST: JsonDict = {
    "tie_below": 0.55,
    "pairs": [
        {
            "id": "a1",
            "prompt": "How do I boil an egg?",
            "chosen": "Lower it into boiling water, wait seven minutes, then cool it in cold water.",
            "rejected": "Eggs are eggs.",
        }
    ],
    "items": [
        {
            "id": "b1",
            "prompt": [{"role": "user", "content": "Name a prime number over ten."}],
            "response": "Eleven is prime.",
        }
    ],
}

BEST_OF_N_REQUEST: JsonDict = {
    "top_k": 2,
    "tie_below": 0.55,
    "prompts": [
        {
            "id": "p1",
            "prompt": "How do I boil an egg?",
            "candidates": [
                "Eggs are eggs.",
                "Lower it into boiling water, wait seven minutes, then cool it in cold water.",
                "Boil it. Boil it. Boil it. Boil it.",
            ],
        }
    ],
}

ERROR_REPLY: JsonDict = {
    "error": {
        "code": "unknown_model",
        "message": "No model is called 'big'; this server has: default.",
        "param": "model",
        "request_id": "0b6f2f3c",
    }
}

SCORE_RESPONSE: JsonDict = {
    "model": MODEL,
    "pairs": [
        {
            "id": "a1",
            "index": 0,
            "margin": 0.87,
            "confidence": 0.66,
            "verdict": "chosen",
            "chosen": {"reward": 1.23, "tokens": 154, "truncated": False},
            "rejected": {"reward": 0.36, "tokens": 98, "truncated": False},
        }
    ],
    "items": [
        {
            "id": "b1",
            "index": 0,
            "error": {"code": "sequence_too_long", "message": "4,312 tokens; this model takes 2,048."},
        }
    ],
    "usage": {"responses": 2, "tokens": 252, "tokens_computed": 211},
}

BEST_OF_N_RESPONSE: JsonDict = {
    "model": MODEL,
    "prompts": [
        {
            "id": "p1",
            "index": 0,
            "best": 1,
            "margin": 0.41,
            "confidence": 0.58,
            "tie": False,
            "ranking": [
                {"candidate": 1, "rank": 1, "reward": 2.10, "p_best": 0.52},
                {"candidate": 2, "rank": 2, "reward": 1.69, "p_best": 0.38},
            ],
            "mean": 1.4,
            "std": 0.7,
        }
    ],
    "usage": {"responses": 3, "tokens": 96, "tokens_computed": 60},
}
