"""Uncertainty of rewards: the posterior against its definition and a known truth, and its way from file to reply."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from marginrm import RewardModel
from marginrm.calibration import (
    area_under_risk_coverage,
    calibrate_uncertain,
    fit_temperature,
    fit_uncertain_temperature,
    narrowed,
)
from marginrm.cli.main import build_app
from marginrm.confidence.uncertain_reward import UncertainReward, margin_std
from marginrm.errors import ConfigError, HeadError, ManifestError, NoUncertaintyError
from marginrm.head_posterior import FILE_NAME, HeadPosterior, laplace
from marginrm_service.engine.reward_cache import ENTRY_BYTES, UNCERTAINTY_BYTES, RewardCache
from marginrm_training.checkpoint.recalibrate import recalibrate
from marginrm_training.checkpoint.uncertainty import without_itself
from support.models import tiny_checkpoint
from support.process_rewards import qwen_math
from support.server import serving
from support.training import config_file, rows, write

SIZE = 6
TEXTS = ["Red, yellow and blue.", "No.", "Paris is the capital.", "I do not know."]


def logistic_pairs(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Differences of features, oriented by labels that follow sigmoid(w . x), and the weights w."""
    generator = np.random.default_rng(seed)
    weights = generator.normal(size=SIZE)
    x = generator.normal(size=(count, SIZE))
    right = generator.random(count) < 1 / (1 + np.exp(-x @ weights))
    return np.where(right[:, None], x, -x), weights


