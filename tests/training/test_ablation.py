"""`marginrm ablate`: the plan, label noise, and ablations of a tiny model that continue where they were ended."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from marginrm.calibration import correctness
from marginrm.cli.main import app
from marginrm.errors import ConfigError, DataError
from marginrm_training.ablation import worker
from marginrm_training.ablation.plan import load_ablation, plan
from marginrm_training.ablation.results import finished, keep_result, read_results
from marginrm_training.ablation.runner import run_all, run_folder, write_spec
from marginrm_training.ablation.worker import measure_pairs
from marginrm_training.evaluation.bootstrap import seeds_estimate
from support.models import tiny_checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "runs"),
    [("alpaca", 15), ("recipe", 15), ("pythia", 15), ("threshold", 18), ("recovery", 72), ("later", 15)],
)
def test_the_examples_are_valid_and_find_all_results_that_are_kept(name, runs):
    ablation = load_ablation(EXAMPLES / f"ablation_{name}.toml")
    kept = EXAMPLES.parent / ablation.results_file
    found = plan(ablation)
    assert {run.label for run in found} >= {row["run"] for row in read_results(kept)} != set()
    assert len(finished(kept, found)) == len(read_results(kept))
    assert len(found) == runs
    assert len({run.digest for run in found}) == runs
    assert len({run.label for run in found}) == runs


def test_the_interval_resamples_items_and_seeds():
    assert seeds_estimate(np.ones((3, 50))) == (1.0, 1.0, 1.0)
    assert seeds_estimate(np.array([[0.0] * 20, [1.0] * 20])) == (0.5, 0.0, 1.0)  # the seeds alone make this one
    _, low, high = seeds_estimate(np.tile([0.0, 1.0], (1, 50)))
    assert 0.38 < low < 0.43  # 0.5 - 1.96 * 0.5 / sqrt(100) = 0.402
    assert 0.57 < high < 0.62
    assert correctness(np.array([2.0, 0.0, -1.0])).tolist() == [1.0, 0.5, 0.0]


def test_a_wrong_setting_is_refused_before_a_run_starts(tmp_path):
    path = tmp_path / "a.toml"
    text = (EXAMPLES / "ablation_alpaca.toml").read_text()
    path.write_text(text.replace('"method.preset" = "paper"', '"method.presett" = "paper"'))
    with pytest.raises(ConfigError, match=r"variant paper.*presett"):
        plan(load_ablation(path))
    path.write_text(text.replace('baseline = "bt"', 'baseline = "no"'))
    with pytest.raises(ConfigError, match=r"is not a variant\. Choose one of: bt, margin_unfiltered"):
        load_ablation(path)


@pytest.fixture
def small(tmp_path):
    tiny_checkpoint(tmp_path / "base", "gpt_neox")
    rows = [
        {
            "prompt": f"Question {i // 2}?",
            "chosen": f"Yes, {i}.",
            "rejected": f"No {i}",
            "strength": 0.6 + 0.3 * (i % 2),
        }
        for i in range(64)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups = [
        {"prompt": f"Q{i}", "candidates": [{"text": "Yes.", "win_prob": 0.9}, {"text": "No", "win_prob": 0.1}]}
        for i in range(4)
    ]
    (tmp_path / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in groups))
    config = tmp_path / "ablation.toml"
    config.write_text(f"""
