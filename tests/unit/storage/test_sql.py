"""SQL over a store: views hold exactly what is served, and only questions are answered."""

from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models

from storage.compact import compact
from storage.errors import ConfigError, LabelStoreError, ShardCorruptError
from storage.fingerprint import DigestMemo, tokenizer_digest
from storage.ipc import ArrowFile
from storage.keys import MassSpec
from storage.narrow import narrow
from storage.selection import SampleRequest, Selection, Source
from storage.sql import SqlError, open_database
from storage.store import LabelStore
from storage.testing import make_sample, make_spec
from storage.writer import publish, write_shard

SPEC = make_spec(k=4)
SAMPLES = [make_sample(number, SPEC, num_tokens=2 + number % 3) for number in range(8)]


@pytest.fixture
def label_set(bench):
    return bench.filled(SAMPLES[:5], SAMPLES[5:], spec=SPEC)


def ask(store: LabelStore, sql: str, parameters=None, **options) -> list[tuple[object, ...]]:
    with open_database(store, **options) as database:
        table = database.query(sql, parameters).table()
    return [tuple(row.values()) for row in table.to_pylist()]


def label_rows(samples, spec=SPEC) -> list[tuple[object, ...]]:
    return sorted(
        (
            spec.key,
            sample.key,
            int(sample.positions_N[n]),
            int(sample.token_ids_N[n]),
            float(sample.token_logprob_N[n]),
            int(sample.token_rank_N[n]),
            float(sample.log_tail_mass_N[n]),
        )
        for sample in samples
        for n in range(len(sample.positions_N))
    )


LABELS = """
select label_set, sample_key, position, token_id, token_logprob, token_rank, log_tail_mass
from labels order by all
"""


def topk_rows(samples) -> list[tuple[object, ...]]:
    return sorted(
        (
            sample.key,
            int(sample.positions_N[n]),
            rank + 1,
            int(token),
            int(token) == int(sample.token_ids_N[n]),
        )
        for sample in samples
        for n in range(len(sample.positions_N))
        for rank, token in enumerate(sample.topk_ids_NK[n])
        if token >= 0
    )


TOPK = "select sample_key, position, rank, token_id, is_sampled from topk order by all"


# -- the views -------------------------------------------------------------------------------------
def test_labels_hold_one_row_per_token(bench, label_set) -> None:
    assert ask(bench.store, LABELS) == label_rows(SAMPLES)
    by_key = {sample.key: sample for sample in SAMPLES}
    rows = ask(
        bench.store,
        "select sample_key, prompt_key, sample_index, finish_reason, position, entropy from labels",
    )
    for key, prompt, index, finish, position, entropy in rows:
        sample = by_key[key]
        assert (prompt, index, finish) == (sample.prompt_key, 0, sample.finish_reason)
        assert entropy == float(sample.entropy_N[position])


def test_topk_holds_one_row_per_stored_id(bench, label_set) -> None:
    assert ask(bench.store, TOPK) == topk_rows(SAMPLES)
    logprobs = {
        (sample.key, n, rank + 1): float(sample.topk_logprobs_NK[n, rank])
        for sample in SAMPLES
        for n in range(len(sample.positions_N))
        for rank in range(4)
    }
    rows = ask(bench.store, "select sample_key, position, rank, logprob from topk")
    assert len(rows) == len(logprobs)
    assert all(abs(logprobs[tuple(where)] - found) <= 1 / 512 + 1e-6 for *where, found in rows)


def test_samples_hold_one_row_per_sample(bench, label_set) -> None:
    rows = ask(
        bench.store,
        "select sample_key, prompt_ids, response_ids, num_prompt_tokens, num_tokens, num_rows, "
        "label_mask, stop_reason from samples order by 1",
    )
    assert rows == [
        (
            sample.key,
            sample.prompt_ids_P.tolist(),
            sample.response_ids_R.tolist(),
            len(sample.prompt_ids_P),
            len(sample.response_ids_R),
            len(sample.response_ids_R),
            None,
            None,
        )
        for sample in sorted(SAMPLES, key=lambda sample: sample.key)
    ]


