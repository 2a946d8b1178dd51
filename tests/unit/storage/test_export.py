"""Label sets are tables for everybody: whole or projected, and verified."""

from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pytest

from storage.compact import compact
from storage.errors import LabelStoreError, ShardCorruptError
from storage.export import columns_of
from storage.ipc import ArrowFile
from storage.keys import MassSpec
from storage.narrow import narrow
from storage.testing import make_sample, make_spec
from storage.writer import publish, write_shard

SPEC = make_spec(k=4)
SAMPLES = [make_sample(number, SPEC, num_tokens=2 + number % 3) for number in range(6)]
COLUMNS = [
    "sample_key",
    "prompt_key",
    "sample_index",
    "finish_reason",
    "position",
    "token_id",
    "token_logprob",
    "token_rank",
    "log_tail_mass",
    "entropy",
    "topk_ids",
    "topk_logprobs",
]


@pytest.fixture
def label_set(bench):
    return bench.filled(SAMPLES[:3], SAMPLES[3:], spec=SPEC)


def rows_of(sample) -> list[dict[str, object]]:
    """What an export shows of a sample."""
    return [
        {
            "sample_key": sample.key,
            "prompt_key": sample.prompt_key,
            "sample_index": sample.sample_index,
            "finish_reason": sample.finish_reason,
            "position": int(sample.positions_N[n]),
            "token_id": int(sample.token_ids_N[n]),
            "token_logprob": float(sample.token_logprob_N[n]),
            "token_rank": int(sample.token_rank_N[n]),
            "log_tail_mass": float(sample.log_tail_mass_N[n]),
            "entropy": float(sample.entropy_N[n]),
            "topk_ids": [token for token in sample.topk_ids_NK[n].tolist() if token >= 0],
            "topk_logprobs": [x for x in sample.topk_logprobs_NK[n].tolist() if x > -np.inf],
        }
        for n in range(len(sample.positions_N))
    ]


def test_every_column_of_every_row_is_exported(bench, label_set) -> None:
    assert columns_of(label_set) == COLUMNS
    table = label_set.to_arrow()
    assert table.column_names == COLUMNS
    expected = [row for s in bench.fresh(SPEC).read(in_order(table)) for row in rows_of(s)]
    assert table.to_pylist() == expected
    assert set(in_order(table)) == {sample.key for sample in SAMPLES}


def in_order(table: pa.Table) -> list[str]:
    return list(dict.fromkeys(table["sample_key"].to_pylist()))


def test_columns_come_in_the_order_that_was_asked_for(label_set) -> None:
    for columns in (["entropy", "sample_key"], ["topk_logprobs"], ["finish_reason"], COLUMNS[::-1]):
        table = label_set.to_arrow(columns)
        assert table.column_names == columns
        assert table.equals(label_set.to_arrow().select(columns))


