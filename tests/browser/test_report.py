"""The report in both themes: accessible, sorted by keyboard, curves fade, tokens tell."""

from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from pipeline.report.page import render_report
from pipeline.report.testing import make_report, make_samples, make_state


@pytest.fixture
def report_file(tmp_path: Path) -> str:
    samples = [make_samples(f"student-{n}") for n in range(2)]
    state = make_state("failed", step="train", why="no space left", go_on="distill run run.yaml")
    file = tmp_path / "report.html"
    file.write_text(render_report(make_report(samples=samples, state=state)), encoding="utf-8")
    return file.as_uri()


def test_axe_finds_no_problem(page: Page, report_file: str, theme: str) -> None:
    page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
    page.goto(report_file)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_the_quality_table_is_sorted_with_the_keyboard(page: Page, report_file: str) -> None:
    page.goto(report_file)
    names = page.locator("[data-sortable] tbody th")
    assert names.all_inner_texts() == ["untrained", "student-0", "student-1"]
    button = page.get_by_role("button", name="sort by KL to the teacher")
    button.focus()
    page.keyboard.press("Enter")
    assert names.all_inner_texts() == ["student-1", "student-0", "untrained"]
    heading = page.locator("th", has=button)
    expect(heading).to_have_attribute("aria-sort", "ascending")
    page.keyboard.press("Enter")
    assert names.all_inner_texts() == ["untrained", "student-0", "student-1"]
    expect(heading).to_have_attribute("aria-sort", "descending")


def test_a_name_of_the_legend_fades_the_other_students(page: Page, report_file: str) -> None:
    page.goto(report_file)
    page.locator("[data-fade='1']").focus()
    assert page.locator("#charts .dim").count() == page.locator("[data-student='0']").count() == 6
    page.locator("[data-fade='1']").blur()
    expect(page.locator("#charts .dim")).to_have_count(0)


def test_printing_opens_what_is_closed_and_hides_what_is_for_hands(
    page: Page, report_file: str
) -> None:
    page.goto(report_file)
    page.emulate_media(media="print")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    expect(page.get_by_text("Every step", exact=True)).to_be_visible()
    expect(page.get_by_text("Steps of all runs of this project")).to_be_visible()
    expect(page.locator("nav")).to_be_hidden()
    expect(page.locator("th button").first).to_be_hidden()
