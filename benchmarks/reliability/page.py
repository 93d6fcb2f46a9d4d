"""Reports -> JSON, and each its section of docs/reliability.md, between two markers."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import psutil

from benchmarks.reliability.checks import Report

PAGE = Path("docs/reliability.md")


def write(report: Report, key: str, folder: Path, page: Path = PAGE) -> None:
    """Writes `folder`/KEY.json and the section of the page that is marked with this key."""
    folder.mkdir(parents=True, exist_ok=True)
    found = asdict(report) | {"machine": machine(), "written": _now(), "passed": report.passed}
    (folder / f"{key}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    page.write_text(with_section(page.read_text(encoding="utf-8"), key, markdown(report)), encoding="utf-8")


def with_section(text: str, key: str, section: str) -> str:
    """Returns a page with what lies between a key's two markers replaced.

    Raises:
        ValueError: The page has no such markers.
    """
    begin, end = f"<!-- {key}: begin -->", f"<!-- {key}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"The page needs {begin} and {end}, once each.")
    before, after = text[: text.index(begin)], text[text.index(end) :]
    return f"{before}{begin}\n{section}\n{after}"


def markdown(report: Report) -> str:
    """Returns a report as Markdown."""
    lines = [f"```sh\n{report.command}\n```", "", f"{_now()[:10]}; {machine()}.", ""]
    lines += [f"- {name}: {fact}" for name, fact in report.facts.items()]
    lines += ["", "| must hold | seen | |", "|---|---|---|"]
    lines += [f"| {check.name} | {check.seen} | {'yes' if check.passed else '**no**'} |" for check in report.checks]
    return "\n".join(lines)


def machine() -> str:
    """Returns what it was measured on, and how busy that was with other things."""
    load = psutil.getloadavg()[0]
    return f"{psutil.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, load {load:.1f} at the end"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
