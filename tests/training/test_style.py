"""Style control: features by hand, b against an independent optimiser, and runs that keep b and leave it out of rewards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from marginrm import RewardModel
from marginrm.calibration import fit_temperature
from marginrm.cli.main import build_app
from marginrm.encoding import EncodedResponse
from marginrm.loading import load_for_training
from marginrm.manifest import Manifest
from marginrm.texts.preferences import PreferencePair
from marginrm_training.config import load_config
from marginrm_training.data.splits import EncodedPair, load_splits
from marginrm_training.evaluation.style import by_style
from marginrm_training.method.style import (
    FEATURES,
    StyleTerm,
    fit_beside_style,
    newton_sums,
    split_sums,
    style_agreement,
    style_differences,
    style_of,
    style_scales,
)
from marginrm_training.report.plots import style_bars
from marginrm_training.run.train import train
from marginrm_training.run.trainer import MarginTrainer
from support.models import tiny_checkpoint
from support.training import config_file, rows, write

MARKDOWN = "# Title\n\n- **one**\n2. two\n   * three __four__\n\n## Part\nplain -5 * 3 #hash"


def test_features_by_hand() -> None:
    assert style_of("") == (0, 0, 0, 0)
    assert np.expm1(style_of(MARKDOWN)) == pytest.approx([len(MARKDOWN), 2, 3, 2])


def test_differences_change_sign_with_the_sides_and_are_scaled_without_centring() -> None:
    texts = [(MARKDOWN, "short"), ("a", "longer text"), ("x" * 50, "- item")]
    forth, back = style_differences(texts), style_differences([(second, first) for first, second in texts])
    assert np.array_equal(forth, -back)
    assert np.array_equal(style_scales(forth), style_scales(back))
    assert style_scales(np.zeros((3, 4))).tolist() == [1, 1, 1, 1]
    assert np.mean((forth / style_scales(forth)) ** 2, axis=0) == pytest.approx([1, 1, 1, 1])


def test_style_decides_where_length_and_markdown_agree() -> None:
    texts = [("- a\n- long", "b"), ("b", "- a\n- long"), ("long plain text", "- b"), ("longer", "b"), ("same", "size")]
    assert style_agreement(style_differences(texts)).tolist() == [1, -1, 0, 0, 0]
    assert style_agreement(style_differences([("# a", "- b...")])).tolist() == [0]  # as much markdown on both sides


def simulated(pairs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Content margins and standardised style differences, with signs by a Bradley-Terry judge of d / 0.5 + 1.5 * first."""
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(pairs, generator=generator, dtype=torch.float64)
    x = torch.randn(pairs, len(FEATURES), generator=generator, dtype=torch.float64)
    x = x / x.square().mean(dim=0).sqrt()
    flip = torch.where(torch.rand(pairs, generator=generator) < torch.sigmoid(d / 0.5 + 1.5 * x[:, 0]), 1.0, -1.0)
    return d * flip, x * flip[:, None]


