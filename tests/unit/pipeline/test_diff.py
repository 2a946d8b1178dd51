"""Why two keys differ, field by field, and what that means for the labels behind them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.commands.diff import differing_fields, serves
from storage.keys import LabelSetSpec, MassSpec
from storage.store import LabelStore
from storage.testing import make_spec

AsJson = Callable[..., Any]


def save(root: Path, spec: LabelSetSpec, **provenance: str) -> str:
    LabelStore(str(root), create=True).create(spec, provenance)
    return spec.key


# -- the comparison -------------------------------------------------------------------------------
def test_equal_trees_have_no_differing_field() -> None:
    tree = {"a": 1, "b": {"c": [1, 2]}}
    assert differing_fields(tree, {"b": {"c": [1, 2]}, "a": 1}) == []


def test_a_nested_field_has_a_dotted_name() -> None:
    found = differing_fields({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": 1, "d": 3}}})
    assert found == [{"field": "a.b.d", "a": 2, "b": 3}]


def test_a_field_that_one_side_lacks_has_one_value() -> None:
    assert differing_fields({"k": 64}, {"mass": 0.9}) == [
        {"field": "k", "a": 64},
        {"field": "mass", "b": 0.9},
    ]


def test_a_section_against_none_is_one_difference() -> None:
    assert differing_fields({"sampling": None}, {"sampling": {"seed": 0}}) == [
        {"field": "sampling", "a": None, "b": {"seed": 0}}
    ]


@pytest.mark.parametrize(
    ("stored", "wanted", "expected"),
    [
        (make_spec(k=8), make_spec(k=8), "hits"),
        (make_spec(k=8), make_spec(k=4), "hits"),
        (make_spec(k=4), make_spec(k=8), "upgrades"),
        (make_spec(seed=0), make_spec(seed=1), "nothing"),
    ],
    ids=["the same", "a larger k", "a smaller k", "another seed"],
)
def test_labels_serve_requests_for_no_more_than_they_hold(
    stored: LabelSetSpec, wanted: LabelSetSpec, expected: str
) -> None:
    assert serves(stored, wanted) == expected


# -- the command ----------------------------------------------------------------------------------
def test_diff_names_every_field_and_keeps_provenance_apart(tmp_path: Path, as_json: AsJson) -> None:
    a = save(tmp_path, make_spec(k=8), teacher="x", tokenizer="t")
    b = save(tmp_path, make_spec(k=4), teacher="y", tokenizer="t")
    found = as_json("diff", a[:8], b[:8], "--store", str(tmp_path))
    assert found == {
        "a": a,
        "b": b,
        "fields": [{"field": "kind.k", "a": 8, "b": 4}],
        "same_generation_key": True,
        "labels_of_a_for_b": "hits",
        "labels_of_b_for_a": "upgrades",
        "provenance": [{"field": "teacher", "a": "x", "b": "y"}],
    }


def test_diff_of_two_kinds_shows_the_options_of_both(tmp_path: Path, as_json: AsJson) -> None:
    spec = make_spec()
    a = save(tmp_path, spec)
    b = save(tmp_path, spec.model_copy(update={"kind": MassSpec(mass=0.99, cap=8)}))
    fields = as_json("diff", a, b, "--store", str(tmp_path))["fields"]
    assert {row["field"] for row in fields} == {"kind.type", "kind.k", "kind.mass", "kind.cap"}


def test_diff_takes_b_from_another_store(tmp_path: Path, as_json: AsJson) -> None:
    a = save(tmp_path / "one", make_spec(seed=0))
    b = save(tmp_path / "other", make_spec(seed=1))
    words = ("--store", str(tmp_path / "one"), "--other-store", str(tmp_path / "other"))
    found = as_json("diff", a, b, *words)
    assert found["fields"] == [{"field": "generation.sampling.seed", "a": 0, "b": 1}]
    assert found["same_generation_key"] is False
    assert found["labels_of_a_for_b"] == "nothing"


def test_diff_says_in_words_what_it_means(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = save(tmp_path, make_spec(k=8), teacher="x")
    b = save(tmp_path, make_spec(k=4), teacher="y")
    assert main(["diff", a, b, "--store", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "kind.k" in shown
    assert "same generation key" in shown
    assert "labels of A for requests of B are hits" in shown
    assert "labels of B for requests of A are upgradable" in shown
    assert "teacher " in shown[shown.index("not part of the key") :]


def test_diff_of_a_key_with_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = save(tmp_path, make_spec())
    assert main(["diff", key, key[:6], "--store", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "same label set key: both answer the same request\n"


def test_diff_of_an_unknown_key_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = save(tmp_path, make_spec())
    assert main(["diff", key, "zzz", "--store", str(tmp_path)]) == 2
    assert "match 'zzz'" in capsys.readouterr().err
