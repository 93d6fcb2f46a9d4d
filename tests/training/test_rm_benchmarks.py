"""Published benchmarks: rows as their files have them, and scores against the published rules worked out by hand.

The rows below have the fields, names and nesting of the files as published (texts made up), taken from:
allenai/reward-bench (data card: prompt, chosen, chosen_model, rejected, rejected_model, subset, id; Parquet),
allenai/reward-bench-2 (data card's features; Parquet, `ref:`/`tied:` ids and the rules in the repository's
scripts/run_v2.py and rewardbench/utils.py), THU-KEG/RM-Bench (README; total_dataset.json, a JSON list),
Zhou-Zoey/RMB-Reward-Model-Benchmark (RMB_dataset/Pairwise_set and BoN_set, .json files indented by one space) and
ScalerLab/JudgeBench (data/*.jsonl).
"""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from marginrm.cli.main import build_app
from marginrm.errors import DataError
from marginrm.reward_model import RewardModel
from marginrm.texts.places import read_raw
from marginrm_training.evaluation.benchmarks.formats import Case, parse_cases, recognised
from marginrm_training.evaluation.benchmarks.measure import score_cases
from marginrm_training.evaluation.benchmarks.scoring import UNREADABLE, Rewards, best_of_k, score, tie_score
from marginrm_training.evaluation.benchmarks.sections import Benchmark
from support.models import tiny_checkpoint

ROWS: dict[Benchmark, list[dict[str, Any]]] = {
    "rewardbench": [
        {
            "prompt": "How do I detail a car?",
            "chosen": "Wash it first, then wax it.",
            "chosen_model": "GPT4-Turbo",
            "rejected": "No.",
            "rejected_model": "alpaca-7b",
            "subset": "alpacaeval-easy",
            "id": 0,
        }
    ],
    "rewardbench2": [
        {
            "id": "4",
            "prompt": "Who wrote it?",
            "chosen": ["She did."],
            "rejected": ["He did.", "They did.", "Nobody."],
            "num_correct": 1,
            "num_incorrect": 3,
            "total_completions": 4,
            "models": ["a", "b", "c", "d"],
            "subset": "Factuality",
            "additional_metadata": {"category": None, "correct": None, "index": None, "instruction_id_list": None},
        },
        {
            "id": "tied:0",
            "prompt": "Name a colour of the rainbow.",
            "chosen": ["Red", "Blue"],
            "rejected": ["Black", "Brown"],
            "num_correct": 2,
            "num_incorrect": 2,
            "total_completions": 4,
            "models": [],
            "subset": "Ties",
            "additional_metadata": None,
        },
    ],
    "rm-bench": [
        {
            "id": "chat/1",
            "prompt": "What does the cat illustrate?",
            "chosen": ["Superposition.", "It illustrates superposition.", "**Superposition**, it is."],
            "rejected": ["Entanglement.", "It illustrates entanglement.", "**Entanglement**, it is."],
            "domain": "chat",
        }
    ],
    "rmb": [
        {
            "pair_uid": "11114",
            "conversation_input": [{"content": "Hello?", "language": "English", "role": "user"}],
            "chosen": {"llm_name": "Qwen1.5-1.8B-Chat", "answer": "Hello to you.", "score": 5.0},
            "reject": {"llm_name": "Gemini-pro", "answer": "No.", "score": 4.5},
            "category_path": "Pairwise_set/Harmlessness/S10",
        },
        {
            "conversation_input": [{"content": "Hello?", "language": "English", "role": "user"}],
            "bon_best": {"llm_name": "Qwen1.5-1.8B-Chat", "answer": "Hello to you."},
            "loser_list": [{"llm_name": "Gemini-pro", "answer": "No."}, {"llm_name": "x", "answer": "Why?"}],
            "bon_uid": "2366",
            "category_path": "BoN_set/Helpfulness/Chat/Discussion",
        },
    ],
    "judgebench": [
        {
            "pair_id": "b5ce1305-50fe-5a5e-b785-325ab15c6d2b",
            "original_id": 6603,
            "source": "mmlu-pro-health",
            "question": "Which one?",
            "response_model": "gpt-4o-2024-05-13",
            "response_A": "The first.",
            "response_B": "The second.",
            "label": "B>A",
        }
    ],
}


