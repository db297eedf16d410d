"""The page in a real browser: every view, by mouse and by keyboard, at both widths, with hostile texts in the run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ui_runs
from browsing import CHECKS, NARROW, WIDE, assert_sound, chromium, go, missing, opened
from job_server import Queue, a_config
from job_server import row as a_row
from run_folders import an_item
from serving import served, serving
from ui_runs import HOSTILE, a_folder_of_runs, lively_run, write_step

from rft.server.serve import create_key
from rft.server.services import Services
from rft.store import RunStore
from rft.types import rollout_id
from rft.ui.app import build_ui

if (reason := missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

from playwright.sync_api import Browser, Locator, Page, Route, expect

pytestmark = pytest.mark.slow

NO_GRADE = "\N{EN DASH}"
LIVELY_TRACE = rollout_id("lively", "train", 5, "validation-00001", 0)
HOSTILE_TRACE = rollout_id("lively", "train", 2, "validation-00001", 0)
PLACES = {
    "runs": ("", "Runs"),
    "charts": ("runs/lively", "lively"),
    "rollouts": ("runs/lively/rollouts", "lively"),
    "doctor": ("runs/lively/doctor", "lively"),
    "events": ("runs/lively/events", "lively"),
    "config": ("runs/lively/config", "lively"),
    "trace": (f"runs/lively/trace/{LIVELY_TRACE}", "validation-00001"),
    "hostile": (f"runs/lively/trace/{HOSTILE_TRACE}", "validation-00001"),
    "compare": ("compare?runs=lively,gentle", "Compare runs"),
    "grader": ("runs/lively/grader", "Try a grader"),
    "dataset": ("dataset", "Check a dataset"),
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(build_ui(a_folder_of_runs(tmp_path_factory.mktemp("site") / "runs"))) as address:
        yield address


@pytest.fixture
def page(browser: Browser, site: str) -> Iterator[Page]:
    with opened(browser, site) as page:
        yield page


def column(page: Page, name: str) -> list[str]:
    """The cells of a column of the table of rollouts."""
    table = page.get_by_role("region", name="Rollouts").get_by_role("table")
    headings = [text.strip(" ↑↓\n") for text in table.get_by_role("columnheader").all_inner_texts()]
    at = headings.index(name) + 1
    return [text.strip() for text in table.locator(f"tbody tr td:nth-child({at})").all_inner_texts()]


# --- every view ---


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("name", PLACES)
def test_every_view_fits_and_is_named(browser: Browser, site: str, name: str, viewport: Any) -> None:
    with opened(browser, site, viewport=viewport) as page:
        go(page, *PLACES[name])
        assert_sound(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(browser: Browser, site: str, scheme: Any) -> None:
    with opened(browser, site, color_scheme=scheme, reduced_motion="reduce") as page:
        for place, heading in PLACES.values():
            go(page, place, heading)
            page.wait_for_load_state("networkidle")
            page.evaluate("document.querySelectorAll('main details').forEach((one) => { one.open = true })")
            page.wait_for_load_state("networkidle")
            assert page.evaluate(f"{CHECKS}.faint()") == [], place


def test_dark_follows_the_system_until_the_user_chooses(browser: Browser, site: str) -> None:
    def brightness(page: Page) -> int:
        return sum(
            page.evaluate("getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).map(Number)")
        )

    with opened(browser, site, color_scheme="dark") as page:
        go(page, "", "Runs")
        assert brightness(page) < 150
        page.get_by_label("Theme").select_option("Light")
        assert brightness(page) > 600
        page.reload()
        expect(page.get_by_role("heading", level=1)).to_have_text("Runs")
        assert brightness(page) > 600
        assert page.get_by_label("Theme").input_value() == "light"


def test_an_unknown_place_says_so(browser: Browser, site: str) -> None:
    with opened(browser, site, may_fail="404") as page:
        go(page, "nowhere", "Nothing here")
        go(page, "runs/nobody", "This cannot be shown")
        expect(page.get_by_role("alert")).to_contain_text("Not found")


# --- runs and charts ---


def test_runs_are_filtered_and_compared(page: Page) -> None:
    go(page, "", "Runs")
    rows = page.get_by_role("row").filter(has=page.get_by_role("rowheader"))
    expect(rows).to_have_count(3)
    expect(rows.filter(has_text="young")).to_contain_text("failed")
    expect(rows.filter(has_text="lively").get_by_role("progressbar")).to_have_attribute("aria-valuetext", "step 8 of 8")
    page.get_by_label("Filter").fill("succ")
    expect(rows).to_have_count(2)
    page.get_by_label("Compare lively").check()
    expect(page.get_by_role("button", name="Choose two runs to compare")).to_be_disabled()
    page.get_by_label("Compare gentle").check()
    page.get_by_role("button", name="Compare 2 runs").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Compare runs")
    options = page.get_by_label("Chart").locator("option").all_inner_texts()
    assert "Grade" in options and len(options) > 3
    lines = page.get_by_role("group", name="Lines")
    expect(lines.get_by_role("button", name="lively: grade, train")).to_be_visible()
    expect(lines.get_by_role("button", name="gentle: grade, train")).to_be_visible()
    expect(page.locator(".plot .scatterlayer")).to_be_visible()
    page.get_by_label("Chart").select_option(index=2)
    expect(page).to_have_url(re.compile("chart="))
    expect(page.get_by_role("heading", level=2)).to_have_text(options[2])


def test_charts_have_lines_tables_and_switches(page: Page) -> None:
    go(page, "runs/lively", "lively")
    grade = page.get_by_role("figure").filter(has=page.get_by_role("heading", name="Grade", exact=True))
    expect(grade.locator(".scatterlayer")).to_be_visible()
    expect(grade.locator(".scatterlayer .trace")).to_have_count(4)  # train and validation, each with its band
    validation = grade.get_by_role("button", name=re.compile("validation"))
    validation.click()
    expect(validation).to_have_attribute("aria-pressed", "false")
    expect(grade.locator(".scatterlayer .trace")).to_have_count(2)
    grade.get_by_text("Show as table").click()
    expect(grade.get_by_role("row")).to_have_count(1 + 9)  # a heading, steps 0 to 8


def test_only_charts_that_can_be_seen_are_drawn(page: Page) -> None:
    go(page, "runs/lively", "lively")
    figures = page.get_by_role("figure")
    expect(figures.first.locator(".scatterlayer")).to_be_visible()
    assert figures.last.locator(".main-svg").count() == 0
    figures.last.scroll_into_view_if_needed()
    expect(figures.last.locator(".scatterlayer")).to_be_visible()


def test_a_run_is_followed_while_it_is_written(browser: Browser, tmp_path: Path) -> None:
    lively_run(tmp_path / "runs", "growing", name="growing", steps=3).path.joinpath("DONE").unlink()
    store = RunStore.open(tmp_path / "runs/growing")
    store.lock()
    store.write_state({"status": "running", "step": 3, "steps": 5})
    with served(build_ui(tmp_path / "runs")) as address, opened(browser, address) as page:
        go(page, "runs/growing", "growing")
        progress = page.get_by_role("progressbar")
        expect(progress).to_have_attribute("aria-valuetext", "step 3 of 5")
        grade = page.get_by_role("figure").filter(has=page.get_by_role("heading", name="Grade", exact=True))
        grade.get_by_text("Show as table").click()
        expect(grade.get_by_role("rowheader", name="4", exact=True)).to_have_count(0)
        write_step(store, [an_item(0), an_item(1)], "train", 4, 0.1)
        store.write_state({"status": "running", "step": 4, "steps": 5})
        expect(progress).to_have_attribute("aria-valuetext", "step 4 of 5")
        expect(grade.get_by_role("rowheader", name="4", exact=True)).to_be_visible()
    store.close()


def test_a_lost_connection_is_said_and_mended(browser: Browser, site: str) -> None:
    with opened(browser, site, may_fail="ERR_FAILED") as page:
        go(page, "", "Runs")
        page.route("**/ui/api/runs", lambda route: route.abort())
        expect(page.get_by_text("Connection lost, trying again.")).to_be_visible()
        page.unroute("**/ui/api/runs")
        expect(page.get_by_text("Connection lost, trying again.")).to_be_hidden()


# --- rollouts ---


def test_rollouts_are_filtered_by_the_server_and_the_address_keeps_it(page: Page) -> None:
    go(page, "runs/lively/rollouts", "lively")
    status = page.get_by_role("tabpanel").get_by_role("status")
    expect(status).to_contain_text("264 rollouts found")
    page.get_by_label("Ended by").select_option("tool_failed")
    expect(status).to_contain_text("8 rollouts found")
    assert set(column(page, "Grade")) == {NO_GRADE}
    page.get_by_label("Step from").fill("3")
    page.get_by_label("Step to").fill("4")
    expect(status).to_contain_text("2 rollouts found")
    expect(page).to_have_url(re.compile("stop=tool_failed.*step_from=3.*step_to=4"))
    page.reload()
    expect(status).to_contain_text("2 rollouts found")
    assert page.get_by_label("Ended by").input_value() == "tool_failed"
    page.get_by_role("button", name="Clear filters").click()
    expect(status).to_contain_text("264 rollouts found")
    page.go_back()
    expect(status).to_contain_text("2 rollouts found")


def test_rollouts_are_sorted_and_paged(page: Page) -> None:
    go(page, "runs/lively/rollouts?split=train", "lively")
    status = page.get_by_role("tabpanel").get_by_role("status")
    expect(status).to_contain_text("192 rollouts found. Page 1.")
    page.get_by_role("columnheader", name="Grade").get_by_role("button").click()
    expect(page.get_by_role("columnheader", name="Grade")).to_have_attribute("aria-sort", "descending")
    expect(page).to_have_url(re.compile("sort=-grade"))
    page.wait_for_load_state("networkidle")
    first = [float(text) for text in column(page, "Grade") if text != NO_GRADE]
    assert first == sorted(first, reverse=True) and len(first) == 100
    page.get_by_role("button", name="Next page").click()
    expect(status).to_contain_text("Page 2.")
    rest = [float(text) for text in column(page, "Grade") if text != NO_GRADE]
    assert rest == sorted(rest, reverse=True) and rest[0] <= first[-1]
    expect(page.get_by_role("button", name="Next page")).to_be_disabled()
    page.get_by_role("button", name="Previous page").click()
    expect(status).to_contain_text("Page 1.")
    assert [float(text) for text in column(page, "Grade") if text != NO_GRADE] == first


# --- a trace ---


def test_a_trace_shows_turns_times_grade_and_group(page: Page) -> None:
    go(page, "runs/lively/rollouts?step_from=5&step_to=5&split=train&sort=attempt", "lively")
    page.get_by_role("link", name="Trace of validation-00001, attempt 1, step 5").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("validation-00001 attempt 1")
    turn = page.get_by_role("article", name="Turn 1")
    expect(turn).to_contain_text("I should search first.")
    expect(turn.get_by_role("group", name="Call of search")).to_contain_text('{"query": "I27"}')
    expect(turn.get_by_role("group", name="Call of search")).to_contain_text("Other secondary pulmonary hypertension")
    page.get_by_role("button", name=re.compile("^search: ")).first.click()
    expect(turn.get_by_role("group", name="Call of search")).to_be_focused()
    grade = page.get_by_role("complementary", name="Grade and group")
    for part in ("exact", "near", "strict"):
        expect(grade.get_by_text(part, exact=True)).to_be_visible()
    for attempt in (0, 1, 2):
        grade.get_by_label(f"Compare attempt {attempt}").check()
    expect(grade.get_by_label("Compare attempt 3")).to_be_disabled()
    grade.get_by_role("button", name="Show 3 side by side").click()
    dialog = page.get_by_role("dialog", name="Rollouts side by side")
    expect(dialog.get_by_role("article")).to_have_count(3)
    expect(dialog.get_by_role("article", name="Attempt 2")).to_contain_text("Attempt 2 is")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    page.get_by_role("link", name="Next of group").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("validation-00001 attempt 2")


def test_tokens_are_read_one_by_one(page: Page) -> None:
    go(page, f"runs/lively/trace/{LIVELY_TRACE}", "validation-00001")
    page.get_by_text("Tokens", exact=True).last.click()
    tokens = page.get_by_role("group", name="Tokens")
    first = tokens.get_by_role("img").first
    expect(first).to_have_accessible_name(re.compile("Token 0: .* id 100, not sampled, not in the loss"))
    first.focus()
    page.keyboard.press("End")
    reading = page.get_by_text(re.compile(r"^Token \d+: .*log-probability -?\d.*, counts in the loss$"))
    expect(reading).to_be_visible()
    page.get_by_label("Loss mask").check()
    expect(page.get_by_text("counts in the loss", exact=True)).to_be_visible()
    looks = set(page.locator(".tokens .token").evaluate_all("tokens => tokens.map((one) => one.dataset.look)"))
    assert looks == {"trained", "given"}


def test_hostile_texts_are_shown_as_texts(page: Page) -> None:
    go(page, f"runs/lively/trace/{HOSTILE_TRACE}", "validation-00001")
    main = page.get_by_role("main")
    shown = main.inner_text()
    for text in HOSTILE[:3]:
        assert text in shown
    for code in (r"\x1b[31mred\x1b[2J\x07", r"\x00 null", r"user\u202efdp.exe\u2066", r"\u200bzero"):
        assert code in shown
    assert not re.search("[\x00-\x08\x0b-\x1f\u200b\u202e\u2066]", shown)
    assert page.locator("main script, main img, main style, main [onerror], main [onload]").count() == 0
    for place in ("rollouts", "events", "config", "doctor"):
        go(page, f"runs/lively/{place}", "lively")
        page.wait_for_load_state("networkidle")
        assert page.locator("main script, main img, main style, main [onerror], main [onload]").count() == 0


def test_a_long_text_comes_in_pieces(page: Page) -> None:
    go(page, f"runs/lively/trace/{HOSTILE_TRACE}", "validation-00001")
    result = page.get_by_role("group", name="Call of lookup")
    more = result.get_by_role("button", name=re.compile("Show more of the result"))
    expect(more).to_have_text("Show more of the result (43,500 characters left)")
    assert result.inner_text().count(ui_runs.LONG[:6]) == 250
    for left in ("25,000", "5,000"):
        more.click()
        expect(more).to_have_text(f"Show more of the result ({left} characters left)")
    more.click()
    expect(more).to_have_count(0)
    assert ui_runs.LONG in (result.text_content() or "")


def test_a_text_of_megabytes_is_not_loaded_before_it_is_wanted(page: Page) -> None:
    sizes: list[int] = []
    page.on("response", lambda answer: sizes.append(len(answer.body())) if "/rollouts/" in answer.url else None)
    go(page, f"runs/lively/trace/{HOSTILE_TRACE}", "validation-00001")
    call = page.get_by_role("group", name="Call of search<img")
    more = call.get_by_role("button", name=re.compile("Show more of the result"))
    expect(more).to_contain_text(re.compile(r"4,998,\d{3} characters left"))
    more.click()
    expect(more).to_contain_text(re.compile(r"4,980,\d{3} characters left"))
    assert sizes and max(sizes) < 500_000


def test_a_table_that_is_not_complete_says_so(page: Page) -> None:
    def half(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json={**answer.json(), "indexed_share": 0.349})

    page.route(re.compile(r"/rollouts\?"), half)
    go(page, "runs/lively/rollouts", "lively")
    status = page.get_by_role("tabpanel").get_by_role("status")
    expect(status).to_contain_text("Still looking through old rollouts: 34%.")
    page.unroute(re.compile(r"/rollouts\?"))
    expect(status).not_to_contain_text("Still looking")


# --- by keyboard ---


def tab_to(page: Page, target: Locator, limit: int = 80) -> None:
    for _ in range(limit):
        if target.evaluate("element => element === document.activeElement"):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{target} cannot be reached with the Tab key")


def test_the_keyboard_alone_leads_to_a_trace(page: Page) -> None:
    go(page, "", "Runs")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    tab_to(page, page.get_by_role("link", name="lively", exact=True))
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("lively")
    tab_to(page, page.get_by_role("tab", name="Charts"))
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Rollouts")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_role("region", name="Rollouts").get_by_role("link").first).to_be_visible()
    tab_to(page, page.get_by_role("region", name="Rollouts").get_by_role("link").first)
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none", "the focus cannot be seen"
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("attempt")
    tab_to(page, page.get_by_role("button", name=re.compile("^turn 1, sampling")))
    page.keyboard.press("Enter")
    expect(page.get_by_role("article", name="Turn 1")).to_be_focused()


# --- grader, dataset, key, job ---


def test_a_grader_is_tried(page: Page) -> None:
    go(page, "runs/lively/rollouts?step_from=8&step_to=8&split=train&sort=attempt", "lively")
    page.get_by_label("Choose validation-00001, attempt 0, step 8").check()
    page.get_by_label("Choose validation-00002, attempt 0, step 8").check()
    page.get_by_role("button", name="Try a grader on 2 rollouts").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Try a grader")
    area = page.get_by_label("Grader as JSON")
    expect(area).to_have_value(re.compile('"type": "multi"'))
    area.fill('{"type": "string_check",')
    expect(page.get_by_text(re.compile("Not JSON"))).to_be_visible()
    area.fill("{}")
    page.get_by_role("button", name="Run the grader").click()
    expect(page.get_by_text(re.compile("Nothing was graded"))).to_be_visible()
    area.fill(
        '{"type": "string_check", "name": "x", "input": "{{ item.answer }}", "reference": "yes", "operation": "eq"}'
    )
    page.get_by_role("button", name="Run the grader").click()
    table = page.get_by_role("region", name="Old and new grades")
    expect(table.get_by_role("rowheader")).to_have_count(2)
    expect(page.get_by_text(re.compile("^Mean of the old grades"))).to_be_visible()


def test_a_dataset_is_checked(page: Page, tmp_path: Path) -> None:
    go(page, "dataset", "Check a dataset")
    page.get_by_role("button", name="Check", exact=True).click()
    expect(page.get_by_text(re.compile("There is nothing to check"))).to_be_visible()
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n{"answer": "x"}\nno json\n')
    page.get_by_label("A JSONL file").set_input_files(bad)
    expect(page.get_by_label("Rows as JSONL")).to_have_value(re.compile("no json"))
    page.get_by_role("button", name="Check", exact=True).click()
    problems = page.get_by_role("region", name="Problems")
    expect(problems.get_by_role("row")).to_have_count(3)
    expect(problems).to_contain_text("messages")
    page.get_by_label("Rows as JSONL").fill('{"messages": [{"role": "user", "content": "hello"}]}')
    page.get_by_role("button", name="Check", exact=True).click()
    expect(page.get_by_text(re.compile("^No problem found in 1 row"))).to_be_visible()


@contextmanager
def server_of_jobs(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The address of `rft serve` with keys, and a key. Its worker starts nothing."""

    def prepare(services: Services) -> None:
        services.worker = Queue(services)

    config = a_config(tmp_path)
    with serving(config, has_auth=True, prepare=prepare) as url:
        yield url.removesuffix("/v1"), create_key(config)


