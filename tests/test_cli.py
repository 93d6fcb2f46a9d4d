"""The command line as people meet it: help that lists, errors in one line, and what is not installed named."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points

import pytest
from typer.testing import CliRunner

from marginrm.cli import GROUP, build_app

COMMANDS = ("score", "serve", "key", "train", "evaluate", "calibrate", "compare", "best-of-n", "ablate", "demo")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from marginrm.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_every_command_is_found_and_has_help() -> None:
    assert {entry.name for entry in entry_points(group=GROUP)} >= set(COMMANDS)
    for name in COMMANDS:
        result = CliRunner().invoke(build_app(), [name, "--help"], catch_exceptions=False)
        assert result.exit_code == 0
        assert "Usage:" in result.output


def test_help_is_quick_because_it_imports_no_torch() -> None:
    code = (
        "import sys\nfrom marginrm.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_an_unknown_command_and_an_unusable_model_are_told_in_a_line() -> None:
    unknown = run("scroe")
    assert unknown.returncode == 2
    assert "scroe" in unknown.stderr
    missing = run("evaluate", "--model", "/nowhere", "--data", "/nowhere.jsonl")
    assert missing.returncode == 1
    assert missing.stderr.count("marginrm: error:") == 1
    assert "/nowhere" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_a_command_whose_extra_is_not_installed_says_how_to_install_it() -> None:
    entry = EntryPoint("serve", "marginrm_service.no_such_module:serve", GROUP)
    app = build_app([entry, EntryPoint("train", "marginrm_training.commands:train", GROUP)])
    with pytest.raises(Exception, match=r'pip install "marginrm\[service\]"'):
        CliRunner().invoke(app, ["serve", "--port", "1"], catch_exceptions=False)
    assert 'pip install "marginrm[service]"' in CliRunner().invoke(app, ["--help"]).output.replace("\n", " ")
