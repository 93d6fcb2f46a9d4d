"""Rows of published preference data -> pairs, for formats other than columns `prompt`, `chosen`, `rejected`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from marginrm.errors import DataError
from marginrm.texts.preferences import PreferencePair, parse_pair

Form = Literal["pairs", "hh_rlhf", "shp"]
Parser = Callable[[Mapping[str, Any], str], PreferencePair]

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_SHP_FIELDS = ("history", "human_ref_A", "human_ref_B", "labels")


def parse_hh_rlhf(row: Mapping[str, Any], source: str) -> PreferencePair:
    r"""Reads a pair of Anthropic's HH-RLHF (arXiv 2204.05862): two dialogues of `\n\nHuman:` and `\n\nAssistant:` turns.

    The prompt becomes messages, so that a chat template applies. A few published rows differ before the last assistant
    turn, so they compare answers to different prompts.

    Raises:
        DataError: The row has another form, or its dialogues answer different prompts.
    """
    for name in ("chosen", "rejected"):
        text = row.get(name)
        if not isinstance(text, str) or not _HH_TURN.match(text):
            raise DataError.of_row(
                source,
                "not an HH-RLHF dialogue",
                f"field '{name}' is not an HH-RLHF dialogue. Use format = \"pairs\" for other data.",
            )
    return parse_pair(row, source)


def parse_shp(row: Mapping[str, Any], source: str) -> PreferencePair:
    """Reads a pair of Stanford's SHP (arXiv 2110.08420): a post, two comments, and `labels` = 1 if A was preferred.

    The ratio of the comments' votes (`score_ratio`) stays in `extra`: it is neither a probability nor a margin.

    Raises:
        DataError: The row has another form.
    """
    absent = [name for name in _SHP_FIELDS if name not in row]
    if absent or row["labels"] not in (0, 1):
        wrong = f"lacks {', '.join(absent)}" if absent else "has labels other than 0 and 1"
        raise DataError.of_row(
            source, "not an SHP row", f'{wrong}, so it is not an SHP row. Use format = "pairs" for other data.'
        )
    first, second = row["human_ref_A"], row["human_ref_B"]
    chosen, rejected = (first, second) if row["labels"] == 1 else (second, first)
    rest = {key: value for key, value in row.items() if key not in _SHP_FIELDS}
    return parse_pair(rest | {"prompt": row["history"], "chosen": chosen, "rejected": rejected}, source)


PARSERS: dict[Form, Parser] = {"pairs": parse_pair, "hh_rlhf": parse_hh_rlhf, "shp": parse_shp}
