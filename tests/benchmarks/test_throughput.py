"""The comparison: its arithmetic by hand, its files and tables, its contenders, and a small run with real processes."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.breakdown import by_kind
from benchmarks.harness.rates import Spread, gemm_share, largest_difference, ratios, reward_rate
from benchmarks.harness.worker_process import WorkerError, WorkerProcess
from benchmarks.harness.workloads import WORKLOADS
from benchmarks.throughput import report
from benchmarks.throughput.contenders import COMPILED, DETERMINISTIC, OURS, OVER_HTTP, REFERENCE, SORTED, VLLM
from benchmarks.throughput.results import Measurement, Results
from benchmarks.throughput.scorers.classify_client import send_all
from benchmarks.throughput.scorers.hugging_face import HuggingFace
from benchmarks.throughput.scorers.in_process import InProcess
from benchmarks.throughput.targets import Finding, cpu_findings

ROOT = Path(__file__).parents[2]
MEASURED = Measurement(
    model="qwen3-0.6b",
    workload="pairs",
    contender=OURS,
    round=0,
    seconds=2.0,
    rewards=8,
    tokens=400,
    sample_rewards=8,
    sample_tokens=400,
    computed=300,
    peak_memory=3 * 2**20,
    loaded_memory=2**20,
    others=0.0,
    gemm_rate=6e6,
)


def test_the_rate_of_a_whole_sample_is_rewards_per_second():
    assert reward_rate(seconds=2.0, tokens=400, sample_tokens=400, sample_rewards=8) == 4.0


def test_the_rate_of_a_subset_does_not_depend_on_its_lengths():
    # 100 tokens/s, and the sample has 50 tokens a reward: 2 rewards/s for any subset.
    assert reward_rate(seconds=1.0, tokens=100, sample_tokens=400, sample_rewards=8) == 2.0
    assert reward_rate(seconds=3.0, tokens=300, sample_tokens=400, sample_rewards=8) == 2.0


def test_ratios_are_taken_within_a_round():
    assert ratios({0: 4.0, 1: 9.0, 3: 1.0}, {0: 2.0, 1: 3.0, 2: 5.0}) == [2.0, 3.0]
    assert Spread.of([3.0, 1.0, 7.0]) == Spread(median=3.0, low=1.0, high=7.0, count=3)
    assert Spread.of([]) is None
    assert Spread(2.0, 1.0, 3.5, 3).text(".2f", "x") == "2.00x (1.00 to 3.50)"


def test_the_share_of_the_gemm_rate():
    # 2 FLOP x 1,000 weights x 300 tokens = 600,000 FLOP in 2 s, of 1,000,000 FLOP/s: 30%.
    assert gemm_share(1000, 300, 2.0, 1e6) == pytest.approx(0.3)


def test_time_is_divided_by_kind_of_operator():
    times = [("aten::addmm", 6.0), ("aten::_scaled_dot_product_flash_attention_for_cpu", 1.5), ("aten::silu", 1.0)]
    times.append(("aten::bmm", 0.5))  # attention by batched products
    shares = by_kind([*times, ("aten::index_select", 1.0)])
    assert list(shares.values()) == [0.2, 0.6, 0.1, 0.1]  # attention first


def test_rewards_of_equal_token_ids_are_compared():
    assert largest_difference({(1,): 0.5, (2,): 1.0, (3,): 9.0}, {(1,): 0.75, (2,): 1.0}) == 0.25
    assert largest_difference({(1,): 0.5}, {}) is None


def test_contenders_agree_on_the_rewards(tiny, samples):
    sample = samples.sample(WORKLOADS["n-4"], 0)
    expected = None
    for contender in (
        HuggingFace(tiny, dtype="float32", batch=1, order="arrival"),
        HuggingFace(tiny, dtype="float32", batch=3, order="length"),
        InProcess(tiny, dtype="float32"),
    ):
        rewards = contender.run(contender.prepare(sample))
        expected = expected or rewards
        assert len(set(rewards)) == len(rewards)
        assert rewards == pytest.approx(expected, abs=1e-4)
    lengths = list(map(len, sample.ids))
    assert max(lengths) < contender.computed < sum(lengths)


def test_other_token_ids_than_the_peers_receive_are_refused(tiny, samples):
    sample = samples.sample(WORKLOADS["pairs"], 0).subset(1)
    (only,) = sample.groups
    with pytest.raises(ValueError, match="other token ids"):
        InProcess(tiny, dtype="float32").prepare(replace(sample, groups=(replace(only, ids=(only.ids[0][::-1],)),)))


def test_the_error_of_a_contender_that_cannot_be_loaded_reaches_the_parent():
    with (
        WorkerProcess("throughput.scorers.vllm_offline", Path(sys.executable), {}) as process,
        pytest.raises(WorkerError, match=r"No module named 'vllm'"),
    ):
        process.load(Path("/no/such/folder"), {})


def test_requests_of_a_sequence_wait_for_each_other_and_sequences_run_side_by_side():
    active, most, order = 0, 0, []

    async def send(request: str) -> str:
        nonlocal active, most
        active += 1
        most = max(most, active)
        await asyncio.sleep(0.01)
        active -= 1
        order.append(request)
        return request.upper()

    sequences = [["a1", "a2"], ["b1", "b2"], ["c1"]]
    assert asyncio.run(send_all(sequences, send, clients=2)) == ["A1", "A2", "B1", "B2", "C1"]
    assert most == 2
    assert order.index("a1") < order.index("a2")


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


def test_targets_are_checked_against_the_measurements(tmp_path):
    results = Results(tmp_path / "lines.jsonl")
    results.add_study("http", "tiny", {"added_ms": 3.5, "throughput": 0.99})
    results.add([replace(MEASURED, contender=VLLM, round=n, seconds=s) for n, s in enumerate((3.0, 5.0, 4.2))])
    results.add([replace(MEASURED, contender=OVER_HTTP, round=n) for n in range(3)])
    found = {finding.text: finding for finding in cpu_findings(results)}
    pairs = found[f"pairs, qwen3-0.6b: {OVER_HTTP}, times {VLLM}"]
    assert pairs.found is not None
    assert (pairs.found.low, pairs.found.median, pairs.found.high) == pytest.approx((1.5, 2.1, 2.5))
    assert pairs.verdict == "reached"
    assert found["ms that HTTP adds to a lone request, p50"].verdict == "missed"
    assert found["throughput over HTTP / in process, 16 clients"].verdict == "reached"
    assert Finding("never", 1.0, None).verdict == "not measured"


def test_the_tables_hold_the_measurements(tmp_path):
    results = Results(tmp_path / "lines.jsonl")
    results.add_detail("qwen3-0.6b", OURS, {"linear_parameters": 1000})
    results.add([MEASURED, replace(MEASURED, contender=SORTED, seconds=4.0, gemm_rate=None, difference=0.02)])
    results.add_detail("qwen3-0.6b", VLLM, {"error": "no such module"})
    lines = report.markdown(results, cpu_findings(results), "some texts").splitlines()
    ours = next(line for line in lines if line.startswith(f"| {OURS} "))
    padded = next(line for line in lines if line.startswith(f"| {SORTED} "))
    # 8 rewards in 2 s; 400 tokens requested, 300 computed; 2 x 1,000 x 300 / 2 s / 6e6 = 5%; 2 MiB over the loaded model.
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
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert text.index(report.BEGIN) < text.index(report.END)


def small_run(output: Path, *, workloads: str, only: str, rounds: int) -> list[Measurement]:
    run.main(
        models="tiny",
        workloads=workloads,
        studies="",
        rounds=rounds,
        minutes=5,
        threads=1,
        device="cpu",
        data=None,
        vllm_python=None,
        infinity_python=None,
        st_python=None,
        only=only,
        without="",
        output=output,
        page=None,
    )
    return Results(output / "measurements.jsonl").measurements


def test_a_small_run_and_its_continuation(tmp_path):
    first = small_run(tmp_path, workloads="pairs", only=OURS, rounds=1)
    assert {m.contender for m in first} == {OURS, COMPILED, DETERMINISTIC, OVER_HTTP}
    for measurement in first:
        assert measurement.rewards == measurement.sample_rewards == 64
        assert 0 < measurement.computed < measurement.tokens
        assert measurement.peak_memory >= measurement.loaded_memory > 0
    assert small_run(tmp_path, workloads="pairs", only=OURS, rounds=1) == first
    assert {path.name for path in tmp_path.iterdir()} >= {"report.md", "summary.json", "rewards_per_second.svg"}
    cell = json.loads((tmp_path / "summary.json").read_text())["cells"][0]
    assert cell["rewards_per_second"]["median"] == pytest.approx(first[0].rate)


def test_a_small_run_of_single_requests(tmp_path):
    found = small_run(tmp_path, workloads="trainer,chat", only=f"{REFERENCE},{OVER_HTTP}", rounds=1)
    assert {(m.workload, m.contender) for m in found} == {
        (workload, contender) for workload in ("trainer", "chat") for contender in (REFERENCE, OVER_HTTP)
    }
    served = {m.workload: m for m in found if m.contender == OVER_HTTP}
    assert (served["trainer"].rewards, served["chat"].rewards) == (128, 32)
    # The same token ids reach the model, and the server computes in bfloat16 or float32.
    assert all(m.difference < 0.1 * m.deviation for m in served.values())
    assert all(0 < m.computed <= m.tokens for m in served.values())
