"""The result of one check, and the tools that checks run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one check.

    Attributes:
        status: `ok`, `failed`, or `not checked` if its tool is not on this machine.
        what: The command that ran, or the check that could not run.
        detail: The output of the tool, or the reason why it did not run.
    """

    status: Literal["ok", "failed", "not checked"]
    what: str
    detail: str = ""


def find_tool(name: str) -> str | None:
    """Returns the path of a tool in this environment, or else on this machine."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def run_tool(tool: str, *arguments: str) -> Outcome:
    """Runs a tool of the dev extra in the repository root. A missing tool is a failure, because setup installs it."""
    path = find_tool(tool)
    what = " ".join([tool, *arguments])
    if path is None:
        return Outcome("failed", what, f"{tool} is missing: run `make setup`")
    done = subprocess.run([path, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return Outcome("failed" if done.returncode else "ok", what, done.stdout + done.stderr if done.returncode else "")
