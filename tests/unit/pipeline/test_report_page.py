"""The report page is complete without network or script, and no text of a model can break out."""

import json
from html.parser import HTMLParser
from typing import Any

import pytest

from pipeline.report.page import render_report
from pipeline.report.testing import (
    HOSTILE,
    make_evaluation,
    make_report,
    make_samples,
    make_state,
    make_student,
    make_token,
)

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """A parsed page: its attributes, scripts and text; fails where tags do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.text += data

    def values(self, name: str) -> list[str]:
        return [value for attribute, value in self.attributes if attribute == name]


def test_page_refers_to_nothing_outside_itself() -> None:
    page = Page(render_report(make_report()))
    assert page.values("src") == []
    assert all(target.startswith("#") for target in page.values("href"))
    assert "default-src 'none'" in page.values("content")[0]


def test_every_link_and_label_of_the_page_has_its_target() -> None:
    page = Page(render_report(make_report()))
    targets = [target.removeprefix("#") for target in page.values("href")]
    assert set(targets + page.values("aria-labelledby")) <= set(page.values("id"))


def test_hostile_text_is_text_and_not_a_script() -> None:
    html = render_report(make_report())
    page = Page(html)
    assert "<script>alert" not in html
    assert len(page.scripts) == 2
    # prompt, generation's prompt and the token itself
    assert page.text.count(HOSTILE) == 3


def test_embedded_data_is_the_report() -> None:
    report = make_report()
    assert json.loads(Page(render_report(report)).scripts[0]) == report


def test_every_model_and_directory_is_shown() -> None:
    page = Page(render_report(make_report(num_students=30)))
    words = page.text.split()
    assert "untrained" in words
    for n in range(30):
        assert f"student-{n}" in words
        assert f"answer of student-{n}" in page.text
        assert f"student-{n}-0123456789ab/model" in page.text


def test_metrics_have_four_digits_and_the_best_of_each_column_is_named() -> None:
    page = Page(render_report(make_report(num_students=2)))
    # kl is 2, 1 and 2/3; cross-entropy one more; agreement 1 / (1 + kl)
    for shown in ["2.0000", "1.0000", "0.6667 (best)", "1.6667 (best)", "0.3333", "0.6000 (best)"]:
        assert shown in page.text
    assert page.text.count("(best)") == 3


def test_a_metric_that_was_not_measured_has_no_column() -> None:
    evaluation = {**make_evaluation("untrained", 2.0), "metrics": {"kl": 2.0}}
    page = Page(render_report(make_report(evaluations=[evaluation])))
    assert "Top-1 agreement" not in page.text
    assert "(best)" not in page.text


def test_summary_tells_that_training_ran_no_teacher() -> None:
    text = " ".join(Page(render_report(make_report())).text.split())
    assert (
        "2 students from 1,200 cached samples; teacher forward tokens during training: 0." in text
    )


def test_label_facts_include_bytes_per_token() -> None:
    # 500,000 bytes for 2,000 tokens
    assert "250.0" in Page(render_report(make_report())).text


def test_label_sets_that_serve_labels_of_another_are_named() -> None:
    text = " ".join(Page(render_report(make_report())).text.split())
    assert f"201 samples of label set {'4' * 64}" in text
    assert f"samples of label set {'1' * 64}" not in text


def test_first_and_last_losses_are_in_the_page_without_script() -> None:
    text = Page(render_report(make_report(num_students=1))).text
    # three steps: 2.5 - 2/8
    assert "2.5000" in text
    assert "2.2500" in text


def test_response_keeps_whitespace_and_marks_it() -> None:
    page = Page(render_report(make_report()))
    assert "The cat\u21b5\n\u21b5\n\u21e5\t\u2423\u2423\u2205" in page.text


def test_samples_link_to_the_viewer_of_this_machine_and_nowhere_else() -> None:
    page = Page(render_report(make_report(samples=[make_samples("student-0")])))
    outside = [target for target in page.values("href") if not target.startswith("#")]
    assert outside == [f"http://127.0.0.1:8601/sample/{'ab' * 16}?by=kl#p7"]
    text = " ".join(page.text.split())
    assert "distill view 1111 --port 8601" in text
    assert "distill inspect 1111 --sample abab" in text
    assert "No sample improved." in text


def test_curves_are_drawn_without_script_and_each_has_a_name() -> None:
    page = Page(render_report(make_report(num_students=3)))
    assert page.values("class").count("curve") == 3 * 3
    assert page.values("data-fade") == ["0", "1", "2"]
    assert set(page.values("data-student")) == {"0", "1", "2"}


def test_a_student_without_a_step_keeps_the_colours_of_the_others() -> None:
    students = [make_student("none", num_steps=0), make_student("some")]
    page = Page(render_report(make_report(students=students)))
    assert page.values("data-fade") == ["1"]
    assert set(page.values("data-student")) == {"1"}


def test_a_failed_run_is_said_to_have_failed_before_anything_else() -> None:
    state = make_state("failed", step="train", why=HOSTILE, go_on="distill run a.yaml")
    text = Page(render_report(make_report(state=state))).text
    assert text.index("failed") < text.index("Quality on held-out prompts")
    assert HOSTILE in text
    assert "distill run a.yaml" in text


@pytest.mark.parametrize("verdict", ["fit", "unfit"])
def test_a_certificate_shows_its_verdict_and_numbers(verdict: str) -> None:
    difference = {"mean": 1e-6, "p99": 2e-6, "typical": 1e-6, "max": 3e-5, "max_limit": 1e-3}
    certificate = {
        "label_set": "1" * 64,
        "verdict": verdict,
        "reasons": [HOSTILE] if verdict == "unfit" else [],
        "number": 3,
        "created_at": "2026-01-05T10:11:12+00:00",
        "current": False,
        "num_samples": 1200,
        "agreement": {
            "sample_keys": ["a", "b"],
            "num_rows": 99,
            "differences": {"kl": {**difference, "typical_limit": None}},
            "worst_sample": "a",
            "worst_sample_kl": 1.25e-5,
            "worst_sample_limit": 0.1,
            "head_overlap": 0.998,
            "argmax_agreement": 0.75,
        },
        "drawing": None,
        "coverage": None,
    }
    text = " ".join(Page(render_report(make_report(certificates=[certificate]))).text.split())
    assert f"{verdict}, certificate 3 of" in text
    assert "samples were added since" in text
    for shown in ["2 samples of 1,200, 99 positions", "75.0 %", "1.25e-05", "3e-05"]:
        assert shown in text
    assert (HOSTILE in text.partition("certificate 3")[2].partition("Labels")[0]) == (
        verdict == "unfit"
    )


def test_a_diverged_student_has_no_number_and_is_not_the_best() -> None:
    worse = make_evaluation("student-0", 1.0)
    diverged = {**worse, "name": "student-1", "metrics": dict.fromkeys(worse["metrics"], None)}
    page = Page(render_report(make_report(evaluations=[worse, diverged])))
    assert page.text.count("not a number") == 3
    assert page.text.count("(best)") == 3


def test_invisible_tokens_have_names() -> None:
    assert "line break, line break" in Page(render_report(make_report())).values("aria-label")


@pytest.mark.parametrize(
    ("entropy", "expected"),
    [(0.0, "tok e0"), (0.1, "tok e1"), (2.99, "tok e5"), (40.0, "tok e6"), (None, "tok unknown")],
)
def test_token_is_coloured_by_entropy(entropy: float | None, expected: str) -> None:
    response = {"sample_key": "a1", "prompt": "", "tokens": [make_token("cat", entropy)]}
    assert expected in Page(render_report(make_report(response=response))).values("class")


@pytest.mark.parametrize(
    "changes",
    [
        {"students": [], "evaluations": []},
        {"students": [make_student("short", num_steps=0)]},
        {"evaluations": [{**make_evaluation("untrained", 1.0), "generations": []}]},
        {"response": None},
        {"response": {"sample_key": "a1", "prompt": "", "tokens": []}},
        {"provenance": None},
        {"costs": []},
        {"labels": None, "missing": {"labels": "the store is gone"}},
        {"certificates": [], "missing": {"certificates": "no labels are stored yet"}},
    ],
    ids=[
        "only labels",
        "no steps",
        "no generations",
        "no response",
        "no tokens",
        "no origin",
        "no cost",
        "no labels",
        "no certificate",
    ],
)
def test_page_without_a_part_still_has_all_sections(changes: dict[str, Any]) -> None:
    page = Page(render_report(make_report(**changes)))
    full = Page(render_report(make_report()))
    assert page.values("href") == full.values("href")
    assert {target.removeprefix("#") for target in page.values("href")} <= set(page.values("id"))


def test_an_empty_answer_is_said_to_be_empty() -> None:
    assert "(empty)" in Page(render_report(make_report())).text
