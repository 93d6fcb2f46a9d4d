"""Bulk scoring that is killed: every row comes out once, with the same rewards, and how fast.

`python -m benchmarks.bulk --rows 200000` writes pairs, scores some of them in a plain loop, and all of them with
`marginrm score`: in one process that is killed (SIGKILL) in mid-run and continued, and on Ray with two actors, one of
which is killed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from benchmarks.harness.command import app_of, known
from benchmarks.harness.texts import load_texts
from benchmarks.models import NAMES, build
from marginrm import RewardModel

_PER_PROMPT = 4  # pairs in a row that share a prompt
_ACTOR = "ray::_Scorer"
_POLL = 0.05  # seconds
_TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class Outcome:
    """One way to score the pairs.

    Attributes:
        name: The way.
        rows: Rows in its output.
        rate: Rows per second, without the start.
        difference: Largest difference of a reward to the plain loop's, or to the run in one process.
    """

    name: str
    rows: int
    rate: float
    difference: float


def write_pairs(path: Path, rows: int, texts: Sequence[str]) -> None:
    """Writes pairs of short texts, numbered, of which four in a row share a prompt."""
    words = [word for text in texts for word in text.split()]

    def piece(place: int, length: int) -> str:
        start = place * 7919 % (len(words) - length)
        return " ".join(words[start : start + length])

    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = {
                "number": number,
                "prompt": f"{number // _PER_PROMPT}: {piece(number // _PER_PROMPT, 20)}",
                "chosen": piece(number, 8),
                "rejected": piece(number + 1, 5 + number % 7),
            }
            file.write(json.dumps(row) + "\n")


def plain_loop(model: Path, pairs: Path, rows: int) -> tuple[list[tuple[float, float]], float]:
    """Returns the rewards of the first pairs, one call each, and rows per second."""
    loaded = RewardModel.from_pretrained(model, dtype="float32")
    rewards = []
    with pairs.open(encoding="utf-8") as file:
        started = time.monotonic()
        for line, _ in zip(file, range(rows), strict=False):
            row = json.loads(line)
            found = loaded.compare(row["prompt"], row["chosen"], row["rejected"])
            rewards.append((found.chosen, found.rejected))
    return rewards, len(rewards) / (time.monotonic() - started)


def command(model: Path, pairs: Path, output: Path, shard_rows: int, *options: str) -> list[str]:
    """Returns the command that scores all pairs into a folder."""
    program = str(Path(sys.executable).with_name("marginrm"))
    fixed = ["score", str(pairs), "-o", f"{output}/", "-m", str(model), "--dtype", "float32"]
    return [program, *fixed, "--shard-rows", str(shard_rows), *options]


def shards(folder: Path) -> list[Path]:
    """Returns the complete shards of an output."""
    return sorted(folder.glob("part-*"))


def killed_and_continued(arguments: list[str], folder: Path, half: int) -> float:
    """Kills a run when so many shards are there, continues it, and returns rows per second of the second run."""
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        _wait_for_shards(process, folder, half)
        process.send_signal(signal.SIGKILL)
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    return _rate(done.stdout)


def with_a_killed_actor(arguments: list[str], folder: Path, half: int) -> float:
    """Kills one actor of a run on Ray when so many shards are there; returns rows per second of the whole run."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}  # as the plain command
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        _wait_for_shards(process, folder, half)
        children = psutil.Process(process.pid).children(recursive=True)
        actors = [child for child in children if any(part.startswith(_ACTOR) for part in child.cmdline())]
        actors[0].send_signal(signal.SIGKILL)
        output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"The run on Ray ended with {process.returncode}: {errors}")
    return _rate(output)