def most_likely(x: np.ndarray) -> np.ndarray:
    """The maximum-likelihood weights of a logistic regression without bias, by Newton's method."""
    w = np.zeros(x.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = (x * (p * (1 - p))[:, None]).T @ x
        w += np.linalg.solve(hessian, x.T @ (1 - p))
    return w


def test_the_posterior_is_the_inverse_of_a_hessian_by_differences() -> None:
    x, w = logistic_pairs(80)
    found = laplace(x, x @ w, 1.0, w)

    def loss(at: np.ndarray) -> float:
        return float(np.sum(np.logaddexp(0, -x @ at)) + found.prior_precision / 2 * at @ at)

    step, eye = 1e-4, np.eye(SIZE)
    hessian = [
        [
            sum(a * b * loss(w + step * (a * eye[i] + b * eye[j])) for a in (1, -1) for b in (1, -1)) / (4 * step**2)
            for j in range(SIZE)
        ]
        for i in range(SIZE)
    ]
    assert found.covariance == pytest.approx(np.linalg.inv(hessian), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_no_other_prior_precision_has_a_greater_marginal_likelihood(temperature: float) -> None:
    x, w = logistic_pairs(60)
    w = w * temperature  # margins in other units, the same probabilities
    found = laplace(x, x @ w, temperature, w)
    p = 1 / (1 + np.exp(-x @ w / temperature))
    hessian = (x * (p * (1 - p))[:, None]).T @ x / temperature**2

    def evidence(precision: float) -> float:
        _, determinant = np.linalg.slogdet(hessian + precision * np.eye(SIZE))
        return float(-precision / 2 * w @ w + SIZE / 2 * np.log(precision) - determinant / 2)

    best = evidence(found.prior_precision)
    assert all(evidence(found.prior_precision * factor) < best for factor in (0.7, 0.9, 1.1, 1.4))


def test_standard_deviations_are_the_spread_of_weights_fitted_again_and_again() -> None:
    x = np.array([logistic_pairs(2000, seed=0)[0][:400]])[0]
    _, truth = logistic_pairs(1, seed=0)
    query = np.random.default_rng(5).normal(size=(8, SIZE))
    fits = []
    for seed in range(150):
        right = np.random.default_rng(seed).random(len(x)) < 1 / (1 + np.exp(-x @ truth))
        fits.append(query @ most_likely(np.where(right[:, None], x, -x)))
    found = laplace(x, x @ truth, 1.0, truth)
    assert np.sqrt(found.variances(query)) == pytest.approx(np.std(fits, axis=0), rel=0.25)


def test_a_pair_is_left_out_of_its_own_posterior_exactly() -> None:
    x, w = logistic_pairs(30)
    d = x @ w
    found = laplace(x, d, 1.0, w)
    p = 1 / (1 + np.exp(-d))
    precision = np.linalg.inv(found.covariance)
    expected = [x[i] @ np.linalg.inv(precision - p[i] * (1 - p[i]) * np.outer(x[i], x[i])) @ x[i] for i in range(30)]
    assert without_itself(found.variances(x), d, 1.0) == pytest.approx(expected)


def test_confidence_that_integrates_is_calibrated_where_temperature_alone_is_too_sure() -> None:
    """Few pairs in many directions, and new pairs farther out: the known truth of a logistic regression."""
    generator = np.random.default_rng(2)
    size, count = 30, 120
    truth = generator.normal(size=size) / math.sqrt(size) * 2
    x = generator.normal(size=(count, size))
    x = np.where((generator.random(count) < 1 / (1 + np.exp(-x @ truth)))[:, None], x, -x)
    w = np.zeros(size)
    for _ in range(50):  # the maximum of the posterior with prior precision 1
        p = 1 / (1 + np.exp(-x @ w))
        w += np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + np.eye(size), x.T @ (1 - p) - w)
    posterior = laplace(x, x @ w, 1.0, w)

    def labelled(scale: float) -> np.ndarray:
        new = generator.normal(size=(4000, size)) * scale
        return np.where((generator.random(4000) < 1 / (1 + np.exp(-new @ truth)))[:, None], new, -new)

    near, far = labelled(1.0), labelled(4.0)
    alone = fit_temperature(near @ w)
    t = fit_uncertain_temperature(near @ w, np.sqrt(posterior.variances(near)))
    integrated = calibrate_uncertain(far @ w, np.sqrt(posterior.variances(far)), temperature=t)
    plain = calibrate_uncertain(far @ w, np.zeros(4000), temperature=alone)
    assert integrated.ece_after < plain.ece_after / 2
    assert integrated.nll_after < plain.nll_after


def test_without_uncertainty_the_temperature_is_the_plain_one() -> None:
    d = np.random.default_rng(0).normal(0.5, 1, 300)
    assert fit_uncertain_temperature(d, np.zeros(300)) == pytest.approx(fit_temperature(d), rel=1e-6)
    assert narrowed(d, np.zeros(300), 2.0) == pytest.approx(d)


def test_the_area_by_hand() -> None:
    # By confidence: right, wrong, right -> error rates 0, 1/2, 1/3.
    assert area_under_risk_coverage([3.0, -2.0, 1.0]) == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    # Uncertainty moves the first to the end: wrong, right, right -> 1, 1/2, 1/3.
    assert area_under_risk_coverage([3.0, -2.0, 1.0], [100.0, 0, 0]) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_draws_give_the_variance_of_margins_and_distances_the_familiarity() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(400, SIZE)) @ generator.normal(size=(SIZE, SIZE)) + 3
    x = features[:200] - features[200:]
    posterior = laplace(x, generator.normal(size=200), 1.0, generator.normal(size=SIZE))
    readout = HeadPosterior.of(posterior, features)
    columns = readout(torch.from_numpy(features).float())
    rewards = readout.rewards(torch.cat([torch.zeros(400, 1), columns], dim=1))
    stds = [margin_std(rewards[i], rewards[200 + i]) for i in range(200)]
    assert stds == pytest.approx(np.sqrt(posterior.variances(x)), rel=1e-3)  # as many draws as features: exact
    familiar = np.array([one.familiarity for one in rewards])
    assert familiar.mean() == pytest.approx(0.5, abs=0.01)
    assert np.quantile(familiar, 0.1) == pytest.approx(0.1, abs=0.02)
    far = torch.from_numpy(features[:1] + 100).float()
    assert readout.rewards(torch.cat([torch.zeros(1, 1), readout(far)], dim=1))[0].familiarity == 0.0


def test_fewer_draws_than_features_are_right_on_average() -> None:
    generator = np.random.default_rng(1)
    size = 200
    features = generator.normal(size=(600, size))
    x = features[:300] - features[300:]
    posterior = laplace(x, generator.normal(size=300), 1.0, generator.normal(size=size))
    draws = HeadPosterior.of(posterior, features).draws.double().numpy()
    assert len(draws) == 64
    ratio = np.linalg.norm(x @ draws.T, axis=1) / np.sqrt(posterior.variances(x))
    assert ratio.mean() == pytest.approx(1, abs=0.03)
    assert ratio.std() < 0.12


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("uncertain")
    folder = tiny_checkpoint(root / "model", "llama")
    recalibrate(folder, str(write(root / "pairs.jsonl", rows(40))), uncertainty=True)
    return folder


