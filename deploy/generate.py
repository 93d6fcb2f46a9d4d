"""Copies the alerts and the Ray Serve configuration into the Kubernetes resources that repeat them.

`python deploy/generate.py` writes them; `python deploy/generate.py --check` only compares, as `make check` does.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The resource, and the file that it repeats between the lines `# generated from FILE` and `# end`.
COPIES = {
    "deploy/ray-serve/rayservice.yaml": "deploy/ray-serve/serve.yaml",
    "deploy/kubernetes/components/monitoring/prometheusrule.yaml": "docker/alerts.yml",
}
START, END = "# generated from {}", "# end"


def refreshed(target: str, source: str) -> str:
    """Returns the text of a resource with the present content of its source, without comments at the top.

    Raises:
        ValueError: The resource lacks the two marking lines.
    """
    text = (ROOT / target).read_text(encoding="utf-8")
    start = START.format(source)
    try:
        head, rest = text.split(start, 1)
        _, tail = rest.split(END, 1)
    except ValueError:
        raise ValueError(f"{target}: the lines {start!r} and {END!r} are missing.") from None
    indent = head[head.rindex("\n") + 1 :]
    content = textwrap.indent("\n".join(_without_comments_at_the_top(source)), indent)
    return f"{head}{start}\n{content}\n{indent}{END}{tail}"


def _without_comments_at_the_top(source: str) -> Iterator[str]:
    lines = iter((ROOT / source).read_text(encoding="utf-8").splitlines())
    for line in lines:
        if not line.startswith("#"):
            yield line
            break
    yield from lines


def main() -> int:
    """Writes or compares every resource; returns 1 if one differs."""
    only_check = "--check" in sys.argv[1:]
    stale = [target for target, source in COPIES.items() if refreshed(target, source) != (ROOT / target).read_text()]
    for target in stale:
        if only_check:
            print(f"{target} differs from {COPIES[target]}: run python deploy/generate.py")
        else:
            (ROOT / target).write_text(refreshed(target, COPIES[target]), encoding="utf-8")
            print(f"Wrote {target}")
    return int(only_check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
