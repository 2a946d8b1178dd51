"""How sizes and labels are written for people."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from storage.keys import LabelSetSpec


def human_bytes(count: float) -> str:
    """``1234567`` as ``1.2 MB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def kind_text(spec: "LabelSetSpec") -> str:
    """The soft labels of a set: ``top-64``, or ``99.9 % <= 64`` for at most 64 of that mass."""
    kind = spec.kind
    if kind.type == "topk":
        return f"top-{kind.k}"
    return f"{100 * kind.mass:.6g} % <= {kind.cap}"
