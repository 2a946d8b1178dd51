"""What the teacher is asked for: samples that nobody has, and labels that hold too little."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pipeline.cluster import Cluster
from pipeline.project import Project
from pipeline.steps.label_job import LabelJob
from pipeline.steps.plan import STATES, Plan, counts, expected_response_tokens, states_of
from pipeline.steps.prepare import PreparedTeacher
from storage.label_set import LabelSet
from storage.quarantine import Quarantine
from storage.request_table import RequestTable
from storage.selection import SampleRequest, Selection
from storage.view import LabelView


@dataclass(frozen=True, slots=True)
class Labelled:
    """What labelling a plan came to."""

    num_labelled: int
    """Samples that the teacher labelled."""
    quarantined: frozenset[str]
    """Keys of the samples of the plan that were set aside, now or earlier."""


def label_missing(
    project: Project,
    plan: Plan,
    teacher: PreparedTeacher,
    cluster: Cluster,
    *,
    retry_quarantined: bool = False,
) -> Labelled:
    """Label every sample of the plan that no label set serves.

    Args:
        project: The project.
        plan: What is wanted.
        teacher: Who labels.
        cluster: Where.
        retry_quarantined: Also ask again for samples that were set aside.

    Raises:
        DistillError: if too many samples had to be set aside; committed samples are kept.
        StoppedError: if the command was asked to stop; committed samples are kept.
    """
    view = project.store.view(plan.spec)
    states = states_of(view, plan.requests())
    misses = _in_key_order(plan.requests(), states != STATES.index("hits"))
    expected_tokens = expected_response_tokens(plan, misses, view)
    label_set = requested_label_set(project, plan, teacher, expected_tokens=expected_tokens)
    quarantine = Quarantine(label_set)
    if retry_quarantined:
        quarantine.release(_among(misses, quarantine.keys()))
    aside = misses.find(quarantine.keys())
    wanted = Wanted(view, misses.take(np.delete(np.arange(len(misses)), aside)))
    job = LabelJob(project, plan, teacher, cluster, label_set, num_aside=len(aside))
    job.require_few_bad_samples()
    if len(wanted):
        facts = {"label_set": plan.spec.key, "samples": len(wanted), **counts(states)}
        with project.timed("label", **facts) as cost:
            job.run(wanted, cost)
    return Labelled(len(wanted) - job.num_bad, frozenset(_among(misses, quarantine.keys())))


def _among(requests: RequestTable, keys: set[str]) -> list[str]:
    """Those of the keys that are keys of the requests."""
    return requests.keys(requests.find(keys).tolist())


def _in_key_order(requests: RequestTable, which: npt.NDArray[np.bool_]) -> RequestTable:
    # neighbours in key order share storage partitions, so a commit goes to few shards
    keys, numbers = requests.key_array, np.flatnonzero(which)
    return requests.take(numbers[np.lexsort((keys[numbers, 1], keys[numbers, 0]))])


@dataclass(frozen=True, slots=True)
class Wanted:
    """The samples that a label job labels, by number.

    Requests whose response is stored with too few labels are to be scored, not answered anew.
    """

    view: LabelView
    table: RequestTable

    def __len__(self) -> int:
        return len(self.table)

    def keys(self, numbers: Sequence[int]) -> list[str]:
        """Sample keys of some of them."""
        return self.table.keys(numbers)

    def requests(self, numbers: Sequence[int]) -> list[SampleRequest]:
        """Some of them, made when they are asked for, without their sources."""
        requests = self.table.requests(numbers, with_sources=False)
        return list(with_stored_responses(self.view, requests))


def without(project: Project, plan: Plan, keys: Iterable[str]) -> Plan:
    """The plan except some samples, such as those in quarantine."""
    left_out = list(keys)
    found = {split: s.table.find(left_out) for split, s in plan.selections.items()}
    if not any(map(len, found.values())):
        return plan
    selections = {
        split: Selection(selection.table.take(np.delete(np.arange(len(selection.table)), out)))
        for (split, selection), out in zip(plan.selections.items(), found.values(), strict=True)
    }
    objects = project.store.objects
    saved = {split: selection.save(objects) for split, selection in selections.items()}
    return replace(plan, selections=selections, selection_keys=saved)


def without_quarantined(project: Project, plan: Plan) -> Plan:
    """The plan except the samples that were set aside."""
    label_set = project.store.find(plan.spec)
    if label_set is None:
        return plan
    served = project.store.view(plan.spec)
    aside = sorted(Quarantine(label_set).keys())
    unserved = [key for key, there in zip(aside, served.contains(aside), strict=True) if not there]
    return without(project, plan, unserved)


def with_stored_responses(
    view: LabelView, requests: Sequence[SampleRequest]
) -> Iterator[SampleRequest]:
    """Requests whose response is stored with too few labels are to be scored, not answered anew.

    The first committed response is the sample: it is never drawn again.
    """
    left = {request.key: request for request in requests if request.response_ids_R is None}
    stored: dict[str, SampleRequest] = {}
    for label_set in view.upgradable:
        keys = list(left)
        known = [
            key for key, there in zip(keys, label_set.contains(keys).tolist(), strict=True) if there
        ]
        for sample in label_set.read(known):
            stored[sample.key] = replace(
                left.pop(sample.key),
                response_ids_R=sample.response_ids_R,
                finish_reason=sample.finish_reason,
                stop_reason=sample.stop_reason,
            )
    for request in requests:
        yield stored.get(request.key, request)


def missing_requests(view: LabelView, requests: RequestTable) -> RequestTable:
    """The requests that no label set serves, in the order in which they are to be labelled."""
    return _in_key_order(requests, states_of(view, requests) != STATES.index("hits"))


def requested_label_set(
    project: Project, plan: Plan, teacher: PreparedTeacher, *, expected_tokens: int = 0
) -> LabelSet:
    """The label set of the plan, created if need be.

    It exists also where other sets serve every sample: students find their labels by its key.
    """
    return project.store.create(
        plan.spec,
        {
            "teacher": str(project.config.teacher.model),
            **({} if teacher.adapter is None else {"adapter": teacher.adapter}),
            "tokenizer": teacher.tokenizer,
            "chat_template": teacher.chat_template or "none",
            "project": project.config.name,
        },
        expected_tokens=expected_tokens,
    )
