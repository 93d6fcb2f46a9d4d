"""The command line: help, errors in one line, and packages that are not installed."""

from __future__ import annotations

import errno
import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from marginrm.cli.main import GROUP, build_app, main
from support.models import tiny_checkpoint
from support.training import config_file, rows, write

COMMANDS = ("score", "serve", "key", "train", "evaluate", "calibrate", "compare", "best-of-n", "ablate", "demo")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from marginrm.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_every_command_is_found_and_has_help() -> None:
    assert {entry.name for entry in entry_points(group=GROUP)} >= set(COMMANDS)
    for name in COMMANDS:
        result = CliRunner().invoke(build_app(), [name, "--help"], catch_exceptions=False)
        assert result.exit_code == 0
        assert "Usage:" in result.output


def test_help_is_quick_because_it_imports_no_torch() -> None:
    code = (
        "import sys\nfrom marginrm.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_an_unknown_command_and_an_unusable_model_give_one_line() -> None:
    unknown = run("scroe")
    assert unknown.returncode == 2
    assert "scroe" in unknown.stderr
    missing = run("evaluate", "--model", "/nowhere", "--data", "/nowhere.jsonl")
    assert missing.returncode == 1
    assert missing.stderr.count("marginrm: error:") == 1
    assert "/nowhere" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_a_command_whose_extra_is_missing_names_it() -> None:
    entry = EntryPoint("serve", "marginrm_service.no_such_module:serve", GROUP)
    app = build_app([entry, EntryPoint("train", "marginrm_training.cli:train", GROUP)])
    with pytest.raises(Exception, match=r'pip install "marginrm\[service\]"'):
        CliRunner().invoke(app, ["serve", "--port", "1"], catch_exceptions=False)
    assert 'pip install "marginrm[service]"' in CliRunner().invoke(app, ["--help"]).output.replace("\n", " ")


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("typo", "run.toml: optim.learning_rat is not a setting. Did you mean 'learning_rate'?"),
        ("missing file", "nowhere.jsonl"),
        (
            "margin in half of the rows",
            "half.jsonl:2: this row has no 'margin', which the method reads from every row.",
        ),
        ("two labels", "head gives 2 values per sequence; a reward model gives 1 (num_labels = 1)"),
    ],
)
def test_a_run_that_cannot_be_trained_stops_with_the_cure(tmp_path: Path, fault: str, expected: str) -> None:
    tiny_checkpoint(tmp_path / "base", "llama", **({"num_labels": 2} if fault == "two labels" else {}))
    half = write(tmp_path / "half.jsonl", [row | ({} if i % 2 else {"margin": 1}) for i, row in enumerate(rows(32))])
    sections: dict[str, dict[str, dict[str, object]]] = {
        "typo": {"optim": {"learning_rat": 1e-5}},
        "missing file": {"data": {"train": str(tmp_path / "nowhere.jsonl")}},
        "margin in half of the rows": {"data": {"train": str(half)}, "method": {"preset": "column"}},
        "two labels": {},
    }
    path = config_file(tmp_path, 32, **sections[fault])
    result = run("train", str(path))
    assert result.returncode == 1
    assert result.stderr.count("marginrm: error:") == 1
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "fault", [PermissionError(errno.EACCES, "Permission denied", "x"), OSError(errno.ENOSPC, "Full")]
)
def test_a_fault_of_a_file_or_a_disk_is_one_line(fault: OSError, capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    def write() -> None:
        raise fault

    with pytest.raises(SystemExit) as left:
        main([], app)
    assert left.value.code == 1
    assert capsys.readouterr().err in (
        "marginrm: error: x: Permission denied. Give --debug to see where.\n",
        "marginrm: error: Full. Give --debug to see where.\n",
    )
    with pytest.raises(SystemExit):
        main(["--debug"], app)
    assert "Traceback" in capsys.readouterr().err
