"""The benchmark's arithmetic by hand, its texts, its files, and one small run with real processes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks import models, run
from benchmarks.breakdown import by_kind
from benchmarks.harness.command import app_of
from benchmarks.harness.groups import Group, sample
from benchmarks.harness.rates import Spread, gemm_share, largest_difference, ratios, reward_rate
from benchmarks.harness.texts import load_texts
from benchmarks.harness.worker_process import ContenderError, ContenderProcess
from benchmarks.harness.workloads import LONG_PROMPT, LONG_RESPONSE, WORKLOADS, Portions
from benchmarks.models import build
from benchmarks.throughput import report
from benchmarks.throughput.contenders import COMPILED, DETERMINISTIC, OURS, OVER_HTTP, SORTED, VLLM
from benchmarks.throughput.results import Measurement, Results
from benchmarks.throughput.scorers.hugging_face import HuggingFace
from benchmarks.throughput.scorers.in_process import InProcess
from benchmarks.throughput.studies import shared_prefix
from benchmarks.throughput.targets import Finding, findings
from benchmarks.training import quality, speed
from marginrm_training.ablation.plan import load_ablation

NOWHERE = Path("/no/such/folder")
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "ablation_recipe.toml"

MEASURED = Measurement(
    model="qwen3-0.6b",
    workload="pairs",
    contender=OURS,
    round=0,
    seconds=2.0,
    rewards=8,
    tokens=400,
    portion_rewards=8,
    portion_tokens=400,
    computed=300,
    peak_rss=3 * 2**20,
    loaded_rss=2**20,
    others=0.0,
    gemm_rate=6e6,
)


@pytest.fixture(scope="module")
def texts():
    return load_texts(NOWHERE)


@pytest.fixture(scope="module")
def tiny(texts, tmp_path_factory):
    return build("tiny", tmp_path_factory.mktemp("models"), texts.passages[:300])


@pytest.fixture(scope="module")
def portions(tiny, texts):
    return Portions(tiny, texts)


def group(*lengths: int) -> Group:
    return Group("p", tuple(map(str, lengths)), tuple((7,) * length for length in lengths), (None,) * len(lengths))


def test_a_rate_of_the_whole_is_rewards_per_second():
    assert reward_rate(seconds=2.0, tokens=400, portion_tokens=400, portion_rewards=8) == 4.0


def test_a_rate_of_a_part_does_not_depend_on_its_lengths():
    # 100 tokens/s, and the portion has 50 tokens a reward: 2 rewards/s, whichever responses the part has.
    assert reward_rate(seconds=1.0, tokens=100, portion_tokens=400, portion_rewards=8) == 2.0
    assert reward_rate(seconds=3.0, tokens=300, portion_tokens=400, portion_rewards=8) == 2.0


def test_ratios_are_of_one_round():
    assert ratios({0: 4.0, 1: 9.0, 3: 1.0}, {0: 2.0, 1: 3.0, 2: 5.0}) == [2.0, 3.0]
    assert Spread.of([3.0, 1.0, 7.0]) == Spread(median=3.0, low=1.0, high=7.0, count=3)
    assert Spread.of([]) is None


def test_the_share_of_the_gemm_rate():
    # 2 FLOP x 1,000 weights x 300 tokens = 600,000 FLOP in 2 s, of 1,000,000 FLOP/s: 30%.
    assert gemm_share(1000, 300, 2.0, 1e6) == pytest.approx(0.3)


def test_time_is_told_by_kind_of_work():
    times = [("aten::addmm", 6.0), ("aten::_scaled_dot_product_flash_attention_for_cpu", 1.5), ("aten::silu", 1.0)]
    times.append(("aten::bmm", 0.5))  # attention by products
    shares = by_kind([*times, ("aten::index_select", 1.0)])
    assert list(shares.values()) == [0.2, 0.6, 0.1, 0.1]  # attention first


def test_rewards_are_compared_where_the_token_ids_are_the_same():
    assert largest_difference({(1,): 0.5, (2,): 1.0, (3,): 9.0}, {(1,): 0.75, (2,): 1.0}) == 0.25
    assert largest_difference({(1,): 0.5}, {}) is None


def test_a_shared_prefix():
    assert shared_prefix(((1, 2, 3), (1, 2, 4, 5), (1, 2, 3, 3))) == 2
    assert shared_prefix(((1, 2), (1, 2, 3))) == 2


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=6), st.integers(1, 40))
def test_a_sample_is_that_many_responses_in_their_order(lengths, limit):
    groups = [group(*some) for some in lengths]
    everything = [(g.prompt, r) for g in groups for r in g.responses]
    found = [(g.prompt, r) for g in sample(groups, limit) for r in g.responses]
    assert len(found) == min(limit, len(everything))
    remaining = iter(everything)
    assert all(response in remaining for response in found)


def test_a_sample_is_spread_over_the_groups():
    assert [g.responses for g in sample([group(1, 2), group(3, 4)], 2)] == [("1",), ("3",)]


def test_a_group_survives_its_way_to_the_worker():
    original = Group("p", ("a", "b"), ((1, 2), (3,)), ((0, 1), None))
    assert Group.from_json(json.loads(json.dumps(original.to_json()))) == original


@pytest.mark.parametrize("name", ["pairs", "bon-short", "bon-long", "n-1"])
def test_portions_share_no_text_and_are_the_same_each_time(name, portions, tiny, texts):
    workload = WORKLOADS[name]
    found = [portions.portion(workload, number) for number in (2, 0, 1)]
    assert [len(groups) for groups in found] == [workload.groups] * 3
    assert {len(g.responses) for groups in found for g in groups} == {workload.candidates}
    sequences = [ids for groups in found for g in groups for ids in g.ids]
    assert len(set(sequences)) == len(sequences)
    assert Portions(tiny, texts).portion(workload, 1) == found[2]


def test_long_texts_have_the_lengths_they_should(portions):
    framing = 16  # the chat template's own tokens, and those that differ where texts are joined
    for found in portions.portion(WORKLOADS["bon-long"], 0):
        assert {abs(len(ids) - LONG_PROMPT - LONG_RESPONSE) <= framing for ids in found.ids} == {True}
        assert abs(shared_prefix(found.ids) - LONG_PROMPT) <= framing


def test_too_many_rounds_are_refused(portions):
    with pytest.raises(ValueError, match="the texts hold only"):
        portions.portion(WORKLOADS["bon-short"], 10_000)


def test_contenders_agree_on_the_rewards(tiny, portions):
    groups = portions.portion(WORKLOADS["n-4"], 0)
    expected = None
    for contender in (
        HuggingFace(tiny, dtype="float32", batch=1, order="arrival"),
        HuggingFace(tiny, dtype="float32", batch=3, order="length"),
        InProcess(tiny, dtype="float32"),
    ):
        rewards = contender.score(contender.prepare(groups))
        expected = expected or rewards
        assert len(set(rewards)) == len(rewards)
        assert rewards == pytest.approx(expected, abs=1e-4)
    lengths = [len(ids) for g in groups for ids in g.ids]
    assert max(lengths) < contender.computed < sum(lengths)


def test_ours_refuses_other_token_ids_than_the_others_get(tiny, portions):
    (first, *_) = portions.portion(WORKLOADS["pairs"], 0)
    with pytest.raises(ValueError, match="other token ids"):
        InProcess(tiny, dtype="float32").prepare([replace(first, ids=first.ids[::-1])])


def test_a_contender_that_cannot_be_loaded_says_why():
    with (
        ContenderProcess("throughput.scorers.vllm_pooling", Path(sys.executable), {}) as process,
        pytest.raises(ContenderError, match=r"No module named 'vllm'"),
    ):
        process.load(NOWHERE, {})


def test_results_are_continued_from_their_file(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    first = Results(path)
    first.add([MEASURED, replace(MEASURED, contender=SORTED)])
    first.add_detail("qwen3-0.6b", OURS, {"linear_parameters": 10})
    first.add_study("memory", "qwen3-0.6b", {"growth": 1.0})
    again = Results(path)
    assert (again.measurements, again.details, again.studies) == (first.measurements, first.details, first.studies)
    assert again.finished("qwen3-0.6b", "pairs", 0, [OURS, SORTED])
    assert not again.finished("qwen3-0.6b", "pairs", 0, [OURS, VLLM])
    assert not again.finished("qwen3-0.6b", "pairs", 1, [OURS])


def test_targets_are_told_from_the_measurements(tmp_path):
    results = Results(tmp_path / "lines.jsonl")
    results.add_study("http", "tiny", {"added_ms": 3.5, "throughput": 0.99})
    results.add([replace(MEASURED, contender=VLLM, round=n, seconds=s) for n, s in enumerate((3.0, 5.0, 4.2))])
    results.add([replace(MEASURED, round=n) for n in range(3)])
    found = {finding.text: finding for finding in findings(results)}
    pairs = found[f"pairs, qwen3-0.6b: times {VLLM}"]
    assert pairs.found is not None
    assert (pairs.found.low, pairs.found.median, pairs.found.high) == pytest.approx((1.5, 2.1, 2.5))
    assert pairs.verdict == "reached"
    assert found["ms that HTTP adds to a lone request, p50"].verdict == "missed"
    assert found["throughput over HTTP / in process, 16 clients"].verdict == "reached"
    assert Finding("never", 1.0, None).verdict == "not measured"


def test_the_tables_hold_what_was_measured(tmp_path):
    results = Results(tmp_path / "lines.jsonl")
    results.add_detail("qwen3-0.6b", OURS, {"linear_parameters": 1000})
    results.add([MEASURED, replace(MEASURED, contender=SORTED, seconds=4.0, gemm_rate=None, difference=0.02)])
    results.add_detail("qwen3-0.6b", VLLM, {"error": "no such module"})
    lines = report.markdown(results, "some texts").splitlines()
    ours = next(line for line in lines if line.startswith(f"| {OURS} "))
    padded = next(line for line in lines if line.startswith(f"| {SORTED} "))
    # 8 rewards in 2 s; 400 tokens asked, 300 computed; 2 x 1,000 x 300 / 2 s / 6e6 = 5%; 2 MiB over the loaded model.
    assert [cell.strip() for cell in ours.split("|")[2:8]] == ["4 (4 to 4)", "200", "0.75", "5%", "2", ""]
    assert padded.split("|")[-2].strip() == "2.00x (2.00 to 2.00)"
    assert f"- {VLLM} could not take part with qwen3-0.6b." in lines


def test_a_page_gets_its_results_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_between_markers(page, "new")
    report.write_between_markers(page, "newer")
    assert page.read_text() == f"before\n{report.BEGIN}\n\nnewer\n\n{report.END}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="lacks the line"):
        report.write_between_markers(page, "new")


def test_the_page_in_the_documentation_has_the_markers():
    text = ROOT.joinpath("docs", "benchmarks.md").read_text(encoding="utf-8")
    assert text.index(report.BEGIN) < text.index(report.END)


def test_a_small_run_and_its_continuation(tmp_path):
    def go(rounds: int) -> list[Measurement]:
        run.main(
            models="tiny",
            workloads="pairs",
            studies="",
            rounds=rounds,
            minutes=5,
            threads=1,
            device="cpu",
            data=NOWHERE,
            vllm_python=None,
            infinity_python=None,
            st_python=None,
            only=OURS,
            without="",
            output=tmp_path,
            page=None,
        )
        return Results(tmp_path / "measurements.jsonl").measurements

    first = go(1)
    assert {m.contender for m in first} == {OURS, COMPILED, DETERMINISTIC, OVER_HTTP}
    for measurement in first:
        assert measurement.rewards == measurement.portion_rewards == 64
        assert 0 < measurement.computed < measurement.tokens
        assert measurement.peak_rss >= measurement.loaded_rss > 0
    assert go(1) == first
    assert {path.name for path in tmp_path.iterdir()} >= {"report.md", "summary.json", "rewards_per_second.svg"}
    cell = json.loads((tmp_path / "summary.json").read_text())["cells"][0]
    assert cell["rewards_per_second"]["median"] == pytest.approx(first[0].rate)


def test_a_small_run_of_training_without_a_peer(tmp_path, capsys):
    speed.main(
        trl_python=None,
        presets="margin",
        models="tiny",
        dtypes="float32",
        rounds=1,
        steps=2,
        batch=8,
        data=NOWHERE,
        output=tmp_path,
    )
    short, long = json.loads((tmp_path / "results.json").read_text())
    for result in (short, long):
        assert set(result["pairs_per_second"]) == {"marginrm bt, float32", "marginrm margin, float32"}
        assert result["reference"] == "marginrm bt, float32"
        assert result["rounds"] == 1
    assert long["tokens"]["marginrm bt, float32"] < 0.8  # two thirds of each are a prompt that is computed once
    table = capsys.readouterr().out
    rate = short["pairs_per_second"]["marginrm bt, float32"]["median"]
    more = (short["loss_seconds"]["margin"] - short["loss_seconds"]["bt"]) / (8 / rate)
    assert f"The loss alone, of a `bt` step's {8 / rate:.2f} s: `bt` " in table
    assert f"({more:+.4%} of the step)." in table


def test_a_peer_is_compared_with_the_runs_of_the_same_seeds(monkeypatch):
    monkeypatch.chdir(ROOT)
    ablation = load_ablation(RECIPE)
    kept = ROOT / "docs" / "results"
    heads, _, peer, first, *_ = quality.table(ablation, kept / "trl_alpaca", 256).splitlines()
    assert heads.count("difference to TRL") == 5  # accuracy and loss of two files of pairs, and the pick
    assert peer.startswith("| TRL, 256 tokens | 3 | ")

    ours, theirs = (
        np.stack([np.load(folder / "arrays.npz")["alpaca test pairs"] for folder in sorted(folders)])
        for folders in ((kept / "ablation_recipe").glob("bt-seed*"), (kept / "trl_alpaca").glob("tokens256-*"))
    )
    right, wrong = (ours > 0).mean(), (theirs > 0).mean()
    assert first.startswith(f"| bt | 3 | {right:.3f} ")
    assert f" | {right - wrong:+.3f} [" in first
    loss, other = (np.log1p(np.exp(-d)).mean() for d in (ours, theirs))
    assert f" | {loss:.3f} ± " in first
    assert f" | {loss - other:+.3f} [" in first


def test_a_seed_that_the_ablation_has_not_is_refused_in_one_line_however_long_the_path(tmp_path):
    ablation = tmp_path / ("a long name " * 15) / RECIPE.name
    ablation.parent.mkdir()
    ablation.write_text(RECIPE.read_text())
    result = CliRunner().invoke(app_of(quality.main), [str(ablation), "--seeds", "0,99"])
    assert result.exit_code == 2
    assert f"{ablation} has no seed 99: it has 0, 1, 2." in result.output


def test_a_model_can_be_written_from_the_command_line(tmp_path):
    result = CliRunner().invoke(app_of(models.main), ["tiny", "--folder", str(tmp_path)], catch_exceptions=False)
    assert result.output.strip().endswith("tiny")
    assert (tmp_path / "tiny" / "model.safetensors").is_file()
    assert CliRunner().invoke(app_of(models.main), ["huge"]).exit_code == 2