def test_partly_labelled_responses_keep_positions_tokens_and_mask(
    bench, score_mode, labelled_in_part
) -> None:
    spec = score_mode(SPEC)
    change = labelled_in_part
    samples = [change(SAMPLES[2], [0, 3]), change(SAMPLES[5], [1]), change(SAMPLES[1], [0, 1, 2])]
    bench.filled(samples, spec=spec)
    assert ask(bench.store, LABELS) == label_rows(samples, spec)
    rows = ask(
        bench.store,
        "select sample_key, response_ids, num_tokens, num_rows, label_mask from samples",
    )
    whole = {sample.key: sample for sample in samples}
    for key, response, num_tokens, num_rows, mask in rows:
        sample = whole[key]
        assert response == sample.response_ids_R.tolist()
        assert (num_tokens, num_rows) == (len(response), len(sample.positions_N))
        expected = sample.label_mask_R.tolist()
        assert mask == (None if all(expected) else expected)


def test_adaptive_heads_have_their_own_lengths(bench) -> None:
    spec = SPEC.model_copy(update={"kind": MassSpec(mass=0.4, cap=4)})
    samples = [narrow(sample, spec) for sample in SAMPLES]
    bench.filled(samples, spec=spec)
    assert ask(bench.store, TOPK) == topk_rows(samples)
    (count,) = ask(bench.store, "select count(*) from topk")
    assert count == (len(topk_rows(samples)),)


def test_copies_that_are_not_served_are_left_out(bench, label_set) -> None:
    copies = [replace(sample, finish_reason="stop") for sample in SAMPLES[2:4]]
    publish(label_set, [write_shard(label_set, copies)], provenance={})
    assert ask(bench.store, LABELS) == label_rows(SAMPLES)
    assert ask(bench.store, TOPK) == topk_rows(SAMPLES)
    assert ask(bench.store, "select distinct finish_reason from samples") == [("length",)]
    assert ask(bench.store, "select count(*) from samples") == [(8,)]


def test_compacting_changes_no_answer(bench, label_set) -> None:
    before = ask(bench.store, LABELS), ask(bench.store, TOPK)
    compact(label_set, {})
    assert (ask(bench.store, LABELS), ask(bench.store, TOPK)) == before


def test_an_empty_store_and_an_empty_set_have_empty_views(bench) -> None:
    assert ask(bench.store, "select count(*) from labels") == [(0,)]
    bench.create(SPEC)
    for view in ("labels", "samples", "topk"):
        assert ask(bench.store, f"select count(*) from {view}") == [(0,)]


# -- label sets ------------------------------------------------------------------------------------
OTHER = make_spec(k=8, columns=())


def test_all_sets_are_seen_and_columns_that_one_lacks_are_null(bench, label_set) -> None:
    others = [make_sample(number, OTHER) for number in range(3)]
    bench.filled(others, spec=OTHER)
    assert ask(bench.store, LABELS) == sorted(label_rows(SAMPLES) + label_rows(others, OTHER))
    rows = ask(bench.store, "select label_set, count(entropy), count(*) from labels group by 1")
    tokens = sum(len(sample.positions_N) for sample in SAMPLES)
    assert sorted(rows) == sorted([(SPEC.key, tokens, tokens), (OTHER.key, 0, 15)])


def test_named_sets_are_schemas_and_the_others_are_not_looked_at(bench, label_set) -> None:
    others = [make_sample(number, OTHER) for number in range(3)]
    bench.filled(others, spec=OTHER)
    both = {"small": SPEC.key[:8], "large": OTHER.key}
    (agree,) = ask(
        bench.store,
        "select count(*), bool_and(s.token_id = l.token_id) from small.labels s "
        "join large.labels l using (sample_key, position)",
        sets=both,
    )
    longer = {sample.key: sample for sample in others}
    pairs = [
        bool(mine == theirs)
        for sample in SAMPLES[:3]
        for mine, theirs in zip(
            sample.token_ids_N,
            longer[sample.key].token_ids_N[: len(sample.token_ids_N)],
            strict=True,
        )
    ]
    assert agree == (len(pairs), all(pairs))
    rows = ask(bench.store, "select set_name, count(*) from samples group by 1", sets=both)
    assert sorted(rows) == [("large", 3), ("small", 8)]
    only = {"small": SPEC.key}
    assert ask(bench.store, "select distinct label_set from labels", sets=only) == [(SPEC.key,)]
    (bench.folder(OTHER) / "spec.json").write_text("{}")
    assert ask(bench.store, "select count(*) from samples", sets=only) == [(8,)]


