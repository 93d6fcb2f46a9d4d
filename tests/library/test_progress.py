"""Progress: a bar where there is a terminal, and lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
import termios

import pytest

from marginrm.progress import progress_bar

WORK = """
from marginrm.progress import progress_bar
with progress_bar("scoring", 1000, "response") as bar:
    for _ in range(1000):
        bar.update(1)
"""


def test_without_a_terminal_states_are_few_whole_lines() -> None:
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True)
    assert "\r" not in done.stderr
    lines = done.stderr.splitlines()
    assert 1 <= len(lines) <= 3  # 1,000 updates within 30 seconds: the first and the last state
    assert lines[-1].startswith("scoring: 100%")
    assert "1000/1000" in lines[-1]
    assert not done.stdout


def test_on_a_terminal_one_line_is_drawn_again() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 80))
    subprocess.run([sys.executable, "-c", WORK], stderr=theirs, check=True)
    os.close(theirs)
    drawn = b""
    with contextlib.suppress(OSError):  # Linux ends a terminal that has been closed by an error
        while more := os.read(ours, 4096):
            drawn += more
    os.close(ours)
    assert b"\r" in drawn
    assert b"1000/1000" in drawn


def test_a_disabled_bar_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar("scoring", 3, "response", disable=True) as bar:
        bar.update(3)
    assert capfd.readouterr().err == ""
