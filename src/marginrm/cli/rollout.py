"""The command `marginrm rollout`: both revisions score the same traffic, and it says GO or STOP."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marginrm.cli.reading import takes_reading
from marginrm.errors import DataError
from marginrm.reading import ReadingOptions
from marginrm.text import Dtype, Truncation

if TYPE_CHECKING:
    from marginrm.rollout.comparison import Results
    from marginrm.rollout.decision import Decision
    from marginrm.rollout.revisions import Identity, Revision

_BOUNDS = "Bounds of a GO"
_STOP = 1  # exit status


@takes_reading
def rollout(
    traffic: Annotated[
        list[str],
        typer.Argument(
            metavar="TRAFFIC...",
            help="Rows as for `marginrm score` (pairs, groups, single responses), or bodies of requests to /score and "
            "/best-of-n: files, folders, globs or a data set.",
            show_default=False,
        ),
    ],
    old: Annotated[
        str,
        typer.Option(metavar="URL|MODEL", help="The present revision: a server, or a checkpoint.", show_default=False),
    ],
    new: Annotated[
        str, typer.Option(metavar="URL|MODEL", help="The new one: a server, or a checkpoint.", show_default=False)
    ],
    reading: ReadingOptions,
    old_model: Annotated[str, typer.Option(metavar="NAME", help="Name of the model on the server --old.")] = "default",
    new_model: Annotated[str, typer.Option(metavar="NAME", help="Name of the model on the server --new.")] = "default",
    api_key: Annotated[
        str | None,
        typer.Option(envvar="MARGINRM_API_KEY", help="API key of both servers.", show_default=False),
    ] = None,
    new_api_key: Annotated[
        str | None,
        typer.Option(
            envvar="MARGINRM_NEW_API_KEY", help="API key of the server --new, if another.", show_default=False
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first rows only.", show_default=False)] = None,
    batch: Annotated[int, typer.Option(min=1, help="Responses that are sent together.")] = 64,
    labels: Annotated[
        bool, typer.Option(help="Whether `chosen` is the better response; otherwise no accuracy and no calibration.")
    ] = True,
    truncation: Annotated[
        Truncation, typer.Option(help="For sequences over the limit: error, or cut the prompt.")
    ] = "error",
    dtype: Annotated[Dtype, typer.Option(help="dtype of a checkpoint that is loaded here.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N, for the same.")] = "auto",
    min_agreement: Annotated[
        float,
        typer.Option(min=0, max=1, help="Least share of preferences that agree (lower end).", rich_help_panel=_BOUNDS),
    ] = 0.8,
    min_pick_agreement: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Least share of groups with the same pick (lower end).", rich_help_panel=_BOUNDS
        ),
    ] = 0.5,
    max_reward_shift: Annotated[
        float, typer.Option(min=0, help="Largest shift of the mean reward, in stds.", rich_help_panel=_BOUNDS)
    ] = 0.5,
    max_margin_ks: Annotated[
        float, typer.Option(min=0, max=1, help="Largest KS distance of margins / T.", rich_help_panel=_BOUNDS)
    ] = 0.25,
    max_accuracy_drop: Annotated[
        float, typer.Option(min=0, help="Largest fall of the accuracy (lower end).", rich_help_panel=_BOUNDS)
    ] = 0.05,
    max_ece_rise: Annotated[
        float, typer.Option(min=0, help="Largest rise of the calibration error.", rich_help_panel=_BOUNDS)
    ] = 0.05,
    max_time_ratio: Annotated[
        float, typer.Option(min=0, help="Largest time, NEW / OLD (lower end).", rich_help_panel=_BOUNDS)
    ] = 1.5,
    max_lost: Annotated[
        float,
        typer.Option(min=0, max=1, help="Largest share of rows that only OLD can score.", rich_help_panel=_BOUNDS),
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say if a new revision may replace the present one: both score the same traffic, and the results are compared.

    Bounds with "lower end" hold for the worse end of a 95% interval, so too little traffic is a STOP. Exit status: 0 for
    GO, 1 for STOP. docs/operations.md has the roll-out around it.
    """
    from marginrm.progress import Progress
    from marginrm.rollout.decision import Thresholds, decide
    from marginrm.rollout.run import score_both
    from marginrm.rollout.traffic import read_traffic

    rows = islice(read_traffic(traffic), limit)
    places = ((old, old_model, api_key), (new, new_model, new_api_key or api_key))
    with ExitStack() as opened:
        both = []
        for place in places:
            both.append(_revision(*place, truncation, dtype, device, reading))
            opened.callback(both[-1].close)
        before = [one.cached() for one in both]
        progress = opened.enter_context(Progress("scoring with both", limit))
        results = score_both(both[0], both[1], rows, batch, progress.update)
        cached = [one.cached() - hits for one, hits in zip(both, before, strict=True)]
    identities = [one.identity for one in both]
    if not (results.rows or results.lost or results.gained):
        raise DataError(f"{traffic[0]}: neither revision can score a row of this traffic ({_counts(results)}).")
    decision = decide(
        results,
        (identities[0].temperature, identities[1].temperature),
        Thresholds(
            agreement=min_agreement,
            pick_agreement=min_pick_agreement,
            reward_shift=max_reward_shift,
            margin_ks=max_margin_ks,
            accuracy_drop=max_accuracy_drop,
            ece_rise=max_ece_rise,
            time_ratio=max_time_ratio,
            lost=max_lost,
        ),
        labelled=labels,
        cached=(cached[0], cached[1]),
    )
    typer.echo(_json(identities, results, decision) if as_json else _table(identities, results, decision))
    if not decision.go:
        raise typer.Exit(_STOP)