@pytest.mark.parametrize("family", ["llama", "bert", "modernbert"])
def test_features_are_the_inputs_of_the_head_of_transformers(tmp_path: Path, family: str) -> None:
    folder = tiny_checkpoint(tmp_path / "model", family)
    model = RewardModel.from_pretrained(folder, dtype="float32")
    encoded = [[model.encoder.encode("Hello?", text) for text in ("Yes.", "No, I do not know.")]]
    ((_, second),), (features,) = model.score_features(encoded)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    layer = theirs.score if hasattr(theirs, "score") else theirs.classifier
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    one = encoded[0][1]
    types = {} if one.type_ids is None else {"token_type_ids": torch.tensor([one.type_ids])}
    with torch.no_grad():
        found = theirs(input_ids=torch.tensor([one.ids]), **types).logits.item()
    assert second == pytest.approx(found, abs=1e-5)
    expected = seen[0].reshape(-1, seen[0].shape[-1])[-1]
    assert features[1] == pytest.approx(expected.numpy(), abs=1e-4)
    assert model.readout is None


def test_rewards_are_the_same_with_and_without_their_uncertainty(calibrated: Path) -> None:
    model = RewardModel.from_pretrained(calibrated, dtype="float32")
    with_it = model.score("Hello?", ["Yes.", "No."])
    model.readout = None
    assert model.score("Hello?", ["Yes.", "No."]) == pytest.approx(with_it, abs=1e-6)
    assert copy.deepcopy(with_it[0]).deviations == with_it[0].deviations
    assert model.verify_golden() == pytest.approx(0, abs=1e-5)


def test_replies_carry_it_and_a_cached_reward_keeps_it(calibrated: Path) -> None:
    model = RewardModel.from_pretrained(calibrated, dtype="float32")
    expected = model.compare("Hello?", "Yes.", "No.")
    assert expected.margin_std is not None
    t = math.sqrt(model.temperature**2 + math.pi / 8 * expected.margin_std**2)
    assert expected.confidence == pytest.approx(1 / (1 + math.exp(-expected.margin / t)))
    pair = {"prompt": "Hello?", "chosen": "Yes.", "rejected": "No."}
    ranked = {"prompt": "Hello?", "candidates": ["Yes.", "No.", "I do not know."]}
    with serving(model) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        for _ in range(2):  # the second time from the cache
            found = http.post(
                "/score", json={"pairs": [pair], "items": [{"prompt": "Hello?", "response": "Yes."}]}
            ).json()
            assert found["pairs"][0]["margin_std"] == pytest.approx(expected.margin_std, rel=1e-4)
            assert found["pairs"][0]["confidence"] == pytest.approx(expected.confidence, rel=1e-4)
            assert 0 <= found["items"][0]["familiarity"] <= 1
            assert found["items"][0]["familiarity"] == found["pairs"][0]["chosen"]["familiarity"]
        plain, averse = (
            http.post("/best-of-n", json={"prompts": [ranked], "risk_averse": factor}).json()["prompts"][0]
            for factor in (0.0, 50.0)
        )
        refused = http.post("/best-of-n", json={"prompts": [ranked], "risk_averse": -1.0})
    assert plain["margin_std"] > 0
    assert [entry["candidate"] for entry in plain["ranking"]] == [
        entry.candidate for entry in model.best_of_n("Hello?", ranked["candidates"]).ranking
    ]
    rewards = model.score("Hello?", ranked["candidates"])
    lowest = min(range(3), key=lambda index: 50 * float(np.linalg.norm(rewards[index].deviations)) - rewards[index])
    assert averse["best"] == lowest
    assert refused.status_code == 422


def test_without_it_replies_omit_it_and_aversion_is_refused(tmp_path: Path) -> None:
    model = RewardModel.from_pretrained(tiny_checkpoint(tmp_path, "llama"), dtype="float32")
    assert model.compare("Hello?", "Yes.", "No.").margin_std is None
    with pytest.raises(NoUncertaintyError, match="--uncertainty"):
        model.best_of_n("Hello?", ["Yes.", "No."], risk_averse=1.0)
    with serving(model) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        found = http.post("/score", json={"pairs": [{"prompt": "Hello?", "chosen": "Yes.", "rejected": "No."}]}).json()
        body = {"prompts": [{"prompt": "Hello?", "candidates": ["Yes.", "No."]}], "risk_averse": 1.0}
        refused = http.post("/best-of-n", json=body)
    assert "margin_std" not in found["pairs"][0]
    assert "familiarity" not in found["pairs"][0]["chosen"]
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "no_uncertainty")


