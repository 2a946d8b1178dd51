"""Which samples share a row: whole samples, none twice, no row above its capacity.

Only lengths decide, so a plan costs no label byte.
"""

from collections.abc import Sequence
from typing import Literal

RowOrder = Literal["first_fit", "length_sorted"]
"""How rows are filled."""


def pack(lengths: Sequence[int], capacity: int, how: RowOrder) -> list[list[int]]:
    """Rows of places in ``lengths``.

    A sample that is longer than the capacity gets a row of its own: nothing is cut or dropped.

    Args:
        lengths: Tokens of every sample. Among equal ones the earlier is placed first.
        capacity: Tokens of a row.
        how: ``first_fit``: longest first, each into the first row with room, which wastes at most
            2/9 of the rows beyond the best possible (Johnson 1973) and a few per cent on the
            lengths of answers. ``length_sorted``: rows of samples of like length, for models
            whose time depends on the longest of a row.
    """
    longest_first = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    rows: list[list[int]] = []
    room: list[int] = []
    first = 0
    """Rows before it are full."""
    for place in longest_first:
        length = lengths[place]
        if how == "length_sorted":
            first = max(0, len(rows) - 1)
        for row in range(first, len(rows)):
            if length <= room[row]:
                rows[row].append(place)
                room[row] -= length
                break
        else:
            rows.append([place])
            room.append(capacity - length)
        while first < len(rows) and room[first] <= 0:
            first += 1
    return rows
