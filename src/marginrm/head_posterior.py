"""The posterior of a head's last linear layer, and how far a text's features lie from those it was calibrated on.

A margin is linear in the layer's weights w: d = w . x, where x is the difference of two responses' features, the layer's
inputs. Given pairs whose labels follow sigmoid(d / T), the log posterior of w is concave, and Laplace's method takes it for
a Gaussian with precision H = sum_i p_i (1 - p_i) x_i x_i^T / T^2 + lambda (MacKay 1992; last layer alone: Kristiadi et
al. 2020, arXiv 2002.10118). The weights themselves are kept as they are. The features come out of the forward pass that
computes the reward, so a reward's uncertainty costs two small matrix products.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from marginrm.atomic_file import replacing, share_weights
from marginrm.calibration import Floats, sigmoid
from marginrm.confidence.uncertain_reward import UncertainReward
from marginrm.errors import HeadError, ManifestError
from marginrm.forward.module import Readout, RewardModule
from marginrm.process_rewards import StepReading

FILE_NAME = "uncertainty.safetensors"
DRAWS = 64  # the standard deviation of a margin is off by 1 / sqrt(2 * 64) = 9% at most times
_QUANTILES = 512  # of the distances of calibration texts
_SHRINKAGE = 0.05  # of their covariance towards a multiple of the identity, so that it can be inverted


@dataclass(frozen=True, slots=True)
class Laplace:
    """A Gaussian over a layer's weights.

    Attributes:
        covariance: [size, size].
        prior_precision: lambda, which maximises the marginal likelihood.
    """

    covariance: Floats
    prior_precision: float

    def variances(self, differences: Floats) -> Floats:
        """Returns the variance of the margins of some pairs, [pairs].

        Args:
            differences: Of the features of the two responses, [pairs, size].
        """
        found: Floats = np.sum(differences @ self.covariance * differences, axis=1)
        return found


def laplace(
    differences: Floats, margins: Floats, temperature: float, weights: Floats, counts_for: float = 1.0
) -> Laplace:
    """Returns the posterior of a layer's weights, with the prior precision of the greatest marginal likelihood.

    log p(labels | lambda) = const - lambda |w|^2 / 2 + size / 2 log lambda - 1 / 2 log det(H + lambda), by Laplace's
    method. Its maximum satisfies lambda = gamma / |w|^2 with gamma = sum_i h_i / (h_i + lambda) well determined
    directions, where h_i are the eigenvalues of H without prior (MacKay 1992).

    Args:
        differences: Of the features of each pair's responses, [pairs, size].
        margins: The pairs' margins, [pairs].
        temperature: T of sigmoid(margin / T).
        weights: The layer's weights, in units of margin, [size].
        counts_for: Number of pairs that each of these stands for, where they are a sample.
    """
    p = sigmoid(margins / temperature)
    curvature = (counts_for * p * (1 - p))[:, None] * differences / temperature**2
    values, vectors = np.linalg.eigh(differences.T @ curvature)
    values = np.maximum(values, 0.0)
    norm = float(weights @ weights) / temperature**2
    scaled = values * temperature**2  # of the weights over T, whose likelihood does not depend on T
    low, high = math.log(1e-8), math.log(1e8)
    for _ in range(100):  # gamma / |w|^2 - lambda falls as lambda grows
        middle = (low + high) / 2
        well = float(np.sum(scaled / (scaled + math.exp(middle))))
        low, high = (middle, high) if well > math.exp(middle) * norm else (low, middle)
    precision = math.exp((low + high) / 2) / temperature**2
    return Laplace((vectors / (values + precision)) @ vectors.T, precision)


class HeadPosterior(Readout):
    """Features to the deviations and the familiarity of rewards.

    Args:
        mean: Mean features of the calibration texts, [size].
        draws: Weights that turn features into deviations, [draws, size].
        whitening: Turns their differences from the mean into coordinates of unit variance, [size, size].
        distances: Quantiles of the calibration texts' distances, ascending, [quantiles].
    """

    mean: Tensor
    draws: Tensor
    whitening: Tensor
    distances: Tensor

    def __init__(self, mean: Tensor, draws: Tensor, whitening: Tensor, distances: Tensor) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("draws", draws), ("whitening", whitening), ("distances", distances)):
            self.register_buffer(name, value.float().contiguous())
        self._known: list[float] = self.distances.tolist()

    @classmethod
    def of(cls, posterior: Laplace, features: Floats, seed: int = 0) -> HeadPosterior:
        """Makes one from a posterior and the features of the calibration texts, [texts, size].

        The draws are orthogonal in the posterior's coordinates, so that their deviations have less sampling error than
        independent ones, and none where there are as many draws as features (Yu et al. 2016, arXiv 1610.09072).
        """
        size = features.shape[1]
        count = min(DRAWS, size)
        basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, count)))
        values, vectors = np.linalg.eigh(posterior.covariance)
        root = vectors * np.sqrt(np.maximum(values, 0.0))  # root @ root.T is the covariance
        draws = math.sqrt(size / count) * basis.T @ root.T
        mean = features.mean(axis=0)
        whitening = _whitening(features - mean)
        distances = np.linalg.norm((features - mean) @ whitening.T, axis=1)
        grid = np.quantile(distances, np.linspace(0, 1, _QUANTILES))
        return cls(*(torch.from_numpy(part) for part in (mean, draws, whitening, grid)))

    def forward(self, features: Tensor) -> Tensor:
        """Returns deviations and distance of each response, [responses, draws + 1].

        Args:
            features: Inputs of the layer, float32, [responses, size].
        """
        centred = features - self.mean
        distance = torch.linalg.vector_norm(centred @ self.whitening.T, dim=1, keepdim=True)
        return torch.cat([centred @ self.draws.T, distance], dim=1)

    def rewards(self, rows: Tensor) -> list[float]:
        """Returns rewards with their uncertainty from the columns of a module with this readout.

        Args:
            rows: Reward, deviations and distance of each response, [responses, draws + 2], on any device.
        """
        table = rows.cpu().numpy()
        deviations = np.ascontiguousarray(table[:, 1:-1])
        return [
            UncertainReward(reward, array("f", deviations[index].tobytes()), self.familiarity(distance))
            for index, (reward, distance) in enumerate(zip(table[:, 0].tolist(), table[:, -1].tolist(), strict=True))
        ]

    def familiarity(self, distance: float) -> float:
        """Returns the share of the calibration texts that lie farther from their mean than this, in [0, 1]."""
        return 1.0 - bisect_right(self._known, distance) / len(self._known)

    def check(self, module: RewardModule, steps: StepReading | None) -> None:
        """Checks that it belongs to the head of a module.

        Raises:
            HeadError: The inputs of the head's last layer cannot be read, or the posterior is that of another layer.
        """
        layer, reason = module.last_linear, no_features(module, steps)
        if reason or layer is None:
            raise HeadError(f"Uncertainty cannot be read: {reason}.")
        if layer.in_features != self.mean.numel():
            raise HeadError(
                f"Uncertainty cannot be read: it is that of a layer with {self.mean.numel()} inputs, and the head's has "
                f"{layer.in_features}. Write it anew with `marginrm calibrate --uncertainty`."
            )

    def save(self, folder: Path) -> str:
        """Writes it beside a checkpoint's weights, and returns the SHA-256 of the file in hex."""
        path = folder / FILE_NAME
        with replacing(path) as fresh:
            save_file({name: value.cpu() for name, value in self.named_buffers()}, fresh)
        share_weights(folder)
        return file_hash(path)

    @classmethod
    def load(cls, folder: Path, sha256: str) -> HeadPosterior:
        """Reads the file of a checkpoint.

        Raises:
            ManifestError: It cannot be read, or is not the file that the manifest names.
        """
        path = folder / FILE_NAME
        cure = "Fetch the checkpoint again, or write it anew with `marginrm calibrate`."
        try:
            found = file_hash(path)
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ManifestError(f"{path}: cannot be read, and the manifest names it: {error}. {cure}") from error
        if found != sha256:
            raise ManifestError(f"{path}: is not the file that the manifest names (another SHA-256). {cure}")
        return cls(**tensors)


