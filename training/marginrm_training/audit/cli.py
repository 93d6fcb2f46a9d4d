"""`marginrm audit`: pairs whose labels are probably wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marginrm.errors import ConfigError

if TYPE_CHECKING:
    from marginrm_training.audit.suspects import Suspect
    from marginrm_training.config import TrainConfig

SUSPECTS = "suspects.jsonl"


def audit(
    source: Annotated[
        Path, typer.Argument(help="TOML file of a run, or preference pairs (then --model too).", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", help="Backbone to train, for pairs without a TOML file.", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting: --set optim.learning_rate=2e-5. Repeatable.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the finished folds and of suspects.jsonl.")] = Path("audit"),
    folds: Annotated[int, typer.Option(min=2, help="Parts of the data; each is judged by a model of the others.")] = 5,
    above: Annotated[float, typer.Option(min=0, max=1, help="Smallest probability of a wrong label to list.")] = 0.5,
    show: Annotated[int, typer.Option(min=0, help="Number of suspects to print.")] = 20,
    without: Annotated[
        Path | None, typer.Option(help="Also write the rows without the suspects, as .jsonl.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cost, train nothing.")] = False,
    resume: Annotated[bool, typer.Option(help="Take finished folds from the output folder.")] = True,
) -> None:
    """List pairs whose labels are probably wrong: models that never saw a pair disagree with its label, and are sure.

    The pairs are split into folds by prompt. For each fold a model is trained on the others and judges it. The share of
    wrong labels is estimated from all judgements. Finished folds are kept, so the same command continues where it ended.
    """
    import numpy as np
    from transformers.utils import logging as transformers_logging

    from marginrm_training.audit.cross_fit import audited_pairs, cost, cross_fit, folds_by_prompt
    from marginrm_training.audit.suspects import fit_label_noise, in_units, suspects

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config = _config(source, model, overrides or ())
    if without:
        _check_without(config, without)
    split = audited_pairs(config)
    typer.echo(split.summary())
    typer.echo(cost(config, split.pairs, folds))
    if dry_run:
        return
    output.mkdir(parents=True, exist_ok=True)
    places = folds_by_prompt(split.pairs, folds, config.seed)
    margins = []
    for number, fold in enumerate(places, start=1):
        typer.echo(f"fold {number} of {folds}: {len(fold):,} pairs")
        margins.append(cross_fit(config, split.pairs, fold, number, output, resume=resume))
    d = np.empty(len(split.pairs))
    for fold, values in zip(places, in_units(margins), strict=True):
        d[fold] = values
    noise = fit_label_noise(d)
    found = suspects(split.pairs, d, noise, above)
    write_suspects(output / SUSPECTS, found)
    typer.echo(
        f"estimated share of wrong labels: {noise.share:.1%}, about {noise.share * len(d):,.0f} of {len(d):,} pairs"
    )
    typer.echo(
        f"{len(found):,} are wrong with probability {above:g} or more, the first {min(show, len(found))} of them:"
    )
    for one in found[:show]:
        typer.echo(f"{one.pair.pair.source}  wrong {one.wrong:.2f}  confidence in the other {one.confidence:.2f}")
    typer.echo(f"written to {output / SUSPECTS}")
    if without:
        kept = write_without(config, without, {one.pair.pair.source for one in found})
        typer.echo(f"{kept:,} rows without the suspects written to {without}")


def write_suspects(path: Path, found: Sequence[Suspect]) -> None:
    """Writes suspects as JSONL: `source`, `wrong`, `confidence`, `margin` and the texts."""
    from marginrm.atomic_file import replace_file

    rows = [
        {
            "source": one.pair.pair.source,
            "wrong": one.wrong,
            "confidence": one.confidence,
            "margin": one.margin,
            "prompt": one.pair.pair.prompt,
            "chosen": one.pair.pair.chosen,
            "rejected": one.pair.pair.rejected,
        }
        for one in found
    ]
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_without(config: TrainConfig, path: Path, sources: set[str]) -> int:
    """Writes the rows of `data.train` whose `path:line` is not among `sources`, as JSONL, and returns their number.

    Rows that the audit left out, such as texts over the length limit, stay.
    """
    from marginrm.atomic_file import replace_file
    from marginrm.texts.places import read_raw
    from marginrm_training.config import expand

    assert config.data.train is not None  # the command refuses several sources

    def unreadable(error: Exception) -> None:
        typer.echo(f"left out: {error}", err=True)

    rows = [row for row, place in read_raw(expand(config.data.train), unreadable) if place not in sources]
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


def _check_without(config: TrainConfig, path: Path) -> None:
    """Checks, before hours of training, that the rows can be written without replacing those that are audited.

    Raises:
        ConfigError: They cannot.
    """
    from marginrm_training.config import expand

    if config.data.train is None:
        raise ConfigError(
            "--without writes the rows of one file, and the run has several sources. Audit them one by one."
        )
    train = Path(expand(config.data.train))
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise ConfigError(f"--without {path}: give the path of a file, in a folder that exists.")
    if path.exists() and train.exists() and path.samefile(train):
        raise ConfigError(f"--without {path} is the file that is audited. Give another one.")


def _config(source: Path, model: str | None, overrides: Sequence[str]) -> TrainConfig:
    """Returns the run of a TOML file, or plain Bradley-Terry training of a backbone on a file of pairs.

    Raises:
        ConfigError: A setting is wrong, or pairs come without a model.
    """
    from marginrm_training.config import apply_override, load_config, parse_config

    if source.suffix == ".toml":
        return load_config(source, [*overrides, *([f"model.path={model}"] if model else [])])
    if model is None:
        raise ConfigError(f"{source}: pairs need a model to train. Add --model BACKBONE, or give a run's TOML file.")
    raw: dict[str, Any] = {
        "output": "audit",
        "model": {"path": model},
        "data": {"train": str(source)},
        "method": {"preset": "bt"},
    }
    for override in overrides:
        apply_override(raw, override)
    return parse_config(raw, str(source))
