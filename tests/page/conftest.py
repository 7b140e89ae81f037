"""A server with few expert slots, and a browser in front of it that may talk to nobody else."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Request, sync_playwright

KEY = "sesame"


def _serve(bundle: Path, *options: str) -> Iterator[str]:
    program = str(Path(sys.executable).with_name("flashmoe"))
    command = [program, "serve", str(bundle), "--port", "0", "--drain", "2"]
    process = subprocess.Popen(
        [*command, "--context", "1024", "--parallel", "2", "--expert-slots", "40%", *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.search(r"http://[\d.]+:\d+", line)
        assert found, line
        yield found[0]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.fixture(scope="session")
def url(demo_bundle: Path) -> Iterator[str]:
    yield from _serve(demo_bundle)


@pytest.fixture(scope="session")
def locked_url(demo_bundle: Path) -> Iterator[str]:
    yield from _serve(demo_bundle, "--api-key", KEY)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.fail("the page's tests need a browser: apt install chromium", pytrace=False)
    with sync_playwright() as playwright:
        # Root, as in containers, has no sandbox; the page is ours.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


class Watched:
    """A page; leaving it checks that it asked only its own server, and that no script failed."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.foreign, self.problems = page, list[str](), list[str]()
        page.on("request", self._on_request)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        # A refusal by the Content-Security-Policy is told on the console.
        page.on("console", lambda m: self.problems.append(m.text) if "Refused" in m.text else None)
        self._url = url
        page.goto(url)

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith(self._url + "/"):
            self.foreign.append(request.url)


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1400, "height": 860})
    watched = Watched(context.new_page(), url)
    watched.page.set_default_timeout(20_000)
    yield watched.page
    context.close()
    assert watched.foreign == []
    assert watched.problems == []
