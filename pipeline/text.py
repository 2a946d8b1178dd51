"""How sizes, labels and errors are written for people."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from storage.keys import LabelSetSpec


ERROR_CHARACTERS = 2000


def human_bytes(count: float) -> str:
    """``1234567`` as ``1.2 MB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def error_text(error: BaseException) -> str:
    """Class and message of an error; of one that holds a traceback as text, its last line.

    Errors that come from other processes through Ray are such: the whole text is in the logs.
    """
    text = str(error).strip()
    name = type(error).__name__
    if name.startswith("RayTaskError") or "Traceback (most recent call last)" in text:
        return text.rsplit("\n", 1)[-1][:ERROR_CHARACTERS]
    return f"{name}: {text}"[:ERROR_CHARACTERS]


def kind_text(spec: "LabelSetSpec") -> str:
    """The soft labels of a set: ``top-64``, or ``99.9 % <= 64`` for at most 64 of that mass."""
    kind = spec.kind
    if kind.type == "topk":
        return f"top-{kind.k}"
    return f"{100 * kind.mass:.6g} % <= {kind.cap}"
