"""The GPU benchmark, rehearsed on the CPU with tiny models and real processes."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from benchmarks import gpu
from benchmarks.harness.command import app_of
from benchmarks.throughput.contenders import ARRIVAL, ENGINE, OURS, REFERENCE, SORTED
from benchmarks.throughput.results import Results
from benchmarks.throughput.targets import TRAINING, gpu_findings

ARGUMENTS = ["--device", "cpu", "--models", "tiny", "--trained", "tiny", "--workloads", "pairs,trainer"]
ARGUMENTS += ["--rounds", "1", "--scale", "1"]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    output = tmp_path_factory.mktemp("gpu")
    arguments = [*ARGUMENTS, "--output", str(output)]
    first = CliRunner().invoke(app_of(gpu.main), arguments, catch_exceptions=False)
    lines = (output / "cpu" / "measurements.jsonl").read_text()
    again = CliRunner().invoke(app_of(gpu.main), arguments, catch_exceptions=False)
    assert (output / "cpu" / "measurements.jsonl").read_text() == lines  # nothing is measured twice
    assert first.stdout.splitlines()[-1] == again.stdout.splitlines()[-1]
    return output / "cpu"


def test_every_contender_scores_its_workloads(rehearsal):
    found = Results(rehearsal / "measurements.jsonl").measurements
    assert {(m.workload, m.contender) for m in found} == {
        *(("pairs", name) for name in (REFERENCE, f"{OURS}, float32", f"{OURS}, bfloat16", ARRIVAL, SORTED, OURS)),
        *(("trainer", name) for name in (ARRIVAL, SORTED, ENGINE)),
    }
    differences = {m.contender: m.difference for m in found if m.difference is not None}
    assert differences[f"{OURS}, float32"] < 1e-5
    assert differences[f"{OURS}, bfloat16"] < 0.02


def test_the_report_has_targets_tables_and_training(rehearsal):
    results = Results(rehearsal / "measurements.jsonl")
    training = results.studies[TRAINING, "tiny"]
    assert set(training["pairs_per_second"]) >= {"marginrm bt, bfloat16"}
    text = (rehearsal / "report.md").read_text()
    assert "\nTargets that were not measured in this run:\n\n- " in text
    assert "- bon-short, llama-3-8b: share of the GEMM rate (0.6)" in text
    assert "**tiny, trainer**" in text
    assert "marginrm, engine is |" in text
    assert "**tiny, short prompts**" in text
    detail = results.details["tiny", OURS]
    assert detail["attention"] in {"gathered", "matmul", "amx", "flex"}
    assert detail["path"]
    assert not [name for name, _ in results.studies if name == "error"]


def test_targets_of_training_are_ratios_to_trl(tmp_path):
    results = Results(tmp_path / "lines.jsonl")
    spread = {"median": 1.7, "low": 1.6, "high": 1.8, "count": 3}
    ratios = {"marginrm bt, bfloat16": spread, "TRL, bfloat16": spread | {"median": 1.0}}
    results.add_study(TRAINING, "smollm2-135m", {"ratios": ratios})
    results.add_study(TRAINING, "minilm-shape", {"ratios": {"marginrm bt, bfloat16": spread}})  # without TRL
    found = {finding.text: finding for finding in gpu_findings(results)}
    assert found["training, smollm2-135m: times TRL"].verdict == "reached"
    assert found["training, minilm-shape: times TRL"].verdict == "not measured"


def test_a_failing_stage_is_kept_and_the_next_one_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)  # from there, `benchmarks.models` cannot be found
    result = CliRunner().invoke(
        app_of(gpu.main), [*ARGUMENTS, "--output", str(tmp_path / "out")], catch_exceptions=False
    )
    assert result.exit_code == 0
    errors = [
        name for kind, name in Results(tmp_path / "out" / "cpu" / "measurements.jsonl").studies if kind == "error"
    ]
    assert errors == ["parity, tiny", "scoring, tiny", "training, tiny"]
    assert json.loads((tmp_path / "out" / "cpu" / "summary.json").read_text())["targets"]