def optimum(d: torch.Tensor, x: torch.Tensor, *, scaled: bool) -> torch.Tensor:
    """Maximum a posteriori (1/T, b) by PyTorch's L-BFGS; with `scaled` false, 1/T is 1."""
    w = torch.zeros(1 + x.shape[1], dtype=torch.float64)
    w[0] = 1
    w.requires_grad_()
    search = torch.optim.LBFGS(
        [w], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        search.zero_grad()
        slope = w[0] if scaled else 1.0
        value = torch.nn.functional.softplus(-(d * slope + x @ w[1:])).sum() + w[1:].square().sum() / 2
        value.backward()
        return value

    search.step(loss)
    return w.detach()


def test_recursive_steps_reach_the_optimum_of_a_fixed_model() -> None:
    d, x = simulated(4000)
    term = StyleTerm(np.ones(len(FEATURES)))
    for part in torch.arange(len(d)).split(16):
        margin = d[part] + term.logits(x[part]).double()
        slopes = torch.sigmoid(margin) - 1
        term.update(*split_sums(newton_sums(margin, slopes, x[part]).tolist()))
    assert term.weights == pytest.approx(optimum(d, x, scaled=False)[1:].numpy(), abs=0.25)
    assert term.weights[0] > 0.8
    assert StyleTerm.from_state(json.loads(json.dumps(term.state()))).weights.tolist() == term.weights.tolist()


def test_a_feature_that_never_differs_keeps_weight_0() -> None:
    term = StyleTerm(np.ones(len(FEATURES)))
    x = torch.zeros(16, len(FEATURES))
    x[:, 0] = 1
    for _ in range(2000):
        margin = term.logits(x)
        term.update(*split_sums(newton_sums(margin, torch.sigmoid(margin) - 1, x).tolist()))
    assert np.isfinite(term.weights).all()
    assert term.weights[1:].tolist() == [0, 0, 0]


def test_the_temperature_beside_style_is_the_optimum_and_that_of_the_content() -> None:
    d, x = simulated(2000)
    fitted = fit_beside_style(d.numpy(), x.numpy())
    scaled = x / x.square().mean(dim=0).sqrt()
    expected = optimum(d, scaled, scaled=True)
    assert 1 / fitted.temperature == pytest.approx(float(expected[0]), rel=1e-4)
    assert list(fitted.weights.values()) == pytest.approx(expected[1:].tolist(), abs=1e-4)
    assert fitted.interval is not None
    assert fitted.interval[0] < 0.5 < fitted.interval[1]
    assert fit_temperature(d.numpy()) > fitted.interval[1]  # style counts as noise where it is left out


def test_the_temperature_stays_within_its_bounds() -> None:
    style = np.zeros((4, len(FEATURES)))
    assert fit_beside_style(np.zeros(4), style).temperature == 1
    always_right = fit_beside_style(np.array([1.0, 2.0, 3.0, 1.0]), style)
    assert always_right.temperature == pytest.approx(1 / 64)
    assert always_right.interval is None
    assert fit_beside_style(np.array([-1.0, -2.0]), style[:2]).temperature == pytest.approx(64)


def test_measures_by_style_agreement_by_hand() -> None:
    texts = [("- a\n- long", "b"), ("b", "- a\n- long"), ("b", "- a\n- long"), ("same", "size")]
    pairs = [
        EncodedPair(EncodedResponse((1,)), EncodedResponse((2,)), None, PreferencePair("p", chosen, rejected))
        for chosen, rejected in texts
    ]
    found = by_style(np.array([2.0, -2.0, 1.0, 0.0]), pairs, temperature=2.0)
    assert (found["accuracy_style_for"], found["accuracy_style_against"], found["style_gap"]) == (1.0, 0.5, 0.5)
    assert (found["pairs_style_for"], found["pairs_style_against"], found["pairs_style_neither"]) == (1, 2, 1)
    assert found["confidence_style_for"] == pytest.approx(1 / (1 + np.exp(-1)))
    drawing = style_bars(found)
    assert drawing is not None
    assert drawing.count("<circle") == 3
    assert style_bars({"accuracy_style_neither": 1.0}) is None


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # as in test_lora
@pytest.mark.parametrize(
    ("method", "model"),
    [
        ({"preset": "bt"}, {}),
        ({"preset": "margin", "label_smoothing": 0.1}, {"lora": {"rank": 4}}),
    ],
    ids=["bt", "margin with LoRA"],
)
def test_a_run_records_b_and_serves_rewards_without_it(tmp_path: Path, method: dict, model: dict) -> None:
    base = tiny_checkpoint(tmp_path / "base", "gpt_neox")
    raw = config_file(tmp_path, 64, method=method | {"style_control": True})
    overrides = [f"model.lora.rank={model['lora']['rank']}"] if model else []
    manifest = train(load_config(raw, overrides))
    assert manifest is not None
    assert manifest.method is not None
    assert manifest.calibration is not None
    style = manifest.method.options["style"]
    assert list(style["weights"]) == list(style["scales"]) == list(FEATURES)
    assert style["weights"]["log_length"] != 0
    assert manifest.calibration.style is not None
    curve = [json.loads(line) for line in (tmp_path / "run" / "learning_curve.jsonl").read_text().splitlines()]
    assert all("style_log_length" in entry for entry in curve)
    served = RewardModel.from_pretrained(tmp_path / "run", dtype="float32")
    served.verify_golden()
    # The classifier alone gives the golden rewards, so no part of them is style.
    sample = manifest.golden[0]
    with torch.no_grad():
        logits = served.module.classifier(input_ids=torch.tensor([sample.ids])).logits
    assert float(logits[0, 0]) == pytest.approx(sample.reward, abs=1e-4)
    assert base.is_dir()


def test_a_resumed_run_continues_with_its_b(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base", "gpt_neox")
    config = load_config(config_file(tmp_path, 96, method={"preset": "margin", "style_control": True}))
    finished = []
    for start in (None, tmp_path / "steps" / "checkpoint-8"):
        module, encoder = load_for_training(config.model.path, seed=0)
        splits = load_splits(config.data, encoder, config.method.method(), 0)
        trainer = MarginTrainer(module, splits.train.pairs, config, tmp_path / "steps", progress=False)
        trainer.train(resume_from_checkpoint=start and str(start))
        assert trainer.style is not None
        finished.append((trainer.style, module.state_dict()))
    (whole, weights), (resumed, again) = finished
    assert resumed.weights == pytest.approx(whole.weights, abs=1e-5)
    assert resumed.curvature == pytest.approx(whole.curvature, abs=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(again[name], weight, atol=1e-5, rtol=0)


def test_calibrate_fits_the_temperature_beside_style(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", "llama")
    data = write(tmp_path / "pairs.jsonl", rows(40))
    command = ["calibrate", "--model", str(checkpoint), "--data", str(data), "--style-control"]
    result = CliRunner().invoke(build_app(), command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "fitted beside style, whose weights are not served: log_length" in result.output
    manifest = Manifest.load(checkpoint)
    assert manifest is not None
    assert manifest.calibration is not None
    assert manifest.calibration.style is not None
    assert manifest.calibration.style.keys() == set(FEATURES)
