"""The playground in a real Chromium, against a real server with a tiny model: what a visitor does, and what goes wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from marginrm_service.keys import add_key
from marginrm_service.settings import ModelSpec
from support.browser import chromium, measured_checkpoint, visiting
from support.server import AppServer, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PROMPT = "Why does bread rise?"
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
RIGHT_TO_LEFT = "\u202eevil\u202c \u0645\u0631\u062d\u0628\u0627 \u2067isolated"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measured_checkpoint(tmp_path_factory.mktemp("page") / "one")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measured_checkpoint(tmp_path_factory.mktemp("page") / "two", seed=1)


def load(server: AppServer, path: Path, name: str = "default") -> None:
    server.on_loop(server.service.registry.load(ModelSpec(name, str(path))))


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[AppServer]:
    with serving(dtype="float32", token_budget=2048) as server:
        load(server, checkpoint)
        yield server


def fill(page: Page, prompt: str, candidates: list[str]) -> None:
    """Writes a question into the form, as a link would."""
    page.fill("#prompt", prompt)
    while page.locator(".card").count() < len(candidates):
        page.click("#add")
    while page.locator(".card").count() > len(candidates):
        page.locator(".card button").last.click()
    for place, text in enumerate(candidates):
        page.fill(f"#candidate-{place}", text)
    page.click("text=Score >> nth=0")
    settled(page)


def settled(page: Page) -> None:
    """Waits until the results are those of the form as it is."""
    page.wait_for_selector("#results[aria-busy=false]")


def ranking(page: Page, side: int = 0) -> list[tuple[str, str]]:
    """Letters and rewards as they are shown, in their order; lines outside the window have texts that are not laid out."""
    script = """lines => lines.map(line => [
        line.querySelector(".who").textContent, line.querySelector(".reward").textContent.replace("\u2212", "-"),
    ])"""
    found = page.locator(".side").nth(side).locator(".place").evaluate_all(script)
    return [(who, reward) for who, reward in found]


def best_of_n(server: AppServer, prompt: Any, candidates: list[str], **more: Any) -> dict[str, Any]:
    body = {"tie_below": 0.55, **more, "prompts": [{"prompt": prompt, "candidates": candidates}]}
    return httpx.post(f"{server.url}/best-of-n", json=body, timeout=120).raise_for_status().json()["prompts"][0]


def expected(server: AppServer, prompt: Any, candidates: list[str]) -> list[tuple[str, str]]:
    outcome = best_of_n(server, prompt, candidates)
    return [("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[one["candidate"]], f"{one['reward']:.3f}") for one in outcome["ranking"]]


def test_it_shows_a_scored_example_without_being_asked(browser: Browser, server: AppServer) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.page
        page.wait_for_selector(".place")
        settled(page)
        assert page.locator("#choices").is_hidden()  # one model: nothing to choose, and nothing is shown
        assert "tiny-llama" in page.inner_text("#facts")
        assert visit.refused == []
        outside = re.findall(r"https?://[^\"' )]+", page.content())
        assert {address for address in outside if not address.startswith(("http://www.w3.org", server.url))} == set()


def test_a_pair_is_scored_and_put_on_the_models_own_calibration(browser: Browser, server: AppServer) -> None:
    pair = ["Yeast eats sugar and gives off gas.", "I do not know."]
    with visiting(browser, server.url) as visit:
        fill(visit.page, PROMPT, pair)
        assert ranking(visit.page) == expected(server, PROMPT, pair)
        outcome = best_of_n(server, PROMPT, pair)
        assert f"{outcome['confidence']:.0%}" in visit.page.inner_text(".side .headline")
        for name in ("margins", "reliability"):
            line = visit.page.locator(f"[data-figure={name}] line.here")
            assert line.count() == 1
        # The line stands where the axis says: the figure's own range, read back.
        svg = visit.page.locator("[data-figure=reliability] svg")
        low, high, left, right = map(float, (svg.get_attribute("data-x") or "").split())
        place = float(svg.locator("line.here").get_attribute("x1") or "nan")
        assert low + (place - left) / (right - left) * (high - low) == pytest.approx(outcome["confidence"], abs=1e-3)
        assert "calibration pairs' margins" in visit.page.inner_text("[data-figure=margins]")


def test_sixteen_are_ranked_as_the_server_ranks_them(browser: Browser, server: AppServer) -> None:
    candidates = [f"Answer {index}: yeast, {'sugar and gas, ' * (index % 5)}number {index}." for index in range(16)]
    with visiting(browser, server.url) as visit:
        fill(visit.page, PROMPT, candidates)
        assert ranking(visit.page) == expected(server, PROMPT, candidates)
        widths = visit.page.eval_on_selector_all(".fill", "bars => bars.map(bar => parseFloat(bar.style.width))")
        assert widths == sorted(widths, reverse=True)
        assert (widths[0], widths[-1]) == (100, 0)


def test_typing_moves_a_bar_and_answers_to_older_texts_are_dropped(browser: Browser, server: AppServer) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.page
        fill(page, PROMPT, ["Paris.", "Red."])
        held: list[Any] = []

        def hold_first(route: Any) -> None:
            if held:
                route.continue_()
            else:
                held.append(route)

        page.route("**/best-of-n", hold_first)
        page.locator("#candidate-1").press_sequentially(" Yellow", delay=10)
        while not held:
            page.wait_for_timeout(50)  # the request for these keystrokes, which now hangs
        page.locator("#candidate-1").press_sequentially(" and blue", delay=10)
        settled(page)
        assert ranking(page) == expected(server, PROMPT, ["Paris.", "Red. Yellow and blue"])
        page.unroute("**/best-of-n")


def test_equal_responses_are_drawn_as_a_tie(browser: Browser, server: AppServer) -> None:
    with visiting(browser, server.url) as visit:
        fill(visit.page, PROMPT, ["Yeast.", "Yeast.", "I do not know. No. Ask somebody else, please." * 3])
        assert "tie" in visit.page.inner_text(".headline")
        assert visit.page.locator(".tied .who").all_text_contents()[:2] == ["A", "B"]


def test_too_long_is_shown_on_card_and_line_and_a_cut_prompt_is_said(browser: Browser, server: AppServer) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.page
        fill(page, PROMPT, ["Yeast.", "word " * 2000])
        assert "refused" in ranking(page)[-1][1]
        for where in (".refused .why", ".card:nth-child(2) .state"):
            assert "tokens" in (page.text_content(where) or "")
        assert "1 candidate refused" in page.inner_text(".headline")
        fill(page, "Why? " * 600, ["Yeast.", "Sugar."])
        assert "No candidate could be scored" in page.inner_text(".headline")
        page.check("#cut")
        settled(page)
        assert page.locator("text=its prompt was cut").count() == 2


def test_a_chat_with_roles_is_sent_as_messages(browser: Browser, server: AppServer) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.page
        fill(page, "Name three primary colours.", ["Red, yellow and blue.", "No."])
        page.click("#as-chat")
        page.click("text=Add a message")
        page.fill("[aria-label='Message 2']", "Red.")
        page.click("text=Add a message")
        page.fill("[aria-label='Message 3']", "Go on.")
        settled(page)
        roles = page.eval_on_selector_all(".message select", "all => all.map(one => one.value)")
        assert roles == ["user", "assistant", "user"]
        contents = ["Name three primary colours.", "Red.", "Go on."]
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
        assert ranking(page) == expected(server, messages, ["Red, yellow and blue.", "No."])


def test_sentences_show_what_each_adds(browser: Browser, server: AppServer) -> None:
    sentences = ["Yeast eats sugar. ", "It gives off gas. ", "The dough holds the bubbles."]
    whole = "".join(sentences)
    with visiting(browser, server.url) as visit:
        page = visit.page
        fill(page, PROMPT, [whole, "No."])
        page.click("[aria-label^='Which sentences of A']")
        page.wait_for_selector(".sentences li")
        without = ["".join(sentences[:left] + sentences[left + 1 :]) for left in range(3)]
        rewards = {one["candidate"]: one["reward"] for one in best_of_n(server, PROMPT, [whole, *without])["ranking"]}
        shown = [float(text.replace("\u2212", "-")) for text in page.locator(".sentences .number").all_text_contents()]
        assert shown == pytest.approx([rewards[0] - rewards[left + 1] for left in range(3)], abs=6e-4)
        page.fill("#candidate-0", "Yeast.")  # its sentences were the old text's
        settled(page)
        assert page.locator(".sentences").count() == 0


def drop(page: Page, name: str, content: str) -> None:
    page.evaluate(
        """([name, content]) => {
            const data = new DataTransfer();
            data.items.add(new File([content], name));
            document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        }""",
        [name, content],
    )


def test_a_file_of_two_hundred_pairs_is_scored_into_a_table(browser: Browser, server: AppServer) -> None:
    rows: list[Any] = [
        {"prompt": f"{PROMPT} {index}", "chosen": f"Yeast {index}.", "rejected": "No."} for index in range(197)
    ]
    lines = [json.dumps(row) for row in rows]
    lines.insert(3, "{not json")
    lines.insert(10, json.dumps({"prompt": PROMPT, "chosen": 3, "rejected": "No."}))
    lines.append(json.dumps({"prompt": PROMPT, "chosen": "word " * 2000, "rejected": "No."}))
    with visiting(browser, server.url) as visit:
        page = visit.page
        drop(page, "pairs.jsonl", "\n".join(lines))
        page.wait_for_selector("text=198 of 198 rows scored", timeout=60_000)
        body = {"pairs": rows}
        pairs = httpx.post(f"{server.url}/score", json=body, timeout=120).json()["pairs"]
        right = sum((pair["margin"] > 0) + (pair["margin"] == 0) / 2 for pair in pairs)
        assert f"{right:g} of 197 pairs ranked as labelled" in page.inner_text("#table .headline")
        assert "1 refused" in page.inner_text("#table .headline")
        faults = page.inner_text("#table ul")
        assert "line 4: not valid JSON" in faults
        assert "line 11:" in faults
        page.click("text=Sort by margin")
        margins = page.eval_on_selector_all("#table tbody tr", "rows => rows.map(row => Number(row.dataset.margin))")
        assert margins == sorted(margins)
        page.click("[aria-label='Open line 1']")
        settled(page)
        assert page.input_value("#prompt") == f"{PROMPT} 0"
        assert ranking(page) == expected(server, f"{PROMPT} 0", ["Yeast 0.", "No."])


def test_a_file_of_responses_becomes_the_candidates(browser: Browser, server: AppServer) -> None:
    texts = [f"Answer {index}." for index in range(200)]
    with visiting(browser, server.url) as visit:
        page = visit.page
        page.fill("#prompt", PROMPT)
        content = "\n".join(json.dumps({"response": text}) for text in texts)
        page.set_input_files("#file", {"name": "r.jsonl", "mimeType": "application/jsonl", "buffer": content.encode()})
        page.wait_for_selector(".place >> nth=199", state="attached")
        settled(page)
        shown = [reward for _, reward in ranking(page)]
        assert shown == [f"{one['reward']:.3f}" for one in best_of_n(server, PROMPT, texts)["ranking"]]


def test_copied_commands_run(browser: Browser, server: AppServer, tmp_path: Path) -> None:
    candidates = ['It\'s "yeast" \\ and $HOME `ls`\nsecond line \u2028 \U0001f35e', HOSTILE]
    with visiting(browser, server.url) as visit:
        page = visit.page
        fill(page, "Don't you know?", candidates)
        texts = {}
        for kind in ("curl", "python", "json"):
            page.click(f"[data-copy={kind}]")
            page.wait_for_selector("text=Copied.")
            texts[kind] = page.evaluate("navigator.clipboard.readText()")
            page.click("text=Close")
        shown = ranking(page)
    posted = httpx.post(f"{server.url}/best-of-n", json=json.loads(texts["json"])).raise_for_status().json()
    by_curl = json.loads(subprocess.run(["bash", "-c", texts["curl"]], capture_output=True, check=True).stdout)
    assert by_curl["prompts"] == posted["prompts"]
    (tmp_path / "copied.py").write_text(texts["python"], encoding="utf-8")
    command = [sys.executable, str(tmp_path / "copied.py")]
    printed = subprocess.run(command, capture_output=True, check=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    rewards = [line.split()[1] for line in printed.stdout.decode().splitlines() if re.match(r"\d+ -?\d", line)]
    assert [f"{float(reward):.3f}" for reward in rewards] == [reward for _, reward in shown]


def test_a_link_restores_the_state_and_the_server_never_sees_it(browser: Browser, server: AppServer) -> None:
    secret = "A secret candidate \u2603"
    with visiting(browser, server.url) as visit:
        page = visit.page
        fill(page, "A secret prompt", [secret, "No."])
        page.fill("#tie", "0.7")
        page.click("#link")
        page.wait_for_selector("text=Copied.")
        link = page.evaluate("navigator.clipboard.readText()")
        page.click("text=Close")
        settled(page)
        shown = ranking(page)
    path = link.removeprefix(server.url)
    with visiting(browser, server.url, path) as visit:
        page = visit.page
        page.wait_for_selector(".place")
        settled(page)
        assert page.input_value("#prompt") == "A secret prompt"
        assert page.input_value("#candidate-0") == secret
        assert page.input_value("#tie") == "0.7"
        assert ranking(page) == shown
    with visiting(browser, server.url, "/#broken") as visit:
        visit.page.wait_for_selector("text=The link's state cannot be read")
        visit.page.wait_for_selector(".place")


@pytest.mark.parametrize("text", [HOSTILE, RIGHT_TO_LEFT, "x" * 100_000, "\x00\x07 ]]> &lt; {{7*7}}"])
def test_markup_marks_and_endless_words_are_texts(browser: Browser, server: AppServer, text: str) -> None:
    with visiting(browser, server.url, viewport={"width": 375, "height": 700}) as visit:
        page = visit.page
        fill(page, text, [text, "No."])
        assert page.title() == "marginrm playground"
        assert page.locator("#sides script, #sides img").count() == 0
        assert page.input_value("#candidate-0") == text.replace("\x00", page.input_value("#candidate-0")[:1])
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.locator(".place .who").count() == 2


def test_a_wrong_key_is_said_and_the_right_one_goes_on(browser: Browser, checkpoint: Path, tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys", "ann")
    with serving(dtype="float32", token_budget=512, key_file=tmp_path / "keys") as server:
        load(server, checkpoint)
        with visiting(browser, server.url) as visit:
            page = visit.page
            page.wait_for_selector("dialog >> text=This server wants an API key.")
            page.fill("#key", "wrong")
            page.click("text=Use this key")
            page.wait_for_selector("dialog >> text=does not accept this key")
            page.fill("#key", key)
            page.click("text=Use this key")
            page.wait_for_selector(".place")
            assert visit.refused
            page.click("[data-copy=curl]")
            assert key not in page.input_value("dialog textarea")
            assert "MARGINRM_API_KEY" in page.input_value("dialog textarea")
            page.click("text=Close")
            page.reload()  # the tab keeps the key
            page.wait_for_selector(".place")
            page.goto(f"{server.url}/models/default")
            page.wait_for_selector("#figure-margins")


def test_a_server_that_restarts_is_waited_for(browser: Browser, checkpoint: Path) -> None:
    with serving(dtype="float32", token_budget=512) as first:
        load(first, checkpoint)
        port = int(first.url.rsplit(":", 1)[1])
        url = first.url
        with visiting(browser, url) as visit:
            page = visit.page
            fill(page, PROMPT, ["Yeast.", "No."])
            before = ranking(page)
            first.stop()
            page.fill("#candidate-0", "Yeast eats sugar.")
            page.wait_for_selector("text=The server cannot be reached. Trying again")
            with serving(dtype="float32", token_budget=512, port=port) as second:
                load(second, checkpoint)
                page.wait_for_selector("#problem", state="hidden")
                settled(page)
                assert ranking(page) != before
                assert ranking(page) == expected(second, PROMPT, ["Yeast eats sugar.", "No."])


def test_a_model_that_is_swapped_is_said_and_nothing_is_mixed(browser: Browser, checkpoint: Path, other: Path) -> None:
    with serving(dtype="float32", token_budget=512) as server:
        load(server, checkpoint)
        with visiting(browser, server.url) as visit:
            page = visit.page
            fill(page, PROMPT, ["Yeast.", "No."])
            load(server, other)
            page.fill("#candidate-0", "Yeast eats sugar.")
            page.wait_for_selector("text=was swapped")
            settled(page)
            assert ranking(page) == expected(server, PROMPT, ["Yeast eats sugar.", "No."])
            temperature = httpx.get(f"{server.url}/v1/models/default").json()["temperature"]
            assert f"T = {temperature:.2f}" in page.inner_text("#facts")


def test_a_server_that_is_loading_is_waited_for(browser: Browser, checkpoint: Path) -> None:
    with (
        serving(dtype="float32", token_budget=512, models=[f"default={checkpoint}"]) as server,
        visiting(browser, server.url) as visit,
    ):
        visit.page.wait_for_selector(".place")
        assert "tiny-llama" in visit.page.inner_text("#facts")


def test_a_key_that_was_not_given_is_asked_for_again(browser: Browser, checkpoint: Path, tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys", "ann")
    with serving(dtype="float32", token_budget=512, key_file=tmp_path / "keys") as server:
        load(server, checkpoint)
        with visiting(browser, server.url) as visit:
            page = visit.page
            page.click("dialog >> text=Cancel")
            page.click("text=Score >> nth=0")
            page.fill("#key", key)
            page.keyboard.press("Enter")
            page.wait_for_selector(".place")


def test_steps_of_a_process_reward_model_are_coloured(browser: Browser, server: AppServer) -> None:
    def with_steps(route: Any) -> None:
        reply = route.fetch()
        body = reply.json()
        for entry in body["prompts"][0]["ranking"]:
            entry["steps"] = [0.9, 0.2, 0.8]
        route.fulfill(response=reply, json=body)

    with visiting(browser, server.url) as visit:
        page = visit.page
        page.route("**/best-of-n", with_steps)
        fill(page, PROMPT, ["Yeast.", "No."])
        steps = page.locator(".place").first.locator(".steps li")
        assert steps.all_text_contents() == ["1: 0.90", "2: 0.20", "3: 0.80"]
        assert [step.get_attribute("class") for step in steps.all()] == ["up", "down", "up"]
        page.unroute("**/best-of-n")


def test_two_models_stand_side_by_side_and_one_that_leaves_is_said(
    browser: Browser, checkpoint: Path, other: Path
) -> None:
    pair = ["Yeast eats sugar.", "No."]
    with serving(dtype="float32", token_budget=512) as server:
        load(server, checkpoint, "one")
        load(server, other, "two")
        with visiting(browser, server.url) as visit:
            page = visit.page
            page.wait_for_selector(".place")
            assert page.locator("#choices").is_visible()
            fill(page, PROMPT, pair)
            page.select_option("#second", "two")
            page.wait_for_selector(".side >> nth=1 >> .place >> nth=1")
            settled(page)
            for side, name in enumerate(("one", "two")):
                shown = dict(ranking(page, side))
                found = best_of_n(server, PROMPT, pair, model=name)["ranking"]
                assert shown == {"AB"[one["candidate"]]: f"{one['reward']:.3f}" for one in found}
            server.on_loop(server.service.registry.unload("two"))
            page.fill("#candidate-1", "Never.")
            page.wait_for_selector("text=No model is called 'two'")
            settled(page)
            assert page.locator(".side").count() == 1
            assert page.locator("#choices").is_hidden()


def test_it_can_be_used_from_the_keyboard(browser: Browser, server: AppServer) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.page
        fill(page, PROMPT, ["Paris.", "No."])
        page.uncheck("#live")
        page.focus("#candidate-0")
        page.keyboard.press("Control+a")
        page.keyboard.type("Yeast eats sugar.")
        settled(page)
        assert ranking(page) == expected(server, PROMPT, ["Paris.", "No."])  # not as it is typed
        page.keyboard.press("Control+Enter")
        settled(page)
        assert ranking(page) == expected(server, PROMPT, ["Yeast eats sugar.", "No."])
        count = page.locator(".card").count()
        page.focus("#add")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == f"candidate-{count}"
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Enter")  # its Remove button
        assert page.locator(".card").count() == count
        assert page.evaluate("document.activeElement.tagName") == "TEXTAREA"
