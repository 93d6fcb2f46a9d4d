"""Preference losses: pure functions of reward differences, in float32.

Shapes: `d` is reward(chosen) - reward(rejected) of the batch's pairs, [pairs]; a target margin `m` has the same shape.
The mean loss is over all pairs, not over those that a filter selects: that would change the learning rate from step to
step.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from marginrm_training.method.margins import MarginMethod, Targets


def preference_losses(method: MarginMethod, d: Tensor, targets: Targets, smoothing: float) -> Tensor:
    """Returns the method's loss of each pair, [pairs].

    Args:
        method: The method; `loss` chooses the form.
        d: Differences of the pairs, [pairs].
        targets: Their target margins, weights or strengths.
        smoothing: Share of labels taken to be wrong, for the margin loss.
    """
    if method.loss == "scaled_bt":
        return scaled_bt(d, targets.margins)
    if method.loss == "soft_label":
        return soft_label(d, targets.margins)
    if smoothing:
        return smoothed(d, targets.margins, smoothing)
    return margin_loss(d, targets.margins)


def bradley_terry(d: Tensor) -> Tensor:
    """-log sigmoid(d) of each pair, [pairs] (Bradley and Terry, 1952). Its mean is what evaluation reports as NLL."""
    return F.softplus(-_checked(d))


def margin_loss(d: Tensor, m: Tensor) -> Tensor:
    """-log sigmoid(d - m) of each pair, [pairs]: Llama 2, equation 2 (arXiv 2307.09288); the paper's equation 4."""
    return F.softplus(_checked(m, like=d) - _checked(d))


def scaled_bt(d: Tensor, weight: Tensor) -> Tensor:
    """-weight * log sigmoid(d) of each pair, [pairs]: scaled BT of HelpSteer2-Preference (arXiv 2410.01257)."""
    return _checked(weight, like=d) * bradley_terry(d)


def soft_label(d: Tensor, p: Tensor) -> Tensor:
    """-p log sigmoid(d) - (1 - p) log sigmoid(-d) of each pair, [pairs], where p is the strength of the preference.

    The form that MMPO and label smoothing share.
    """
    return _checked(p, like=d) * F.softplus(-_checked(d)) + (1 - p) * F.softplus(d)


def smoothed(d: Tensor, m: Tensor, smoothing: float) -> Tensor:
    """The margin loss where a share `smoothing` of the labels is taken to be wrong, [pairs]."""
    return (1 - smoothing) * margin_loss(d, m) + smoothing * F.softplus(_checked(d))


def centring(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(chosen + rejected)^2 of each pair, [pairs]: pins the rewards' free offset near 0 (arXiv 2312.09244).

    It does not bound d, so margins can grow all the same.
    """
    return (_checked(chosen) + _checked(rejected, like=chosen)).square()


def _checked(values: Tensor, like: Tensor | None = None) -> Tensor:
    """Returns the values in float32; refuses shapes that would broadcast: [pairs, 1] - [pairs] is [pairs, pairs]."""
    if values.ndim != 1 or (like is not None and values.shape != like.shape):
        expected = "one value per pair" if like is None else f"shape {tuple(like.shape)}"
        raise ValueError(f"expected {expected}, got shape {tuple(values.shape)}")
    return values.float()
