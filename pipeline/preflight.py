"""Do the students of a project fit its labels? Also asked before these cost anything."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cluster import Cluster
from pipeline.project import Project
from pipeline.run import plan_project, student_requests
from pipeline.steps.label import requested_label_set
from pipeline.steps.plan import Plan
from pipeline.steps.prepare import PreparedTeacher
from pipeline.steps.train import StudentRequest
from storage.errors import ConfigError, NotLabelledError
from storage.selection import SampleRequest
from student_train.config import LabelSource, TrainJob
from student_train.preflight.checks import check_labelled, check_unlabelled
from student_train.preflight.findings import Finding, require_fit
from student_train.preflight.room import Ranks, memory_here
from student_train.preflight.subject import Subject, some_prompts
from student_train.streaming.label_sources import resolve_labels
from student_train.streaming.reader import LabelReader

if TYPE_CHECKING:
    from student_train.preflight.self_test import SelfTest


def require_fit_before_labels(project: Project) -> None:
    """Refuse students that could not use the labels which are about to be made.

    Does nothing where all labels are there: then the training looks at them itself.

    Raises:
        PreflightError: with one sentence for everything that does not fit.
    """
    teacher, plan = plan_project(project)
    if _is_labelled(project, plan):
        return
    for request in student_requests(project, teacher):
        findings = check_student(project, request, teacher, plan)
        for finding in findings:
            if finding.verdict == "warning":
                project.say(f"student {request.name}: {finding.check}: {finding.sentence}")
        require_fit([_of(request, finding) for finding in findings])


def chosen_requests(
    project: Project, teacher: PreparedTeacher, name: str | None
) -> list[StudentRequest]:
    """The students of a project, or the one with this name.

    Raises:
        ConfigError: if there is none.
    """
    if project.config.train is None:
        raise ConfigError("the config has no section train; add one to train students")
    requests = student_requests(project, teacher)
    chosen = [request for request in requests if name in (None, request.name)]
    if not chosen:
        names = ", ".join(request.name for request in requests)
        raise ConfigError(f"there is no student {name!r}; the config has {names}")
    return chosen


def check_student(
    project: Project, request: StudentRequest, teacher: PreparedTeacher, plan: Plan
) -> list[Finding]:
    """Everything that can be told now about one student.

    Args:
        project: The project.
        request: The student.
        teacher: Of the labels.
        plan: What is labelled, or is to be.
    """
    subject = Subject(
        request.train,
        Path(request.untrained.directory),
        Path(teacher.model.directory),
        plan.spec.vocab_size,
        trust_teacher_code=project.config.teacher.trust_remote_code,
    )
    ranks = _ranks(project)
    if _is_labelled(project, plan):
        return check_labelled(subject, _reader(_job(project, request, teacher, plan)), ranks)
    requests = plan.selections["train"].requests
    prompts = some_prompts([sample.prompt_ids_P for sample in requests])
    return check_unlabelled(replace(subject, prompts=prompts), _longest(request, plan), ranks)


def self_test_labels(
    project: Project, request: StudentRequest, teacher: PreparedTeacher, plan: Plan
) -> "SelfTest":
    """The teacher as its own student, through the settings of this one.

    Raises:
        NotLabelledError: if labels are missing.
        PreflightError: if the teacher cannot be had as a plain model.
    """
    if not _is_labelled(project, plan):
        raise NotLabelledError("the self-test needs labels; run `distill label` first")
    from student_train.preflight.self_test import self_test  # DeepSpeed takes seconds to import

    return self_test(_job(project, request, teacher, plan), adapter=teacher.adapter)


def _is_labelled(project: Project, plan: Plan) -> bool:
    """Whether every sample of the plan has labels."""
    keys = [request.key for request in plan.requests()]
    return bool(project.store.view(plan.spec).contains(keys).all())


def _job(
    project: Project, request: StudentRequest, teacher: PreparedTeacher, plan: Plan
) -> TrainJob:
    """What the checks read of a training."""
    requested_label_set(project, plan, teacher)
    own = LabelSource(
        store=project.store_uri,
        label_set=plan.spec.key,
        selection=plan.selection_keys["train"],
    )
    labels, *mixture = resolve_labels(own, request.train.data)
    return TrainJob(
        labels=labels,
        mixture=tuple(mixture),
        model=request.untrained.directory,
        tokenizer=teacher.model.directory,
        train=request.train,
        output=str(project.directory),
    )


def _reader(job: TrainJob) -> LabelReader:
    train = job.train
    return LabelReader(
        job.labels, train.loss.weight, mixture=job.mixture, data=train.data, loader=train.loader
    )


def _ranks(project: Project) -> Ranks:
    """Who trains, and what each may use where that is this machine."""
    config = project.config.cluster
    fewest, most = config.worker_bounds
    if not Cluster(config).is_local:
        return Ranks(fewest, None)
    return Ranks(fewest, memory_here(most, use_gpu=config.gpus_per_worker > 0))


def _longest(request: StudentRequest, plan: Plan) -> int:
    """Tokens that a sample may have which the student is to learn."""
    sampling = plan.spec.generation.sampling
    longest = max(
        len(sample.prompt_ids_P)
        + (_response_tokens(sample) if sampling is None else sampling.max_tokens)
        for sample in plan.selections["train"].requests
    )
    limit = request.train.data.filter.max_tokens
    return min(longest, plan.context, longest if limit is None else limit)


def _response_tokens(sample: SampleRequest) -> int:
    return 0 if sample.response_ids_R is None else len(sample.response_ids_R)


def _of(request: StudentRequest, finding: Finding) -> Finding:
    """The finding with the student's name."""
    return replace(finding, sentence=f"student {request.name!r}: {finding.sentence}")
