"""Move a label set as one stream: a checksummed ``.tar.zst`` with a data card.

The first member, ``manifest.json``, names everything that follows with size and checksum
(``docs/format.md``).
"""

from storage.pack.pack import Packed, pack
from storage.pack.unpack import Unpacked, unpack

__all__ = ["Packed", "Unpacked", "pack", "unpack"]
