"""The chat page in a real browser."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import FakeEngine, chatting, demo, eventually, serving

from browsing import NEEDS_CHROMIUM

pytestmark = NEEDS_CHROMIUM

EVIL = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(engine=FakeEngine()) as (found, _):
        yield found


@contextmanager
def visiting(browser: Any, address: str, *, expected: str = "", **context: Any) -> Iterator[Any]:
    """The opened page; it may complain of `expected` only."""
    opened = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, "color_scheme": "light", **context})
    page, complaints = opened.new_page(), []
    page.set_default_timeout(20_000)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: request.url.startswith((address, "data:")) or complaints.append(request.url))
    page.goto(address)
    page.wait_for_selector("html[data-ready=true]")
    yield page
    opened.close()
    assert [text for text in complaints if not expected or expected not in text] == []


def say(page: Any, text: str, most: int = 30) -> None:
    page.locator("#most").fill(str(most))
    page.locator("#temperature").fill("0")
    page.locator("#message").fill(text)
    page.locator("#message").press("Enter")


def done(page: Any) -> None:
    page.wait_for_selector("html[data-busy=false]")


def until(page: Any, so: str) -> None:
    """Wait until an expression is true; the page's policy forbids the waiting that playwright would do inside it."""
    eventually(lambda: page.evaluate(so))


def lit(page: Any) -> set[str]:
    """Sources of the experts that are lit in the picture, by their colours."""
    return set(
        page.locator("#grid").evaluate(
            """async (canvas) => {
                await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
                const style = getComputedStyle(document.documentElement), named = {};
                for (const name of ["memory", "prefetch", "disk"])
                    named[style.getPropertyValue(`--${name}`).trim()] = name;
                const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height), seen = [];
                for (let i = 0; i < data.length; i += 4) {
                    const hex = [0, 1, 2].map((c) => data[i + c].toString(16).padStart(2, "0")).join("");
                    if (named[`#${hex}`]) seen.push(named[`#${hex}`]);
                }
                return seen;
            }"""
        )
    )


def picture(page: Any, name: str) -> None:
    """Kept for looking at, where a folder is named."""
    if folder := os.environ.get("COLLEGIUM_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def test_text_streams_and_experts_light_up(browser: Any, address: str) -> None:
    slow = demo()[0].register_forward_pre_hook(lambda *_: time.sleep(0.03))
    try:
        with visiting(browser, address) as page:
            say(page, "Once upon a time there was", 60)
            until(page, "Number(document.querySelector('#count').textContent) > 8")
            half = page.locator(".turn.assistant").inner_text()
            assert half
            assert page.locator("#stop").is_enabled(), "it streams"
            assert lit(page) == {"memory", "prefetch", "disk"}
            picture(page, "light")
            done(page)
            assert page.locator(".turn.assistant").inner_text().startswith(half)
            assert page.locator("#count").inner_text() == "60"
            assert 5 < float(page.locator("#rate").inner_text()) < 34, "one token takes 30 ms at the least"
            assert re.fullmatch(r"\d\d\.\d %", page.locator("#hits").inner_text())
    finally:
        slow.remove()


def test_the_answer_is_that_of_the_server(browser: Any, address: str) -> None:
    with visiting(browser, address) as page:
        page.locator("summary").click()
        page.locator("#system").fill("Be brief.")
        say(page, "Hello")
        done(page)
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
        for more in ("And then?", None):
            body = {"model": "demo", "messages": turns, "max_tokens": 30, "temperature": 0}
            answer = httpx.post(f"{address}/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
            assert page.locator(".turn.assistant").last.evaluate("box => box.textContent") == answer
            if more:
                turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": more}]
                say(page, more)
                done(page)
        page.locator("#clear").click()
        assert page.locator(".turn").count() == 0


def test_stop(browser: Any, address: str) -> None:
    slow = demo()[0].register_forward_pre_hook(lambda *_: time.sleep(0.03))
    try:
        with visiting(browser, address) as page:
            say(page, "Hello", 200)
            until(page, "Number(document.querySelector('#count').textContent) > 3")
            page.locator("#stop").click()
            done(page)
            assert page.locator(".turn.error").count() == 0
            assert page.locator(".turn.assistant").inner_text()
            eventually(lambda: not httpx.get(f"{address}/health").json()["running"], seconds=3)
    finally:
        slow.remove()


def test_text_never_runs(browser: Any, address: str) -> None:
    with visiting(browser, address, expected="Content Security Policy") as page:
        say(page, EVIL, 5)
        done(page)
        assert page.locator(".turn.user").inner_text() == EVIL
        assert page.locator("#turns img, #turns script").count() == 0
        assert page.title() == "Collegium"
        page.evaluate(
            """() => {
                const script = document.createElement("script");
                script.textContent = "document.title = 'taken'";
                document.body.append(script);
            }"""
        )
        assert page.title() == "Collegium", "the policy lets no other script run"


def test_errors_are_shown(browser: Any, address: str) -> None:
    with visiting(browser, address, expected="400") as page:
        say(page, "word " * 400)
        done(page)
        assert "context of 256" in page.locator(".turn.error").inner_text()
        say(page, "Hello", 3)
        done(page)
        assert page.locator(".turn.error").count() == 1, "what failed is not said again"


def test_the_grid_reads_out_an_expert(browser: Any, address: str) -> None:
    with visiting(browser, address) as page:
        say(page, "Hello", 8)
        done(page)
        until(page, "document.querySelector('#grid').dataset.drawn > 1")
        box = page.locator("#grid").bounding_box()
        page.mouse.move(box["x"] + 30, box["y"] + 6)
        assert re.match(r"Layer 0, expert 0: used by \d of 8 tokens", page.locator("#readout").inner_text())


def test_without_a_template_it_continues_text(browser: Any) -> None:
    with serving(demo()[1]) as (address, _), visiting(browser, address) as page:
        assert "/v1/completions" in page.locator("#notice").inner_text()
        say(page, "Once upon a time", 12)
        done(page)
        body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
        answer = httpx.post(f"{address}/v1/completions", json=body).json()["choices"][0]["text"]
        assert page.locator(".turn.assistant").evaluate("box => box.textContent") == answer
        assert lit(page) == {"memory"}, "without an engine all is in memory"


def test_a_key_is_asked_for(browser: Any) -> None:
    with serving(api_key="secret") as (address, _), visiting(browser, address, expected="401") as page:
        page.locator("#key").fill("secret")
        page.locator("#key").press("Tab")
        until(page, "document.querySelector('#model').textContent.includes('demo')")
        say(page, "Hello", 3)
        done(page)
        assert page.locator(".turn.assistant").inner_text()


@pytest.mark.parametrize(("name", "width", "scheme"), [("dark", 1200, "dark"), ("narrow", 390, "light")])
def test_dark_and_narrow(browser: Any, address: str, name: str, width: int, scheme: str) -> None:
    with visiting(browser, address, viewport={"width": width, "height": 844}, color_scheme=scheme) as page:
        say(page, "Once upon a time there was a king, and " * 3, 40)
        done(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert lit(page) == {"memory", "prefetch", "disk"}
        red = page.evaluate("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
        assert (red < 60) == (scheme == "dark")
        unnamed = page.locator("button, input, textarea, canvas").evaluate_all(
            "all => all.filter(e => !(e.innerText || e.ariaLabel || e.labels?.length)).map(e => e.outerHTML)"
        )
        assert unnamed == []
        picture(page, name)


def test_chat_template_of_the_tests() -> None:
    text = chatting().apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "x\n> "
