"""What is labelled: only samples that no label set serves, in an order that suits the store."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.cluster import Cluster
from pipeline.project import Project
from pipeline.run import plan_project, train_project
from pipeline.steps.label import label_missing, missing_requests, requested_label_set
from pipeline.steps.plan import Plan
from pipeline.steps.prepare import PreparedTeacher
from pipeline.steps.report import write_report
from storage.errors import ConfigError, NotLabelledError
from storage.testing import label_sample_densely

OpenProject = Callable[..., Project]


def plan_of(project: Project) -> tuple[PreparedTeacher, Plan]:
    with project.running():
        return plan_project(project)


def label(project: Project, plan: Plan, start: int, end: int, num_tokens: int = 4) -> None:
    """Store made-up labels of some of the requests, ``num_tokens`` long."""
    random = np.random.default_rng(0)
    logits_RV = random.normal(size=(num_tokens, plan.spec.vocab_size))
    logprobs_RV = logits_RV - np.log(np.exp(logits_RV).sum(axis=1, keepdims=True))
    response_R = np.arange(num_tokens, dtype=np.int32)
    samples = [
        label_sample_densely(request, response_R, logprobs_RV, plan.spec)
        for request in plan.requests()[start:end]
    ]
    project.store.create(plan.spec, {}).append(samples, {})


def test_misses_are_labelled_in_the_order_of_their_keys(open_project: OpenProject) -> None:
    project = open_project()
    _, plan = plan_of(project)
    label(project, plan, 0, 2)
    misses = missing_requests(project.store.view(plan.spec), plan.requests())
    assert [r.key for r in misses] == sorted(r.key for r in plan.requests()[2:])


def test_after_a_repair_exactly_the_lost_samples_are_asked_for_again(
    open_project: OpenProject, flip_a_bit: Callable[[Path], None]
) -> None:
    project = open_project()
    _, plan = plan_of(project)
    label(project, plan, 0, 4)
    before = {*Path(project.store_uri).rglob("*.labels.arrow")}
    label(project, plan, 4, 6)
    (second,) = {*Path(project.store_uri).rglob("*.labels.arrow")} - before
    flip_a_bit(second)
    assert main(["verify", "--store", project.store_uri]) == 2
    assert main(["repair", "--store", project.store_uri, "--yes"]) == 0
    misses = missing_requests(project.store.view(plan.spec), plan.requests())
    assert {r.key for r in misses} == {r.key for r in plan.requests()[4:]}


def test_where_another_set_serves_everything_nothing_is_labelled_and_the_set_exists(
    open_project: OpenProject,
) -> None:
    """Students find their labels by the key of the set that was requested."""
    project = open_project()
    label(project, plan_of(project)[1], 0, 6)
    smaller = open_project("label.kind.k=2")
    teacher, plan = plan_of(smaller)
    assert smaller.store.find(plan.spec) is None
    # a cluster that was not entered has no Ray: any work for it would fail
    done = label_missing(smaller, plan, teacher, Cluster(smaller.config.cluster))
    assert (done.num_labelled, done.quarantined) == (0, frozenset())
    assert smaller.store.open(plan.spec.key).totals().num_samples == 0


def test_a_new_set_is_partitioned_for_the_tokens_that_are_expected(
    open_project: OpenProject,
) -> None:
    project = open_project()
    teacher, plan = plan_of(project)
    label_set = requested_label_set(project, plan, teacher, expected_tokens=2**22)
    assert label_set.totals().num_partitions > 1
    assert label_set.document.provenance["project"] == "tiny"


@pytest.mark.parametrize("labelled", [0, 3])
def test_training_asks_all_sets_for_its_labels(open_project: OpenProject, labelled: int) -> None:
    larger = open_project("label.kind.k=6")
    label(larger, plan_of(larger)[1], 0, labelled)
    project = open_project("train.model=./gone")
    teacher, plan = plan_of(project)
    with pytest.raises(NotLabelledError, match=rf"{4 - labelled} of 4 training samples"):
        train_project(project, teacher, plan, Cluster(project.config.cluster))


def test_training_makes_the_set_that_another_one_serves(open_project: OpenProject) -> None:
    larger = open_project("label.kind.k=6")
    label(larger, plan_of(larger)[1], 0, 6)
    project = open_project("train.model=./gone")
    teacher, plan = plan_of(project)
    with pytest.raises(ConfigError, match=r"'\./gone' does not exist"):
        train_project(project, teacher, plan, Cluster(project.config.cluster))
    assert project.store.find(plan.spec) is not None


def test_the_report_counts_the_labels_of_every_set_that_serves_some(
    open_project: OpenProject,
) -> None:
    """Two of the six samples lie in the set itself (4 tokens), four in a wider one (3 tokens)."""
    larger = open_project("label.kind.k=6")
    _, larger_plan = plan_of(larger)
    label(larger, larger_plan, 1, 6, num_tokens=3)
    project = open_project()
    teacher, plan = plan_of(project)
    label(project, plan, 0, 2, num_tokens=4)
    with project.running():
        write_report(project, plan, teacher, [], [])
    report = json.loads((project.directory / "report.json").read_text())
    labels = report["labels"]
    assert labels["served_by"] == {plan.spec.key: 2, larger_plan.spec.key: 4}
    assert (labels["stored_samples"], labels["stored_tokens"]) == (6, 2 * 4 + 4 * 3)
    own, wider = (project.store.open(key).totals() for key in (plan.spec.key, larger_plan.spec.key))
    # four of the five samples of the wider set are read
    assert labels["stored_bytes"] == round(own.num_bytes + wider.num_bytes * 4 / 5)
    assert len(report["response"]["tokens"]) > 0