output = "{tmp_path}/out"
baseline = "bt"
seeds = [0]
variants.bt = {{ "method.preset" = "bt" }}
variants.margin = {{ "method.preset" = "margin" }}
axes.flip = [0.25]
[base]
log_every = 1
model.path = "{tmp_path}/base"
data.train = "{tmp_path}/pairs.jsonl"
optim = {{ learning_rate = 1e-2, pairs_per_step = 16, train_batch = 16 }}
[[evaluations]]
name = "test pairs"
path = "{tmp_path}/pairs.jsonl"
[[evaluations]]
name = "best of 2"
kind = "best_of_n"
path = "{tmp_path}/groups.jsonl"
""")
    return config


def test_an_ablation_measures_compares_and_keeps_finished_runs(small, tmp_path):
    ablation = load_ablation(small)
    output = tmp_path / "out"
    assert run_all(ablation, limit_minutes=0) == []
    assert (output / "results.jsonl").read_text() == ""

    result = CliRunner().invoke(app, ["ablate", str(small), "--jobs", "2"], catch_exceptions=False)
    assert result.exit_code == 0
    results = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert [row["variant"] for row in results] == ["bt", "margin"]
    assert all(row["evaluations"]["test pairs"]["pairs"] == 64 for row in results)
    assert all(row["evaluations"]["best of 2"]["oracle"] == 0.9 for row in results)
    assert results[0]["train"]["fire_rate"] == 0
    assert results[1]["train"]["fire_rate"] > 0
    table = (output / "table.md").read_text()
    for part in ("2 of 2 runs", "| margin | 0.25 |", "## best of 2", "accuracy by strength"):
        assert part in table
    page = (output / "report.html").read_text()
    assert all(f"<h2>{heading}</h2>" in page for heading in ("Training", "test pairs", "best of 2"))
    assert page.count("<svg") == 5  # differences; training; accuracy and margins of the pairs; quality of the picks
    assert "2 of 2 runs" in page
    assert not list(output.rglob("model.safetensors"))

    before = {path: path.stat().st_mtime_ns for path in output.rglob("result.json")}
    assert run_all(ablation) == []
    assert {path: path.stat().st_mtime_ns for path in output.rglob("result.json")} == before
    assert len(finished(ablation.results_file, plan(ablation))) == 2


def test_an_ablation_continues_from_its_results_file_alone(small, tmp_path):
    small.write_text(f'results = "{tmp_path}/kept"\n' + small.read_text())
    ablation = load_ablation(small)
    assert run_all(ablation, jobs=2) == []
    table = (tmp_path / "out" / "table.md").read_text()
    assert {path.name for path in (tmp_path / "kept").rglob("*") if path.is_file()} == {
        "results.jsonl.gz",
        "differences.svg",
    }

    shutil.rmtree(tmp_path / "out")  # as on another machine
    assert run_all(ablation) == []
    assert (tmp_path / "out" / "table.md").read_text() == table
    assert not (tmp_path / "out" / "runs").exists()


def test_a_run_that_outlived_the_command_is_collected(small, tmp_path):
    ablation = load_ablation(small)
    runs = plan(ablation)
    for run in runs:
        write_spec(ablation, run, run_folder(ablation, run))
    worker.main(run_folder(ablation, runs[0]))
    assert run_all(ablation, limit_minutes=0) == []
    (row,) = read_results(ablation.results_file)
    assert row["run"] == runs[0].label
    assert "1 of 2 runs" in (tmp_path / "out" / "table.md").read_text()


def test_results_files_hold_every_float_and_the_rows_of_other_ablations(small, tmp_path):
    path = tmp_path / "kept" / "results.jsonl.gz"
    margins = [1 / 3, -(2.0**-40), 0.0, 123456.789]
    keep_result(path, {"digest": "other", "arrays": {"pairs": margins}})
    keep_result(path, {"digest": "mine", "arrays": {}, "seed": 0})
    keep_result(path, {"digest": "mine", "arrays": {}, "seed": 1})
    assert [row["digest"] for row in read_results(path)] == ["other", "mine"]
    assert read_results(path)[0]["arrays"]["pairs"] == margins
    assert read_results(path)[1]["seed"] == 1
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"results\.jsonl\.gz: cannot be read"):
        read_results(path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_is_measured_in_the_dtype_it_was_trained_in(small, tmp_path, monkeypatch, dtype):
    small.write_text(small.read_text().replace("model.path", f'model.dtype = "{dtype}"\nmodel.path'))
    ablation = load_ablation(small)
    folder = tmp_path / "run"
    write_spec(ablation, plan(ablation)[0], folder)
    measured = []

    def watched(model, *arguments, **options):
        measured.append(model.info.dtype)
        return measure_pairs(model, *arguments, **options)

    monkeypatch.setattr(worker, "measure_pairs", watched)
    worker.main(folder)
    assert measured == [dtype]


def test_a_terminated_command_ends_its_runs(small):
    code = "from marginrm.cli.main import main; main()"
    with subprocess.Popen([sys.executable, "-c", code, "ablate", str(small), "--jobs", "2"]) as command:
        tree = psutil.Process(command.pid)
        while len(runs := tree.children()) < 2:
            assert command.poll() is None
            time.sleep(0.1)
        command.terminate()
        assert command.wait() == 128 + signal.SIGTERM
    assert not any(run.is_running() for run in runs)


def test_a_failed_run_is_named_with_its_log(small, tmp_path):
    small.write_text(small.read_text().replace("groups.jsonl", "missing.jsonl"))
    runner = CliRunner()
    result = runner.invoke(app, ["ablate", str(small), "--jobs", "2"])
    assert "2 runs failed" in str(result.exception)
    assert result.output.count("failed; why: ") == 2
    assert "0/2" in result.output.splitlines()[-1]
    logs = list((tmp_path / "out").rglob("log"))
    assert len(logs) == 2
    assert all("missing.jsonl" in log.read_text() for log in logs)
