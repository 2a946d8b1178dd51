"""The labelling loop: requests in, committed samples out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from storage.errors import BadLabelError
from storage.label_set import LabelSet
from storage.quarantine import Quarantine
from storage.selection import SampleRequest
from teacher_server.backends.base import TeacherBackend


@dataclass(frozen=True, slots=True)
class LabelProgress:
    """What happened since the job began."""

    finished_samples: int = 0
    """Samples that the teacher has finished, committed or not, bad ones included."""
    committed_samples: int = 0
    """Samples that are durable."""
    bad_samples: int = 0
    """Samples that were set aside because their labels cannot be right."""
    response_tokens: int = 0
    """Response tokens of the finished samples."""
    forward_tokens: int = 0
    """Tokens that went through the teacher, prompts included."""


def label_samples(
    backend: TeacherBackend,
    requests: Sequence[SampleRequest],
    label_set: LabelSet,
    *,
    commit_samples: int,
    provenance: dict[str, str],
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[LabelProgress]:
    """Label requests and commit them in groups; yields progress after every sample and commit.

    What was committed stays, whatever happens next; what was not is asked for again by the next
    run. Never more than ``commit_samples`` finished samples wait for their commit, and the teacher
    waits while one is written. A sample that breaks an invariant of the format goes to quarantine
    with the reason, and the others go on.

    Args:
        backend: The teacher.
        requests: What to label, in the order in which the teacher gets it.
        label_set: Where the samples go.
        commit_samples: Samples of a commit.
        provenance: Recorded with every commit.
        should_stop: Asked before the teacher gets one more request. Once it says yes, what the
            teacher has begun is finished and committed, and nothing else is begun.
    """
    facts = {**provenance, **backend.describe()}
    # so that a commit asks new records only
    label_set.missing([request.key for request in requests])
    quarantine = Quarantine(label_set)
    finished = bad = response_tokens = 0

    def wanted() -> Iterator[SampleRequest]:
        for request in requests:
            if should_stop():
                return
            yield request

    with label_set.writer(facts, commit_samples=commit_samples) as writer:
        for sample in backend.label(wanted()):
            try:
                writer.add(sample)
            except BadLabelError as error:
                quarantine.add(sample.key, "bad label", str(error), facts)
                bad += 1
            finished += 1
            response_tokens += len(sample.response_ids_R)
            yield LabelProgress(
                finished, writer.committed, bad, response_tokens, backend.forward_tokens
            )
    yield LabelProgress(finished, writer.committed, bad, response_tokens, backend.forward_tokens)
