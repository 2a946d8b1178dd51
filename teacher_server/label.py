"""The labelling loop: requests in, committed samples out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from storage.samples import LabelledSample
from storage.selection import SampleRequest
from storage.store import LabelSet
from teacher_server.backends.base import TeacherBackend


@dataclass(frozen=True, slots=True)
class LabelProgress:
    """What happened since the job began."""

    finished_samples: int
    """Samples that the teacher has finished, committed or not."""
    committed_samples: int
    """Samples that are durable."""
    response_tokens: int
    """Response tokens of the finished samples."""
    forward_tokens: int
    """Tokens that went through the teacher, prompts included."""


def label_samples(
    backend: TeacherBackend,
    requests: Sequence[SampleRequest],
    label_set: LabelSet,
    *,
    commit_samples: int,
    provenance: dict[str, str],
) -> Iterator[LabelProgress]:
    """Label requests and commit them in groups; yields progress after every sample and commit.

    What was committed stays, whatever happens next; what was not is asked for again by the next
    run. The buffer never holds more than ``commit_samples`` finished samples.

    Raises:
        BadLabelError: if a label breaks an invariant of the format; it is not written.
    """
    facts = {**provenance, **backend.describe()}
    buffer: list[LabelledSample] = []
    finished = committed = response_tokens = 0
    for sample in backend.label(requests):
        sample.check(label_set.spec)
        buffer.append(sample)
        finished += 1
        response_tokens += len(sample.response_ids_R)
        if len(buffer) >= commit_samples:
            label_set.append(buffer, facts)
            committed += len(buffer)
            buffer = []
        yield LabelProgress(finished, committed, response_tokens, backend.forward_tokens)
    if buffer:
        label_set.append(buffer, facts)
        committed += len(buffer)
    yield LabelProgress(finished, committed, response_tokens, backend.forward_tokens)
