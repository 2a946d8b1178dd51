"""The teacher as its own student: trained for no step, it must have a loss near 0.

Everything is what a training uses: reader, plan, stream, collate, packing, isolation of documents
and fused loss. Labels that are read one row off, a vocabulary that is cut in another place, or
documents of a packed row that see each other show here as a loss that is not near 0.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from storage.keys import LabelSetSpec
from student_train.config import HybridLossConfig, SupervisionConfig, TaidLossConfig, TrainJob
from student_train.errors import PreflightError
from student_train.hard.config import HardLabel
from student_train.losses import DIVERGENCES
from student_train.losses.base import LossTerms, TeacherRows
from student_train.losses.head_chunks import CHUNK_ROWS
from student_train.losses.linear_head import LinearHead
from student_train.models.documents import isolate_documents
from student_train.models.head import head_of
from student_train.models.student import Student, model_inputs
from student_train.schedules import StepState
from student_train.streaming.reader import LabelReader, MicroBatch, collate
from student_train.streaming.step_plan import TrainingPlan
from student_train.streaming.stream import BatchStream

MAX_SAMPLES = 64
"""Samples that are looked at, spread over the selection."""
MAX_TOKENS = 8192
"""Tokens after which no more samples are taken."""

TAID_PLACES = (0.0, 0.5, 1.0)
"""Values of TAID's t: between a student and an equal teacher nothing lies at any."""

TOLERANCE_NATS: Final = {"float32": 5e-4, "float16": 5e-3, "bfloat16": 3e-2}
"""Largest mean divergence, by the dtype of the labels. Log-probs are stored to 1/512 nats, which is
2e-6 nats of KL; the rest is left to engines that add in another order. What this test is there to
find comes to tenths of a nat and more."""

