"""The labelling loop: requests in, committed samples out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from storage.label_set import LabelSet
from storage.selection import SampleRequest
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
    run. Never more than ``commit_samples`` finished samples wait for their commit, and the teacher
    waits while one is written.

    Raises:
        BadLabelError: if a label breaks an invariant of the format; it is not written.
    """
    facts = {**provenance, **backend.describe()}
    label_set.missing(
        [request.key for request in requests]
    )  # so that a commit asks new records only
    finished = response_tokens = 0
    with label_set.writer(facts, commit_samples=commit_samples) as writer:
        for sample in backend.label(requests):
            writer.add(sample)
            finished += 1
            response_tokens += len(sample.response_ids_R)
            yield LabelProgress(finished, writer.committed, response_tokens, backend.forward_tokens)
    yield LabelProgress(finished, writer.committed, response_tokens, backend.forward_tokens)
