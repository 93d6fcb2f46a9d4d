"""Training beside TRL: a small run with real processes, and the comparison of the kept results."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from benchmarks.harness.command import app_of
from benchmarks.training import code_pairs, quality, speed
from marginrm_training.ablation.plan import load_ablation
from marginrm_training.ablation.results import read_results

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "ablation_recipe.toml"


def test_a_small_training_run_without_a_peer(tmp_path, capsys):
    speed.main(
        trl_python=None,
        presets="margin",
        models="tiny",
        dtypes="float32",
        rounds=1,
        steps=2,
        batch=8,
        data=None,
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
    heads, _, peer, first, *_ = quality.table(ablation, kept / "trl_alpaca" / "results.jsonl.gz", 256).splitlines()
    assert heads.count("difference to TRL") == 5  # accuracy and loss of two files of pairs, and the pick
    assert peer.startswith("| TRL, 256 tokens | 3 | ")

    ours, theirs = (
        np.array(
            [row["arrays"]["alpaca test pairs"] for row in read_results(kept / name / "results.jsonl.gz") if keep(row)]
        )
        for name, keep in (("ablation_recipe", lambda row: row["variant"] == "bt"), ("trl_alpaca", lambda _: True))
    )
    right, wrong = (ours > 0).mean(), (theirs > 0).mean()
    assert first.startswith(f"| bt | 3 | {right:.3f} ")
    assert f" | {right - wrong:+.3f} [" in first
    loss, other = (np.log1p(np.exp(-d)).mean() for d in (ours, theirs))
    assert f" | {loss:.3f} ± " in first
    assert f" | {loss - other:+.3f} [" in first


def test_an_unknown_seed_is_refused_in_one_line_with_a_long_path(tmp_path):
    ablation = tmp_path / ("a long name " * 15) / RECIPE.name
    ablation.parent.mkdir()
    ablation.write_text(RECIPE.read_text())
    result = CliRunner().invoke(app_of(quality.main), [str(ablation), "--seeds", "0,99"])
    assert result.exit_code == 2
    assert f"{ablation} has no seed 99: it has 0, 1, 2." in result.output


def test_code_pairs_hold_a_function_and_the_same_with_a_fault(tmp_path, monkeypatch):
    file = tmp_path / "code.jsonl"
    monkeypatch.setattr("sys.argv", ["code_pairs", str(file), "--pairs", "40"])
    code_pairs.main()
    pairs = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(pairs) == 40
    for pair in pairs:
        sources = [pair[side].removeprefix("```python\n").removesuffix("\n```") for side in ("chosen", "rejected")]
        chosen, rejected = (ast.parse(source).body[0] for source in sources)
        assert ast.dump(chosen) != ast.dump(rejected)
        assert pair["prompt"].startswith(f"Write the Python function `{chosen.name}(")
