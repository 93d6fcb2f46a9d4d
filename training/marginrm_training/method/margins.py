"""Target margins: the difference that the loss asks of each pair, and the filter that selects the pairs.

The method (arXiv 2404.04932) uses the batch's own mean difference, its *reward confidence*, as the margin, and asks it
only of pairs below that mean. No gradient flows through margins: estimators and filters get detached values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from marginrm.errors import ConfigError

Estimator = Literal[
    "none",
    "fixed",
    "column",
    "strength",
    "batch_mean",
    "ema_mean",
    "deficit",
    "zscore_exp",
    "transport",
    "small_margin",
]
Filter = Literal["none", "below_mean"]
LossName = Literal["margin", "scaled_bt", "soft_label"]

POOLED: frozenset[Estimator] = frozenset({"transport", "small_margin"})  # read every pair of the reference batch
ESTIMATED: frozenset[Estimator] = frozenset[Estimator]({"batch_mean", "ema_mean", "deficit", "zscore_exp", *POOLED})
SMALLEST_REFERENCE_BATCH = 8


@dataclass(frozen=True, slots=True)
class MarginMethod:
    """The form of the loss, the source of its target margins, and the filter.

    Attributes:
        loss: `margin` softplus(m - d); `scaled_bt` m * softplus(-d); `soft_label` with p = strength.
        estimator: The one source of m.
        filter: `below_mean` asks m only of pairs with d < mu_B + c * std; the others keep plain Bradley-Terry.
        scale: lambda, the factor on an estimated mean; for `small_margin` the width of its weights.
        cap: m_max, the largest margin asked, or None for no cap.
        fixed: The margin of the `fixed` estimator.
        threshold_std: c of the filter.
        ema: Decay of the running mean for reference batches that are too small, or None to refuse those.
        grades: (smallest strength, margin) pairs, highest first, that turn graded labels into margins.
    """

    loss: LossName = "margin"
    estimator: Estimator = "none"
    filter: Filter = "none"
    scale: float = 1.0
    cap: float | None = None
    fixed: float = 0.0
    threshold_std: float = 0.0
    ema: float | None = None
    grades: tuple[tuple[float, float], ...] = ()

    @property
    def unbounded(self) -> bool:
        """Whether margins follow the model's own differences without a cap, so that each may feed the other."""
        return self.loss == "margin" and self.estimator in ESTIMATED and self.cap is None


# Strength at which Llama 2's annotators' four grades begin: significantly better, better, slightly, negligibly. The
# paper gives grades and no probabilities, so these bounds are our choice.
_GRADES = (0.95, 0.8, 0.65, 0.0)

PRESETS: dict[str, MarginMethod] = {
    "bt": MarginMethod(),
    "margin_unfiltered": MarginMethod(estimator="batch_mean"),
    "paper": MarginMethod(estimator="batch_mean", filter="below_mean"),
    "margin": MarginMethod(estimator="batch_mean", filter="below_mean", cap=1.0),
    # Llama 2, table 27.
    "llama2_small": MarginMethod(
        estimator="strength", grades=tuple(zip(_GRADES, (1.0, 2 / 3, 1 / 3, 0.0), strict=True))
    ),
    "llama2_large": MarginMethod(estimator="strength", grades=tuple(zip(_GRADES, (3.0, 2.0, 1.0, 0.0), strict=True))),
    "column": MarginMethod(estimator="column"),
    "scaled_bt": MarginMethod(loss="scaled_bt", estimator="strength"),
    "soft_label": MarginMethod(loss="soft_label", estimator="strength"),
    # After the ideas of APLOT (arXiv 2510.10963) and MARS (arXiv 2602.17658), whose full texts were not available.
    "aplot": MarginMethod(estimator="transport", cap=1.0),
    "mars": MarginMethod(loss="scaled_bt", estimator="small_margin"),
}


