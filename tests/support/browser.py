"""A real Chromium for the pages' tests, and a tiny checkpoint that has everything a model page shows.

Debian's Chromium is driven by Playwright's client, which downloads no browser of its own. Where one of the two is
missing, the tests are skipped and say which.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from marginrm.calibration import calibrate
from marginrm.manifest import BestOfNMeasure, DataFile, GoldenSample, Manifest, MethodInfo
from marginrm.reward_model import RewardModel
from support.models import tiny_checkpoint

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

PROMPT = "Why does bread rise?"
AXE = Path(
    os.environ.get("MARGINRM_AXE", Path(__file__).resolve().parents[2] / "build/axe/node_modules/axe-core/axe.min.js")
)
_FETCH_FAILED = "Failed to load resource"  # Chromium's own line for every status of 400 and above


@contextmanager
def chromium() -> Iterator[Browser]:
    """Starts a headless Chromium; skips the test where there is none."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="Playwright's client is not installed: pip install playwright"
    )
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


def serious(page: Page) -> list[str]:
    """Returns what axe-core finds serious on a page: rule, first place and why; skips the test where it is missing."""
    if not AXE.is_file():
        pytest.skip("axe-core is not installed: npm install --no-save --prefix build/axe axe-core@4.14.1")
    page.evaluate(f"{AXE.read_text(encoding='utf-8')}; 0")  # through the debugger: the page's own policy refuses it
    found: dict[str, Any] = page.evaluate("axe.run()")
    return [
        f"{one['id']}: {one['nodes'][0]['target']} {one['nodes'][0]['failureSummary']}"
        for one in found["violations"]
        if one["impact"] in {"serious", "critical"}
    ]


@dataclass
class Watched:
    """A page, with its errors and its requests to other hosts.

    Attributes:
        page: Playwright's page.
        errors: Exceptions and console errors, without Chromium's lines about refused requests.
        refused: Those lines.
        strangers: Addresses that it asked outside its own server.
    """

    page: Page
    errors: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Fails if something went wrong that a test did not ask for."""
        assert self.errors == []
        assert self.strangers == []


@contextmanager
def visiting(browser: Browser, url: str, path: str = "/", **context: Any) -> Iterator[Watched]:
    """Opens a page of a server in a fresh profile, and checks at the end that it kept to itself.

    Args:
        browser: As `chromium` gives it.
        url: Address of the server.
        path: Of the page.
        **context: Options of Playwright's `new_context`, such as `viewport` and `color_scheme`.
    """
    profile: BrowserContext = browser.new_context(**context)
    if url.startswith("http"):
        profile.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
    profile.set_default_timeout(20_000)
    watched = Watched(profile.new_page())

    def on_console(message: Any) -> None:
        if message.type == "error":
            (watched.refused if _FETCH_FAILED in message.text else watched.errors).append(message.text)

    def on_request(request: Any) -> None:
        if not request.url.startswith((f"{url.rstrip('/')}/", "data:", "blob:")):
            watched.strangers.append(request.url)

    watched.page.on("console", on_console)
    watched.page.on("pageerror", lambda error: watched.errors.append(str(error)))
    profile.on("request", on_request)
    try:
        watched.page.goto(f"{url}{path}")
        yield watched
        watched.check()
    finally:
        profile.close()


def measured_checkpoint(folder: Path, *, seed: int = 0, max_length: int = 512) -> Path:
    """Writes a tiny random model with a whole manifest; its calibration is that of random margins."""
    tiny_checkpoint(folder, "llama", seed=seed, max_length=max_length)
    model = RewardModel.from_pretrained(folder, dtype="float32")
    (reward,) = model.score(PROMPT, ["Yeast eats sugar."])
    sample = model.encoder.encode(PROMPT, "Yeast eats sugar.")
    margins = np.random.default_rng(seed).normal(0.4, 0.6, 600)
    curve = [
        BestOfNMeasure(
            n=n, kl=0.0, model=q, model_low=q - 0.1, model_high=q + 0.1, longest=0.2, oracle=q + 0.2, random=0
        )
        for n, q in ((1, 0.0), (2, 0.3), (4, 0.5))
    ]
    Manifest(
        name="tiny",
        created="2026-01-01T00:00:00Z",
        base_model="tiny-llama",
        method=MethodInfo(preset="margin", loss="paper", scale=1.0, cap=1.0, fire_rate=0.4, mean_target_margin=0.3),
        data=[DataFile(path="/data/train.jsonl", sha256="ab" * 32, rows=700, pairs_used=600)],
        encoding=model.encoder.describe(),
        calibration=calibrate(margins),
        metrics={
            "pairs": 600.0,
            "accuracy": 0.75,
            "accuracy_low": 0.71,
            "accuracy_high": 0.79,
            "accuracy_strength_0.5_0.75": 0.6,
            "accuracy_strength_0.75_1": 0.9,
            "pairs_strength_0.5_0.75": 300.0,
            "pairs_strength_0.75_1": 300.0,
        },
        best_of_n=curve,
        versions={"marginrm": "0.1.0"},
        golden=[GoldenSample(prompt=PROMPT, response="Yeast eats sugar.", ids=list(sample.ids), reward=reward)],
        golden_tolerance={"float32": 1e-3, "bfloat16": 0.5},
    ).save(folder)
    (folder / "README.md").write_text("# A tiny model\n\n<script>alert(1)</script>\n", encoding="utf-8")
    return folder
