"""An engine that is asked to let go of samples while it works through a lease."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.logs import RunLog
from pipeline.project import Project
from pipeline.run import plan_project
from pipeline.steps.label import requested_label_set
from pipeline.steps.label_worker import OpenLease, TeacherWorker
from teacher_server.backends.base import TeacherJob, start_backend

OpenProject = Callable[..., Project]


@given(st.integers(0, 30), st.lists(st.none() | st.integers(0, 9), max_size=60))
def test_every_sample_is_begun_or_let_go_never_both(size: int, asked: list[int | None]) -> None:
    lease = OpenLease(size)
    begun = let_go = 0
    for count in asked:  # None: the engine begins the next
        if count is None:
            begun += lease.begin()
        else:
            let_go += lease.let_go(count)
    while lease.begin():
        begun += 1
    assert begun + let_go == size


def new_worker(project: Project, tmp_path: Path) -> tuple[TeacherWorker, list]:
    """A worker with a made-up teacher, in this process, and the requests of the project."""
    with project.running():
        teacher, plan = plan_project(project)
    label_set = requested_label_set(project, plan, teacher)
    job = TeacherJob(
        model=teacher.model.directory,
        backend=project.config.teacher.backend,
        spec=plan.spec,
        max_model_len=plan.max_model_len,
    )
    worker = TeacherWorker(
        job,
        project.store_uri,
        {},
        commit_samples=2,
        report_s=0.0,
        log=RunLog(str(tmp_path / "logs"), "run"),
    )
    worker._label_set, worker._backend = label_set, start_backend(job)
    return worker, list(plan.requests())


def test_what_is_let_go_in_the_middle_is_not_labelled(
    open_project: OpenProject, tmp_path: Path
) -> None:
    worker, requests = new_worker(open_project("teacher.backend={type: fake}"), tmp_path)
    reports = worker.label(0, requests)
    assert next(reports).finished_samples == 1
    assert worker.let_go(0, 2) == 2
    *_, last = reports
    assert (last.finished_samples, last.committed_samples) == (4, 4)
    assert worker.let_go(0, 2) == 0
    stored = worker._label_set.contains([request.key for request in requests])
    np.testing.assert_array_equal(stored, [True] * 4 + [False] * 2)
    # progress is that of a lease
    *_, last = worker.label(1, requests[4:])
    assert last.committed_samples == 2


def test_a_question_that_comes_before_its_lease_is_obeyed(
    open_project: OpenProject, tmp_path: Path
) -> None:
    worker, requests = new_worker(open_project("teacher.backend={type: fake}"), tmp_path)
    assert worker.let_go(3, 4) == 4
    *_, last = worker.label(3, requests)
    assert last.committed_samples == 2
    assert worker.let_go(2, 1) == 0  # a lease that is over
