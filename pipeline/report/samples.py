"""The held-out samples that each student improved most, and those it is worst at."""

import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pipeline.inspection.server import LOOPBACK

SHOWN: Final = 5
"""Samples of each list."""
FIRST_PORT: Final = 8601
"""Of the first viewer; those of further students and label sets follow."""
LAST_PORT: Final = 65535

Measured = Mapping[str, dict[str, Any]]
"""What an evaluation says of its samples, by sample key."""


@dataclass(frozen=True, slots=True)
class MeasuredStudent:
    """A student and what was measured of its samples."""

    name: str
    directory: str
    samples: Measured
    baseline: Measured | None
    """Of the model that it started from; None if that was not measured sample by sample."""

    def kl(self, key: str) -> float:
        """Mean KL of a sample, nats per labelled position."""
        return _mean_kl(self.samples[key])

    def gain(self, key: str) -> float:
        """By how much training lowered the mean KL of a sample; 0 where that is not known."""
        if self.baseline is None or key not in self.baseline:
            return 0.0
        return _mean_kl(self.baseline[key]) - self.kl(key)


def by_key(evaluation: Mapping[str, Any]) -> Measured | None:
    """The samples of an evaluation; None if it was made before they were noted."""
    samples = evaluation.get("samples")
    return None if samples is None else {sample["sample_key"]: sample for sample in samples}


def sample_lists(
    students: Sequence[MeasuredStudent],
    *,
    store: str,
    owner: Mapping[str, str],
    prompt: Callable[[str], str | None],
) -> list[dict[str, Any]]:
    """For every student: where it gained most on the untrained model, and where it is worst.

    Args:
        students: Those whose samples were measured.
        store: URI of the label store.
        owner: By sample key, the key of the label set from which it is read; others are left out.
        prompt: The end of a sample's prompt, None where no tokenizer is known.
    """
    ports: dict[tuple[str, str], int] = {}
    lists = []
    for student in students:
        keys = [key for key in student.samples if key in owner]
        improved = sorted(keys, key=lambda k: (-student.gain(k), k))[:SHOWN]
        chosen = {
            "improved": [key for key in improved if student.gain(key) > 0],
            "worst": sorted(keys, key=lambda k: (-student.kl(k), k))[:SHOWN],
        }
        viewers = {}
        for label_set in dict.fromkeys(owner[key] for found in chosen.values() for key in found):
            port = min(FIRST_PORT + len(ports), LAST_PORT)
            ports[student.name, label_set] = port
            viewers[label_set] = _command("view", label_set, store, student, "--port", str(port))
        lists.append(
            {
                "name": student.name,
                "measured": len(keys),
                "has_baseline": student.baseline is not None,
                "viewers": list(viewers.values()),
                **{
                    name: [
                        _entry(student, key, owner[key], store, ports[student.name, owner[key]])
                        | {"prompt": prompt(key)}
                        for key in found
                    ]
                    for name, found in chosen.items()
                },
            }
        )
    return lists


def _entry(
    student: MeasuredStudent, key: str, label_set: str, store: str, port: int
) -> dict[str, Any]:
    found = student.samples[key]
    position = found["worst_position"]
    words = ("--sample", key, "--by", "kl", "--position", str(position))
    before = None if student.baseline is None else student.baseline.get(key)
    return {
        "sample_key": key,
        "label_set": label_set,
        "num_tokens": found["num_tokens"],
        "kl": student.kl(key),
        "untrained_kl": None if before is None else _mean_kl(before),
        "position": position,
        "view": f"http://{LOOPBACK}:{port}/sample/{key}?by=kl#p{position}",
        "inspect": _command("inspect", label_set, store, student, *words),
    }


def _mean_kl(sample: Mapping[str, Any]) -> float:
    """Mean KL of a sample; the largest number there is where a diverged model has none."""
    mean = float(sample["kl"]) / int(sample["num_tokens"])
    return mean if math.isfinite(mean) else sys.float_info.max


def _command(
    command: str, label_set: str, store: str, student: MeasuredStudent, *words: str
) -> str:
    return shlex.join(
        ["distill", command, label_set, "--store", store, "--student", student.directory, *words]
    )