def test_a_key_is_asked_for_kept_in_the_tab_and_forgotten(browser: Browser, tmp_path: Path) -> None:
    with server_of_jobs(tmp_path) as (address, key), opened(browser, address, may_fail="401") as page:
        page.goto("/ui/")
        dialog = page.get_by_role("dialog", name="Key needed")
        dialog.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        expect(dialog.get_by_role("alert")).to_contain_text("Incorrect API key")
        dialog.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        expect(page.get_by_text("There is no run yet.")).to_be_visible()
        assert page.evaluate("[Object.values(localStorage), document.cookie]") == [[], ""]
        page.reload()
        expect(page.get_by_text("There is no run yet.")).to_be_visible()
        page.get_by_role("button", name="Forget key").click()
        expect(page.get_by_role("dialog", name="Key needed")).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0


def test_a_job_is_created_and_cancelled_and_refusals_stand_at_their_field(browser: Browser, tmp_path: Path) -> None:
    rows = tmp_path / "train.jsonl"
    rows.write_text("".join(json.dumps(a_row(number)) + "\n" for number in range(12)))
    with server_of_jobs(tmp_path) as (address, key), opened(browser, address, may_fail="40[01]") as page:
        page.goto("/ui/")
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        page.get_by_role("link", name="New job").click()
        expect(page.get_by_label("Base model")).to_have_value("m")
        page.get_by_role("button", name="Create the job").click()
        expect(page.get_by_text("Choose a file.")).to_be_visible()
        page.get_by_label("Training file").set_input_files(rows)
        field = page.get_by_label("Compute multiplier")
        field.fill("much")
        page.get_by_role("button", name="Create the job").click()
        expect(field).to_have_accessible_description(re.compile("must be 'auto' or a number"))
        expect(field).to_be_focused()
        assert page.evaluate(f"{CHECKS}.problems()") == []
        field.fill("2")
        page.get_by_role("button", name="Create the job").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Runs")
        job = page.get_by_role("row").filter(has_text="ftjob-")
        expect(job.get_by_text("queued", exact=True)).to_be_visible()
        job.get_by_role("button", name="Cancel").click()
        page.get_by_role("dialog", name="Cancel this run?").get_by_role("button", name="Cancel the run").click()
        expect(job.get_by_text("cancelled", exact=True)).to_be_visible()
        expect(job.get_by_role("button")).to_have_count(0)


def test_a_run_is_paused_after_a_question(browser: Browser, tmp_path: Path) -> None:
    lively_run(tmp_path / "runs", "going", name="going", steps=2).path.joinpath("DONE").unlink()
    store = RunStore.open(tmp_path / "runs/going")
    store.lock()
    store.write_state({"status": "running", "step": 2, "steps": 5})
    with served(build_ui(tmp_path / "runs")) as address, opened(browser, address) as page:
        go(page, "runs/going", "going")
        page.get_by_role("button", name="Pause going").click()
        dialog = page.get_by_role("dialog", name="Pause this run?")
        dialog.get_by_role("button", name="Keep as it is").click()
        expect(dialog).to_be_hidden()
        assert not store.is_pause_asked
        page.get_by_role("button", name="Pause going").click()
        dialog.get_by_role("button", name="Pause the run").click()
        expect(page.get_by_role("button", name="Pause going")).to_have_count(0)
        assert store.is_pause_asked
    store.close()
