"""Figures as SVG, and the stylesheets: the look that the server's pages and training's reports share.

`chart` draws axes and marks, `drawings` holds the named figures. Both are pure Python: numbers in, SVG text out. Marks
carry class names only, and `figures.css` gives those their colours, for light and dark screens alike.
"""

from __future__ import annotations

from importlib.resources import files

STYLESHEETS = ("figures.css", "style.css")


def stylesheet(name: str) -> str:
    """Returns the text of a stylesheet.

    Args:
        name: One of `STYLESHEETS`: `figures.css` for figures alone, `style.css` for the page around them.
    """
    return (files(__name__) / name).read_text(encoding="utf-8")