def as_published(folder: Path, benchmark: Benchmark) -> Path:
    """Writes the rows in the container that the benchmark comes in."""
    rows = ROWS[benchmark]
    folder.mkdir()
    if benchmark in {"rewardbench", "rewardbench2"}:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), folder / "test-00000-of-00001.parquet")
    elif benchmark == "judgebench":
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "dataset=judgebench,response_model=gpt-4o-2024-05-13.jsonl").write_text(lines, encoding="utf-8")
    else:
        (folder / "total_dataset.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.mark.parametrize("benchmark", ROWS)
def test_files_as_published_are_recognised_and_read(tmp_path: Path, benchmark: Benchmark) -> None:
    rows = list(read_raw(str(as_published(tmp_path / "data", benchmark))))
    assert {recognised(row) for row, _ in rows} == {benchmark}
    cases = parse_cases(benchmark, rows)
    assert len(cases) == len(ROWS[benchmark])
    first = cases[0]
    expected = {
        "rewardbench": (("Wash it first, then wax it.",), ("No.",), "alpacaeval-easy"),
        "rewardbench2": (("She did.",), ("He did.", "They did.", "Nobody."), "Factuality"),
        "rm-bench": (tuple(ROWS["rm-bench"][0]["chosen"]), tuple(ROWS["rm-bench"][0]["rejected"]), "chat"),
        "rmb": (("Hello to you.",), ("No.",), "Pairwise_set/Harmlessness"),
        "judgebench": (("The second.",), ("The first.",), "mmlu-pro-health"),
    }
    assert (first.chosen, first.rejected, first.subset) == expected[benchmark]
    assert first.source.endswith(":1")
    if benchmark == "rmb":
        assert first.prompt == [{"role": "user", "content": "Hello?"}]
        assert (cases[1].rejected, cases[1].subset) == (("No.", "Why?"), "BoN_set/Helpfulness")


def test_plain_pairs_are_not_recognised_as_a_benchmark() -> None:
    assert recognised({"prompt": "a", "chosen": "b", "rejected": "c"}) is None
    assert recognised({"prompt": "a", "chosen": "b", "rejected": "c", "subset": "math"}) is None
    assert recognised({"prompt": "a", "chosen": ["b"], "rejected": ["c"], "domain": "other"}) is None
    with pytest.raises(DataError, match=r"x:1: is not a row of rmb"):
        parse_cases("rmb", [({"prompt": "a"}, "x:1")])
    with pytest.raises(DataError, match="empty"):
        parse_cases("rmb", [])


@pytest.mark.parametrize(
    ("benchmark", "change", "message"),
    [
        ("judgebench", {"label": "A=B"}, "must be A>B or B>A"),
        ("rm-bench", {"chosen": ["a", "b"]}, "3 texts each"),
        ("rewardbench2", {"chosen": ["a", "b"]}, "outside the subset Ties"),
        ("rewardbench2", {"rejected": "text"}, "list of at least one text"),
        ("rmb", {"reject": "text"}, "object with the text 'answer'"),
        ("rmb", {"conversation_input": [{"role": "user"}]}, "list of messages"),
        ("rewardbench", {"chosen": 3}, "'chosen' must be a text"),
    ],
)
def test_a_wrong_row_is_named(benchmark: Benchmark, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        parse_cases(benchmark, [(ROWS[benchmark][0] | change, "f:7")])
    assert str(raised.value).startswith("f:7: ")


def cases_of(*rows: tuple[str, int, int]) -> list[Case]:
    return [
        Case("p", ("c",) * right, ("r",) * wrong, subset, f"x:{n}") for n, (subset, right, wrong) in enumerate(rows)
    ]


RIGHT, WRONG, TIE = ([1.0], [0.0]), ([0.0], [1.0]), ([1.0], [1.0])


def test_rewardbench_weighs_subsets_in_their_section_and_takes_no_tie() -> None:
    names = {
        "alpacaeval-easy": RIGHT, "alpacaeval-length": RIGHT, "alpacaeval-hard": RIGHT, "mt-bench-easy": WRONG,
        "mt-bench-med": TIE, "mt-bench-hard": RIGHT, "llmbar-natural": RIGHT, "llmbar-adver-neighbor": RIGHT,
        "llmbar-adver-GPTInst": RIGHT, "llmbar-adver-GPTOut": RIGHT, "llmbar-adver-manual": RIGHT,
        "refusals-dangerous": WRONG, "refusals-offensive": WRONG, "xstest-should-refuse": WRONG,
        "xstest-should-respond": WRONG, "donotanswer": WRONG, "math-prm": WRONG, "hep-cpp": RIGHT, "hep-go": RIGHT,
        "hep-java": RIGHT, "hep-js": RIGHT, "hep-python": RIGHT, "hep-rust": RIGHT,
    }  # fmt: skip
    found = score("rewardbench", cases_of(*((name, 1, 1) for name in names)), list(names.values()))
    assert not found.missing
    assert found.metrics["Chat"] == pytest.approx((100 + 95 + 95) / (100 + 95 + 95 + 28 + 40))
    assert found.metrics["Reasoning"] == pytest.approx(6 * 164 / (984 + 6 * 164))
    sections = [found.metrics[name] for name in ("Chat", "Chat Hard", "Safety", "Reasoning")]
    assert found.metrics["overall"] == pytest.approx(sum(sections) / 4)
    part = score("rewardbench", cases_of(("math-prm", 1, 1), ("math-prm", 1, 1)), [RIGHT, WRONG])
    assert "overall" not in part.metrics
    assert len(part.missing) == 22
    assert part.metrics["Reasoning"] == 0.5


def test_best_of_four_shares_a_tie() -> None:
    assert best_of_k(2.0, [1.0, 0.0, 0.0]) == 1
    assert best_of_k(2.0, [2.0, 2.0, 0.0]) == pytest.approx(1 / 3)
    assert best_of_k(1.0, [2.0, 0.0, 0.0]) == 0


def published_tie_scores(both: list[tuple[Rewards, Rewards]]) -> float:
    """The subset's score as published, in arrays over all prompts (RewardBench, process_single_model)."""
    ref_gap = np.array([min(ref[0]) - max(ref[1]) for ref, _ in both])
    gap = np.array([min(tied[0]) - max(tied[1]) for _, tied in both])
    spread = np.array([max(tied[0]) - min(tied[0]) for _, tied in both])
    least = np.minimum(ref_gap, gap)
    with np.errstate(all="ignore"):
        margin = np.nan_to_num(np.tanh(least / spread - 1), nan=0.0)
    parts = [(gap > 0).mean(), (ref_gap > 0).mean(), (gap > spread).mean(), (least > spread).mean(), margin.mean()]
    return float(np.dot(parts, [0.3, 0.3, 0.2, 0.2, 0.01]))


def test_ties_score_as_published() -> None:
    assert tie_score(([5.0], [0.0]), ([4.0, 3.0], [1.0])) == pytest.approx(1 + 0.01 * math.tanh(2 / 1 - 1))
    assert tie_score(([1.0], [0.0]), ([4.0, 3.0], [2.5])) == pytest.approx(0.6 + 0.01 * math.tanh(0.5 - 1))
    generator = np.random.default_rng(0)
    both = [
        (([a], [b]), ([c, d, c], [e, b])) for a, b, c, d, e in generator.integers(0, 4, (200, 5)).astype(float).tolist()
    ]
    cases = [
        Case("p", ("c",) * len(one[0]), ("r",) * len(one[1]), "Ties", "x", f"{kind}:{number}")
        for number, pair in enumerate(both)
        for kind, one in zip(("ref", "tied"), pair, strict=True)
    ]
    found = score("rewardbench2", cases, [one for pair in both for one in pair])
    assert found.metrics["Ties"] == pytest.approx(published_tie_scores(both))
    with pytest.raises(DataError, match="tied:0"):
        score("rewardbench2", cases[:1], [both[0][0]])


def test_rewardbench_2_averages_its_six_subsets() -> None:
    names = ("Factuality", "Precise IF", "Math", "Safety", "Focus")
    cases = cases_of(*((name, 1, 3) for name in names), ("Math", 1, 3))
    cases += [Case("p", ("c",), ("r",), "Ties", "x", key) for key in ("ref:1", "tied:1")]
    alone: Rewards = ([1.0], [0.0, 0.0, 0.0])
    rewards: list[Rewards] = [
        alone,
        alone,
        alone,
        ([0.0], [1.0, 0.0, 0.0]),
        ([0.0], [0.0, 0.0, -1.0]),
        *[UNREADABLE] * 3,
    ]
    found = score("rewardbench2", cases, rewards)
    assert found.metrics["Math"] == 0.5
    assert found.metrics["Ties"] == pytest.approx(-0.01)
    assert found.metrics["overall"] == pytest.approx((1 + 1 + 0.5 + 0 + 1 / 3 - 0.01) / 6)


def test_rm_bench_easy_normal_and_hard_are_parts_of_the_matrix_of_styles() -> None:
    domains = ("chat", "code", "math", "safety-refuse", "safety-response")
    generator = np.random.default_rng(1)
    cases = cases_of(*((name, 3, 3) for name in domains for _ in range(5)))
    rewards: list[Rewards] = [(generator.normal(0.3, 1, 3).tolist(), generator.normal(0, 1, 3).tolist()) for _ in cases]
    matrices = {name: np.zeros((3, 3)) for name in domains}
    for case, (chosen, rejected) in zip(cases, rewards, strict=True):
        for row, column in product(range(3), range(3)):
            matrices[case.subset][row, column] += (chosen[row] > rejected[column]) / 5
    safety = (matrices["safety-refuse"] + matrices["safety-response"]) / 2
    mean = (matrices["chat"] + matrices["code"] + matrices["math"] + safety) / 4
    found = score("rm-bench", cases, rewards).metrics
    assert found["easy"] == pytest.approx(np.tril(mean, -1).sum() / 3)
    assert found["normal"] == pytest.approx(np.diag(mean).mean())
    assert found["hard"] == pytest.approx(np.triu(mean, 1).sum() / 3)
    assert found["overall"] == pytest.approx((found["easy"] + found["normal"] + found["hard"]) / 3)
    assert found["overall"] == pytest.approx(
        (found["chat"] + found["code"] + found["math"] + (found["safety-refuse"] + found["safety-response"]) / 2) / 4
    )


def test_a_fancy_style_helps_where_it_is_easy() -> None:
    cases = cases_of(*((name, 3, 3) for name in ("chat", "code", "math", "safety-refuse", "safety-response")))
    found = score("rm-bench", cases, [([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])] * 5).metrics
    assert (found["easy"], found["normal"], found["hard"]) == (1, 0, 0)


def test_rmb_takes_a_best_answer_that_beats_every_loser() -> None:
    names = ("Pairwise_set/Harmlessness", "Pairwise_set/Helpfulness", "BoN_set/Harmlessness", "BoN_set/Helpfulness")
    cases = cases_of(*((name, 1, 2) for name in names), (names[3], 1, 2))
    beats_all: Rewards = ([2.0], [1.0, 0.0])
    found = score("rmb", cases, [beats_all, beats_all, ([2.0], [2.0, 0.0]), beats_all, ([1.0], [0.0, 3.0])]).metrics
    assert found["BoN_set/Helpfulness"] == 0.5
    assert found["overall"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)


def test_judgebench_counts_pairs() -> None:
    cases = cases_of(
        *(("mmlu-pro-law", 1, 1),) * 3, *(("mmlu-pro-physics", 1, 1),) * 1,
        ("livebench-math", 1, 1), ("livebench-reasoning", 1, 1), ("livecodebench", 1, 1),
    )  # fmt: skip
    found = score("judgebench", cases, [RIGHT, RIGHT, WRONG, RIGHT, TIE, RIGHT, WRONG]).metrics
    assert found["knowledge"] == pytest.approx(3 / 4)
    assert found["math"] == 0
    assert found["overall"] == pytest.approx(4 / 7)
    with pytest.raises(DataError, match="not a source of JudgeBench"):
        score("judgebench", cases_of(("other", 1, 1)), [RIGHT])


def test_intervals_contain_the_score_and_are_reproducible() -> None:
    cases = cases_of(*(("livecodebench", 1, 1),) * 100)
    rewards: list[Rewards] = [RIGHT] * 70 + [WRONG] * 30
    first, again = (score("judgebench", cases, rewards).metrics for _ in range(2))
    assert first == again
    low, high = first["overall_low"], first["overall_high"]
    half = 1.96 * math.sqrt(0.7 * 0.3 / 100)  # what the normal approximation gives
    assert low == pytest.approx(0.7 - half, abs=0.025)
    assert high == pytest.approx(0.7 + half, abs=0.025)


def test_a_case_over_the_limit_counts_as_wrong(tmp_path: Path) -> None:
    model = RewardModel.from_pretrained(tiny_checkpoint(tmp_path / "m", "llama"), dtype="float32", max_length=16)
    long = "far too long " * 20
    cases = [Case("Hi", ("Yes.",), (long,), "livecodebench", "x:1"), Case("Hi", ("Yes.", "No."), ("Why?",), "s", "x:2")]
    rewards, counts, unreadable = score_cases(model, cases)
    assert rewards[0] == UNREADABLE
    assert (len(rewards[1][0]), len(rewards[1][1])) == (2, 1)
    assert counts == {"cases": 2, "truncated": 0, "unreadable": 1}
    assert unreadable.sources == {"too long": ["x:1"]}
    assert [*rewards[1][0], *rewards[1][1]] == pytest.approx(model.score("Hi", ["Yes.", "No.", "Why?"]), abs=1e-5)


def test_the_command_scores_a_benchmark_by_its_own_rule(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama")
    runner, app = CliRunner(), build_app()
    for benchmark in ("judgebench", "rmb"):
        data = as_published(tmp_path / benchmark, benchmark)
        arguments = ["evaluate", "--model", str(folder), "--data", str(data), "--json"]
        result = runner.invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert f"recognised as {benchmark}" in result.stderr
        metrics = json.loads(result.stdout)
        named = runner.invoke(app, [*arguments, "--format", benchmark], catch_exceptions=False)
        assert json.loads(named.stdout) == metrics
        assert metrics["cases"] == len(ROWS[benchmark])
    assert "no overall" in result.stderr
    wrong = runner.invoke(app, [*arguments[:-1], "--format", "rm-bench"])
    assert isinstance(wrong.exception, DataError)
    assert "is not a row of rm-bench" in str(wrong.exception)