def test_the_command_writes_it_and_evaluate_shows_both(calibrated: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "pairs.jsonl", rows(40))
    arguments = ["evaluate", "--model", str(calibrated), "--data", str(file), "--json"]
    result = CliRunner().invoke(build_app(), arguments, catch_exceptions=False)
    found = json.loads(result.stdout)
    for name in ("ece", "nll", "aurc"):
        assert found[f"{name}_temperature_alone"] >= 0
        assert name in found
    assert 0 <= found["familiarity_median"] <= 1


def test_a_file_that_is_not_the_named_one_is_refused(calibrated: Path) -> None:
    path = calibrated / FILE_NAME
    kept = path.read_bytes()
    try:
        path.write_bytes(kept[:-4] + b"\0\0\0\0")
        with pytest.raises(ManifestError, match=r"not the file that the manifest names"):
            RewardModel.from_pretrained(calibrated)
        path.unlink()
        with pytest.raises(ManifestError, match=r"cannot be read, and the manifest names it"):
            RewardModel.from_pretrained(calibrated)
    finally:
        path.write_bytes(kept)


def test_models_without_a_last_linear_layer_say_so(tmp_path: Path) -> None:
    qwen_math(tmp_path)
    with pytest.raises(HeadError, match="process reward model"):
        recalibrate(tmp_path, str(write(tmp_path / "pairs.jsonl", rows(12))), uncertainty=True)
    with pytest.raises(ConfigError, match="Leave one of them out"):
        recalibrate(tmp_path, "unread", uncertainty=True, style_control=True)


def test_the_cache_counts_its_memory() -> None:
    cache = RewardCache(10_000)
    cache.put(b"a", UncertainReward(1.0, [0.0] * 64, 0.5))
    assert cache.size == ENTRY_BYTES + UNCERTAINTY_BYTES + 4 * 64


def test_a_run_calibrates_choices_and_uncertainty_on_held_out_data(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base", "gpt_neox")
    held = [
        {"prompt": f"Held {i}?", "candidates": [{"text": one, "gold": k} for k, one in enumerate(TEXTS)]}
        for i in range(22)
    ]
    seen = [{**held[0], "prompt": "Question 3: what is it?"}]
    groups = write(tmp_path / "groups.jsonl", [*held, *seen])
    file = config_file(tmp_path, 32, data={"calibration_groups": str(groups)}, optim={"epochs": 1.0})
    file.write_text(file.read_text() + "\n[calibration]\nuncertainty = true\n")
    result = CliRunner().invoke(build_app(), ["train", str(file)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "22 groups; left out: 1 with a prompt of the training pairs" in result.output
    model = RewardModel.from_pretrained(tmp_path / "run", dtype="float32")
    assert model.manifest is not None
    assert model.manifest.groups is not None
    assert model.manifest.uncertainty is not None
    assert (model.manifest.groups.prompts, model.manifest.uncertainty.pairs) == (22, 32)
    ranking = model.best_of_n("Held 1?", TEXTS)
    assert ranking.confidence_from == "groups"
    assert ranking.margin_std is not None
    assert "ece_temperature_alone" in model.manifest.metrics


def test_what_a_new_calibration_removes_is_said(tmp_path: Path) -> None:
    folder, pairs = tiny_checkpoint(tmp_path / "model", "llama"), str(write(tmp_path / "pairs.jsonl", rows(12)))
    assert not any("removed" in note for note in recalibrate(folder, pairs, uncertainty=True).notes)
    assert (folder / FILE_NAME).is_file()
    assert any("uncertainty" in note and "was removed" in note for note in recalibrate(folder, pairs).notes)
    assert not (folder / FILE_NAME).exists()
    with pytest.raises(NoUncertaintyError, match="calibrate --uncertainty"):  # before the data are read
        CliRunner().invoke(
            build_app(),
            ["best-of-n", "--model", str(folder), "--data", "/nowhere", "--risk-averse", "1"],
            catch_exceptions=False,
        )
