"""Sections of the benchmarks, their subsets, and the weight of each subset in its section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Benchmark = Literal["rewardbench", "rewardbench2", "rm-bench", "rmb", "judgebench"]

# rewardbench/constants.py of RewardBench: sections, and the count that weighs each subset (math-prm, 447 pairs, is
# given the weight of the 984 pairs of code).
_REWARD_BENCH = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 250,
        "xstest-should-respond": 154,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
_REWARD_BENCH_2 = {name: {name: 1} for name in ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")}
_RM_BENCH = {
    "chat": {"chat": 1},
    "code": {"code": 1},
    "math": {"math": 1},
    "safety": {"safety-refuse": 1, "safety-response": 1},
}
_RMB = {
    f"{kind}/{goal}": {f"{kind}/{goal}": 1}
    for goal in ("Helpfulness", "Harmlessness")
    for kind in ("BoN_set", "Pairwise_set")
}
SECTIONS: dict[Benchmark, Mapping[str, Mapping[str, int]]] = {
    "rewardbench": _REWARD_BENCH,
    "rewardbench2": _REWARD_BENCH_2,
    "rm-bench": _RM_BENCH,
    "rmb": _RMB,
}