def test_a_projection_reads_only_what_it_must(label_set, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    batch = ArrowFile.batch

    def noted(self: ArrowFile, index: int, columns=None):
        asked.append(tuple(columns or self.schema.names))
        return batch(self, index, columns)

    label_set.contains([])
    monkeypatch.setattr(ArrowFile, "batch", noted)
    list(label_set.scan(["entropy"]))
    read = {name for columns in asked for name in columns}
    assert not {name for name in read if name.startswith("topk")}
    assert read & {"token_logprob", "prompt_ids", "prompt_key", "finish_reason"} == set()
    assert {"entropy", "sample", "sample_key"} <= read


def test_a_projection_does_not_mind_damage_elsewhere(bench, label_set) -> None:
    """The last buffer of a labels file holds top-k bytes; the scalars before it are whole."""
    whole = label_set.to_arrow(["token_rank"])
    for path in bench.files("shards/*.labels.arrow", SPEC):
        data = path.read_bytes()
        bench.damage(path, byte=data.rindex(b"\x28\xb5\x2f\xfd") + 8)
    fresh = bench.fresh(SPEC)
    assert fresh.to_arrow(["token_rank"]).equals(whole)
    with pytest.raises(ShardCorruptError, match=r"topk_dq_b1|unreadable"):
        fresh.to_arrow(["topk_logprobs"])


def test_an_unknown_column_lists_the_known_ones(label_set) -> None:
    with pytest.raises(LabelStoreError, match="has no column 'logits'; it has sample_key, prompt"):
        next(label_set.scan(["entropy", "logits"]))


def test_heads_of_varying_length_are_lists_of_their_length(bench) -> None:
    spec = SPEC.model_copy(update={"kind": MassSpec(mass=0.4, cap=4)})
    samples = [narrow(sample, spec) for sample in SAMPLES]
    table = bench.filled(samples, spec=spec).to_arrow(["sample_key", "topk_ids", "topk_logprobs"])
    lengths = {len(ids) for ids in table["topk_ids"].to_pylist()}
    assert len(lengths) > 1
    assert -1 not in np.concatenate(table["topk_ids"].to_pylist())
    by_key = {sample.key: sample for sample in samples}
    expected = [r["topk_ids"] for key in in_order(table) for r in rows_of(by_key[key])]
    assert table["topk_ids"].to_pylist() == expected


def test_positions_of_a_partly_labelled_response_are_its_own(
    bench, score_mode, labelled_in_part
) -> None:
    spec = score_mode(SPEC)
    sample = labelled_in_part(SAMPLES[2], [0, 3])
    table = bench.filled([sample], spec=spec).to_arrow(["position", "token_id"])
    assert table["position"].to_pylist() == [0, 3]
    assert table["token_id"].to_pylist() == sample.response_ids_R[[0, 3]].tolist()


def test_copies_that_are_not_served_are_left_out(bench, label_set) -> None:
    copies = [replace(sample, finish_reason="stop") for sample in SAMPLES[2:4]]
    publish(label_set, [write_shard(label_set, copies)], provenance={})
    table = label_set.to_arrow(["sample_key", "finish_reason"])
    assert set(table["finish_reason"].to_pylist()) == {"length"}
    assert len(table) == sum(len(sample.positions_N) for sample in SAMPLES)


def test_a_set_that_was_compacted_shows_the_same_rows(bench, label_set) -> None:
    before = label_set.to_arrow()
    compact(label_set, {})
    after = bench.fresh(SPEC).to_arrow()
    order = [("sample_key", "ascending"), ("position", "ascending")]
    assert after.sort_by(order).equals(before.sort_by(order))


def test_an_empty_set_has_all_columns(bench) -> None:
    label_set = bench.create(SPEC)
    assert label_set.to_arrow().column_names == COLUMNS
    assert label_set.to_arrow(["entropy"]).column_names == ["entropy"]
    assert len(label_set.to_arrow()) == 0


def test_a_shard_that_vanished_is_refused(bench, label_set) -> None:
    stream = label_set.scan(["entropy"])
    next(stream)
    for path in bench.files("shards/*.labels.arrow", SPEC):
        path.unlink()
    with pytest.raises(ShardCorruptError, match="replaced while the set was scanned"):
        list(stream)


# -- other tools -----------------------------------------------------------------------------------
def test_a_hugging_face_dataset_has_the_same_rows(label_set) -> None:
    dataset = label_set.to_datasets(["sample_key", "entropy", "topk_ids"])
    assert dataset.column_names == ["sample_key", "entropy", "topk_ids"]
    assert dataset.to_list() == label_set.to_arrow(dataset.column_names).to_pylist()


def paths(bench, label_set, table: str) -> list[Path]:
    return [bench.root / path for path in label_set.files(table)]


def test_duckdb_joins_the_files_of_a_set(bench, label_set) -> None:
    tables = {
        table: pyarrow.dataset.dataset(
            [str(path) for path in paths(bench, label_set, table)], format="ipc"
        )
        for table in ("labels", "samples")
    }
    with duckdb.connect() as connection:
        for name, dataset in tables.items():
            connection.register(name, dataset)
        (rows, entropy) = connection.execute(
            "select count(*), sum(entropy) from labels where position > 0"
        ).fetchone()
        (samples,) = connection.execute("select count(distinct sample_key) from samples").fetchone()
    later = np.concatenate([sample.entropy_N[1:] for sample in SAMPLES])
    assert (rows, samples) == (len(later), 6)
    assert abs(entropy - later.sum(dtype=np.float64)) < 1e-4


def test_polars_and_pandas_read_the_files_of_a_set(bench, label_set) -> None:
    labels = paths(bench, label_set, "labels")
    expected = sorted(int(token) for sample in SAMPLES for token in sample.token_ids_N)
    assert sorted(pl.concat([pl.read_ipc(p) for p in labels])["token_id"].to_list()) == expected
    assert sorted(pd.concat([pd.read_feather(p) for p in labels])["token_id"]) == expected
