"""The frame of every report: one self-contained HTML file in which texts of the data are escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from marginrm.figures import STYLESHEETS, stylesheet
from marginrm_training.data.splits import EncodedPair
from marginrm_training.report.text import lines

_SHOWN = 4_000  # characters of one text


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, a note, and drawings as SVG text."""

    title: str
    note: str
    drawings: Sequence[str]


@dataclass(frozen=True, slots=True)
class Examples:
    """Texts of pairs, each folded until it is opened.

    Attributes:
        title: Heading.
        note: Their number of how many, and their order.
        pairs: Each with its headline.
    """

    title: str
    note: str
    pairs: Sequence[tuple[str, EncodedPair]]


def write_page(
    path: Path,
    title: str,
    subtitle: str,
    metrics: Mapping[str, float],
    sections: Sequence[Section],
    examples: Sequence[Examples],
) -> None:
    """Writes a page; equal arguments give equal bytes.

    Raises:
        OSError: It cannot be written.
    """
    environment = Environment(
        loader=PackageLoader("marginrm_training.report", "."), autoescape=True, undefined=StrictUndefined
    )
    style = "".join(map(stylesheet, STYLESHEETS))
    html = environment.get_template("report.html.j2").render(
        style=style,
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        title=title,
        subtitle=subtitle,
        metrics=lines(metrics),
        sections=sections,
        examples=[
            {
                "title": group.title,
                "note": group.note,
                "pairs": [
                    {
                        "headline": headline,
                        "source": one.pair.source,
                        "texts": [
                            (name, _text(value))
                            for name, value in (
                                ("Prompt", one.pair.prompt),
                                ("Chosen", one.pair.chosen),
                                ("Rejected", one.pair.rejected),
                            )
                        ],
                    }
                    for headline, one in group.pairs
                ],
            }
            for group in examples
        ],
    )
    path.write_text(html, encoding="utf-8")


def _text(value: str | Sequence[Mapping[str, str]]) -> str:
    """Returns a text or a dialogue for the page, cut at `_SHOWN` characters with the rest counted."""
    text = value if isinstance(value, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}\n[{len(text) - _SHOWN:,} more characters]"
