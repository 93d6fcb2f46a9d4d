"""Losses: numbers by hand, an independent loop, and gradients by the formulas of docs/training.md."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marginrm_training.method.losses import bradley_terry, centring, margin_loss, scaled_bt, smoothed, soft_label
from marginrm_training.method.margins import PRESETS, Reference, target_margins

values = st.lists(st.floats(-20, 20), min_size=1, max_size=8)


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def test_numbers_by_hand() -> None:
    zero, two = torch.tensor([0.0]), torch.tensor([2.0])
    assert float(bradley_terry(zero)) == pytest.approx(math.log(2))
    assert float(margin_loss(two, two)) == pytest.approx(math.log(2))  # the margin is just met
    assert float(margin_loss(two, torch.tensor([3.0]))) == pytest.approx(1.313262, abs=1e-6)  # softplus(1)
    assert float(scaled_bt(two, torch.tensor([3.0]))) == pytest.approx(3 * 0.126928, abs=1e-5)  # softplus(-2)
    assert float(soft_label(two, torch.tensor([0.75]))) == pytest.approx(0.75 * 0.126928 + 0.25 * 2.126928, abs=1e-5)
    assert float(centring(torch.tensor([1.0]), torch.tensor([-3.0]))) == 4.0


@given(values)
def test_the_losses_equal_those_of_a_loop(d: list[float]) -> None:
    tensor = torch.tensor(d)
    m = torch.linspace(0, 2, len(d))
    expected = [softplus(float(margin) - float(x)) for x, margin in zip(tensor, m, strict=True)]
    assert margin_loss(tensor, m).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert smoothed(tensor, m, 0.0).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_huge_differences_stay_finite() -> None:
    d = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = margin_loss(d, torch.zeros(2)).sum() + soft_label(d, torch.full((2,), 0.5)).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert d.grad is not None
    assert torch.isfinite(d.grad).all()


def test_trap_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="one value per pair"):
        bradley_terry(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="shape"):
        margin_loss(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="shape"):
        margin_loss(torch.zeros(3), torch.zeros(1))


@pytest.mark.parametrize("preset", ["bt", "margin_unfiltered", "paper", "margin"])
def test_the_gradient_is_the_formula_and_none_flows_through_filter_or_margin(preset: str) -> None:
    d = torch.tensor([-1.0, 0.2, 0.5, 3.0, 4.0, 1.0, 2.0, -0.5], requires_grad=True)
    method = PRESETS[preset]
    targets = target_margins(method, d, Reference.of(d))
    margin_loss(d, targets.margins).mean().backward()
    mu = float(d.detach().mean())
    m = {"bt": 0.0, "margin_unfiltered": mu, "paper": mu, "margin": min(mu, 1.0)}[preset]
    asked = [m if preset == "margin_unfiltered" or x < mu else 0.0 for x in d.tolist()]
    expected = [-1 / (1 + math.exp(x - k)) / len(d) for x, k in zip(d.tolist(), asked, strict=True)]
    assert d.grad is not None
    assert d.grad.tolist() == pytest.approx(expected, rel=1e-5)
