"""The playground's examples say what is true of the demo model: each is loaded with one click and its claim is checked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from marginrm_service.settings import ModelSpec
from support.browser import chromium, visiting
from support.server import serving

if TYPE_CHECKING:
    from playwright.sync_api import Page

DEMO = Path(os.environ.get("MARGINRM_DEMO", Path(__file__).resolve().parents[2] / "checkpoints/demo"))


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    if not (DEMO / "reward_manifest.json").is_file():
        pytest.skip("There is no demo model: `marginrm demo`, or MARGINRM_DEMO with its folder.")
    with chromium() as browser, serving() as server:
        server.on_loop(server.service.registry.load(ModelSpec("default", str(DEMO))))
        with visiting(browser, server.url) as visit:
            visit.page.wait_for_selector(".place")
            yield visit.page


@pytest.mark.parametrize(
    ("name", "order", "said"),
    [
        ("A ranking", "BD", "B is better than D"),
        ("A clear win", "AB", "A is better than B"),
        ("A tie", "", "tie"),
        ("A length trap", "DA", "D is better than A"),
        ("Too long", "ACB", "1 candidate refused"),
        ("Off its data", "BA", "B is better than A"),
    ],
)
def test_an_example_shows_what_it_says(page: Page, name: str, order: str, said: str) -> None:
    page.click(f"button:text-is('{name}')")
    page.wait_for_selector("#results[aria-busy=false]")
    assert page.locator("#lesson").is_visible()
    assert said in page.inner_text(".side .headline")
    letters = page.locator(".place .who").all_text_contents()
    assert "".join(letters).startswith(order)