@pytest.mark.parametrize("name", ["main", "labels", "a b", "1a", 'x"', ""])
def test_a_set_cannot_have_every_name(bench, label_set, name: str) -> None:
    with pytest.raises(SqlError, match="cannot be the name of a label set"):
        open_database(bench.store, {name: SPEC.key})


def test_a_key_that_fits_no_set_or_several_is_refused(bench, label_set) -> None:
    with pytest.raises(LabelStoreError, match="no label set"):
        open_database(bench.store, {"a": "zz"})
    bench.filled([make_sample(0, OTHER)], spec=OTHER)
    with pytest.raises(LabelStoreError, match="several label sets"):
        open_database(bench.store, {"a": ""})


# -- what is read ----------------------------------------------------------------------------------
@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, tuple[str, ...]]]:
    """What is read of files: name, batch, columns."""
    noted: list[tuple[str, int, tuple[str, ...]]] = []
    batch = ArrowFile.batch

    def note(self: ArrowFile, index: int, columns=None):
        noted.append((self._name, index, tuple(columns or self.schema.names)))
        return batch(self, index, columns)

    monkeypatch.setattr(ArrowFile, "batch", note)
    return noted


def columns_read(reads, table: str) -> set[str]:
    return {name for file, _, names in reads if f".{table}." in file for name in names}


def test_only_columns_that_a_query_needs_are_read(bench, label_set, reads) -> None:
    ask(bench.store, "select avg(entropy) from labels where position > 0")
    assert columns_read(reads, "labels") == {"entropy", "position"}
    assert columns_read(reads, "samples") <= {"sample_key", "first_row", "num_rows"}
    reads.clear()
    ask(bench.store, "select count(*) from labels")
    assert columns_read(reads, "labels") == {"position"}
    reads.clear()
    ask(bench.store, "select count(*) from topk")
    assert columns_read(reads, "labels") == set()
    ask(bench.store, "select sample_key from topk where rank = 9")
    ask(bench.store, "select avg(num_tokens) from samples")
    assert columns_read(reads, "labels") == set()


def test_a_condition_on_samples_leaves_other_batches_unread(
    bench, monkeypatch: pytest.MonkeyPatch, reads
) -> None:
    monkeypatch.setattr("storage.shard.BATCH_ROWS", 8)
    label_set = bench.filled(SAMPLES, spec=SPEC)
    (shard,) = label_set.live_shards()
    assert len(shard.batch_rows) > 2
    reads.clear()
    key = SAMPLES[3].key
    found = ask(bench.store, "select token_id from labels where sample_key = $k", {"k": key})
    assert sorted(found) == sorted((int(token),) for token in SAMPLES[3].token_ids_N)
    assert len({number for name, number, _ in reads if ".labels." in name}) == 1
    reads.clear()
    ask(bench.store, "select * from topk where sample_key = $k and position < 2", {"k": key})
    assert len({number for name, number, _ in reads if ".labels." in name}) == 1


