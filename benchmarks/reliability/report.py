"""Reports -> JSON files, and the sections of docs/reliability.md, each between two markers."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil

PAGE = Path("docs/reliability.md")


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a report.

    Attributes:
        name: The requirement.
        seen: The observation.
        passed: Whether the observation meets the requirement.
    """

    name: str
    seen: str
    passed: bool


@dataclass(frozen=True, slots=True)
class Report:
    """One run.

    Attributes:
        name: Title of its section in docs/reliability.md.
        command: The command that repeats it.
        facts: The circumstances, as text by name.
        checks: The requirements and observations.
    """

    name: str
    command: str
    facts: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """True if every check passed."""
        return all(check.passed for check in self.checks)


def write(report: Report, key: str, folder: Path, page: Path = PAGE) -> None:
    """Writes `folder`/KEY.json and the section of the page that is marked with this key."""
    folder.mkdir(parents=True, exist_ok=True)
    found = asdict(report) | {"machine": machine(), "written": _now(), "passed": report.passed}
    (folder / f"{key}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    page.write_text(with_section(page.read_text(encoding="utf-8"), key, markdown(report)), encoding="utf-8")


def with_section(text: str, key: str, section: str) -> str:
    """Returns a page with the text between a key's two markers replaced.

    Raises:
        ValueError: The page lacks the markers.
    """
    begin, end = f"<!-- {key}: begin -->", f"<!-- {key}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"The page needs {begin} and {end}, once each and in this order.")
    before, after = text[: text.index(begin)], text[text.index(end) :]
    return f"{before}{begin}\n{section}\n{after}"


def markdown(report: Report) -> str:
    """Returns a report as Markdown."""
    lines = [f"```sh\n{report.command}\n```", "", f"{_now()[:10]}; {machine()}.", ""]
    lines += [f"- {name}: {fact}" for name, fact in report.facts.items()]
    lines += ["", "| requirement | observed | passed |", "|---|---|---|"]
    lines += [f"| {check.name} | {check.seen} | {'yes' if check.passed else '**no**'} |" for check in report.checks]
    return "\n".join(lines)


def machine() -> str:
    """Returns the machine, and its load at the end of the run."""
    load = psutil.getloadavg()[0]
    return f"{psutil.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, load {load:.1f} at the end"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
