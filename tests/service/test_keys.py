"""API keys and rate limits, over a real socket, with a real key file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from marginrm.cli.main import build_app
from marginrm.client import RewardClient, UnauthorizedError
from marginrm.errors import ConfigError
from marginrm_service.keys import KeyFile, RateLimit, add_key, new_key
from support.server import serving
from support.service import FakeRewardModel

ASK = {"items": [{"prompt": "Hi?", "response": "Yes."}]}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_key_file_holds_no_key_and_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    first = add_key(path, "ann")
    assert first not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    keys = KeyFile(path)
    assert keys.owner(first) == "ann"
    assert keys.owner(new_key()) is None
    second = add_key(path, "bob")
    assert keys.owner(second) == "bob"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))  # ann's key is taken back
    assert (keys.owner(first), keys.owner(second)) == (None, "bob")


def test_an_invalid_key_file_keeps_the_known_keys_and_admits_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    key = add_key(path, "ann")
    keys = KeyFile(path)
    path.write_text("ann sha256:oops\n")
    assert keys.owner(key) == "ann"
    assert keys.owner("oops") is None
    assert f"{path}:1" in caplog.text
    with pytest.raises(ConfigError, match=r"keys:1: expected NAME sha256:HEX"):
        KeyFile(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyFile(tmp_path / "missing")
    with pytest.raises(ConfigError, match="not a valid name for a key"):
        add_key(tmp_path / "other", "two words")


def test_a_name_has_one_key(tmp_path: Path) -> None:
    add_key(tmp_path / "keys", "ann")
    with pytest.raises(ConfigError, match="already"):
        add_key(tmp_path / "keys", "ann")


def test_the_rate_limit_by_hand() -> None:
    now = 0.0
    limit = RateLimit(per_minute=6, clock=lambda: now)
    assert [limit.take("a") for _ in range(7)] == [0] * 6 + [10]
    assert limit.take("b") == 0  # each key has its own bucket
    now = 9.9
    assert limit.take("a") == 1
    now = 10.0
    assert limit.take("a") == 0
    now = 1000.0
    assert [limit.take("a") for _ in range(7)] == [0] * 6 + [10]  # at most one minute is saved up


def test_every_route_except_health_and_the_pages_files_needs_a_key(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys", "ann")
    with (
        serving(FakeRewardModel(), key_file=tmp_path / "keys") as server,
        httpx.Client(base_url=server.url, timeout=120) as http,
    ):
        paths = set(http.get("/openapi.json", headers=bearer(key)).json()["paths"]) | {"/nowhere"}
        for path in paths - {"/healthz", "/readyz"}:
            for headers in ({}, bearer("wrong"), {"Authorization": f"Basic {key}"}):
                reply = http.get(path, headers=headers)
                assert reply.status_code == (404 if path.startswith("/admin/") else 401), path
                assert reply.json()["error"]["request_id"] == reply.headers["x-request-id"]
        for path in ("/healthz", "/readyz", "/", "/docs", "/models/default", "/page/style.css"):
            assert http.get(path).status_code == 200, path
        assert http.post("/score", json=ASK, headers=bearer(key)).status_code == 200
        with RewardClient(server.url, api_key=key) as client:
            assert client.score("Hi?", ["Yes."])
        with RewardClient(server.url) as stranger, pytest.raises(UnauthorizedError):
            stranger.score("Hi?", ["Yes."])


def test_a_key_over_its_rate_limit_gets_retry_after(tmp_path: Path) -> None:
    ann, bob = (add_key(tmp_path / "keys", name) for name in ("ann", "bob"))
    with (
        serving(FakeRewardModel(), key_file=tmp_path / "keys", rate_limit=2) as server,
        httpx.Client(base_url=server.url, timeout=120) as http,
    ):
        replies = [http.post("/score", json=ASK, headers=bearer(ann)) for _ in range(3)]
        assert [reply.status_code for reply in replies] == [200, 200, 429]
        assert replies[2].json()["error"]["code"] == "rate_limited"
        assert 1 <= int(replies[2].headers["retry-after"]) <= 30
        assert http.post("/score", json=ASK, headers=bearer(bob)).status_code == 200


def test_size_takes_the_figures_of_a_server_that_needs_a_key(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys", "ann")
    with (
        serving(FakeRewardModel(), key_file=tmp_path / "keys") as server,
        RewardClient(server.url, api_key=key) as client,
    ):
        arguments = ["size", "--url", server.url, "--json", "--p99", "1000", "--responses-per-minute", "1"]
        with pytest.raises(ConfigError, match="Give it as MARGINRM_API_KEY"):
            CliRunner().invoke(build_app(), arguments, catch_exceptions=False)
        client.score("Hi?", ["Yes.", "No."])
        text = httpx.get(f"{server.url}/metrics", headers=bearer(key)).text
        tokens, seconds = (
            float(re.findall(rf"^marginrm_step_{name}_sum\{{.*\}} (\S+)$", text, re.MULTILINE)[0])
            for name in ("tokens", "seconds")
        )
        found = json.loads(CliRunner().invoke(build_app(), arguments, env={"MARGINRM_API_KEY": key}).output)
        assert found["replica"]["tokens_per_second"] == pytest.approx(tokens / seconds)
