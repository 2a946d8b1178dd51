"""A file is read as it was written, or not at all, and takes no more memory than it may."""

import io
import random
import re
import struct
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from storage import ipc
from storage.errors import (
    BadLabelError,
    FormatError,
    LabelStoreError,
    OversizedError,
    ShardCorruptError,
    WrongLabelSetError,
    WrongMagicError,
)
from storage.ipc import LZ4, ZSTD, ArrowFile, column_digest, encode_file
from storage.ipc_metadata import Block, read_blocks, read_layout, schema_buffers

NAME = "store/x.labels.arrow"
BITS = 1000
"""Random bits that are flipped."""

SCHEMA = pa.schema(
    [
        pa.field("row", pa.int32(), nullable=False),
        pa.field("logprob", pa.float32(), nullable=False),
        pa.field("plane", pa.list_(pa.uint8(), 4), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("ids", pa.list_(pa.int32())),
        pa.field("mask", pa.list_(pa.bool_())),
        pa.field("reason", pa.string()),
        pa.field("files", pa.list_(pa.string()), nullable=False),
    ],
    metadata={"distillcache.format": "1", "distillcache.label_set": "a" * 32},
)

LABELS_ROWS = 4096
LABELS_K = 64
SCALARS = ["sample", "position", "token_id", "token_logprob", "token_rank", "tail", "entropy"]
PLANES = ["b0", "b1", "b2", "d0", "d1"]


def batch_of(first: int, num_rows: int) -> pa.RecordBatch:
    rows = range(first, first + num_rows)
    columns = [
        pa.array(rows, pa.int32()),
        pa.array([-row / 3 for row in rows], pa.float32()),
        pa.array([[row % 256, 1, 2, row % 7] for row in rows], pa.list_(pa.uint8(), 4)),
        pa.array([f"key {row} ü" for row in rows]),
        pa.array(
            [None if row % 3 == 0 else [*range(row % 5)] for row in rows], pa.list_(pa.int32())
        ),
        pa.array([None if row % 3 == 0 else [True, False] for row in rows], pa.list_(pa.bool_())),
        pa.array([None if row % 2 else "stop" * (row % 4) for row in rows]),
        pa.array([["a.jsonl"] * (row % 3) for row in rows], pa.list_(pa.string())),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


BATCHES = [batch_of(0, 40), batch_of(40, 25), batch_of(65, 1)]
DATA = encode_file(BATCHES, SCHEMA)


def open_file(data: bytes | pa.NativeFile, schema: pa.Schema = SCHEMA) -> ArrowFile:
    return ArrowFile(data, name=NAME, schema=schema)


def labels_file() -> tuple[bytes, pa.Schema]:
    """The shape of a labels file at k = 64: 7 scalars and 5 planes, two of them almost empty."""
    generator = np.random.default_rng(0)
    columns = {
        "sample": pa.array(np.repeat(np.arange(LABELS_ROWS // 256, dtype=np.int32), 256)),
        "position": pa.array(np.tile(np.arange(256, dtype=np.int32), LABELS_ROWS // 256)),
        "token_id": pa.array(generator.integers(0, 49152, LABELS_ROWS).astype(np.int32)),
        "token_logprob": pa.array(-generator.random(LABELS_ROWS).astype(np.float32)),
        "token_rank": pa.array(generator.geometric(0.3, LABELS_ROWS).astype(np.int32)),
        "tail": pa.array(-generator.random(LABELS_ROWS).astype(np.float32)),
        "entropy": pa.array(generator.random(LABELS_ROWS).astype(np.float32)),
    }
    for name, high in zip(PLANES, (256, 256, 1, 60, 2), strict=True):
        values = generator.integers(0, high, LABELS_ROWS * LABELS_K).astype(np.uint8)
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values), LABELS_K)
    batch = pa.record_batch(columns)
    return encode_file([batch, batch], batch.schema), batch.schema


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << (bit % 8)
    return bytes(damaged)


def blocks_of(data: bytes) -> list[Block]:
    (footer_bytes,) = struct.unpack("<i", data[-10:-6])
    return read_blocks(data[-10 - footer_bytes : -10])


def prefix_positions(data: bytes, block: Block, column: str, schema: pa.Schema) -> list[int]:
    """Where the buffers of a column start that hold something."""
    layout = read_layout(data[block.offset : block.body])
    return [
        block.body + offset
        for kind, (offset, size) in zip(schema_buffers(schema), layout.buffers, strict=True)
        if kind.column == column and size
    ]


class CountingReader(io.BytesIO):
    """A remote file: counts requests and bytes."""

    num_read = 0
    num_requests = 0

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self.num_read += len(found)
        self.num_requests += 1
        return found


# -- round trips -----------------------------------------------------------------------------------
def test_what_was_written_is_read() -> None:
    with open_file(DATA) as file:
        assert file.num_batches == 3
        assert [batch.to_pylist() for batch in file.batches()] == [b.to_pylist() for b in BATCHES]
        assert file.batch(1).num_rows == 25
        assert file.table().to_pylist() == pa.Table.from_batches(BATCHES).to_pylist()


def test_the_same_batches_give_the_same_bytes() -> None:
    assert encode_file(iter(BATCHES), SCHEMA) == DATA


@pytest.mark.parametrize("columns", [["key"], ["files", "row"], ["reason", "mask", "plane"]])
def test_columns_come_in_the_order_in_which_they_were_asked_for(columns: list[str]) -> None:
    with open_file(DATA) as file:
        table = file.table(columns)
    assert table.schema.names == columns
    assert table.to_pylist() == pa.Table.from_batches(BATCHES).select(columns).to_pylist()


def test_a_column_that_does_not_exist_is_the_callers_mistake() -> None:
    with open_file(DATA) as file, pytest.raises(KeyError):
        file.batch(0, ["no such column"])
    with open_file(DATA) as file, pytest.raises(ValueError, match="at least one column"):
        file.batch(0, [])


@pytest.mark.parametrize("batches", [[], [batch_of(0, 0)]])
def test_files_without_rows_can_be_read(batches: list[pa.RecordBatch]) -> None:
    with open_file(encode_file(batches, SCHEMA)) as file:
        assert file.num_batches == len(batches)
        assert file.table().num_rows == 0


def test_slices_are_written_and_read_as_what_they_show() -> None:
    whole = batch_of(0, 100)
    slices = [whole.slice(3, 50), whole.slice(90)]
    with open_file(encode_file(slices, SCHEMA)) as file:
        assert [batch.to_pylist() for batch in file.batches()] == [s.to_pylist() for s in slices]


texts = st.one_of(st.none(), st.text(max_size=5))
lists = st.one_of(st.none(), st.lists(st.one_of(st.none(), st.integers(-9, 9)), max_size=4))


@given(st.lists(st.tuples(texts, lists, st.booleans()), max_size=20), st.integers(0, 20))
def test_any_values_survive_and_slicing_does_not_change_a_digest(
    rows: list[tuple[str | None, list[int | None] | None, bool]], start: int
) -> None:
    schema = pa.schema(
        [("text", pa.string()), ("list", pa.list_(pa.int32())), ("flag", pa.bool_())]
    )
    values = [dict(zip(schema.names, row, strict=True)) for row in rows]
    batch = pa.RecordBatch.from_pylist(values, schema=schema)
    with open_file(encode_file([batch], schema), schema) as file:
        assert file.batch(0).to_pylist() == values
    copy = pa.RecordBatch.from_pylist(values[start:], schema=schema)
    for name in schema.names:
        assert column_digest(batch.slice(start)[name]) == column_digest(copy[name])


def test_anybodys_reader_opens_the_file() -> None:
    assert pa.ipc.open_file(pa.BufferReader(DATA)).read_all().num_rows == 66


# -- digests ---------------------------------------------------------------------------------------
def test_digest_of_integers_is_the_specified_one() -> None:
    values = np.array([1, 2, 3], "<i4").tobytes()
    expected = xxhash.xxh3_64(b"int32|3|0" + values).hexdigest()
    assert column_digest(pa.array([1, 2, 3], pa.int32())) == expected == "1ec7774536dbaccd"


def test_digest_of_fixed_lists_is_the_specified_one() -> None:
    column = pa.array([[1, 2], [3, 4]], pa.list_(pa.uint8(), 2))
    items = b"uint8|4|0" + bytes([1, 2, 3, 4])
    expected = xxhash.xxh3_64(b"fixed_size_list<item: uint8>[2]|2|0" + items).hexdigest()
    assert column_digest(column) == expected == "e7712b051794af8b"


def test_digest_of_strings_with_nulls_is_the_specified_one() -> None:
    # valid, null, valid: 101 and five bits of padding; lengths and bytes of the two values
    content = b"string|3|1" + bytes([0b10100000]) + np.array([1, 2], "<i4").tobytes() + b"abc"
    assert column_digest(pa.array(["a", None, "bc"])) == xxhash.xxh3_64(content).hexdigest()


def test_digest_of_lists_with_nulls_is_the_specified_one() -> None:
    lengths = np.array([2, 0], "<i4").tobytes()
    content = b"list<item: bool>|3|1" + bytes([0b10100000]) + lengths + b"bool|2|0" + bytes([1, 0])
    column = pa.array([[True, False], None, []], pa.list_(pa.bool_()))
    assert column_digest(column) == xxhash.xxh3_64(content).hexdigest()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([1, 2], pa.int32()), pa.array([1, 2], pa.uint32())),
        (pa.array([0, None], pa.int32()), pa.array([None, 0], pa.int32())),
        (pa.array(["ab", "c"]), pa.array(["a", "bc"])),
        (pa.array(["", None]), pa.array([None, ""])),
        (pa.array([[1], [2, 3]]), pa.array([[1, 2], [3]])),
        (pa.array([[], None], pa.list_(pa.int8())), pa.array([None, []], pa.list_(pa.int8()))),
        (pa.array([True]), pa.array([False])),
    ],
)
def test_columns_that_differ_have_different_digests(one: pa.Array, other: pa.Array) -> None:
    assert column_digest(one) != column_digest(other)


# -- damage ----------------------------------------------------------------------------------------
def test_no_flipped_bit_changes_a_value() -> None:
    expected = open_file(DATA).table()
    caught = 0
    for bit in random.Random(0).sample(range(len(DATA) * 8), BITS):
        try:
            with open_file(flipped(DATA, bit)) as file:
                found = file.table()
        except LabelStoreError:
            caught += 1
        else:
            assert found.equals(expected), f"bit {bit} went unnoticed"
    assert caught > BITS / 2  # the others hit padding and what only stream readers look at


def test_no_flipped_bit_changes_a_value_of_a_projection() -> None:
    for column in SCHEMA.names:
        expected = open_file(DATA).table([column])
        for bit in random.Random(1).sample(range(len(DATA) * 8), BITS // 8):
            try:
                with open_file(pa.BufferReader(flipped(DATA, bit))) as file:
                    found = file.table([column])
            except LabelStoreError:
                continue
            assert found.equals(expected), f"bit {bit} went unnoticed"


def test_a_damaged_value_names_file_batch_column_and_remedy() -> None:
    data, schema = labels_file()
    (start,) = prefix_positions(data, blocks_of(data)[1], "b0", schema)
    # 20 bytes into an incompressible buffer: a byte of a raw block
    with open_file(flipped(data, (start + 20) * 8), schema) as file:
        assert file.batch(1, ["entropy"]).num_rows == LABELS_ROWS
        with pytest.raises(
            ShardCorruptError,
            match=re.escape(f"{NAME}: batch 1: column 'b0' is damaged") + ".*run `distill verify`",
        ):
            file.batch(1)


@pytest.mark.parametrize("length", [0, 3, 6, 15, 100, len(DATA) // 2, len(DATA) - 1])
def test_a_truncated_file_is_damaged(length: int) -> None:
    with pytest.raises(ShardCorruptError, match=r"not a complete Arrow IPC file.*distill verify"):
        open_file(DATA[:length])


@pytest.mark.parametrize("data", [b"PAR1" + DATA[4:], b"{}", b"\0" * 1000])
def test_a_file_of_another_kind_has_the_wrong_magic(data: bytes) -> None:
    with pytest.raises(WrongMagicError, match="not an Arrow IPC file"):
        open_file(data)


def test_a_footer_that_leaves_out_the_last_batch_is_noticed() -> None:
    count = DATA.rindex(struct.pack("<I", 3) + struct.pack("<q", blocks_of(DATA)[0].offset))
    with pytest.raises(ShardCorruptError, match="does not end at its footer"):
        open_file(DATA[:count] + struct.pack("<I", 2) + DATA[count + 4 :])


def test_a_batch_in_the_place_of_another_is_noticed() -> None:
    batch = batch_of(0, 8)
    data = encode_file([batch, batch], SCHEMA)
    first, second = blocks_of(data)
    swapped = (
        data[: first.offset]
        + data[second.offset : second.stop]
        + data[first.offset : first.stop]
        + data[second.stop :]
    )
    with (
        open_file(swapped) as file,
        pytest.raises(ShardCorruptError, match="batch 0 is batch 1 of its file"),
    ):
        file.batch(0)


def test_a_file_without_digests_is_refused() -> None:
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(sink, SCHEMA, options=options) as writer:
        writer.write_batch(BATCHES[0])
    with (
        open_file(sink.getvalue()) as file,
        pytest.raises(ShardCorruptError, match="batch 0 is unreadable"),
    ):
        file.batch(0)


def test_a_file_that_is_not_compressed_is_refused() -> None:
    """Its buffers do not tell how long they are."""
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, SCHEMA, options=pa.ipc.IpcWriteOptions()) as writer:
        writer.write_batch(BATCHES[0])
    with (
        open_file(sink.getvalue()) as file,
        pytest.raises(ShardCorruptError, match="missing"),
    ):
        file.batch(0)


def test_an_unknown_codec_is_refused() -> None:
    message = bytearray(batch_message(DATA))
    known = [n for n in range(len(message)) if message[n] == 1 and changes_codec(message, n)]
    assert len(known) == 1
    message[known[0]] = 2
    with pytest.raises(ValueError, match="unknown codec"):
        read_layout(bytes(message))


def batch_message(data: bytes) -> bytes:
    """The metadata of the first batch of a file."""
    footer = int.from_bytes(data[-10:-6], "little")
    block = read_blocks(data[-10 - footer : -10])[0]
    return data[block.offset : block.body]


def changes_codec(message: bytearray, place: int) -> bool:
    changed = bytearray(message)
    changed[place] = 99
    try:
        read_layout(bytes(changed))
    except ValueError as error:
        return "codec" in str(error)
    except (struct.error, IndexError):
        return False
    return False


def test_both_codecs_hold_the_same_and_lz4_keeps_noise_raw() -> None:
    for codec in (ZSTD, LZ4):
        with open_file(encode_file(BATCHES, SCHEMA, codec=codec)) as file:
            assert file.table().equals(pa.Table.from_batches(BATCHES))
    noise = np.random.default_rng(0).integers(0, 2**63, 1000).astype(np.uint64)
    schema = pa.schema([pa.field("noise", pa.uint64(), nullable=False)])
    batch = pa.record_batch([pa.array(noise)], schema=schema)
    assert noise.tobytes() in encode_file([batch], schema, codec=LZ4)


# -- schema ----------------------------------------------------------------------------------------
def test_another_label_set_has_its_own_error() -> None:
    other = SCHEMA.with_metadata({**SCHEMA.metadata, b"distillcache.label_set": b"b" * 32})
    with pytest.raises(WrongLabelSetError, match=r"belongs to label set .*aaa.*, not to .*bbb"):
        open_file(DATA, other)


@pytest.mark.parametrize(
    "change",
    [
        lambda schema: schema.remove(0),
        lambda schema: schema.set(0, pa.field("row", pa.int64(), nullable=False)),
        lambda schema: schema.set(0, pa.field("row", pa.int32())),
        lambda schema: schema.remove_metadata(),
        lambda schema: schema.with_metadata({**schema.metadata, b"distillcache.format": b"2"}),
        lambda schema: schema.with_metadata(
            {b"distillcache.format": b"2", b"distillcache.label_set": b"b" * 32}
        ),
    ],
)
def test_another_schema_is_refused(change: Callable[[pa.Schema], pa.Schema]) -> None:
    with pytest.raises(FormatError, match=r"(?s)wanted .*found row") as caught:
        open_file(DATA, change(SCHEMA))
    assert caught.type is FormatError


# -- bounds ----------------------------------------------------------------------------------------
def with_size(data: bytes, position: int, size: int) -> bytes:
    return data[:position] + struct.pack("<q", size) + data[position + 8 :]


@pytest.mark.parametrize("column", ["row", "plane", "key", "ids", "mask", "reason", "files"])
@pytest.mark.parametrize("size", [2**30 + 1, 2**62, -2])
def test_a_bomb_is_refused_before_it_is_unpacked(column: str, size: int) -> None:
    position = prefix_positions(DATA, blocks_of(DATA)[0], column, SCHEMA)[-1]
    with open_file(with_size(DATA, position, size)) as file:
        before = pa.total_allocated_bytes()
        with pytest.raises(OversizedError, match=f"batch 0: column '{column}' claims to take"):
            file.batch(0)
        assert pa.total_allocated_bytes() == before
        assert file.batch(0, ["logprob"]).num_rows == 40


def test_a_column_of_fixed_width_takes_no_more_than_its_rows() -> None:
    # 40 rows of 4 bytes, one value more for lists, and 64 bytes of padding
    (position,) = prefix_positions(DATA, blocks_of(DATA)[0], "row", SCHEMA)
    with (
        open_file(with_size(DATA, position, 41 * 4 + 64 + 1)) as file,
        pytest.raises(OversizedError, match="its values take at most 228"),
    ):
        file.batch(0)


def test_the_sum_over_a_batch_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipc, "MAX_BATCH_BYTES", 1000)
    with open_file(DATA) as file:
        with pytest.raises(OversizedError, match="a batch may take 1000"):
            file.batch(0)
        assert file.batch(0, ["row"]).num_rows == 40


def test_a_batch_that_no_reader_would_take_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipc, "MAX_BATCH_BYTES", 1000)
    with pytest.raises(BadLabelError, match="write fewer rows per batch"):
        encode_file(BATCHES, SCHEMA)


def test_types_without_a_place_in_the_store_are_refused() -> None:
    schema = pa.schema([("x", pa.large_string())])
    with pytest.raises(TypeError, match="no columns of type large_string"):
        schema_buffers(schema)


# -- partial reads ---------------------------------------------------------------------------------
@pytest.mark.parametrize("column", SCALARS)
def test_one_scalar_column_takes_a_small_part_of_a_file(column: str) -> None:
    data, schema = labels_file()
    counter = CountingReader(data)
    with open_file(pa.PythonFile(counter, mode="r"), schema) as file:
        file.table([column])
    assert counter.num_read <= 0.03 * len(data)


def test_all_scalar_columns_take_a_tenth_of_a_file_at_most_and_two_requests_per_batch() -> None:
    data, schema = labels_file()
    counter = CountingReader(data)
    with open_file(pa.PythonFile(counter, mode="r"), schema) as file:
        table = file.table(SCALARS)
        assert file.num_batches == 2
    assert table.num_rows == 2 * LABELS_ROWS
    assert counter.num_read <= 0.1 * len(data)
    # head, tail; metadata and scalars of each batch
    assert counter.num_requests <= 2 + 2 * 2


def test_a_whole_batch_is_one_request_and_nothing_is_read_twice() -> None:
    data, schema = labels_file()
    counter = CountingReader(data)
    with open_file(pa.PythonFile(counter, mode="r"), schema) as file:
        file.table()
    assert counter.num_requests <= 2 + 2
    assert counter.num_read <= len(data) + ipc.TAIL_BYTES


def test_a_footer_longer_than_the_first_read_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipc, "TAIL_BYTES", 10)
    with open_file(pa.BufferReader(DATA)) as file:
        assert file.table().to_pylist() == pa.Table.from_batches(BATCHES).to_pylist()


def test_the_source_is_closed_also_when_it_cannot_be_read() -> None:
    source = pa.BufferReader(DATA)
    with open_file(source):
        assert not source.closed
    assert source.closed
    damaged = pa.BufferReader(DATA[:-1])
    with pytest.raises(ShardCorruptError):
        open_file(damaged)
    assert damaged.closed


def test_failure_of_the_medium_is_not_damage() -> None:
    class Broken(CountingReader):
        def read(self, size: int | None = -1, /) -> bytes:
            raise ConnectionResetError("the network is gone")

    with pytest.raises(ConnectionResetError):
        open_file(pa.PythonFile(Broken(DATA), mode="r"))


def test_a_file_that_got_shorter_is_damaged() -> None:
    counter = CountingReader(DATA)
    with open_file(pa.PythonFile(counter, mode="r")) as file:
        counter.truncate(2000)
        with pytest.raises(ShardCorruptError, match="ends while it is read"):
            file.batch(2)