def test_shards_of_other_partitions_are_not_opened(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.writer.shard_bits", lambda *_: 2)
    label_set = bench.create(SPEC, expected_tokens=2**24)
    label_set.append(SAMPLES, {})
    assert len(label_set.live_shards()) > 1
    opened = []
    open_table = type(label_set).open_table

    def note(self, shard, table):
        opened.append(shard.name)
        return open_table(self, shard, table)

    monkeypatch.setattr(type(label_set), "open_table", note)
    for sample in SAMPLES:
        opened.clear()
        found = ask(
            bench.store, "select sample_key from samples where sample_key = $k", {"k": sample.key}
        )
        assert found == [(sample.key,)]
        assert len(set(opened)) == 1


def test_a_set_that_a_condition_excludes_is_not_opened(bench, label_set, reads) -> None:
    assert ask(bench.store, "select * from labels where label_set = 'x'") == []
    assert [name for name, _, _ in reads if "/shards/" in name] == []


def test_damage_ends_a_query_and_only_one_that_reads_it(bench, label_set) -> None:
    """The last buffer of a labels file holds top-k bytes; the scalars before it are whole."""
    entropy = ask(bench.store, "select avg(entropy) from labels")
    for path in bench.files("shards/*.labels.arrow", SPEC):
        data = path.read_bytes()
        bench.damage(path, byte=data.rindex(b"\x28\xb5\x2f\xfd") + 8)
    assert ask(bench.store, "select avg(entropy) from labels") == entropy
    with pytest.raises(ShardCorruptError, match=r"topk_dq_b1|unreadable"):
        ask(bench.store, "select sum(logprob) from topk")


def test_every_flipped_byte_of_a_column_is_noticed_or_harmless(bench, label_set) -> None:
    right = ask(bench.store, LABELS)
    path = bench.files("shards/*.labels.arrow", SPEC)[0]
    whole = path.read_bytes()
    noticed = 0
    for byte in range(16, len(whole), max(1, len(whole) // 40)):
        bench.damage(path, byte=byte)
        try:
            assert ask(bench.store, LABELS) == right
        except LabelStoreError:
            noticed += 1
        path.write_bytes(whole)
    assert noticed > 0


def test_a_file_that_is_gone_is_named(bench, label_set) -> None:
    with open_database(bench.store) as database:
        for path in bench.files("shards/*.samples.arrow", SPEC):
            path.unlink()
        with pytest.raises(ShardCorruptError, match=r"samples\.arrow.*ask again"):
            database.query("select count(*) from samples").table()


def test_an_index_that_was_replaced_does_not_hide_samples(bench, label_set, gc) -> None:
    with open_database(bench.store) as database:
        compact(label_set, {})
        gc(bench, SPEC)
        with pytest.raises(ShardCorruptError, match="ask again"):
            database.query("select count(*) from labels").table()


def test_a_database_shows_the_store_as_it_was(bench, label_set) -> None:
    with open_database(bench.store) as database:
        bench.fresh(SPEC).append([make_sample(100, SPEC)], {})
        assert database.query("select count(*) from samples").table()[0][0].as_py() == 8
    assert ask(bench.store, "select count(*) from samples") == [(9,)]


# -- questions -------------------------------------------------------------------------------------
def test_parameters_are_bound(bench, label_set) -> None:
    rows = ask(
        bench.store,
        "select count(*) from labels where position < $n and finish_reason = $why",
        {"n": 1, "why": "length"},
    )
    assert rows == [(8,)]
    with pytest.raises(SqlError, match="Values were not provided"):
        ask(bench.store, "select $missing")


@pytest.mark.parametrize(
    "sql",
    [
        "create table x as select 1",
        "drop view labels",
        "insert into labels values (1)",
        "copy (select 1) to '{file}'",
        "attach '{file}'",
        "set threads = 1",
        "pragma threads = 1",
        "install httpfs",
        "load json",
        "select 1; select 2",
        "",
        "explain create table x as select 1",
        "select * from read_text('{file}')",
        "select * from read_csv('{file}')",
        "select * from '{file}'",
        "from '{file}'",
        "select * from glob('/*')",
        "select * from arrow_scan(1, 2, 3)",
        "select * from query('select 1')",
        "select 1 where 1 in (select * from python_map_function(1))",
        "with x as (select * from read_blob('{file}')) select * from x",
        "select * from local_variable",
    ],
)
def test_only_questions_about_the_views_are_answered(
    bench, label_set, tmp_path: Path, sql: str
) -> None:
    local_variable = pa.table({"secret": [1]})
    file = tmp_path / "file.csv"
    file.write_text("a,b\n1,2\n")
    before = bench.contents() | {str(file): file.read_bytes()}
    with pytest.raises(SqlError):
        ask(bench.store, sql.format(file=file))
    assert bench.contents() | {str(file): file.read_bytes()} == before
    assert len(local_variable) == 1


@pytest.mark.parametrize(
    "sql",
    [
        "describe labels",
        "show tables",
        "summarize labels",
        "explain select count(*) from labels",
        "from samples select sample_key limit 1",
        "values (1)",
        "with n as (select * from range(3)) select * from n",
        "select unnest(prompt_ids) from samples",
        "select * from labels -- a comment",
        "(select 1) union all (select 2)",
    ],
)
def test_questions_of_every_form_are_answered(bench, label_set, sql: str) -> None:
    assert ask(bench.store, sql)


def test_an_unknown_view_or_column_lists_what_there_is(bench, label_set) -> None:
    with pytest.raises(SqlError, match=r"(?s)label.*Views: labels, samples, topk, a\.labels"):
        ask(bench.store, "select * from label_rows", sets={"a": SPEC.key})
    with pytest.raises(SqlError, match=r"(?s)entropi.*entropy"):
        ask(bench.store, "select entropi from labels")
    with pytest.raises(SqlError, match="syntax error"):
        ask(bench.store, "selec 1")


def test_a_result_that_is_not_read_to_its_end_leaves_the_database_usable(bench, label_set) -> None:
    with open_database(bench.store) as database:
        next(database.query("select * from labels").batches)
        assert database.query("select 1").table().num_rows == 1


def test_more_tables_are_views_too(bench, label_set) -> None:
    tables = {"runs": pa.table({"run": ["a"], "label_set": [SPEC.key]})}
    sql = "select run, count(*) from runs join samples using (label_set) group by 1"
    assert ask(bench.store, sql, tables=tables) == [("a", 8)]


# -- where prompts came from -----------------------------------------------------------------------
def select(store: LabelStore, samples, sources) -> None:
    requests = [
        SampleRequest(sample.key, 0, sample.prompt_ids_P, None, tuple(found))
        for sample, found in zip(samples, sources, strict=True)
    ]
    Selection(tuple(requests)).save(store.objects)


def test_sources_are_those_of_the_selections(bench, label_set) -> None:
    mathematics = [[Source("data/math.jsonl", n + 1, f"m{n}")] for n in range(3)]
    select(bench.store, SAMPLES[:3], mathematics)
    twice = [[Source("z/code.jsonl", 4, "c"), Source("data/chat.parquet", 7, "d")]]
    select(bench.store, SAMPLES[2:4], [[Source("zz.jsonl", 1, "z")], *twice])
    rows = ask(
        bench.store,
        "select sample_key, domain, source_file, source_line, source_id from samples",
    )
    found = {key: tuple(rest) for key, *rest in rows}
    for number in range(3):
        expected = ("math", "data/math.jsonl", number + 1, f"m{number}")
        assert found[SAMPLES[number].key] == expected
    assert found[SAMPLES[3].key] == ("chat", "data/chat.parquet", 7, "d")
    assert found[SAMPLES[4].key] == (None, None, None, None)
    tokens = sum(len(sample.positions_N) for sample in SAMPLES[:3])
    assert ask(bench.store, "select count(*) from labels where domain = 'math'") == [(tokens,)]
    assert ask(bench.store, "select count(*) from topk where domain = 'math'") == [(4 * tokens,)]


def test_a_damaged_selection_ends_queries_about_sources_only(bench, label_set) -> None:
    select(bench.store, SAMPLES[:1], [[Source("a.jsonl", 1, "x")]])
    (path,) = (bench.root / "selections").glob("*.arrow")
    bench.damage(path, byte=len(path.read_bytes()) // 2)
    assert ask(bench.store, "select count(*) from samples") == [(8,)]
    with pytest.raises(LabelStoreError):
        ask(bench.store, "select sample_key, domain, source_line, source_id from samples")


# -- text ------------------------------------------------------------------------------------------
def words(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = {f"w{number}": number for number in range(90)}  # ids 90 to 99 have no token
    Tokenizer(models.WordLevel(vocabulary, unk_token="w0")).save(str(directory / "tokenizer.json"))
    return directory


def known_by(bench, **provenance: str) -> None:
    bench.store.create(SPEC, provenance).append(SAMPLES, {})


def text_of(token: int) -> str | None:
    return f"w{token}" if token < 90 else None


def test_text_is_that_of_the_tokenizer_of_the_teacher(bench, tmp_path: Path) -> None:
    teacher = words(tmp_path / "teacher")
    digest = tokenizer_digest(teacher, DigestMemo(None))
    known_by(bench, teacher=str(teacher), tokenizer=digest)
    for view in ("labels", "topk"):
        rows = ask(bench.store, f"select distinct token_id, token from {view}")
        assert {token for token, _ in rows if token >= 90}
        assert all(text == text_of(token) for token, text in rows)
    rows = ask(bench.store, "select prompt_ids, prompt, response_ids, response from samples")
    for prompt_ids, prompt, response_ids, response in rows:
        for ids, text in ((prompt_ids, prompt), (response_ids, response)):
            assert text == " ".join(text_of(token) or f"<|id {token}|>" for token in ids)


def test_a_tokenizer_elsewhere_is_found_by_its_digest(bench, tmp_path: Path) -> None:
    here = words(tmp_path / "here")
    known_by(bench, teacher="gone", tokenizer=tokenizer_digest(here, DigestMemo(None)))
    other = words(tmp_path / "other")
    (other / "merges.txt").write_text("another")
    sql = "select count(token) from labels where token_id < 90"
    expected = sum(int((sample.token_ids_N < 90).sum()) for sample in SAMPLES)
    assert ask(bench.store, sql, models=[other, here]) == [(expected,)]
    assert ask(bench.store, sql, tokenizers=[here]) == [(expected,)]
    assert ask(bench.store, sql, tokenizers=[other], models=[here]) == [(expected,)]


def test_text_is_null_with_a_note_where_the_tokenizer_is_not_known(bench, tmp_path: Path) -> None:
    other = words(tmp_path / "other")
    known_by(bench, teacher="gone", tokenizer="0" * 32)
    with open_database(bench.store, tokenizers=[other]) as database:
        table = database.query("select token, token_id from labels").table()
        assert table["token"].null_count == len(table) > 0
        (note,) = database.notes
    assert "--tokenizer" in note
    assert str(other) in note
    with open_database(bench.store) as database:
        database.query("select token_id from labels").table()
        assert database.notes == []


def test_a_set_that_names_no_tokenizer_takes_only_a_given_one(bench, tmp_path: Path) -> None:
    here = words(tmp_path / "here")
    known_by(bench)
    sql = "select count(token) > 0 from labels"
    assert ask(bench.store, sql, models=[here]) == [(False,)]
    assert ask(bench.store, sql, tokenizers=[here]) == [(True,)]
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        ask(bench.store, sql, tokenizers=[tmp_path])


# -- other tools -----------------------------------------------------------------------------------
def test_a_relation_reads_lazily_and_agrees_with_the_table(bench, label_set, reads) -> None:
    table = label_set.to_arrow()
    reads.clear()
    relation = label_set.to_duckdb()
    assert reads == []
    assert relation.columns == table.column_names
    (found,) = relation.filter("position > 0").aggregate("count(*), avg(entropy)").fetchall()
    assert columns_read(reads, "labels") == {"sample", "position", "entropy"}
    later = table.filter(np.array(table["position"]) > 0)
    assert found[0] == len(later)
    assert found[1] == pytest.approx(np.mean(later["entropy"].to_numpy().astype(np.float64)))
    with duckdb.connect() as connection:
        chosen = label_set.to_duckdb(["topk_ids", "sample_key"], connection=connection)
        assert chosen.columns == ["topk_ids", "sample_key"]
        assert sorted(chosen.fetchall()) == sorted(
            zip(table["topk_ids"].to_pylist(), table["sample_key"].to_pylist(), strict=True)
        )
