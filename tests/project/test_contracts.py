"""docs/contracts.md against the service: routes, fixtures and the files of clients."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from marginrm_service.api import adapters

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/contracts.md").read_text(encoding="utf-8")
CHECKOUTS = os.environ.get("MARGINRM_TEST_CLIENTS")
REPOSITORIES = {
    "3c3be62": "OpenRLHF+OpenRLHF",
    "624b824": "THUDM+slime",
    "ff6d4d1": "hiyouga+LLaMA-Factory",
    "1dda039": "verl-project+verl",
    "b178a3c": "volcengine+verl",
    "3602360": "modelscope+ms-swift",
    "07d6b0d": "NVIDIA-NeMo+Gym",
    "0d124dc": "huggingface+text-embeddings-inference",
}


def rows(heading: str) -> list[list[str]]:
    """The rows of the first table under a heading, without its head."""
    table = re.search(rf"^## {heading}$.*?((?:^\|[^\n]*\n)+)", PAGE, re.MULTILINE | re.DOTALL)
    assert table is not None
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table[1].splitlines()[2:]]


def served() -> set[str]:
    return {route.path for router in adapters.ROUTERS for route in router.routes}


def test_each_route_of_a_contract_is_in_both_tables_and_each_row_is_served() -> None:
    for heading in ("Routes and replies", "Clients"):
        named = {path for row in rows(heading) for path in re.findall(r"/[\w/]+", row[0])}
        assert named - served() == {"/v1/models", "/v1/models/NAME"} & named
        alike = {"/rerank", "/v1/rerank", "/v2/rerank"}
        assert served() - named <= (alike if named & alike else set())


def test_each_client_has_what_it_sends_what_it_does_and_what_we_answer() -> None:
    for row in rows("Clients"):
        assert len(row) == 7
        assert all(row)
        assert re.search(r"run|read|its server", row[1]), row[1]


def test_each_fixture_belongs_to_a_client() -> None:
    named = {name for row in rows("Clients") for name in re.findall(r"`(\w+)`", row[6])}
    assert named == {path.stem for path in (ROOT / "tests/service/fixtures").glob("*.json")}


@pytest.mark.skipif(not CHECKOUTS, reason="MARGINRM_TEST_CLIENTS names no checkouts of the clients")
def test_files_and_names_exist_at_the_commits_given() -> None:
    for row in rows("Clients"):
        repository = next((name for commit, name in REPOSITORIES.items() if commit in row[1]), None)
        folder = next(
            (
                f
                for f in (Path(CHECKOUTS or "", str(repository), "repo"), Path(CHECKOUTS or "", str(repository)))
                if f.is_dir()
            ),
            None,
        )
        if folder is None or row[2] == "the same":
            continue
        commit = next(one for one in REPOSITORIES if one in row[1])
        names = re.findall(r"`([^`]+)`", row[2])
        files = [name for name in names if "/" in name]
        git = ["git", "-C", str(folder), "show"]
        text = "".join(
            subprocess.run([*git, f"{commit}:{file}"], check=True, capture_output=True, text=True).stdout
            for file in files
        )
        for name in names:
            assert name in files or name.rpartition(".")[2] in text, (row[1], name)
