"""The markup of the page: valid, accessible by structure, self-contained, and nothing escapes."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from pipeline.inspection.page import Links, render_sample, script_json
from pipeline.inspection.record import InspectedSample, describe
from pipeline.inspection.source import Inspector, find_vocabulary
from pipeline.inspection.testing import TEXTS, keys_of, make_store
from storage.errors import ConfigError

Read = Callable[[str], InspectedSample]
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Document(HTMLParser):
    """Elements of a page, and the text outside scripts; refuses tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[tuple[str, str]] = []
        """The id of the innermost element that has one, and a piece of text."""
        self._open: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.elements.append((tag, values))
        if tag not in VOID:
            outer = self._open[-1][1] if self._open else ""
            self._open.append((tag, values.get("id") or outer))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] == "script":
            self.scripts.append(data)
        elif self._open:
            self.text.append((self._open[-1][1], data))

    def find(self, **wanted: str) -> list[dict[str, str | None]]:
        return [
            values
            for _, values in self.elements
            if all(values.get(name) == value for name, value in wanted.items())
        ]


@pytest.fixture
def page(inspected: Read) -> Callable[[str], str]:
    return lambda name: render_sample(inspected(name), by="entropy")


@pytest.mark.parametrize("name", TEXTS)
def test_the_markup_closes_what_it_opens_and_ids_are_unique(
    page: Callable[[str], str], name: str
) -> None:
    found = Document(page(name))
    ids = [values["id"] for _, values in found.elements if values.get("id")]
    assert len(ids) == len(set(ids))
    for _, values in found.elements:
        for reference in ("aria-labelledby", "aria-describedby", "for"):
            for one in (values.get(reference) or "").split():
                assert one in ids, one


@pytest.mark.parametrize("name", TEXTS)
def test_nothing_is_asked_for_from_elsewhere(page: Callable[[str], str], name: str) -> None:
    found = Document(page(name))
    for tag, values in found.elements:
        assert tag not in {"link", "img", "iframe", "object", "base", "embed", "audio", "video"}
        assert not {"src", "href", "action", "srcset"}.intersection(values), (tag, values)
        assert not [attribute for attribute in values if attribute.startswith("on")]
    css = page(name).partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in css
    assert "@import" not in css
    policy = found.find(**{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_hostile_tokens_open_no_element(page: Callable[[str], str]) -> None:
    hostile, harmless = Document(page("hostile")), Document(page("plain"))
    assert {tag for tag, _ in hostile.elements} == {tag for tag, _ in harmless.elements}
    assert len(hostile.scripts) == len(harmless.scripts) == 2
    data = json.loads(hostile.scripts[0])
    assert "".join(t.get("joined", t["text"]) for t in data["response"]) == (
        TEXTS["hostile"] + "<|end|>"
    )
    assert "\u202e" not in page("hostile").partition('id="data"')[0]


@pytest.mark.parametrize("text", ["</script>", "<!--<script>", "\u2028", "&lt;", "]]>"])
def test_embedded_json_holds_no_markup(text: str) -> None:
    encoded = str(script_json({"text": text}))
    assert not re.search(r"[<>&\u2028]", encoded)
    assert json.loads(encoded) == {"text": text}


def test_tokens_are_options_of_a_list_with_a_name(page: Callable[[str], str]) -> None:
    found = Document(page("emoji"))
    (listbox,) = found.find(role="listbox")
    assert listbox["dir"] == "auto"
    assert listbox["aria-labelledby"] == "pane-0-title"
    options = found.find(role="option")
    assert [option["data-row"] for option in options] == [str(n) for n in range(len(options))]
    assert all(option["aria-selected"] == "false" for option in options)
    assert all(re.search(r"\bh[0-6]\b", str(option["class"])) for option in options)
    (live,) = found.find(**{"aria-live": "polite"})
    assert live["role"] == "status"
    assert [values["lang"] for tag, values in found.elements if tag == "html"] == ["en"]


def test_every_option_has_something_to_say(page: Callable[[str], str]) -> None:
    for name in TEXTS:
        found = Document(page(name))
        said = {owner for owner, text in found.text if any(c.isalnum() for c in text)}
        for option in found.find(role="option"):
            assert option.get("aria-label") or option["id"] in said, option


def test_colours_are_those_of_the_values(inspected: Read) -> None:
    sample = inspected("plain")
    found = Document(render_sample(sample, by="entropy"))
    classes = [str(option["class"]) for option in found.find(role="option")]
    for value, name in zip(sample.predictions[0].values["entropy"], classes, strict=True):
        edges = (0.1, 0.5, 1.0, 1.5, 2.0, 3.0)
        assert f"h{sum(value >= edge for edge in edges)}" in name.split()


def test_curves_have_a_point_per_position_and_a_description(page: Callable[[str], str]) -> None:
    found = Document(page("plain"))
    num_rows = len(found.find(role="option"))
    lines = [values for tag, values in found.elements if tag == "polyline"]
    assert len(lines) == 2  # entropy and tail
    assert all(len(str(line["points"]).split()) == num_rows for line in lines)
    charts = [values for tag, values in found.elements if tag == "svg" and values.get("role")]
    assert [chart["data-measure"] for chart in charts] == ["entropy", "tail"]
    assert any("largest" in text for owner, text in found.text if owner == "chart-entropy")


def test_two_sets_stand_side_by_side(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("two")
    first, second = make_store(root), make_store(root, seed=1)
    vocabulary = find_vocabulary(first, None)
    inspector = Inspector(first, first.objects.uri, vocabulary, others=[second])
    (inspected,) = inspector.read(keys_of(first)[:1])
    found = Document(render_sample(inspected, by="kl"))
    assert len(found.find(role="listbox")) == 2
    assert [values["data-measure"] for values in found.find(role="img")] == [
        "entropy",
        "tail",
        "kl",
    ]
    differing = [o for o in found.find(role="option") if "differs" in str(o["class"]).split()]
    assert len(differing) == 2 * int(inspected.disagrees_N.sum())


def test_a_measure_that_nobody_has_is_refused(inspected: Read) -> None:
    with pytest.raises(ConfigError, match="labels has no kl"):
        render_sample(inspected("plain"), by="kl")


def test_links_to_neighbours_are_escaped(inspected: Read) -> None:
    links = Links("/?where=%22", previous='/sample/a?x="><script>', next=None)
    found = Document(render_sample(inspected("plain"), by="tail", links=links))
    hrefs = [values["href"] for tag, values in found.elements if tag == "a"]
    assert hrefs == [links.all, links.previous]


def test_the_page_holds_what_the_description_holds(inspected: Read) -> None:
    sample = inspected("right_to_left")
    data = json.loads(Document(render_sample(sample, by="rank", top=4)).scripts[0])
    described = describe(sample, top=4)
    assert {name: data[name] for name in ("positions", "models", "sql")} == {
        name: described[name] for name in ("positions", "models", "sql")
    }
