"""A checkpoint on a benchmark: read, scored with the same call that serving uses, and judged by the benchmark's rule."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm.auto import tqdm

from marginrm.encoding import EncodedResponse
from marginrm.reward_model import RewardModel
from marginrm_training.evaluation.benchmarks.formats import Case
from marginrm_training.evaluation.benchmarks.scoring import UNREADABLE, Rewards


def score_cases(model: RewardModel, cases: Sequence[Case]) -> tuple[list[Rewards], dict[str, float]]:
    """Scores all responses of all cases, cutting prompts from the left where that makes a response fit.

    A case with a response that the model cannot read counts as wrong: leaving it out would make the benchmark easier.

    Returns:
        The rewards of each case's chosen and rejected responses, and counts: `cases`, `truncated` (with a cut prompt)
        and `unreadable`.
    """
    encoded: list[list[EncodedResponse]] = []
    readable: list[int] = []
    truncated = 0
    for index, case in enumerate(cases):
        outcomes = model.encoder.encode_group(case.prompt, [*case.chosen, *case.rejected], "prompt_left")
        kept = [outcome for outcome in outcomes if isinstance(outcome, EncodedResponse)]
        if len(kept) == len(outcomes):
            encoded.append(kept)
            readable.append(index)
            truncated += any(response.truncated for response in kept)
    with tqdm(total=sum(map(len, encoded)), desc="scoring", unit="response") as bar:
        scored = model.score_encoded(encoded, progress=bar.update)
    rewards: list[Rewards] = [UNREADABLE] * len(cases)
    for index, values in zip(readable, scored, strict=True):
        right = len(cases[index].chosen)
        rewards[index] = (values[:right], values[right:])
    counts = {"cases": len(cases), "truncated": truncated, "unreadable": len(cases) - len(readable)}
    return rewards, {name: float(count) for name, count in counts.items()}
