"""What a person waits for at the page, in a headless Chromium: from the click until the view is there. For bench_ui."""

from __future__ import annotations

import shutil
import time
from importlib.util import find_spec
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

_NUM_RUNS = 3
_IS_DRAWN = """() => {
    const seen = [...document.querySelectorAll("figure")].filter((one) => {
        const { top, bottom } = one.getBoundingClientRect();
        return top < innerHeight && bottom > 0;
    });
    return seen.length > 0 && seen.every((one) => one.querySelector(".scatterlayer"));
}"""


def missing() -> str | None:
    """Why nothing can be measured here; None when it can."""
    if find_spec("playwright") is None:
        return "the package playwright is not installed"
    return None if shutil.which("chromium") else "there is no chromium on this machine"


def browser(address: str, run: str) -> dict[str, float]:
    """Medians of three tabs: the charts that a window of 1280 x 900 shows, the table's first page, a trace.

    The page's own files are in the browser's cache, as on any day but the first. Charts are measured twice: from the
    list of runs when that has come to rest, and in a new tab by their address, which also has to start the library.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        context = chromium.new_context(viewport={"width": 1280, "height": 900}, base_url=address)
        tabs = [_clicks(context.new_page(), run) for _ in range(1 + _NUM_RUNS)][1:]
        chromium.close()
    return {name: median(tab[name] for tab in tabs) for name in tabs[0]}


def _clicks(page: Page, run: str) -> dict[str, float]:
    found: dict[str, float] = {}
    started = time.perf_counter()
    page.goto(f"/ui/#/runs/{run}")
    page.wait_for_function(_IS_DRAWN)
    found["browser: charts in a new tab, ms"] = (time.perf_counter() - started) * 1e3
    page.close()
    page = page.context.new_page()
    page.goto("/ui/")
    link = page.get_by_role("link", name=run, exact=True)
    link.wait_for()
    page.wait_for_load_state("networkidle")
    started = time.perf_counter()
    link.click()
    page.wait_for_function(_IS_DRAWN)
    found["browser: charts of 10,000 steps, ms"] = (time.perf_counter() - started) * 1e3
    row = page.get_by_role("region", name="Rollouts").get_by_role("link").first
    started = time.perf_counter()
    page.get_by_role("tab", name="Rollouts").click()
    row.wait_for()
    found["browser: first page, ms"] = (time.perf_counter() - started) * 1e3
    started = time.perf_counter()
    row.click()
    page.get_by_role("heading", name="Turns").wait_for()
    found["browser: a trace, ms"] = (time.perf_counter() - started) * 1e3
    page.close()
    return found
