"""The command `marginrm inspect`: what a checkpoint is, how it is read, and whether that is what transformers gives."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marginrm.cli.reading import takes_reading
from marginrm.reading import CheckpointReading, ReadingOptions
from marginrm.text import Dtype

if TYPE_CHECKING:
    from marginrm.reward_model import RewardModel

TOLERANCE = 1e-4  # in float32, relative to the larger of 1 and the reward


@takes_reading
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint folder or Hub name.")],
    reading: ReadingOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    verify: Annotated[
        Path | None,
        typer.Option(
            metavar="PAIRS.jsonl",
            help="Score these pairs with a plain loop in transformers, too, and compare.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most responses to compare.")] = 200,
    dtype: Annotated[Dtype, typer.Option(help="dtype of the backbone; float32 with --verify.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    max_length: Annotated[int | None, typer.Option(help="Most tokens a sequence may have.", show_default=False)] = None,
) -> None:
    """Say what a checkpoint is: backbone, head, template, BOS and EOS, where the reward is read, how it is computed.

    With --verify, rewards are held against a plain loop in transformers, which loads the checkpoint afresh and computes
    one response at a time as its documentation says. A difference above 1e-4 is an error (exit code 1).
    """
    from marginrm.reward_model import RewardModel

    model = RewardModel.from_pretrained(
        path, dtype="float32" if verify else dtype, device=device, max_length=max_length, reading=reading
    )
    assert model.reading is not None  # from_pretrained makes one
    found: dict[str, Any] = model.reading.as_dict() | {
        "forward_path": model.forward_path,
        "forward_reason": model.forward_reason,
        "calibrated": model.info.calibrated,
        "revision": model.info.revision,
    }
    if verify:
        found["verified"] = compare_with_plain(model, model.reading, path, verify, limit=limit)
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False) if as_json else _table(found))
    if verify and not found["verified"]["agrees"]:
        raise typer.Exit(1)


def compare_with_plain(
    model: RewardModel, reading: CheckpointReading, path: str, pairs: Path, *, limit: int
) -> dict[str, Any]:
    """Holds a model's rewards against those of a plain loop in transformers over the same texts.

    Args:
        model: The model, in float32.
        reading: How its checkpoint is read.
        path: The checkpoint.
        pairs: A file of preference pairs.
        limit: The most responses to compare.

    Returns:
        `responses` compared, `left_out` (texts that the encoder refuses), `malformed_rows` (their lines),
        `largest_difference` relative to the larger of 1 and the reward, the rewards `there`, and whether they agree within
        `TOLERANCE`.
    """
    from marginrm.errors import DataError, EncodingError
    from marginrm.loading.plain_usage import plain_reward
    from marginrm.texts.preferences import read_pairs

    odd: list[DataError] = []
    texts = [(pair.prompt, text) for pair in read_pairs(pairs, odd.append) for text in (pair.chosen, pair.rejected)]
    if odd and not texts:
        raise odd[0]
    encoded = [(text, model.encoder.encode_group(text[0], [text[1]])[0]) for text in islice(texts, limit)]
    usable = [(text, one) for text, one in encoded if not isinstance(one, EncodingError)]
    ours = [rewards[0] for rewards in model.score_encoded([[one] for _, one in usable])]
    plain = plain_reward(path, reading)
    theirs = [plain(prompt, response) for (prompt, response), _ in usable]
    differences = [abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True)]
    worst = max(range(len(differences)), key=differences.__getitem__, default=None)
    return {
        "responses": len(usable),
        "left_out": len(encoded) - len(usable),
        "malformed_rows": [error.source for error in odd],
        "largest_difference": None if worst is None else differences[worst],
        "there": None if worst is None else {"index": worst, "marginrm": ours[worst], "transformers": theirs[worst]},
        "agrees": worst is not None and differences[worst] <= TOLERANCE,
    }


def _table(found: dict[str, Any]) -> str:
    rows = {name: value for name, value in found.items() if value not in (None, {}, [], "")}
    width = max(map(len, rows))
    lines = []
    for name, value in rows.items():
        parts = value if isinstance(value, list) else [value]
        if isinstance(value, dict):
            parts = [f"{key}: {inner}" for key, inner in value.items()]
        lines += [f"{name if index == 0 else '':<{width}}  {part}" for index, part in enumerate(parts)]
    return "\n".join(lines)