DISTANCE_TOLERANCE: Final = {"float32": 5e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""The same for the total variation distance, which is not squared in the errors, and for the
log-prob of the response token, nats."""

NOT_SQUARED = ("tvd", "cross-entropy")


@dataclass(frozen=True, slots=True)
class Measured:
    """One number that must be near 0."""

    name: str
    value: float
    """Mean over label rows."""
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether it is; NaN is not."""
        return abs(self.value) <= self.tolerance


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Result of a self-test."""

    num_samples: int
    num_rows: int
    """Label rows."""
    dtype: str
    """Of the labels, and of the model here."""
    cross_entropy: float
    """Of the response tokens, nats per token."""
    teacher_cross_entropy: float
    """The same as the labels have it."""
    measured: tuple[Measured, ...]

    def require_passed(self) -> None:
        """Refuse to go on with labels that the teacher itself does not have.

        Raises:
            PreflightError: naming what is not near 0.
        """
        failed = [found for found in self.measured if not found.passed]
        if failed:
            listed = ", ".join(
                f"{found.name} {found.value:.3g} (at most {found.tolerance:g})" for found in failed
            )
            raise PreflightError(
                f"the teacher as its own student should have a loss near 0, found {listed}; the "
                "labels are of other weights than these, or are misread: check the teacher's "
                "directory, look at the label set with distill certify, and try "
                "train.batch.packing: padded"
            )


def self_test(job: TrainJob, *, adapter: str | None = None) -> SelfTest:
    """Compute every divergence between the teacher and its own labels.

    Args:
        job: A training; its student is not looked at.
        adapter: Directory of the LoRA adapter that the teacher was used with.

    Raises:
        PreflightError: if the teacher cannot be had as a plain model.
    """
    reader = LabelReader(job.labels, data=job.train.data, loader=job.train.loader)
    model = _load_teacher(job.tokenizer, reader.spec, adapter)
    packed = job.train.batch.packing != "padded"
    if packed:
        isolate_documents(model)
    chosen = _chosen(reader)
    plan = TrainingPlan([chosen], reader.num_rows, reader.num_tokens, job.train.batch, seed=0)
    hard: HardLabel = "sampled" if reader.spec.generation.sampling is not None else "dataset"
    stream = BatchStream(
        reader,
        plan,
        first_step=0,
        rank_of_world=(0, 1),
        collate=partial(collate, hard=hard, spec=reader.spec, packed=packed),
        loader=job.train.loader,
    )
    students = {
        name: partial(Student(model, loss, reader.vocab_size), step=step)
        for name, loss, step in _objectives()
    }
    with stream, torch.inference_mode():
        return _measure(students, _batches(plan, stream, model, reader.vocab_size), reader.spec)


def _load_teacher(directory: str, spec: LabelSetSpec, adapter: str | None) -> Any:
    """The teacher's model in the dtype of its labels."""
    from transformers import AutoModelForCausalLM

    teacher = spec.generation.teacher
    if teacher.quantization is not None:
        raise PreflightError(
            f"the labels are of a teacher that its engine quantised ({teacher.quantization}), "
            "which cannot be loaded as a student; leave the self-test out"
        )
    if teacher.adapters and adapter is None:
        raise PreflightError(
            "the labels are of a teacher with a LoRA adapter, which the job does not name; use "
            "distill preflight CONFIG --self-test"
        )
    model: Any = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=getattr(torch, spec.generation.compute_dtype),
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=teacher.trust_remote_code,
    )
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(
            model, adapter, autocast_adapter_dtype=False, local_files_only=True
        ).merge_and_unload()
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _chosen(reader: LabelReader) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Places of some samples, sorted by their keys."""
    count = min(reader.num_samples, MAX_SAMPLES)
    spread = np.linspace(0, reader.num_samples - 1, count).round().astype(np.int64)
    found = reader.key_order_S[np.unique(spread)]
    within = np.cumsum(reader.num_tokens[found]) <= MAX_TOKENS
    within[0] = True
    return np.asarray(found[within], dtype=np.int64)


def _objectives() -> Iterator[tuple[str, SupervisionConfig, StepState]]:
    """Every soft divergence by itself; TAID at several t."""
    start = StepState(step=0, total_steps=1)
    alone = {"weight": {"type": "static", "soft_weight": 1.0}}
    for name in DIVERGENCES:
        if name != "taid":
            yield name, HybridLossConfig.model_validate({**alone, "soft": name}), start
    taid = TaidLossConfig.model_validate({**alone, "soft": {"type": "taid", "value": "kl"}})
    for t in TAID_PLACES:
        yield f"taid (t = {t:g})", taid, StepState(step=0, total_steps=1, t=t)


def _batches(
    plan: TrainingPlan, stream: BatchStream, model: Any, vocab_size: int
) -> Iterator[MicroBatch]:
    """The micro-batches of a training, with labels over the rows that are compared."""
    for step in range(len(plan)):
        for _ in plan.rounds(step, 0, 1):
            batch = stream.next().to(model.device)
            yield replace(batch, labels=_without_padding(batch, model, vocab_size))


def _without_padding(batch: MicroBatch, model: Any, vocab_size: int) -> TeacherRows:
    """Labels as if the teacher had no rows for padding.

    Cached log-probs are normalised over all rows of the teacher's embedding, and what those of
    padding get, which is next to nothing after training, is part of the tail. Students have
    no such rows.
    """
    head, rows = head_of(model), batch.labels
    if head.weight_VH.shape[0] <= vocab_size:
        return rows
    hidden_BTH = model.base_model(**model_inputs(batch)).last_hidden_state
    hidden_MH = hidden_BTH.flatten(0, 1).index_select(0, batch.rows_M)
    parts = [
        (part_NV[:, vocab_size:].logsumexp(dim=-1), part_NV[:, :vocab_size].logsumexp(dim=-1))
        for part_NV in _logprobs(head, hidden_MH)
    ]
    padding_M, rest_M = (torch.cat(column) for column in zip(*parts, strict=True))
    tail_M = (rows.log_tail_mass_M.exp() - padding_M.exp()).clamp_min(0.0).log()
    assert rows.token_logprob_M is not None, "every label set has it"
    return replace(
        rows,
        topk_logprobs_MK=rows.topk_logprobs_MK - rest_M[:, None],
        log_tail_mass_M=tail_M - rest_M,
        token_logprob_M=rows.token_logprob_M - rest_M,
    )


def _logprobs(head: LinearHead, hidden_MH: Tensor) -> Iterator[Tensor]:
    """Log-probs over all rows, float32[N, V] of N rows at a time."""
    for hidden_NH in torch.split(hidden_MH, CHUNK_ROWS):
        yield head.logits(hidden_NH).float().log_softmax(dim=-1)


def _measure(
    students: Mapping[str, Callable[..., LossTerms]],
    batches: Iterable[MicroBatch],
    spec: LabelSetSpec,
) -> SelfTest:
    sums = dict.fromkeys(students, 0.0)
    own, teachers, apart = 0.0, 0.0, 0.0
    num_samples, num_rows = 0, 0
    for batch in batches:
        num_samples += len(batch.document_ends or batch.input_ids_BT)
        num_rows += len(batch.labels)
        for name, student in students.items():
            terms = student(batch)
            sums[name] += _sum(terms.soft_M)
        assert batch.labels.token_logprob_M is not None, "every label set has it"
        hard_M, stored_M = terms.hard_M, -batch.labels.token_logprob_M
        own += _sum(hard_M)
        teachers += _sum(stored_M)
        apart += _sum((hard_M - stored_M).abs())
    dtype = spec.generation.compute_dtype
    means = {name: total / num_rows for name, total in sums.items()}
    means["cross-entropy against stored"] = apart / num_rows
    return SelfTest(
        num_samples=num_samples,
        num_rows=num_rows,
        dtype=dtype,
        cross_entropy=own / num_rows,
        teacher_cross_entropy=teachers / num_rows,
        measured=tuple(
            Measured(name, value, _tolerance(name, dtype)) for name, value in means.items()
        ),
    )


def _tolerance(name: str, dtype: str) -> float:
    table = DISTANCE_TOLERANCE if name.startswith(NOT_SQUARED) else TOLERANCE_NATS
    return table[dtype]


def _sum(values_M: Tensor) -> float:
    return float(values_M.double().sum())
