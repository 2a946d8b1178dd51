"""Conditions that are pushed into the reading give what DuckDB finds in the whole views."""

from collections.abc import Iterator

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.keys import MassSpec
from storage.narrow import narrow
from storage.selection import SampleRequest, Selection, Source
from storage.sql import Database, open_database
from storage.store import LabelStore
from storage.testing import make_sample, make_spec

SPEC = make_spec(k=4)
ADAPTIVE = SPEC.model_copy(update={"kind": MassSpec(mass=0.4, cap=4), "columns": ()})
SAMPLES = [make_sample(number, SPEC, num_tokens=2 + number % 4) for number in range(12)]
KEYS = [sample.key for sample in SAMPLES]

NUMBERS = {
    "labels": ["position", "token_id", "token_logprob", "token_rank", "log_tail_mass", "entropy"],
    "samples": ["sample_index", "num_prompt_tokens", "num_tokens", "num_rows", "source_line"],
    "topk": ["position", "rank", "token_id", "logprob"],
}
TEXTS = {
    "sample_key": [*KEYS[:3], "5", "a", "zz"],
    "prompt_key": [SAMPLES[0].prompt_key, "8"],
    "label_set": [SPEC.key, ADAPTIVE.key, "x"],
    "set_name": ["whole", "heads", "x"],
    "finish_reason": ["length", "stop"],
    "domain": ["math", "chat", "x"],
}
COMPARISONS = ["=", "!=", "<", "<=", ">", ">=", "is distinct from"]


@pytest.fixture(scope="module")
def databases(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Database, duckdb.DuckDBPyConnection]]:
    """Our views of two sets, and the same views as tables of DuckDB."""
    patch = pytest.MonkeyPatch()
    patch.setattr("storage.shard.BATCH_ROWS", 8)
    store = LabelStore(str(tmp_path_factory.mktemp("store")), create=True)
    for start in (0, 6):
        store.create(SPEC, {}).append(SAMPLES[start : start + 6], {})
    store.create(ADAPTIVE, {}).append([narrow(sample, ADAPTIVE) for sample in SAMPLES[:5]], {})
    patch.undo()
    requests = [
        SampleRequest(s.key, 0, s.prompt_ids_P, None, (Source(f"{file}.jsonl", n + 1, ""),))
        for n, (s, file) in enumerate(zip(SAMPLES, ["math", "chat"] * 4, strict=False))
    ]
    Selection(tuple(requests)).save(store.objects)
    sets = {"whole": SPEC.key, "heads": ADAPTIVE.key}
    with open_database(store, sets) as database, duckdb.connect() as tables:
        for view in NUMBERS:
            whole = database.query(f"select * from {view}").table()
            tables.register("whole view", whole)
            tables.execute(f'create table {view} as select * from "whole view"')
        yield database, tables


@st.composite
def leaves(draw: st.DrawFn, view: str) -> str:
    if draw(st.booleans()):
        column = draw(st.sampled_from(NUMBERS[view]))
        values = [str(v) for v in draw(st.lists(st.integers(-3, 8), min_size=1, max_size=3))]
    else:
        column = draw(st.sampled_from(sorted(TEXTS)))
        values = [f"'{v}'" for v in draw(st.lists(st.sampled_from(TEXTS[column]), min_size=1))]
    form = draw(st.sampled_from(["compare", "in", "not in", "null", "not null", "between"]))
    return {
        "compare": f"{column} {draw(st.sampled_from(COMPARISONS))} {values[0]}",
        "in": f"{column} in ({', '.join(values)})",
        "not in": f"{column} not in ({', '.join(values)})",
        "null": f"{column} is null",
        "not null": f"{column} is not null",
        "between": f"{column} between {values[0]} and {values[-1]}",
    }[form]


@st.composite
def questions(draw: st.DrawFn) -> tuple[str, str]:
    view = draw(st.sampled_from(sorted(NUMBERS)))
    both = st.recursive(
        leaves(view),
        lambda part: st.one_of(
            st.tuples(part, st.sampled_from(["and", "and", "or"]), part).map(
                lambda p: f"({p[0]} {p[1]} {p[2]})"
            ),
            part.map(lambda p: f"(not {p})"),
        ),
        max_leaves=4,
    )
    columns = draw(st.sampled_from(["sample_key", "count(*)", "*", f"max({NUMBERS[view][0]})"]))
    return f"select {columns} from {view} where {draw(both)}", view


@given(questions())
def test_a_condition_selects_the_same_rows(
    databases: tuple[Database, duckdb.DuckDBPyConnection], question: tuple[str, str]
) -> None:
    ours, tables = databases
    sql, _ = question
    found = ours.query(sql).table().to_pylist()
    expected = tables.sql(sql).to_arrow_table().to_pylist()
    assert sorted(map(repr, found)) == sorted(map(repr, expected))
