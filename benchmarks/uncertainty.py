"""`python -m benchmarks.uncertainty`: what the uncertainty of rewards costs, as a share of a step.

The same step runs with and without it, in turn. Its cost depends on the number of responses and the width of the head, so
short responses cost the most.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer

from benchmarks.harness.command import DataFolder, all_known, app_of
from benchmarks.harness.texts import load_texts
from benchmarks.models import NAMES, build
from marginrm import RewardModel
from marginrm.encoding import EncodedResponse
from marginrm.head_posterior import HeadPosterior, Laplace
from marginrm.tuning.timing import timed, trial_groups

_WARM_UP = 2  # pairs of steps


def main(
    models: Annotated[str, typer.Option(help="Shapes, separated by commas.")] = "minilm-shape,smollm2-135m",
    lengths: Annotated[str, typer.Option(help="Tokens of a response.")] = "32,256",
    tokens: Annotated[int, typer.Option(help="Tokens of a step.", min=1)] = 4096,
    rounds: Annotated[int, typer.Option(help="Steps of each kind; the median ratio counts.", min=2)] = 15,
    data: DataFolder = None,
) -> None:
    """Print the time of a step with uncertainty over that without, for each model and length of its responses."""
    sizes = [int(length) for length in lengths.split(",")]
    if not all(1 <= length <= tokens for length in sizes):
        raise typer.BadParameter(f"--lengths {lengths}: give numbers from 1 to {tokens}, the tokens of a step")
    texts = load_texts(data)
    typer.echo("| model | step | without, ms | with / without (quartiles) |\n|---|---|---:|---:|")
    with TemporaryDirectory() as folder:
        for name in all_known(models, NAMES):
            path = build(name, Path(folder) / name, texts.for_tokenizer)
            model = RewardModel.from_pretrained(path, dtype="auto")
            for length in sizes:
                groups = trial_groups(model.encoder, tokens, length)
                seconds, ratios = _measure(model, groups, rounds)
                low, middle, high = statistics.quantiles(ratios, n=4)
                step = f"{len(groups):,} responses of {groups[0][0].tokens:,} tokens"
                typer.echo(f"| {name} | {step} | {1e3 * seconds:.1f} | {middle:.3f} ({low:.3f} to {high:.3f}) |")


def _measure(model: RewardModel, groups: list[list[EncodedResponse]], rounds: int) -> tuple[float, list[float]]:
    """Returns the median seconds of a step without uncertainty, and for each round the ratio of with to without."""
    _, features = model.score_features(groups)
    size = features[0].shape[1]
    posterior = HeadPosterior.of(Laplace(np.eye(size) / size, 1.0), np.concatenate(features))

    def step(*, uncertain: bool) -> Callable[[], object]:
        if uncertain:
            model.read_uncertainty(posterior)
        else:
            model.readout = None
        return lambda: model.run_step(groups)

    pairs = [(timed(step(uncertain=False)), timed(step(uncertain=True))) for _ in range(rounds + _WARM_UP)][_WARM_UP:]
    return statistics.median(without for without, _ in pairs), [uncertain / without for without, uncertain in pairs]


if __name__ == "__main__":
    app_of(main)()
