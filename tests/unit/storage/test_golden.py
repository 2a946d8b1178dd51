"""The golden store of format version 1 reads as it always did, by us and by readers unlike us.

``tests/golden/v1/README.md`` says what is in it, ``make.py`` there how it was made.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pytest

from storage.label_set import LabelSet
from storage.pack import pack, unpack
from storage.selection import load_selection
from storage.sidecar import list_sidecars
from storage.store import LabelStore

STORE = Path(__file__).resolve().parents[2] / "golden" / "v1" / "store"

TOPK = "ab6297cc9a64d2e8bb3b4fe4fffd9729"
MASS = "dbe6c30b67d221bfdd6207852a9e1673"
SELECTION = "920375af2c092a562fde0f94b8afe1bb"
GIVEN = [
    "d35a89e0e806f9e424e32eea8342394b",
    "78e27e4bd055b386501d30b2ca1a3565",
    "c718576902b93b3b9cdba85a7cd0038a",
]
GENERATED = ["d35a89e0d2c4c0956072885a8ffdd558", "78e27e4be358b57f2e9849c885f745b8"]
PROMPT_KEYS = ["d35a89e0", "78e27e4b", "c7185769"]

HALF = 1 / 512
"""Nats by which a stored log-prob may differ: half a step."""
LOG = {n: -0.6931471805599453 * n for n in range(6)}
"""Logarithms of 1, 1/2, 1/4, ..."""
EVEN, ODD = [LOG[1], LOG[2], LOG[3], LOG[4]], [LOG[2], LOG[3], LOG[3], LOG[4]]
"""Log-probs of the four ids at even and odd positions."""
TAIL = {0: -2.7725887298583984, 1: -0.8266785740852356}
"""log(1/16) and log(7/16) as float32."""
HEADS = {0: 2, 1: 4, 2: 2}
"""1/2 + 1/4 reach 70 %; at odd positions no 4 tokens do."""
HEAD_TAIL = {0: LOG[2], 1: TAIL[1]}
"""What a head of two tokens leaves is 1/4."""


def open_set(key: str) -> LabelSet:
    return LabelStore(str(STORE)).open(key)


def ids(position: int) -> list[int]:
    return [17 + position, 300 + position, 65536 + position, 69999 - position]


def test_keys_and_layout() -> None:
    assert sorted(path.name for path in STORE.iterdir()) == ["label_sets", "selections"]
    assert LabelStore(str(STORE)).keys() == sorted([TOPK, MASS])
    assert sorted(path.name for path in (STORE / "label_sets" / TOPK).iterdir()) == [
        "commits",
        "index",
        "merged",
        "shards",
        "sidecars",
        "spec.json",
    ]


@pytest.mark.parametrize("key", [TOPK, MASS])
def test_every_byte_is_in_order(key: str) -> None:
    assert list(open_set(key).verify()) == []


def test_requests_still_have_their_keys() -> None:
    """The whole request, from the document: another key here orphans every stored set."""
    spec = open_set(TOPK).spec
    assert spec.key == TOPK
    assert spec.generation.mode == "score"
    assert (spec.kind.type, spec.kind.width, spec.columns) == ("topk", 4, ("entropy",))
    spec = open_set(MASS).spec
    assert spec.key == MASS
    assert (spec.kind.type, spec.kind.mass, spec.kind.cap) == ("mass", 0.7, 4)
    assert spec.generation.sampling.stop == ("\n\n",)


def test_totals() -> None:
    totals = open_set(TOPK).totals()
    # 3 responses of 5 tokens; of the second one 3 positions are labelled
    assert (totals.num_commits, totals.num_shards, totals.num_samples) == (2, 2, 3)
    assert (totals.num_tokens, totals.num_rows) == (15, 13)
    totals = open_set(MASS).totals()
    assert (totals.num_commits, totals.num_samples, totals.num_rows) == (1, 2, 6)


@pytest.mark.parametrize(
    ("number", "positions", "place"),
    [(0, [0, 1, 2, 3, 4], 0), (1, [1, 2, 4], 2), (2, [0, 1, 2, 3, 4], 0)],
)
def test_given_responses(number: int, positions: list[int], place: int) -> None:
    (sample,) = open_set(TOPK).read([GIVEN[number]])
    assert sample.prompt_ids_P.tolist() == [1, 2, 3, number]
    assert sample.response_ids_R.tolist() == [ids(position)[place] for position in range(5)]
    assert sample.positions_N.tolist() == positions
    assert sample.topk_ids_NK.tolist() == [ids(position) for position in positions]
    expected = np.array([ODD if position % 2 else EVEN for position in positions])
    assert np.abs(sample.topk_logprobs_NK - expected).max() <= HALF
    assert sample.token_rank_N.tolist() == [place + 1] * len(positions)
    np.testing.assert_array_equal(sample.token_logprob_N, expected[:, place].astype(np.float32))
    assert sample.log_tail_mass_N.tolist() == [TAIL[position % 2] for position in positions]
    assert sample.entropy_N.tolist() == [position / 8 for position in positions]
    assert (sample.sample_index, sample.finish_reason, sample.stop_reason) == (0, "given", None)


@pytest.mark.parametrize(
    ("number", "place", "reasons"), [(0, 0, ("stop", "\n\n")), (1, 2, ("length", None))]
)
def test_generated_responses_with_heads(
    number: int, place: int, reasons: tuple[str, str | None]
) -> None:
    (sample,) = open_set(MASS).read([GENERATED[number]])
    assert sample.response_ids_R.tolist() == [ids(position)[place] for position in range(3)]
    for position, (kept_K, logprobs_K) in enumerate(
        zip(sample.topk_ids_NK.tolist(), sample.topk_logprobs_NK, strict=True)
    ):
        length = HEADS[position]
        assert kept_K == ids(position)[:length] + [-1] * (4 - length)
        expected = (ODD if position % 2 else EVEN)[:length]
        assert np.abs(logprobs_K[:length] - expected).max() <= HALF
        assert np.isneginf(logprobs_K[length:]).all()
    tails = [HEAD_TAIL[position % 2] for position in range(3)]
    np.testing.assert_allclose(sample.log_tail_mass_N, tails, atol=1e-6)
    assert (sample.finish_reason, sample.stop_reason) == reasons
    assert sample.entropy_N is None


def test_the_merged_record_sums_up_both_commits() -> None:
    log = open_set(TOPK).log
    merged = log.merged(1, 2)
    singles = list(log.singles())
    assert [shard.name for shard in merged.shards] == [r.shards[0].name for r in singles]
    assert [shard.since for shard in merged.shards] == [1, 2]


def test_the_sidecar() -> None:
    label_set = open_set(TOPK)
    (spec,) = list_sidecars(label_set)
    assert spec.producer == {"student": "d" * 32}
    (found,) = label_set.sidecar(spec).read([GIVEN[1]])
    assert found["kl"].tolist() == [0.5, 0.25, 0.125]


def test_the_selection() -> None:
    (request,) = load_selection(LabelStore(str(STORE)).objects, SELECTION).requests
    assert request.key == GIVEN[1]
    assert request.is_genuine
    assert request.label_mask_R.tolist() == [False, True, True, False, True]
    (source,) = request.sources
    assert (source.file, source.line, source.id) == ("train.jsonl", 3, "third")


def test_a_store_of_today_takes_it_up(tmp_path: Path) -> None:
    """Appending to an old set, and carrying it in an archive."""
    store = tmp_path / "store"
    shutil.copytree(STORE, store)
    label_set = LabelStore(str(store)).open(TOPK)
    pack(label_set, str(tmp_path / "archive"), {})
    other = LabelStore(str(tmp_path / "other"), create=True)
    assert unpack(str(tmp_path / "archive"), other, {}).num_new == 3
    assert other.open(TOPK).contains(GIVEN).all()


# -- readers that know nothing of us: the recipe of docs/format.md, and nothing from storage/ ------
Rows = list[dict[str, object]]


def by_pyarrow(paths: list[str]) -> Rows:
    return [row for path in paths for row in pa.ipc.open_file(path).read_all().to_pylist()]


def by_polars(paths: list[str]) -> Rows:
    return [row for path in paths for row in pl.read_ipc(path).to_dicts()]


def by_duckdb(paths: list[str]) -> Rows:
    rows: Rows = []
    with duckdb.connect() as connection:
        for path in paths:
            connection.register("file", pyarrow.dataset.dataset(path, format="ipc"))
            found = connection.execute("from file")
            names = [column[0] for column in found.description]
            rows += [dict(zip(names, row, strict=True)) for row in found.fetchall()]
    return rows


readers = pytest.mark.parametrize("read", [by_pyarrow, by_polars, by_duckdb])


def committed(key: str, table: str) -> list[str]:
    """Paths by the single commit records alone, in their order."""
    folder = STORE / "label_sets" / key
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("commits/*.json"))]
    names = [shard["name"] for record in records for shard in record["shards"]]
    return [str(folder / "shards" / f"{name}.{table}.arrow") for name in names]


def decoded(row: dict[str, object]) -> tuple[list[int], np.ndarray]:
    """Ids and log-probs of a row by the recipe."""
    b0, b1, b2, d0, d1 = (
        np.array(row[name], dtype=np.int64)
        for name in ("topk_id_b0", "topk_id_b1", "topk_id_b2", "topk_dq_b0", "topk_dq_b1")
    )
    return (b0 + 256 * b1 + 65536 * b2).tolist(), -np.cumsum(d0 + 256 * d1) / 256


@readers
def test_other_readers_find_the_labels(read: Callable[[list[str]], Rows]) -> None:
    rows = read(committed(TOPK, "labels"))
    assert len(rows) == 13
    for row in rows:
        position = row["position"]
        found_ids, logprobs = decoded(row)
        assert found_ids == ids(position)
        assert np.abs(logprobs - (ODD if position % 2 else EVEN)).max() <= HALF
        assert row["log_tail_mass"] == TAIL[position % 2]
        assert row["entropy"] == position / 8
        assert row["token_id"] == found_ids[row["token_rank"] - 1]


@readers
def test_other_readers_find_the_heads(read: Callable[[list[str]], Rows]) -> None:
    rows = read(committed(MASS, "labels"))
    assert len(rows) == 6
    for row in rows:
        position, length = row["position"], row["topk_n"]
        found_ids, logprobs = decoded(row)
        assert length == HEADS[position]
        assert found_ids[:length] == ids(position)[:length]
        assert found_ids[length:] == [0] * (4 - length)
        assert np.abs(logprobs - (ODD if position % 2 else EVEN))[:length].max() <= HALF


@readers
def test_other_readers_find_the_samples(read: Callable[[list[str]], Rows]) -> None:
    rows = {row["sample_key"]: row for row in read(committed(TOPK, "samples"))}
    assert sorted(rows) == sorted(GIVEN)
    for number, key in enumerate(GIVEN):
        row = rows[key]
        assert row["prompt_key"].startswith(PROMPT_KEYS[number])
        assert row["prompt_ids"] == [1, 2, 3, number]
        assert (row["num_tokens"], row["finish_reason"]) == (5, "given")
    masked = rows[GIVEN[1]]
    assert masked["num_rows"] == 3
    assert masked["label_mask"] == [False, True, True, False, True]
    assert masked["response_ids"] == [ids(position)[2] for position in range(5)]
    assert rows[GIVEN[0]]["label_mask"] is None
    assert rows[GIVEN[0]]["response_ids"] is None