def _revision(
    place: str,
    model: str,
    api_key: str | None,
    truncation: Truncation,
    dtype: Dtype,
    device: str,
    reading: ReadingOptions,
) -> Revision:
    from marginrm.bulk.scoring import ModelOptions
    from marginrm.rollout.revisions import LoadedRevision, ServedRevision

    if place.startswith(("http://", "https://")):
        return ServedRevision(place, model, api_key, truncation)
    return LoadedRevision(ModelOptions(model=place, dtype=dtype, device=device, reading=reading), truncation)


def _json(identities: list[Identity], results: Results, decision: Decision) -> str:
    said: dict[str, Any] = {"verdict": "go" if decision.go else "stop"}
    said |= {name: asdict(one) for name, one in zip(("old", "new"), identities, strict=True)}
    kinds = [row.kind for row in results.rows]
    said["rows"] = {
        "compared": len(kinds),
        "pairs": kinds.count("pair"),
        "groups": kinds.count("group"),
        "items": kinds.count("item"),
        "unreadable": results.unreadable,
        "scored_by_neither": results.neither,
        "scored_by_old_only": sum(results.lost.values()),
        "scored_by_new_only": results.gained,
    }
    said["checks"] = [asdict(check) for check in decision.checks]
    said["notes"] = decision.notes
    return json.dumps(said, indent=2)


def _table(identities: list[Identity], results: Results, decision: Decision) -> str:
    lines = [
        f"{name}  {one.place}  {one.name}  {one.revision}  T {one.temperature:.3f}"
        for name, one in zip(("OLD", "NEW"), identities, strict=True)
    ]
    if identities[0].revision == identities[1].revision:
        lines.append("Both serve the same revision.")
    lines += [_counts(results), ""]
    width = max(len(check.name) for check in decision.checks)
    for check in decision.checks:
        within = "" if check.low is None else f"[{check.low:.3f}, {check.high:.3f}]"
        lines.append(
            f"{'ok' if check.ok else 'STOP':<5}{check.name:<{width}}  {check.value:>7.3f} {within:>17}  bound "
            f"{check.bound:>6.3f}  ({check.note})"
        )
    return "\n".join([*lines, "", *decision.notes, "GO" if decision.go else "STOP"])


def _counts(results: Results) -> str:
    kinds = [row.kind for row in results.rows]
    text = f"{len(kinds):,} rows compared: {kinds.count('pair'):,} pairs, {kinds.count('group'):,} groups, "
    text += f"{kinds.count('item'):,} single responses"
    others = {
        "cannot be read": results.unreadable,
        "neither can score": results.neither,
        "only OLD can score": sum(results.lost.values()),
        "only NEW can score": results.gained,
    }
    return "; ".join([text, *(f"{count:,} that {reason}" for reason, count in others.items() if count)])
