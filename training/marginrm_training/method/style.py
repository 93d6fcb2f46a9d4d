"""Style control: length and markdown explain a part of the labels, so that the reward need not.

As in the style control of public arenas, style is a nuisance covariate of Bradley-Terry: the training margin is
d + b * (style(chosen) - style(rejected)). b is learned along with the model and is left out of rewards. While b is at its
optimum for the current model, the residuals of the loss are uncorrelated with style, so the loss does not ask the reward
for any linear effect of style. b therefore has to be ahead of the model: it is fitted by recursive Newton steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from marginrm.calibration import T_MAX, T_MIN, Floats, sigmoid
from marginrm.intervals import NORMAL_975

FEATURES = ("log_length", "headings", "lists", "bold")
_HEADING = re.compile(r"^[ \t]{0,3}#{1,6}[ \t]", re.MULTILINE)
_LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+]|\d{1,3}[.)])[ \t]", re.MULTILINE)
_BOLD = re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")
_PRECISION = 1e-9
_MEMORY = 1000.0  # pairs: the weight of a pair in b falls to 1/e over this many later ones


def style_of(text: str) -> tuple[float, ...]:
    """Returns the style of a response, a number for each of `FEATURES`: log(1 + count).

    The counts are characters, markdown headings, list items and bold spans.
    """
    counts = (len(text), *(len(pattern.findall(text)) for pattern in (_HEADING, _LIST_ITEM, _BOLD)))
    return tuple(math.log1p(count) for count in counts)


def style_differences(pairs: Iterable[tuple[str, str]]) -> Floats:
    """Returns style(first) - style(second) of pairs of responses, [pairs, features]."""
    rows = [np.subtract(style_of(first), style_of(second)) for first, second in pairs]
    return np.array(rows, dtype=np.float64).reshape(-1, len(FEATURES))


def style_scales(differences: Floats) -> Floats:
    """Returns the root mean square of each feature's difference, [features], by which it is standardised.

    A feature that never differs gets 1. Differences are not centred: exchanging the sides must only change their sign.
    """
    spread = np.sqrt(np.mean(differences**2, axis=0))
    scales: Floats = np.where(spread > 0, spread, 1.0)
    return scales


def style_agreement(differences: Floats) -> Floats:
    """Returns 1 where style speaks for the first response, -1 for the second, 0 where it does not decide, [pairs].

    It decides where one response is both longer and more formatted: more headings, list items and bold spans, summed
    as logarithms.

    Args:
        differences: As `style_differences` returns them, [pairs, features].
    """
    longer, formatted = np.sign(differences[:, 0]), np.sign(np.round(differences[:, 1:].sum(axis=1), 9))
    agreed: Floats = np.where(longer == formatted, longer, 0.0)
    return agreed


@dataclass(slots=True)
class StyleTerm:
    """b * (style(chosen) - style(rejected)), with b learned along with the model.

    b follows the loss by recursive Newton steps with forgetting (recursive least squares for a logistic model). The
    first steps are large, and later ones average over about 1,000 pairs. The identity, added to the curvature, damps them.

    Attributes:
        scales: Root mean square of each feature's difference, [features].
        weights: b, for standardised features, [features].
        curvature: Sum of the pairs' curvatures with forgetting, [features, features].
    """

    scales: Floats
    weights: Floats = field(default_factory=lambda: np.zeros(len(FEATURES)))
    curvature: Floats = field(default_factory=lambda: np.zeros((len(FEATURES), len(FEATURES))))

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str]]) -> StyleTerm:
        """Makes the term for training pairs of (chosen, rejected) responses, with b = 0."""
        return cls(style_scales(style_differences(pairs)))

    def standardised(self, differences: Tensor) -> Tensor:
        """Returns standardised differences, [pairs, features] float32."""
        return differences.float() / torch.as_tensor(self.scales, dtype=torch.float32, device=differences.device)

    def logits(self, standardised: Tensor) -> Tensor:
        """Returns b * (style(chosen) - style(rejected)) of standardised differences, [pairs], without gradient."""
        return standardised.float() @ torch.as_tensor(self.weights, dtype=torch.float32, device=standardised.device)

    def update(self, gradient: Floats, curvature: Floats, pairs: float) -> None:
        """Takes one Newton step.

        Args:
            gradient: Gradient of the summed loss by b, [features].
            curvature: Sum of sigmoid'(margin) x x^T over the pairs, x standardised, [features, features].
            pairs: Number of pairs in both sums.
        """
        self.curvature = math.exp(-pairs / _MEMORY) * self.curvature + curvature
        self.weights = self.weights - np.linalg.solve(self.curvature + np.eye(len(self.weights)), gradient)

    def describe(self) -> dict[str, dict[str, float]]:
        """Returns b and the scales by feature, as the manifest records them."""
        scales = dict(zip(FEATURES, self.scales.tolist(), strict=True))
        return {"weights": self.by_name(), "scales": scales}

    def by_name(self) -> dict[str, float]:
        """Returns b by feature."""
        return dict(zip(FEATURES, self.weights.tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return {"scales": self.scales.tolist(), "weights": self.weights.tolist(), "curvature": self.curvature.tolist()}

    @classmethod
    def from_state(cls, state: dict[str, Sequence[Any]]) -> StyleTerm:
        """Makes a term from what `state` returned."""
        return cls(**{name: np.array(values, dtype=np.float64) for name, values in state.items()})


@dataclass(frozen=True, slots=True)
class FitBesideStyle:
    """A temperature that was fitted with style in the logit.

    Attributes:
        temperature: T.
        interval: Its 95% interval (Wald's, by the joint curvature); None where T is a bound.
        weights: b by feature, for standardised differences.
    """

    temperature: float
    interval: tuple[float, float] | None
    weights: dict[str, float]


def fit_beside_style(d: Floats, differences: Floats) -> FitBesideStyle:
    """Fits T and b of P(chosen is better) = sigmoid(d / T + b * style difference) to labelled pairs.

    The likelihood is concave in (1/T, b); bisection finds 1/T, with the best b at each. b has a standard normal prior. Without b in the logit, labels that follow style
    would count as noise of the reward, and T would be too large.

    Args:
        d: reward(chosen) - reward(rejected), [pairs].
        differences: As `style_differences` returns them, [pairs, features].
    """
    z = differences / style_scales(differences)
    weights = np.zeros(z.shape[1])

    def slope(log_t: float) -> float:
        """Derivative of the loss by 1/T at the best b for this T; it falls as T grows."""
        nonlocal weights
        offset = d * math.exp(-log_t)
        weights = _best_weights(offset, z, weights)
        return float(np.sum(d * (sigmoid(offset + z @ weights) - 1)))

    low, high = math.log(T_MIN), math.log(T_MAX)
    if not np.any(d):
        low = high = 0.0
    elif slope(low) <= 0:  # the loss still falls at the smallest T
        high = low
    elif slope(high) >= 0:
        low = high
    inside = low < high
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    temperature = math.exp((low + high) / 2)
    weights = _best_weights(d / temperature, z, weights)
    interval = _interval(d, z, temperature, weights) if inside else None
    return FitBesideStyle(temperature, interval, dict(zip(FEATURES, weights.tolist(), strict=True)))


def _best_weights(offset: Floats, z: Floats, weights: Floats) -> Floats:
    """Returns b that minimises the loss of sigmoid(offset + z b), with its prior: Newton's method with halved steps."""

    def loss(b: Floats) -> float:
        return float(np.logaddexp(0.0, -offset - z @ b).sum() + b @ b / 2)

    for _ in range(100):
        p = sigmoid(offset + z @ weights)
        gradient = z.T @ (p - 1) + weights
        step = np.linalg.solve((z * (p * (1 - p))[:, None]).T @ z + np.eye(z.shape[1]), gradient)
        before = loss(weights)
        while np.max(np.abs(step)) > _PRECISION and loss(weights - step) > before - 0.25 * float(gradient @ step):
            step = step / 2
        weights = weights - step
        if np.max(np.abs(step)) <= _PRECISION:
            break
    return weights


def _interval(d: Floats, z: Floats, temperature: float, weights: Floats) -> tuple[float, float]:
    """Returns Wald's 95% interval of T in log T, by the joint curvature of the loss in (log T, b)."""
    x = np.column_stack([d / temperature, z])
    p = sigmoid(x[:, 0] + z @ weights)
    curvature = (x * (p * (1 - p))[:, None]).T @ x + np.diag([1e-12] + [1.0] * z.shape[1])
    deviation = math.sqrt(float(np.linalg.inv(curvature)[0, 0]))
    factor = math.exp(min(NORMAL_975 * deviation, math.log(T_MAX / T_MIN)))
    return temperature / factor, temperature * factor


def newton_sums(margins: Tensor, loss_slopes: Tensor, standardised: Tensor) -> Tensor:
    """Returns one rank's sums for `StyleTerm.update` in one vector: gradient, curvature row by row, pairs; float64.

    Args:
        margins: d + b * style of each pair, [pairs].
        loss_slopes: Derivative of each pair's loss by its margin, [pairs].
        standardised: Standardised style differences, [pairs, features].
    """
    x, probability = standardised.double(), torch.sigmoid(margins.detach().double())
    gradient = loss_slopes.double() @ x
    curvature = (x * (probability * (1 - probability))[:, None]).T @ x
    count = torch.tensor([float(len(x))], dtype=torch.float64, device=x.device)
    return torch.cat([gradient, curvature.flatten(), count])


def split_sums(sums: Sequence[float]) -> tuple[Floats, Floats, float]:
    """Returns gradient, curvature and number of pairs from the sums of `newton_sums`."""
    features = len(FEATURES)
    values = np.array(sums, dtype=np.float64)
    return values[:features], values[features:-1].reshape(features, features), float(values[-1])
