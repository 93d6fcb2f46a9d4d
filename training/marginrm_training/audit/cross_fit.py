"""Cross-fitting: every pair is judged by a model that was trained without its prompt; folds are kept, so audits resume."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from marginrm.atomic_file import replace_file
from marginrm.calibration import Floats
from marginrm.errors import ConfigError, DataError
from marginrm.reward_model import RewardModel
from marginrm_training.config import TrainConfig
from marginrm_training.data.mixture import read_training
from marginrm_training.data.splits import EncodedPair, Split, check_margins, encode_pairs, prompt_key
from marginrm_training.evaluation.pairs import score_pairs
from marginrm_training.run.distributed import ranks
from marginrm_training.run.dry_run import computed_tokens, measure
from marginrm_training.run.lora import merge_lora
from marginrm_training.run.train import load, tune_for_training
from marginrm_training.run.trainer import MarginTrainer

_NEVER = 10**9  # steps: folds resume, steps within one do not


def audited_pairs(config: TrainConfig) -> Split:
    """Reads and encodes every row of the training sources, the ones that a run would hold out included.

    Raises:
        ConfigError: Several processes were started.
        DataError: A source cannot be read, or no pair is usable.
    """
    if ranks() > 1:
        raise ConfigError("`marginrm audit` trains in one process. Start it without a launcher.")
    method = config.method.method()
    sources = read_training(config.data, config.seed)
    rows = [pair for source in sources for pair in source.pairs]
    check_margins(rows, method, ignore=config.data.ignore_margins)
    split = encode_pairs("audit", rows, load(config)[1], method, config.data.too_long, config.data.limit)
    for source in sources:
        split.excluded.update(source.excluded)
    if not split.pairs:
        raise DataError(f"{', '.join(source.name for source in sources)}: no usable pairs. {split.summary()}")
    return split


def folds_by_prompt(pairs: Sequence[EncodedPair], folds: int, seed: int) -> list[list[int]]:
    """Returns the places of the pairs of each fold: all pairs of a prompt in one, and folds of about one size.

    Raises:
        ConfigError: There are fewer prompts than folds.
    """
    by_prompt: dict[str, list[int]] = {}
    for place, pair in enumerate(pairs):
        by_prompt.setdefault(prompt_key(pair.pair.prompt), []).append(place)
    if len(by_prompt) < folds:
        raise ConfigError(f"{folds} folds need as many prompts, and the pairs have {len(by_prompt)}. Lower --folds.")
    prompts = sorted(by_prompt)
    random.Random(f"{seed}:folds").shuffle(prompts)
    found: list[list[int]] = [[] for _ in range(folds)]
    for prompt in sorted(prompts, key=lambda prompt: -len(by_prompt[prompt])):  # stable: equal sizes stay shuffled
        min(found, key=len).extend(by_prompt[prompt])
    return [sorted(fold) for fold in found]


def cost(config: TrainConfig, pairs: Sequence[EncodedPair], folds: int) -> str:
    """Returns a sentence on the work and the time of an audit, measured on one batch."""
    module, _ = load(config)
    batch = config.optim.train_batch
    tokens = computed_tokens(pairs, batch, module)
    seconds = measure(config, pairs, module).seconds_per_token * tokens * ((folds - 1) * config.optim.epochs + 1 / 3)
    share = (folds - 1) / folds
    return (
        f"audit: {folds} trainings of about {share * len(pairs):,.0f} pairs each, and each fold scored once; together "
        f"{tokens * (folds - 1) * config.optim.epochs:,.0f} tokens of training, about {seconds / 60:.1f} minutes "
        "(measured on one batch)"
    )


def cross_fit(
    config: TrainConfig, pairs: Sequence[EncodedPair], fold: Sequence[int], number: int, folder: Path, *, resume: bool
) -> Floats:
    """Returns the margins of a fold's pairs by a model that was trained on all others, [pairs of the fold].

    Args:
        config: The run to train by.
        pairs: All pairs.
        fold: Places of the pairs to judge.
        number: The fold's number, for its file.
        folder: The audit's folder; a finished fold is kept in it as `fold-NUMBER.json`.
        resume: Take a finished fold from its file.

    Raises:
        ConfigError: The file belongs to an audit with other settings or data.
    """
    path, key = folder / f"fold-{number}.json", _key(config, pairs, fold)
    if resume and path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] != key:
            raise ConfigError(
                f"{path} belongs to an audit with other settings or data. Choose another --output, or start over with "
                "--no-resume."
            )
        return np.array(kept["margins"], dtype=np.float64)
    judged = set(fold)
    d = _judge(config, [pair for place, pair in enumerate(pairs) if place not in judged], [pairs[i] for i in fold])
    replace_file(path, json.dumps({"key": key, "margins": d.tolist()}))
    return d


def _judge(config: TrainConfig, known: Sequence[EncodedPair], judged: Sequence[EncodedPair]) -> Floats:
    settings = config.model_copy(update={"save_every": _NEVER, "eval_every": 0, "loggers": ()})
    module, encoder = load(settings)
    with tempfile.TemporaryDirectory() as steps:
        trainer = MarginTrainer(module, known, settings, Path(steps))
        tune_for_training(trainer, module)
        trainer.train()
    merge_lora(module)
    return score_pairs(RewardModel.from_module(module, encoder), judged, progress=True).d


def _key(config: TrainConfig, pairs: Sequence[EncodedPair], fold: Sequence[int]) -> str:
    """Returns a digest of all that decides a fold's margins: settings, texts as ids, and the fold."""
    digest = hashlib.sha256(config.model_dump_json(exclude={"output"}).encode())
    for pair in pairs:
        digest.update(repr((pair.chosen.ids, pair.rejected.ids, pair.label)).encode())
    digest.update(repr(list(fold)).encode())
    return digest.hexdigest()
