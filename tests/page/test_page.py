"""The page in a real browser, over the demo model: chat, keys, themes, the machine."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect
from tests.page.conftest import KEY

SHORT = {"max_tokens": 24, "temperature": 0}


def use(page: Page, **settings: Any) -> None:
    """Load the page anew with these settings."""
    page.evaluate("s => localStorage.setItem('flashmoe.settings', s)", json.dumps(settings))
    page.reload()


def ask(page: Page, text: str) -> None:
    page.locator("#message").fill(text)
    page.keyboard.press("Enter")


def finished(page: Page, answers: int = 1) -> None:
    expect(page.locator(".message.assistant .facts")).to_have_count(answers)


def test_an_answer_streams_and_survives_a_reload(page: Page) -> None:
    use(page, **SHORT)
    ask(page, "Tell me of the sea.")
    expect(page.locator(".message.assistant.busy")).to_be_visible()
    finished(page)
    answer = page.locator(".message.assistant .markdown").last.inner_text()
    assert len(answer) > 20
    expect(page.locator(".facts")).to_contain_text("24 tokens")
    expect(page.locator("#status")).to_contain_text(answer[:10])
    page.reload()
    assert page.locator(".message.assistant .markdown").last.inner_text() == answer
    expect(page.locator("#title")).to_have_text("Tell me of the sea.")


def test_stop_frees_the_place(page: Page) -> None:
    use(page, max_tokens=900, temperature=0)
    ask(page, "Tell me a long story.")
    expect(page.locator(".message.assistant .markdown p").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".facts")).to_contain_text("stopped")
    expect(page.locator("#answers")).to_have_text("0 running")


def test_the_keyboard_alone_is_enough(page: Page) -> None:
    use(page, **SHORT)
    assert page.evaluate("document.activeElement.id") == "message"
    page.keyboard.type("One.")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Two.")
    page.keyboard.press("Enter")
    finished(page)
    assert page.locator(".bubble").inner_text() == "One.\nTwo."
    page.keyboard.press("Alt+n")
    expect(page.locator(".welcome")).to_be_visible()
    page.keyboard.press("Alt+s")
    expect(page.locator("#settings")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    page.keyboard.type("Three.")
    page.keyboard.press("Enter")
    finished(page)
    page.keyboard.press("Alt+ArrowDown")
    expect(page.locator(".bubble")).to_contain_text("One.")
    page.keyboard.press("Alt+r")
    expect(page.locator(".message.assistant.busy")).to_be_visible()
    finished(page)
    page.keyboard.press("Alt+m")
    expect(page.locator("#machine")).to_be_hidden()


def test_every_control_has_a_name(page: Page) -> None:
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, select")].filter((node) =>
            !(node.getAttribute("aria-label") || node.textContent.trim() || node.labels?.length))
            .map((node) => node.outerHTML)"""
    )
    assert unnamed == []


def test_text_of_a_model_is_never_html(page: Page) -> None:
    hostile = (
        "<img src=x onerror=alert(1)> [a](javascript:alert(1)) ![b](https://example.com/b.png) **bold** `<b>`"
    )
    shown = page.evaluate(
        """async (text) => {
          const { MarkdownView } = await import("/page/js/markdown.js");
          const box = document.createElement("div");
          new MarkdownView(box).update(text);
          const count = (what) => box.querySelectorAll(what).length;
          return [count("img, script"), box.textContent, count("strong, code"),
                  [...box.querySelectorAll("a")].map((a) => a.href)];
        }""",
        hostile,
    )
    assert shown[0] == 0
    assert "<img src=x onerror=alert(1)>" in shown[1]
    assert shown[2] == 2
    assert shown[3] == ["https://example.com/b.png"]
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<b>x</b>'")


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("# A\n\ntext *em* __strong__", "<h3>A</h3><p>text <em>em</em> <strong>strong</strong></p>"),
        ("- a\n- b\n  1. c", "<ul><li>a</li><li>b<ol><li>c</li></ol></li></ul>"),
        ("> q\n\n---", "<blockquote><p>q</p></blockquote><hr>"),
        ("snake_case_name 2 * 3 * 4", "<p>snake_case_name 2 * 3 * 4</p>"),
        ("a\nb", "<p>a<br>b</p>"),
        ("**not closed", "<p>**not closed</p>"),
    ],
)
def test_markdown(page: Page, text: str, html: str) -> None:
    shown = page.evaluate(
        """async (text) => {
          const { MarkdownView } = await import("/page/js/markdown.js");
          const box = document.createElement("div");
          const view = new MarkdownView(box);
          for (let i = 0; i <= text.length; i++) view.update(text.slice(0, i)); // as it streams
          return box.innerHTML;
        }""",
        text,
    )
    assert shown == html


