"""The server of ``distill view`` in a browser: list, filter, permalinks."""

from collections.abc import Callable

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from pipeline.inspection.testing import TEXTS


def test_from_the_list_to_a_sample_and_on(page: Page, address: str, theme: str) -> None:
    page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
    page.goto(address)
    expect(page.locator("ol.samples li")).to_have_count(len(TEXTS))
    report = Axe().run(page)
    assert report.violations_count == 0, report.generate_report()
    page.locator("ol.samples a").first.click()
    expect(page.get_by_role("listbox")).to_have_count(2)
    key = page.locator("h1 code").inner_text()
    page.get_by_role("link", name="Next sample").click()
    assert page.locator("h1 code").inner_text() != key
    permalink = page.url
    page.goto(address)
    page.goto(permalink)
    page.get_by_role("link", name="Previous sample").click()
    assert page.locator("h1 code").inner_text() == key
    page.get_by_role("link", name="All samples").click()
    expect(page.locator("ol.samples li")).to_have_count(len(TEXTS))


def test_filter_and_sort_with_the_keyboard(page: Page, address: str) -> None:
    page.goto(address)
    page.get_by_label("Only samples where (SQL)").fill("num_tokens > 30")
    page.get_by_label("sorted by").select_option("kl")
    page.get_by_label("order", exact=True).select_option("desc")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Show").press("Enter")
    expect(page.get_by_role("status")).to_contain_text("of")
    tokens = page.locator("ol.samples .quiet").all_inner_texts()
    assert all(int(text.split()[0]) > 30 for text in tokens)
    assert "sort=kl" in page.url


def test_a_wrong_condition_is_told_on_the_page(
    page: Page, address: str, page_file: Callable[[str], str]
) -> None:
    failed: list[int] = []
    page.on("response", lambda response: failed.append(response.status))
    page.goto(page_file("plain"))  # a page that loads, so that only the next answer is a problem
    answer = page.request.get(address, params={"where": "nonsense = 1"})
    assert answer.status == 400
    page.set_content(answer.text())
    expect(page.get_by_role("alert")).to_contain_text("nonsense")