class Features(Readout):
    """The features themselves, as the deviations of the rewards; to fit a posterior on."""

    def rewards(self, rows: Tensor) -> list[float]:
        """Returns rewards with their features as deviations, from [responses, 1 + size]."""
        table = rows.cpu().numpy()
        return [UncertainReward(float(row[0]), row[1:], 0.0) for row in table]

    @staticmethod
    def of(scored: Sequence[Sequence[float]]) -> list[Floats]:
        """Returns the features of rewards that were read with it: for each group [responses, size], float64."""
        return [
            np.array([one.deviations for one in group if isinstance(one, UncertainReward)], dtype=np.float64)
            for group in scored
        ]


def no_features(module: RewardModule, steps: StepReading | None) -> str | None:
    """Returns why the inputs of a head's last linear layer cannot be read; None if they can.

    Args:
        module: The forward pass.
        steps: How the steps of a response are read, for a process reward model.
    """
    if steps:
        return "it is a process reward model, whose rewards are made of steps"
    if module.pooling is None:
        return "its rewards come from the model's own forward"
    return None if module.last_linear else "its head does not end in a linear layer with one row"


def file_hash(path: Path) -> str:
    """Returns the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _whitening(centred: Floats) -> Floats:
    """Returns W with W cov W^T = 1, of a covariance that is shrunk towards its mean eigenvalue (Ledoit and Wolf 2004)."""
    values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    values = np.maximum(values, 0.0)
    mean = float(values.mean()) or 1.0
    found: Floats = (vectors / np.sqrt((1 - _SHRINKAGE) * values + _SHRINKAGE * mean)).T
    return found