@dataclass(slots=True)
class RunningMean:
    """Bias-corrected exponential moving average of the mean difference, for reference batches that are too small.

    Attributes:
        decay: Weight of the past.
        total: Weighted sum so far.
        weight: Sum of the weights so far, which corrects the bias towards 0.
    """

    decay: float
    total: float = 0.0
    weight: float = 0.0

    def update(self, mean: float) -> float:
        """Adds one batch's mean and returns the average."""
        self.total = self.decay * self.total + (1 - self.decay) * mean
        self.weight = self.decay * self.weight + (1 - self.decay)
        return self.total / self.weight


@dataclass(frozen=True, slots=True)
class Reference:
    """Statistics of the reference batch: the pairs of one micro-step, gathered over all ranks.

    Attributes:
        mean: mu_B, the mean difference.
        std: Its standard deviation (population).
        pairs: |B|.
        pool: Rewards of chosen and of rejected of all pairs, [2, pairs], for estimators in `POOLED`; otherwise None.
    """

    mean: float
    std: float
    pairs: int
    pool: Tensor | None = None

    @classmethod
    def of(cls, d: Tensor) -> Reference:
        """Measures detached differences, [pairs]."""
        values = d.detach().double()
        return cls(float(values.mean()), float(values.std(correction=0)), values.numel())


@dataclass(frozen=True, slots=True)
class Targets:
    """The target margins of one micro-step.

    Attributes:
        margins: m of each pair after the filter, [pairs], float32, without gradient.
        fired: Share of the pairs that the filter selected; 1 without a filter, 0 without a margin.
        mean: The mean target margin.
    """

    margins: Tensor
    fired: float
    mean: float = field(default=0.0)


def target_margins(
    method: MarginMethod,
    d: Tensor,
    reference: Reference,
    labels: Tensor | None = None,
    warmup: float = 1.0,
    chosen: Tensor | None = None,
) -> Targets:
    """Returns the target margin of each pair.

    Args:
        method: Estimator, filter, scale and cap.
        d: Differences of this rank's pairs, [pairs]; detached here.
        reference: Mean and deviation of the reference batch (for `ema_mean`, the running mean in its place).
        labels: The data's margins or strengths, [pairs], for `column` and `strength`.
        warmup: Factor from 0 to 1 while the margin is faded in.
        chosen: Rewards of this rank's chosen responses, [pairs], for `transport`.

    Raises:
        ConfigError: The estimator needs a column that the batch does not have.
    """
    values = d.detach().float()
    given = chosen.detach().float() if method.estimator == "transport" and chosen is not None else labels
    raw = _ESTIMATORS[method.estimator](method, values, reference, given)
    capped = raw.clamp(min=0.0, max=method.cap) * warmup
    passes = torch.ones_like(values, dtype=torch.bool)
    if method.filter == "below_mean":
        passes = values < reference.mean + method.threshold_std * reference.std
    if method.estimator == "none":
        passes = torch.zeros_like(passes)
    margins = torch.where(passes, capped, torch.zeros_like(capped))
    return Targets(margins, float(passes.float().mean()), float(margins.mean()))


def strengths_to_margins(strengths: Tensor, grades: tuple[tuple[float, float], ...]) -> Tensor:
    """Returns the margin of the first grade whose bound a strength reaches, [pairs]; without grades the strength."""
    if not grades:
        return strengths
    margins = torch.zeros_like(strengths)
    for bound, margin in reversed(grades):
        margins = torch.where(strengths >= bound, torch.full_like(margins, margin), margins)
    return margins


def check_reference_batch(method: MarginMethod, pairs: int) -> None:
    """Refuses reference batches that are too small for the filter: a single pair's d is its own mean, never below it.

    Raises:
        ConfigError: The margin is estimated from fewer than 8 pairs, without a running mean.
    """
    averages = method.ema is not None and method.estimator not in POOLED
    if method.estimator in ESTIMATED and pairs < SMALLEST_REFERENCE_BATCH and not averages:
        raise ConfigError(
            f"The margin is estimated from {pairs} pairs a step, which is too few: raise `train_batch` (times "
            f"ranks) to {SMALLEST_REFERENCE_BATCH} or more"
            + ("." if method.estimator in POOLED else ", or set `ema = 0.9` under [method].")
        )


