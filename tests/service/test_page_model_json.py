"""`GET /v1/models/{name}`: what the manifest says, the self-test of this load, the drift of this server, and its files."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from marginrm.manifest import Manifest
from marginrm.model_schema import ModelDetail
from marginrm_service.keys import add_key
from marginrm_service.settings import ModelSpec
from support.browser import measured_checkpoint
from support.server import AppServer, serving
from support.service import FakeRewardModel


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    folder = measured_checkpoint(tmp_path_factory.mktemp("measured"))
    with serving(FakeRewardModel("plain"), dtype="float32", token_budget=512) as server:
        server.on_loop(server.service.registry.load(ModelSpec("tiny", str(folder))))
        server.folder = folder  # type: ignore[attr-defined]
        yield server


def detail(server: AppServer, name: str = "tiny") -> ModelDetail:
    return ModelDetail.model_validate(httpx.get(f"{server.url}/v1/models/{name}").raise_for_status().json())


def test_it_repeats_the_manifest_and_adds_what_this_load_found(server: AppServer) -> None:
    found, manifest = detail(server), Manifest.load(server.folder)  # type: ignore[attr-defined]
    assert manifest is not None
    for name in ("method", "calibration", "metrics", "best_of_n", "versions", "reward_mean"):
        assert getattr(found, name) == getattr(manifest, name)
    assert found.trained == manifest.created
    assert found.data[0].path == "train.jsonl"  # not the folder of the machine that trained
    assert found.golden is not None
    assert (found.golden.samples, found.golden.tolerance) == (1, 1e-3)
    assert 0 <= found.golden.difference < 1e-3
    assert found.reading["pooling"] == "last"
    assert found.reading["max_length"] == found.max_length == 512


def test_every_figure_that_it_names_is_svg_and_others_are_not_found(server: AppServer) -> None:
    found = detail(server)
    assert set(found.figures) >= {"strength", "margins", "reliability", "risk-coverage", "best-of-n"}
    for name in found.figures:
        reply = httpx.get(f"{server.url}/v1/models/tiny/figures/{name}").raise_for_status()
        assert reply.headers["content-type"].startswith("image/svg+xml")
        assert ET.fromstring(reply.text).tag.endswith("svg")
    assert httpx.get(f"{server.url}/v1/models/tiny/figures/nothing").status_code == 404


def test_drift_is_that_of_the_pairs_that_this_server_compared(server: AppServer) -> None:
    before = detail(server).drift
    assert before is not None
    pairs = [{"prompt": f"{index}", "chosen": "Yes.", "rejected": "No."} for index in range(220)]
    httpx.post(f"{server.url}/score", json={"model": "tiny", "pairs": pairs}, timeout=120).raise_for_status()
    after = detail(server).drift
    assert after is not None
    assert after.margins == before.margins + 220
    assert after.psi is not None
    assert sum(after.expected) == pytest.approx(sum(after.seen)) == pytest.approx(1)
    assert len(after.edges) + 1 == len(after.expected) == len(after.seen)
    assert "drift" in detail(server).figures


def test_a_model_without_a_manifest_says_so_by_empty_parts(server: AppServer) -> None:
    found = detail(server, "plain")
    assert (found.method, found.calibration, found.golden, found.drift) == (None, None, None, None)
    assert found.figures == found.documents == []
    assert httpx.get(f"{server.url}/v1/models/nobody").json()["error"]["code"] == "unknown_model"


def test_documents_are_those_two_and_run_nothing(server: AppServer) -> None:
    assert detail(server).documents == ["README.md"]
    card = httpx.get(f"{server.url}/v1/models/tiny/documents/README.md").raise_for_status()
    assert card.headers["content-type"].startswith("text/plain")
    assert "sandbox" in card.headers["content-security-policy"]
    for other in ("config.json", "..%2Fconfig.json", "report.html"):
        assert httpx.get(f"{server.url}/v1/models/tiny/documents/{other}").status_code == 404


def test_facts_want_a_key_where_the_page_itself_does_not(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys", "ann")
    with serving(FakeRewardModel("plain"), key_file=tmp_path / "keys") as server:
        for path in ("", "/figures/margins", "/documents/README.md"):
            assert httpx.get(f"{server.url}/v1/models/plain{path}").status_code == 401
        reply = httpx.get(f"{server.url}/v1/models/plain", headers={"Authorization": f"Bearer {key}"})
        assert reply.status_code == 200
