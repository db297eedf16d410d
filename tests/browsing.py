"""A real browser for tests: a headless Chromium that must not complain, and where there is none the reason."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
CHECKS = Path(__file__).with_name("ui_page.js").read_text().strip().removesuffix(";")
_TIMEOUT_MS = 20_000


def missing() -> str | None:
    """Why there is no browser; None where there is one."""
    if find_spec("playwright") is None:
        return "the package playwright is not installed"
    return None if shutil.which("chromium") else "there is no chromium on this machine"


@contextmanager
def chromium() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, address: str, *, may_fail: str | None = None, **options: Any) -> Iterator[Page]:
    """A page that must not complain, ask another origin for anything, or run what it shows.

    may_fail: complaints that match it are meant.
    """
    context = browser.new_context(viewport=options.pop("viewport", WIDE), base_url=address, **options)
    context.set_default_timeout(_TIMEOUT_MS)
    page = context.new_page()
    complaints: list[str] = []
    origins: set[str] = set()
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: origins.add(urlsplit(request.url).netloc))
    page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    yield page
    assert page.evaluate("window.hacked") is None
    context.close()  # what the page said until then arrives with it
    complaints = [text for text in complaints if may_fail is None or not re.search(may_fail, text)]
    assert complaints == [], complaints  # said in full: this module's asserts are not rewritten
    assert origins <= {urlsplit(address).netloc}


def go(page: Page, place: str, heading: str | None = None) -> None:
    from playwright.sync_api import expect

    page.goto(f"/ui/#/{place}")
    expect(page.get_by_role("heading", level=1)).to_contain_text(heading or "")


def assert_sound(page: Page) -> None:
    """What is loaded fits into the window, and everything in it has a name."""
    from playwright.sync_api import expect

    expect(page.get_by_text("Loading", exact=True)).to_have_count(0)
    page.wait_for_load_state("networkidle")
    width = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1], "the page scrolls sideways"
    assert page.evaluate(f"{CHECKS}.problems()") == []