def named(preset: str, **changes: object) -> MarginMethod:
    """Returns a preset with changes.

    Raises:
        ConfigError: There is no such preset.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset = {preset!r} is unknown. Choose one of: {', '.join(PRESETS)}.")
    return replace(PRESETS[preset], **changes)  # type: ignore[arg-type]  # the config has checked names and types


EstimatorFn = Callable[[MarginMethod, Tensor, Reference, "Tensor | None"], Tensor]


def _none(method: MarginMethod, d: Tensor, reference: Reference, labels: Tensor | None) -> Tensor:
    return torch.zeros_like(d)


def _fixed(method: MarginMethod, d: Tensor, reference: Reference, labels: Tensor | None) -> Tensor:
    return torch.full_like(d, method.fixed)


def _from_data(method: MarginMethod, d: Tensor, reference: Reference, labels: Tensor | None) -> Tensor:
    if labels is None:
        column = "margin" if method.estimator == "column" else "strength"
        raise ConfigError(f"The method takes its margins from the data, whose rows have no {column!r}.")
    return strengths_to_margins(labels.float(), method.grades)


def _batch_mean(method: MarginMethod, d: Tensor, reference: Reference, labels: Tensor | None) -> Tensor:
    return torch.full_like(d, method.scale * reference.mean)


def _deficit(method: MarginMethod, d: Tensor, reference: Reference, labels: Tensor | None) -> Tensor:
    return method.scale * (reference.mean - d)


def _zscore_exp(method: MarginMethod, d: Tensor, reference: Reference, labels: Tensor | None) -> Tensor:
    """AMaPO's form (arXiv 2511.09385): larger margins for pairs further below the mean."""
    deviation = max(reference.std, 1e-6)
    return method.scale * torch.exp((reference.mean - d) / deviation)


def _transport(method: MarginMethod, d: Tensor, reference: Reference, chosen: Tensor | None) -> Tensor:
    """Optimal transport from the chosen to the rejected rewards of the batch, after APLOT's idea (arXiv 2510.10963).

    In one dimension, with a convex cost of the difference, the optimal plan joins the k-th largest reward of one side with
    the k-th largest of the other. A pair's margin is its chosen reward's difference to the rejected one that it is joined
    with. The mean over the batch is mu_B. APLOT's cost has a semantic part too, which rewards alone do not have.
    """
    if reference.pool is None or chosen is None:
        raise ValueError("`transport` needs the rewards of the reference batch")
    all_chosen, all_rejected = (side.contiguous().float().sort().values for side in reference.pool)
    place = torch.searchsorted(all_chosen, chosen.contiguous()).clamp(max=len(all_chosen) - 1)
    margins: Tensor = method.scale * (chosen - all_rejected[place])
    return margins


def _small_margin(method: MarginMethod, d: Tensor, reference: Reference, labels: Tensor | None) -> Tensor:
    """Weights that favour small margins, after MARS's idea (arXiv 2602.17658): exp(-|d| / (lambda * mean |d|)).

    Their mean over the batch is 1, so weighting is what sampling the batch's pairs with these odds does on average. MARS
    also makes new responses for those pairs, which is left out here.
    """
    if reference.pool is None:
        raise ValueError("`small_margin` needs the rewards of the reference batch")
    pooled = (reference.pool[0] - reference.pool[1]).abs().float()
    width = (method.scale * pooled.mean()).clamp(min=1e-6)
    return torch.exp(-d.abs() / width) / torch.exp(-pooled / width).mean()


_ESTIMATORS: dict[Estimator, EstimatorFn] = {
    "none": _none,
    "fixed": _fixed,
    "column": _from_data,
    "strength": _from_data,
    "batch_mean": _batch_mean,
    "ema_mean": _batch_mean,
    "deficit": _deficit,
    "zscore_exp": _zscore_exp,
    "transport": _transport,
    "small_margin": _small_margin,
}
