"""The page of a sample with keyboard and pointer, in both themes, checked by axe."""

import re
from collections.abc import Callable

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from pipeline.inspection.testing import TEXTS

Address = Callable[[str], str]
FIRST = "#pane-0 [data-row='0']"


def assert_accessible(page: Page) -> None:
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("name", TEXTS)
def test_axe_finds_no_problem(page: Page, page_file: Address, name: str, theme: str) -> None:
    page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
    page.goto(page_file(name))
    assert_accessible(page)
    page.get_by_label("Colour tokens by").select_option("kl")
    page.locator(FIRST).focus()
    page.keyboard.press("End")
    assert_accessible(page)


def test_the_page_works_with_the_keyboard_only(page: Page, page_file: Address) -> None:
    page.goto(page_file("plain"))
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.row") is not None:
            break
    assert page.evaluate("document.activeElement.id") == "t0-0"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert outline == "3px"
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "t0-1"
    selected = page.locator("#pane-0 [aria-selected=true]")
    expect(selected).to_have_count(1)
    expect(selected).to_have_id("t0-1")
    expect(page.locator("#pane-1 [aria-selected=true]")).to_have_id("t1-1")
    page.keyboard.press("End")
    last = page.locator("#pane-0 [role=option]").count() - 1
    assert page.evaluate("document.activeElement.id") == f"t0-{last}"
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.dataset.row") == str(min(10, last))
    assert page.url.endswith(f"#p{min(10, last)}")


def test_the_candidates_of_a_token_are_announced_and_shown(page: Page, page_file: Address) -> None:
    page.goto(page_file("plain"))
    page.locator(FIRST).hover()
    expect(page.locator("#detail-title")).to_have_text("Position 0: hello")
    tables = page.locator("#detail table")
    expect(tables).to_have_count(2)
    sampled = tables.first.locator("tr.sampled")
    expect(sampled).to_have_count(1)
    expect(sampled.locator("th")).to_have_text("hello (sampled)")
    expect(page.locator("#live")).to_contain_text("hello, position 0; labels: Entropy")
    expect(page.locator("#query")).to_have_value(
        re.compile(r"^SELECT \* FROM labels WHERE sample_key = '[0-9a-f]{32}' AND position = 0$")
    )
    width = page.locator("#detail .bar").first.evaluate("bar => bar.offsetWidth")
    assert width >= 1


def test_colours_follow_the_measure(page: Page, page_file: Address) -> None:
    page.goto(page_file("emoji"))
    expect(page.locator("#legend-title")).to_contain_text("Entropy")
    page.get_by_label("Colour tokens by").select_option("rank")
    expect(page.locator("#legend-title")).to_contain_text("Rank of the sampled token")
    data = page.evaluate("data.models[1].values.rank.map((value) => level('rank', value))")
    classes = page.locator("#pane-1 [data-row]").evaluate_all(
        "tokens => tokens.map((token) => /h([0-6])/.exec(token.className)[1] * 1)"
    )
    assert classes == data
    page.get_by_label("Colour tokens by").select_option("kl")
    expect(page.locator("#pane-0-title")).to_contain_text("has no such number")
    expect(page.locator("#pane-0 .h0, #pane-0 .h6")).to_have_count(0)


def test_a_character_of_several_tokens_is_whole(page: Page, page_file: Address) -> None:
    page.goto(page_file("emoji"))
    text = page.locator("#pane-0").inner_text()
    assert "\U0001f600" in text
    assert "\u6f22" in text
    assert "\ufffd" not in text
    expect(page.get_by_role("option", name="bytes <F0> of \U0001f600").first).to_be_attached()


def test_hostile_text_stays_text(page: Page, page_file: Address) -> None:
    page.goto(page_file("hostile"))
    page.locator(FIRST).focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    assert page.evaluate("window.hacked") is None
    assert "<script>window.hacked=1</script>" in page.locator("#pane-0").inner_text()
    expect(page.locator("img")).to_have_count(0)
    expect(page.locator("script")).to_have_count(2)


def test_right_to_left_text_runs_from_the_right_and_arrows_follow(
    page: Page, page_file: Address
) -> None:
    page.goto(page_file("right_to_left"))
    assert page.locator("#pane-0").evaluate("pane => getComputedStyle(pane).direction") == "rtl"
    page.locator(FIRST).focus()
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.dataset.row") == "1"


def test_find_and_next_difference(page: Page, page_file: Address) -> None:
    page.goto(page_file("plain"))
    page.get_by_label("Find in the response").fill("WORLD")
    page.keyboard.press("Enter")
    assert page.evaluate("data.response[data.positions[row]].text") == " world"
    first = page.evaluate("row")
    page.get_by_role("button", name="Find next").click()
    assert page.evaluate("row") > first
    page.get_by_role("button", name="next difference").click()
    assert page.evaluate("data.disagrees[row]") is True
    page.get_by_label("Find in the response").fill("nowhere")
    page.keyboard.press("Enter")
    expect(page.locator("#live")).to_have_text("nowhere does not occur")


def test_a_link_to_a_position_opens_it(page: Page, page_file: Address) -> None:
    page.goto(page_file("plain") + "#p3")
    expect(page.locator("#detail-title")).to_contain_text("Position 3")
    expect(page.locator("#t0-3")).to_be_focused()
