"""Metrics of a reward model, against numbers worked out by hand and against brute force."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from marginrm import RewardModel
from marginrm.cli.main import build_app
from marginrm.encoding import EncodedResponse
from marginrm.errors import DataError
from marginrm.manifest import Manifest
from marginrm.texts.preferences import CandidateGroup, PreferencePair
from marginrm_training.data.splits import EncodedPair
from marginrm_training.evaluation.best_of_n import best_of_n_curve, expected_best_of_n, shortest_group
from marginrm_training.evaluation.bootstrap import evaluation_intervals, mean_interval
from marginrm_training.evaluation.comparison import common, compare, compare_picks, mcnemar
from marginrm_training.evaluation.groups import UNSCORED, Groups, load_groups, score_groups
from marginrm_training.evaluation.pairs import PairRewards, evaluate, skew, spearman
from support.models import CHATML_TEMPLATE, tiny_checkpoint


def pairs(*rows: tuple[str, str, float | None]) -> list[EncodedPair]:
    return [
        EncodedPair(
            EncodedResponse((1, index)),
            EncodedResponse((2, index)),
            None,
            PreferencePair("p", chosen, rejected, strength=strength, source=f"x:{index}"),
        )
        for index, (chosen, rejected, strength) in enumerate(rows)
    ]


def test_metrics_by_hand() -> None:
    rewards = PairRewards(np.array([2.0, 1.0, 0.0, 0.0]), np.array([0.0, 1.0, 1.0, -3.0]))  # d = 2, 0, -1, 3
    rows = pairs(("long", "s", 0.6), ("s", "long", 0.6), ("long", "s", 0.9), ("s", "long", 0.9))
    metrics = evaluate(rewards, rows, temperature=2.0)
    assert metrics["accuracy"] == pytest.approx(2.5 / 4)
    assert metrics["accuracy_strict"] == pytest.approx(2 / 4)
    assert metrics["ties"] == pytest.approx(1 / 4)
    softplus = [math.log1p(math.exp(-d)) for d in (2, 0, -1, 3)]
    assert metrics["bt_nll"] == pytest.approx(sum(softplus) / 4)
    assert metrics["nll"] == pytest.approx(sum(math.log1p(math.exp(-d / 2)) for d in (2, 0, -1, 3)) / 4)
    brier = [(1 - 1 / (1 + math.exp(-d / 2))) ** 2 for d in (2, 0, -1, 3)]
    assert metrics["brier"] == pytest.approx(sum(brier) / 4)
    assert metrics["accuracy_strength_0.5_0.7"] == pytest.approx(0.75)
    assert metrics["accuracy_strength_0.9_0.95"] == pytest.approx(0.5)
    assert metrics["pairs_strength_0.9_0.95"] == 2
    doubtful = evaluate(rewards, pairs(*[("a", "bb", 0.2)] * 4), temperature=2.0)
    assert doubtful["accuracy_strength_0_0.5"] == metrics["accuracy"]
    assert metrics["pick_longest_accuracy"] == pytest.approx(0.5)
    assert metrics["accuracy_longer_chosen"] == pytest.approx(0.5)
    assert metrics["accuracy_shorter_chosen"] == pytest.approx(0.75)


def test_skew_by_hand() -> None:
    assert skew(np.array([-1.0, 0.0, 1.0])) == pytest.approx(0)
    assert skew(np.array([0.0, 0.0, 0.0, 4.0])) == pytest.approx(2 / math.sqrt(3))
    assert skew(np.zeros(3)) == 0


def test_rank_correlation_takes_ties_at_their_mean_rank() -> None:
    assert spearman([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)


scores_and_gold = st.lists(
    st.tuples(st.integers(-2, 2).map(float), st.integers(0, 9).map(float)), min_size=1, max_size=7
)


@given(scores_and_gold, st.integers(1, 7))
def test_best_of_n_is_the_mean_over_all_subsets(drawn: list[tuple[float, float]], n: int) -> None:
    scores, gold = [score for score, _ in drawn], [truth for _, truth in drawn]
    if n > len(scores):
        with pytest.raises(ValueError, match="candidates"):
            expected_best_of_n(scores, gold, n)
        return
    subsets = list(combinations(range(len(scores)), n))
    picks = [gold[max(subset, key=lambda index: (scores[index], -index))] for subset in subsets]
    assert expected_best_of_n(scores, gold, n) == pytest.approx(sum(picks) / len(picks))


def test_the_curve_has_random_longest_and_oracle_beside_it() -> None:
    one, two = best_of_n_curve([[3.0, 1.0]], [[0.2, 0.8]], [[5, 9]])
    assert (one.n, one.kl) == (1, 0.0)
    assert [one.model, one.longest, one.oracle, one.random] == pytest.approx([0.5] * 4)
    assert [two.model, two.longest, two.oracle, two.random] == pytest.approx([0.2, 0.8, 0.8, 0.5])
    assert two.kl == pytest.approx(math.log(2) - 0.5)


def test_a_candidate_over_the_limit_is_kept_and_never_picked(tmp_path: Path) -> None:
    model = RewardModel.from_pretrained(tiny_checkpoint(tmp_path / "m", "llama"), dtype="float32", max_length=16)
    group = CandidateGroup("Hi", ("Yes.", "far too long " * 20, "No."), gold=(0.1, 1.0, 0.3), source="x:1")
    scored = score_groups(model, Groups([group]))
    assert scored.rewards[0][1] == UNSCORED
    assert all(math.isfinite(scored.rewards[0][index]) for index in (0, 2))
    assert "1 too long (x:1 candidate 1)" in scored.summary()
    assert expected_best_of_n(scored.rewards[0], scored.gold[0], 3) in (0.1, 0.3)


def test_the_reason_of_an_unreadable_candidate_is_the_true_one(tmp_path: Path) -> None:
    model = RewardModel.from_pretrained(tiny_checkpoint(tmp_path / "m", "llama"), dtype="float32", max_length=16)
    groups = [
        CandidateGroup("Hi", ["Yes.", " ", "No."], [0.1, 1.0, 0.3], "x:1"),
        CandidateGroup("", ["Yes.", "No."], [0.1, 0.3], "x:2"),
        CandidateGroup("Hi", ["long " * 40, ""], [0.1, 0.3], "x:3"),
    ]
    scored = score_groups(model, Groups(groups))
    assert scored.unscored.sources == {"empty text": ["x:1 candidate 1"]}
    assert scored.excluded.sources == {
        "without a readable candidate: empty text": ["x:2"],
        "without a readable candidate: empty text, too long": ["x:3"],
    }
    assert (scored.sources, len(scored.rewards)) == (["x:1"], 1)
    assert all(reason in scored.summary() for reason in ("1 empty text", "empty text, too long (x:3)"))
    with pytest.raises(DataError, match="No candidate of any prompt can be read"):
        score_groups(model, Groups(groups[1:]))


def test_odd_groups_are_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "candidates": [{"text": "a", "gold": 1}, {"text": "b", "gold": 0}]},
        {"prompt": "p", "candidates": ["a", "b"]},
        {"prompt": "p", "candidates": []},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_groups(path)
    assert len(found.groups) == 1
    assert found.excluded.sources == {
        "without gold qualities": [f"{path}:2"],
        "without candidates": [f"{path}:3"],
        "with other fields": [f"{path}:4"],
    }
    with pytest.raises(DataError, match="3 malformed rows, and max_bad_rows is 2"):
        load_groups(path, 2)
    with pytest.raises(DataError, match=r"x\.jsonl:2: the candidates have no gold quality"):
        load_groups(path, 0)


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(1, 3) == pytest.approx(2 * (1 + 4) / 16)


def test_a_better_model_is_distinguished_from_chance() -> None:
    generator = np.random.default_rng(1)
    first = generator.normal(0.2, 1, 800)
    better = np.where(generator.random(800) < 0.2, np.abs(first) + 0.1, first)
    found = compare(first, better)
    assert found["difference"] == pytest.approx(found["accuracy_second"] - found["accuracy_first"])
    assert 0 < found["difference_low"] < found["difference"] < found["difference_high"]
    assert found["mcnemar_p"] < 1e-6
    same = compare(first, first)
    assert (same["difference_low"], same["difference_high"], same["mcnemar_p"]) == (0, 0, 1)
    with pytest.raises(ValueError, match="not the same pairs"):
        compare(first, first[:-1])


def test_only_pairs_that_both_models_can_read_are_compared() -> None:
    first, second = common({"f:1": 1.0, "f:2": 2.0, "f:3": 3.0}, {"f:3": -3.0, "f:4": 4.0, "f:2": -2.0})
    assert (first.tolist(), second.tolist()) == ([2.0, 3.0], [-2.0, -3.0])
    with pytest.raises(DataError, match="no pair in common"):
        common({"f:1": 1.0}, {"f:2": 1.0})


def preference_file(path: Path, model: RewardModel, seed: int) -> Path:
    """Pairs on which the model's sign is right 70% of the time, so its margins, ten times too large, are too sure."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(120):
        first, second = (" ".join(generator.choice(["red", "blue", "green", "no", "yes"], 6)) for _ in range(2))
        a, b = model.score(f"Question {seed}-{index}?", [first, second])
        if (a < b) == (generator.random() < 0.7):
            first, second = second, first
        if first != second:
            rows.append({"prompt": f"Question {seed}-{index}?", "chosen": first, "rejected": second})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_calibrate_writes_a_manifest_for_a_plain_checkpoint_and_its_confidence_holds_on_other_pairs(
    tmp_path: Path,
) -> None:
    folder = tiny_checkpoint(tmp_path / "plain", "llama", chat_template=CHATML_TEMPLATE)
    sharpen_head(folder, 10.0)
    model = RewardModel.from_pretrained(folder, dtype="float32")
    assert not model.info.calibrated
    fitted = preference_file(tmp_path / "fit.jsonl", model, 0)
    held_out = preference_file(tmp_path / "held_out.jsonl", model, 1)
    runner, app = CliRunner(), build_app()
    result = runner.invoke(app, ["calibrate", "--model", str(folder), "--data", str(fitted)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    manifest = Manifest.load(folder)
    assert manifest is not None
    assert manifest.calibration is not None
    assert manifest.method is None  # it was trained elsewhere, and the manifest does not pretend to know how
    assert RewardModel.from_pretrained(folder, dtype="float32").info.calibrated
    measured = runner.invoke(
        app, ["evaluate", "--model", str(folder), "--data", str(held_out), "--json"], catch_exceptions=False
    )
    metrics = json.loads(measured.stdout[measured.stdout.index("{") :])
    assert metrics["ece"] < metrics["ece_before"]


def sharpen_head(folder: Path, factor: float) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] *= factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_intervals_contain_their_figure_and_are_reproducible() -> None:
    d = np.random.default_rng(2).normal(0.4, 1, 300)
    found = evaluation_intervals(d, 1.5)
    assert found == evaluation_intervals(d, 1.5)
    figures = evaluate(PairRewards(d, np.zeros(300)), pairs(*[("a", "b", None)] * 300), 1.5)
    for name in ("accuracy", "accuracy_strict", "bt_nll", "nll", "brier_before", "brier", "margin_mean"):
        assert found[f"{name}_low"] < figures[name] < found[f"{name}_high"]
    low, high = mean_interval(d)
    half = 1.96 * d.std() / math.sqrt(300)  # what the normal approximation gives
    assert (low, high) == (
        pytest.approx(d.mean() - half, abs=0.02),
        pytest.approx(d.mean() + half, abs=0.02),
    )


def test_the_win_rate_of_picks_is_over_all_prompts() -> None:
    gold = [[0.1, 0.9], [0.5, 0.2], [0.3, 0.3], [0.4, 0.8]]
    first = [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]  # picks 0, 0, 0, 1
    second = [[0.0, 1.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]]  # picks 1, 0, 1, 0: wins, same, equal quality, loses
    found = compare_picks(first, second, gold)
    counts = [found[name] for name in ("prompts", "second_wins", "first_wins", "draws", "same_pick")]
    assert counts == [4, 1, 1, 2, 1]
    assert found["win_rate"] == (1 + 2 / 2) / 4
    assert found["pick_first"] == pytest.approx((0.1 + 0.5 + 0.3 + 0.8) / 4)
    assert found["pick_second"] == pytest.approx((0.9 + 0.5 + 0.3 + 0.4) / 4)
    assert found["pick_difference_low"] <= found["pick_difference"] <= found["pick_difference_high"]
    assert found["win_rate_p"] == 1


def test_the_curve_ends_at_the_shortest_group_and_needs_a_prompt() -> None:
    rewards, lengths = [[1.0, 2.0, 3.0], [1.0] * 9], [[1, 2, 3], [1] * 9]
    assert [point.n for point in best_of_n_curve(rewards, rewards, lengths)] == [1, 2]
    assert shortest_group(rewards) == 3
    with pytest.raises(DataError, match="empty"):
        best_of_n_curve([], [], [])


def test_the_curves_interval_is_over_prompts() -> None:
    generator = np.random.default_rng(3)
    gold = generator.random((200, 4)).tolist()
    scores = generator.random((200, 4)).tolist()
    point = best_of_n_curve(scores, gold, scores, ns=[4])[0]
    values = np.array([truth[int(np.argmax(group))] for group, truth in zip(scores, gold, strict=True)])
    assert point.model == pytest.approx(values.mean())
    assert point.model_high - point.model_low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(200), rel=0.15)
