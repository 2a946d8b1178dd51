"""Which checks can be made before labelling, and which after."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from storage.errors import ConfigError
from student_train.config import SupervisionConfig, TrainJob, missing_columns
from student_train.models.memory import model_shape
from student_train.preflight.ends import check_beginning, check_ending
from student_train.preflight.findings import Finding
from student_train.preflight.room import (
    Ranks,
    check_context,
    check_memory,
    memory_here,
    vocabulary_of,
)
from student_train.preflight.subject import Subject, look_at
from student_train.preflight.template import check_template
from student_train.preflight.vocabulary import (
    check_cutting,
    check_rows,
    check_special_tokens,
    check_tokens,
)
from student_train.streaming.reader import LabelReader

LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError)
"""What transformers raises where files are missing, or are not what they should be."""

Check = Callable[[], Finding]


def check_job(job: TrainJob, reader: LabelReader) -> list[Finding]:
    """Everything about a job, as this rank sees it.

    Args:
        job: The training.
        reader: Its labels.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    subject = Subject(job.train, Path(job.model), Path(job.tokenizer), reader.vocab_size)
    return check_labelled(subject, reader, Ranks(world_size, memory_here(ranks_here, use_gpu=True)))


def check_labelled(subject: Subject, reader: LabelReader, ranks: Ranks) -> list[Finding]:
    """Everything about a student whose labels are there.

    Args:
        subject: The student; its prompts are read from the labels.
        reader: The labels.
        ranks: Who trains it.
    """
    prompts, endings = look_at(reader)
    return _in_order(
        replace(subject, prompts=prompts),
        [
            lambda subject: check_columns(subject.train.loss, reader),
            lambda subject: check_context(subject, int(reader.num_tokens.max()), is_certain=True),
        ],
        [lambda subject: check_ending(subject, endings)],
        ranks,
    )


def check_unlabelled(subject: Subject, longest: int, ranks: Ranks) -> list[Finding]:
    """What can be told before labelling.

    Args:
        subject: The student, with prompts that are to be labelled.
        longest: Tokens that a sample may have.
        ranks: Who trains it.
    """
    return _in_order(
        subject,
        [
            lambda _: Finding("label columns", "unknown", "not labelled yet"),
            lambda subject: check_context(subject, longest, is_certain=False),
        ],
        [lambda subject: check_ending(subject, None)],
        ranks,
    )


def check_columns(loss: SupervisionConfig, reader: LabelReader) -> Finding:
    """The labels have the optional columns which the loss is computed from."""
    missing = missing_columns(loss, reader.spec.columns)
    if not missing:
        return Finding("label columns", "ok", "the labels have what the loss needs")
    return Finding(
        "label columns",
        "refused",
        f"the loss (soft {loss.soft.type}, weight {loss.weight.type}) needs the label columns "
        f"{', '.join(missing)}, which label set {reader.spec.key} lacks; add them to "
        "label.columns and label again (stored responses are kept, only their labels are made "
        "anew)",
    )


SubjectCheck = Callable[[Subject], Finding]


def _in_order(
    subject: Subject, of_labels: list[SubjectCheck], of_endings: list[SubjectCheck], ranks: Ranks
) -> list[Finding]:
    """All checks; those that make no sense after another refused are left out."""
    tokens = _made("tokens", partial(check_tokens, subject))
    findings = [tokens]
    if tokens.verdict != "refused":  # with other tokens all texts differ
        findings += _text_findings(subject, of_endings)
    try:
        num_rows = vocabulary_of(subject.student)
    except LOADING_ERRORS as error:
        sentence = f"the student {str(subject.student)!r} cannot be loaded: {error}; choose another"
        return [*findings, Finding("model", "refused", sentence)]
    findings.append(check_rows(subject, num_rows))
    findings += [check(subject) for check in of_labels]
    try:
        shape = model_shape(subject.student)
    except (*LOADING_ERRORS, RuntimeError, AttributeError) as error:
        # a model whose shape cannot be had without weights can be trained all the same
        sentence = f"it cannot be estimated for this architecture: {error}"
        return [*findings, Finding("memory", "unknown", sentence)]
    return [*findings, check_memory(shape, subject.train, ranks)]


def _text_findings(subject: Subject, of_endings: list[SubjectCheck]) -> list[Finding]:
    """Checks that load tokenizers."""
    try:
        _ = subject.teacher_tokenizer
    except LOADING_ERRORS as error:
        sentence = (
            f"the teacher's tokenizer {str(subject.teacher)!r} cannot be loaded, so texts are not "
            f"compared: {error}"
        )
        return [Finding("tokenizer", "warning", sentence)]
    try:
        _ = None if subject.gets_teachers_tokenizer else subject.student_tokenizer
    except LOADING_ERRORS as error:
        sentence = (
            f"the student's tokenizer {str(subject.student)!r} cannot be loaded: {error}; add its "
            "files, or set train.chat_template: teacher"
        )
        return [Finding("tokenizer", "refused", sentence)]
    checks = [check_cutting, check_special_tokens, check_template, check_beginning, *of_endings]
    return [check(subject) for check in checks]


def _made(name: str, check: Check) -> Finding:
    """The finding of a check; what it cannot read is refused."""
    try:
        return check()
    except ConfigError as error:
        return Finding(name, "refused", str(error))
