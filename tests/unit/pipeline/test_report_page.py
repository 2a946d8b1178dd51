"""The report page is complete without network or script, and no text of a model can break out."""

import json
from html.parser import HTMLParser
from typing import Any

import pytest

from pipeline.steps.report import render_report

HOSTILE = "</script><script>alert(1)</script>"
TEXTS = ["The", " cat", "\n\n", "\t", "  ", "", HOSTILE, "<|im_end|>", "\ufffd", "\U0001f98a"]
ARABIC = "\u0645\u0631\u062d\u0628\u0627"
VOID = {"meta", "br", "hr", "img", "input", "link"}


def make_token(text: str, entropy: float | None = 0.25, rank: int = 1) -> dict[str, Any]:
    top = [{"text": text, "probability": 0.75}, {"text": HOSTILE, "probability": 0.125}]
    return {
        "text": text,
        "entropy": entropy,
        "probability": 0.75,
        "rank": rank,
        "tail_mass": 0.0625,
        "top": top,
    }


def make_student(name: str, num_steps: int = 3) -> dict[str, Any]:
    curve = [
        {"step": n + 1, "loss": 2.5 - n / 8, "soft": 1.5 - n / 8, "hard": 3.5 - n / 8}
        for n in range(num_steps)
    ]
    return {
        "name": name,
        "steps": num_steps,
        "trained_tokens": 3000,
        "teacher_forward_tokens": 0,
        "directory": f"runs/demo/students/{name}-0123456789ab",
        "curve": curve,
    }


def make_evaluation(name: str, kl: float) -> dict[str, Any]:
    generation = {
        "sample_key": "a1",
        "prompt": f"Say {ARABIC} {HOSTILE}",
        "teacher": f"{ARABIC}, she said.",
        "student": "" if name == "untrained" else f"answer of {name}",
    }
    return {
        "name": name,
        "metrics": {"kl": kl, "cross_entropy": kl + 1, "agreement": 1 / (1 + kl)},
        "num_tokens": 4321,
        "generations": [generation],
    }


def make_report(num_students: int = 2, **changes: Any) -> dict[str, Any]:
    names = [f"student-{n}" for n in range(num_students)]
    models = ["untrained", *names]
    report = {
        "key": "0" * 64,
        "project": "demo",
        "labels": {
            "key": "1" * 64,
            "store": "labels",
            "k": 64,
            "mode": "generate",
            "samples": {"train": 1200, "heldout": 1},
            "selections": {"train": "2" * 64, "heldout": "3" * 64},
            "served_by": {"1" * 64: 1000, "4" * 64: 201},
            "stored_samples": 1201,
            "stored_tokens": 2000,
            "stored_bytes": 500_000,
            "skipped_rows": [],
        },
        "costs": [
            {
                "step": "label",
                "what": "",
                "samples": 1201,
                "seconds": 12.5,
                "teacher_forward_tokens": 2500,
                "trained_tokens": 0,
            }
        ],
        "students": [make_student(name) for name in names],
        "evaluations": [make_evaluation(name, 2.0 / (n + 1)) for n, name in enumerate(models)],
        "response": {
            "sample_key": "a1",
            "prompt": f"Say {ARABIC} {HOSTILE}",
            "tokens": [make_token(text) for text in TEXTS],
        },
        "provenance": {"created_at": "2026-01-05T10:11:12+00:00", "command": "distill run"},
        "config": {"name": "demo", "note": HOSTILE},
    }
    return {**report, **changes}


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
    ],
    ids=[
        "only labels",
        "no steps",
        "no generations",
        "no response",
        "no tokens",
        "no origin",
        "no cost",
    ],
)
def test_page_without_a_part_still_has_all_sections(changes: dict[str, Any]) -> None:
    page = Page(render_report(make_report(**changes)))
    full = Page(render_report(make_report()))
    assert page.values("href") == full.values("href")
    assert {target.removeprefix("#") for target in page.values("href")} <= set(page.values("id"))


def test_an_empty_answer_is_said_to_be_empty() -> None:
    assert "(empty)" in Page(render_report(make_report())).text