def read_rewards(folder: Path, rows: int) -> list[tuple[float, float]]:
    """Returns the rewards of an output in order, after checking that each row is there once.

    Raises:
        SystemExit: A row is missing, doubled or out of place.
    """
    found: list[dict[str, Any]] = []
    for part in shards(folder):
        found += [json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()]
    if [row["number"] for row in found] != list(range(rows)):
        raise SystemExit(f"{folder}: has {len(found):,} rows, which are not the {rows:,} of the input in order")
    return [(row["score"]["chosen"]["reward"], row["score"]["rejected"]["reward"]) for row in found]


def largest_difference(first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]) -> float:
    """Returns the largest difference of a reward, over the rows that both have."""
    return max(abs(one - other) for pair in zip(first, second, strict=False) for one, other in zip(*pair, strict=True))


def measure(
    model: Path, folder: Path, rows: int, loop_rows: int, shard_rows: int, texts: Sequence[str], *, ray: bool
) -> list[Outcome]:
    """Scores the pairs in each way and returns the outcomes.

    Raises:
        SystemExit: A run lost or doubled a row, or its rewards differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pairs = folder / "pairs.jsonl"
    write_pairs(pairs, rows, texts)
    looped, loop_rate = plain_loop(model, pairs, loop_rows)
    half = rows // shard_rows // 2
    arguments = command(model, pairs, folder / "plain", shard_rows)
    rate = killed_and_continued(arguments, folder / "plain", half)
    plain = read_rewards(folder / "plain", rows)
    outcomes = [
        Outcome("plain loop", len(looped), loop_rate, 0.0),
        Outcome("one process, killed and continued", len(plain), rate, largest_difference(looped, plain)),
    ]
    if ray:
        options = ("--ray", "local", "--ray-actors", "2")
        arguments = command(model, pairs, folder / "ray", shard_rows, *options)
        rate = with_a_killed_actor(arguments, folder / "ray", half)
        found = read_rewards(folder / "ray", rows)
        outcomes.append(Outcome("Ray, 2 actors, one killed", len(found), rate, largest_difference(plain, found)))
    worst = max(outcome.difference for outcome in outcomes)
    if worst > _TOLERANCE:
        raise SystemExit(f"rewards differ by {worst:g}")
    return outcomes


def _wait_for_shards(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    while len(shards(folder)) < count:
        if process.poll() is not None:
            raise SystemExit(f"{folder}: the run ended before it could be killed: {process.communicate()}")
        time.sleep(_POLL)


def _rate(output: str) -> float:
    found = re.search(r"rows scored, ([\d,.]+) rows/s", output)
    if found is None:
        raise SystemExit(f"no rate in: {output}")
    return float(found[1].replace(",", ""))


def main(
    rows: Annotated[int, typer.Option(help="Pairs.")] = 200_000,
    loop_rows: Annotated[int, typer.Option(help="Pairs that the plain loop scores.")] = 2_000,
    shard_rows: Annotated[int, typer.Option(help="Rows of a shard.")] = 2_048,
    model: Annotated[str, typer.Option(help=f"One of {', '.join(NAMES)}.")] = "tiny",
    folder: Annotated[Path, typer.Option(help="Folder of models and outputs; must be new.")] = Path("runs/bulk"),
    ray: Annotated[bool, typer.Option(help="Also score on Ray.")] = True,
) -> None:
    """Kill bulk scoring in mid-run, and show that every row comes out once and how fast."""
    texts = load_texts(None).for_tokenizer
    built = build(known(model, NAMES), folder / "models", texts)
    outcomes = measure(built, folder / "out", rows, loop_rows, shard_rows, texts, ray=ray)
    print(f"{'':<36}{'rows':>10}{'rows/s':>10}{'to one process':>16}{'difference':>12}")
    one = outcomes[1].rate
    for outcome in outcomes:
        share = f"{outcome.rate / one:.2f}"
        print(f"{outcome.name:<36}{outcome.rows:>10,}{outcome.rate:>10,.0f}{share:>16}{outcome.difference:>12.1e}")


if __name__ == "__main__":
    app_of(main)()