def test_json_is_shown_as_json(page: Page) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [7]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    use(page, form="schema", schema=json.dumps(schema), max_tokens=40, temperature=0)
    ask(page, "A number.")
    finished(page)
    assert json.loads(page.locator(".message.assistant .json code").inner_text()) == {"n": 7}


def test_a_tool_is_called_and_its_result_answered(page: Page) -> None:
    weather = {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}},
    }
    weather["parameters"]["required"] = ["city"]  # type: ignore[index]
    tools = json.dumps([{"type": "function", "function": weather}])
    use(page, tools=tools, tool_choice="required", max_tokens=80, temperature=0)
    ask(page, "How is the weather in Oslo?")
    call = page.locator(".call").first
    expect(call.locator("strong")).to_have_text("weather")
    expect(call.locator("code")).to_contain_text('"Oslo"')
    call.get_by_role("textbox").fill("sunny, 21 degrees")
    call.get_by_role("button").click()
    expect(page.locator(".message.tool")).to_have_count(1)
    expect(page.locator(".message.assistant")).to_have_count(2)
    finished(page, 2)


def test_the_heat_map_moves(page: Page) -> None:
    use(page, max_tokens=200, temperature=0)
    expect(page.locator("#slots")).to_have_text("96 of 240 fit in memory")
    still = "document.getElementById('map').toDataURL()"
    before = page.evaluate(still)
    ask(page, "Tell me of the sea.")
    expect(page.locator("#speed")).to_have_text(re.compile("[1-9]"))
    assert page.evaluate(still) != before
    expect(page.locator("#hit-rate")).to_have_text(re.compile(r"^\d\d?\.\d %"))  # below 100: there are misses
    page.locator("#layers summary").click()
    expect(page.locator("#layer-rows tr")).to_have_count(30)
    expect(page.locator("#layer-rows tr td:nth-child(4)").first).to_have_text(re.compile("[1-9]"))
    page.locator("#map").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#cell")).to_contain_text("Layer 0, expert 0")
    finished(page)


def test_light_dark_and_the_system(page: Page) -> None:
    background = "getComputedStyle(document.documentElement).backgroundColor"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(background)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(background)
    assert light != dark
    page.locator("#theme").click()
    assert page.evaluate(background) == light
    page.reload()
    assert page.evaluate(background) == light
    page.locator("#theme").click()
    page.emulate_media(color_scheme="light")
    assert page.evaluate(background) == dark


def test_a_narrow_screen(page: Page) -> None:
    page.set_viewport_size({"width": 380, "height": 700})
    use(page, **SHORT)
    assert page.evaluate("document.documentElement.scrollWidth") == 380
    expect(page.locator("#machine")).to_be_hidden()
    ask(page, "Tell me of the sea.")
    finished(page)
    page.locator("#open-sidebar").click()
    expect(page.locator("#conversations .open")).to_be_in_viewport()
    page.keyboard.press("Escape")
    expect(page.locator("#conversations .open")).not_to_be_in_viewport()
    page.locator("#toggle-machine").click()
    expect(page.locator("#map")).to_be_in_viewport()


def test_a_server_that_wants_a_key(browser: Browser, locked_url: str) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(locked_url)
    expect(page.locator("#key-dialog")).to_be_visible()
    page.locator("#key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-problem")).to_have_text("That one was wrong.")
    page.locator("#key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_text("demo")
    expect(page.locator("#slots")).to_contain_text("of 240")
    context.close()
