"""What pyarrow does not show of an Arrow IPC file: where its batches lie and how large they get.

Reads the few fields that matter out of the flatbuffers of the footer and of a batch message. The
field numbers are those of Arrow's ``File.fbs`` and ``Message.fbs``; every position is checked by
the slicing or unpacking that uses it.
"""

import struct
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

MAGIC: Final = b"ARROW1"
TRAILER_BYTES: Final = 4 + len(MAGIC)
"""A file ends in the length of its footer and the magic."""

PREFIX_BYTES: Final = 8
"""A message starts with a marker and its length; a buffer with its length when decompressed."""
MARKER: Final = b"\xff" * 4
END_OF_BATCHES: Final = MARKER + bytes(4)

FOOTER_DICTIONARIES, FOOTER_BATCHES = 2, 3
MESSAGE_HEADER = 2
BATCH_NODES, BATCH_BUFFERS, BATCH_COMPRESSION = 1, 2, 3
COMPRESSION_CODEC = 0
LZ4_FRAME, ZSTD = 0, 1

PAIR: Final = struct.Struct("<qq")
BLOCK: Final = struct.Struct("<qi4xq")


@dataclass(frozen=True, slots=True)
class Block:
    """Where a batch lies in its file, in bytes."""

    offset: int
    metadata_bytes: int
    body_bytes: int

    @property
    def body(self) -> int:
        """First byte of the buffers."""
        return self.offset + self.metadata_bytes

    @property
    def stop(self) -> int:
        """First byte after the batch."""
        return self.body + self.body_bytes


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """The arrays of a batch (nested ones included) and its buffers, as the file claims."""

    lengths: list[int]
    """Values of each array."""
    buffers: list[tuple[int, int]]
    """Where each buffer starts in the body, and its bytes in the file."""


def read_blocks(footer: bytes) -> list[Block]:
    """Positions of the batches in the order of their numbers.

    Raises:
        ValueError, struct.error: if ``footer`` is no footer of a file without dictionaries.
    """
    table = _follow(footer, 0)
    if len(_vector(footer, table, FOOTER_DICTIONARIES, BLOCK)):
        raise ValueError("it holds dictionaries")
    return [Block(*block) for block in _vector(footer, table, FOOTER_BATCHES, BLOCK)]


def read_layout(message: bytes) -> BatchLayout:
    """Arrays and buffers of a batch whose body is compressed.

    Args:
        message: The metadata of the batch, as long as its block says.

    Raises:
        ValueError, struct.error: if ``message`` is not the metadata of such a batch.
    """
    if not message.startswith(MARKER):  # without it, Arrow reads the older form of a message
        raise ValueError("it is no message")
    message = message[PREFIX_BYTES:]
    table = _follow(message, 0)
    batch = _follow(message, _required(message, table, MESSAGE_HEADER))
    compression = _follow(message, _required(message, batch, BATCH_COMPRESSION))
    codec = _field(message, compression, COMPRESSION_CODEC)
    if codec is not None and message[codec] not in (LZ4_FRAME, ZSTD):  # absent is the first
        raise ValueError("it is compressed with an unknown codec")
    return BatchLayout(
        lengths=[length for length, _ in _vector(message, batch, BATCH_NODES, PAIR)],
        buffers=[(offset, size) for offset, size in _vector(message, batch, BATCH_BUFFERS, PAIR)],
    )


@dataclass(frozen=True, slots=True)
class BufferKind:
    """What a buffer of a batch belongs to."""

    column: str
    array: int
    """Number of its array in the batch."""
    bits: int
    """Bits per value of its array; 0 where its size depends on the values."""


def schema_buffers(schema: pa.Schema) -> list[BufferKind]:
    """The buffers of every batch, in order; a nested column is a chain of arrays.

    Raises:
        TypeError: if a column is of a type that the store does not use.
    """
    buffers: list[BufferKind] = []
    for field in schema:
        kind = field.type
        while kind is not None:
            array = buffers[-1].array + 1 if buffers else 0
            buffers += [BufferKind(field.name, array, bits) for bits in _bits_of_buffers(kind)]
            kind = kind.value_type if kind.num_fields else None
    return buffers


def _bits_of_buffers(kind: pa.DataType) -> list[int]:
    """Bits per value in the validity bitmap, the offsets or the values, and the text."""
    if pa.types.is_fixed_size_list(kind):
        return [1]
    if pa.types.is_list(kind):
        return [1, 32]
    if pa.types.is_string(kind):
        return [1, 32, 0]
    if pa.types.is_primitive(kind):
        return [1, kind.bit_width]
    raise TypeError(f"the store has no columns of type {kind}")


# -- flatbuffers: tables hold offsets to their fields, relative to where the offset stands ---------
def _follow(data: bytes, position: int) -> int:
    return position + int(struct.unpack_from("<I", data, position)[0])


def _field(data: bytes, table: int, number: int) -> int | None:
    """Position of a field, or ``None`` where the table leaves it out."""
    vtable = table - int(struct.unpack_from("<i", data, table)[0])
    if vtable < 0:
        raise ValueError("a table has no description")
    (vtable_bytes,) = struct.unpack_from("<H", data, vtable)
    entry = 4 + 2 * number
    if entry >= vtable_bytes:
        return None
    (offset,) = struct.unpack_from("<H", data, vtable + entry)
    return table + int(offset) if offset else None


def _required(data: bytes, table: int, number: int) -> int:
    position = _field(data, table, number)
    if position is None:
        raise ValueError(f"field {number} of its metadata is missing")
    return position


def _vector(data: bytes, table: int, number: int, item: struct.Struct) -> list[tuple[int, ...]]:
    position = _field(data, table, number)
    if position is None:
        return []
    start = _follow(data, position)
    (count,) = struct.unpack_from("<I", data, start)
    items = data[start + 4 : start + 4 + count * item.size]
    if len(items) != count * item.size:
        raise ValueError("a list does not end where it should")
    return list(item.iter_unpack(items))
