"""Held-out quality of a model against cached teacher labels; the teacher is not run."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from storage.files import write_atomically
from storage.samples import LabelledSample
from student_train.config import EvaluateJob, HybridLossConfig
from student_train.losses.measures import HELD_OUT_MEASURES
from student_train.models.documents import PER_DOCUMENT
from student_train.models.student import Student, load_causal_lm
from student_train.schedules import StepState
from student_train.streaming.reader import LabelReader, collate
from student_train.streaming.step_plan import split_by_padded_size

NOWHERE = StepState(step=0, total_steps=1)
"""For a forward pass that measures: nothing in it moves with the steps."""


def evaluate_student(job: EvaluateJob) -> None:
    """Measure a model on the held-out selection and write the result as JSON.

    The file holds ``metrics`` (means over all labelled positions, see ``EvaluateConfig.metrics``),
    their ``num_tokens``, ``generations``, and ``samples``: the same of every sample, in the order
    of the selection.
    """
    torch.set_num_threads(job.threads)
    reader = LabelReader(job.labels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    language_model = load_causal_lm(job.model, "bfloat16").eval().to(device)
    student = Student(language_model, HybridLossConfig(), reader.vocab_size)
    measured: list[dict[str, Any]] = []
    with torch.inference_mode():
        for indices in split_by_padded_size(
            range(reader.num_samples), reader.num_tokens, job.evaluate.micro_tokens
        ):
            samples = reader.read(indices)
            columns = measure(student, samples, reader, job.evaluate.metrics, device=device)
            measured += _by_sample(samples, columns)
    num_tokens = int(reader.num_rows.sum())
    answered = reader.read(range(min(job.evaluate.generations, reader.num_samples)))
    result = {
        "metrics": {
            name: math.fsum(sample[name] for sample in measured) / num_tokens
            for name in job.evaluate.metrics
        },
        "num_tokens": num_tokens,
        "generations": generate(
            language_model,
            answered,
            tokenizer=AutoTokenizer.from_pretrained(job.model, local_files_only=True),
            max_new_tokens=job.evaluate.max_new_tokens,
        ),
        "samples": measured,
    }
    write_atomically(Path(job.output), json.dumps(result, indent=1).encode())


def measure(
    student: Any,
    samples: Sequence[LabelledSample],
    reader: LabelReader,
    metrics: Sequence[str],
    *,
    device: torch.device,
    packed: bool = False,
) -> dict[str, torch.Tensor]:
    """One number for every label row of some samples, [M] each, by the name of the metric.

    ``kl`` is always there: it says where a sample is worst.

    Args:
        student: A :class:`Student`, or DeepSpeed's engine around one.
        samples: One micro-batch.
        reader: Where they come from.
        metrics: Names of ``HELD_OUT_MEASURES``.
        device: Where the student is.
        packed: As for ``collate``; models that were set up for packed rows see no padding.
    """
    batch = collate(samples, "sampled", reader.spec, packed=packed).to(device)
    terms = student(batch, NOWHERE, measure=True)
    names = dict.fromkeys(("kl", *metrics))
    return {name: HELD_OUT_MEASURES[name](terms, batch.labels) for name in names}


def _by_sample(
    samples: Sequence[LabelledSample], columns: Mapping[str, torch.Tensor]
) -> list[dict[str, Any]]:
    """Sums over the labelled positions of every sample, and where its KL is largest.

    Args:
        samples: Of one micro-batch.
        columns: One number for each of its M label rows, by name; those of a sample follow one
            another.
    """
    sizes = [len(sample.positions_N) for sample in samples]
    parts = {name: torch.split(values_M.cpu(), sizes) for name, values_M in columns.items()}
    return [
        {
            "sample_key": sample.key,
            "num_tokens": size,
            **{
                name: float(split[number].sum(dtype=torch.float64)) for name, split in parts.items()
            },
            "worst_position": int(sample.positions_N[int(parts["kl"][number].argmax())]),
        }
        for number, (sample, size) in enumerate(zip(samples, sizes, strict=True))
    ]


def generate(
    language_model: Any, samples: Sequence[LabelledSample], *, tokenizer: Any, max_new_tokens: int
) -> list[dict[str, str]]:
    """Greedy answers to the prompts of some samples, beside the teacher's cached ones.

    Every rank that calls this does the same, so ranks stay together where ZeRO has spread the
    weights.

    Args:
        language_model: A causal model of transformers.
        samples: Any number of them.
        tokenizer: Of the model.
        max_new_tokens: Length limit of an answer.
    """
    if not samples:
        return []
    width = max(len(sample.prompt_ids_P) for sample in samples)
    input_ids = np.zeros((len(samples), width), dtype=np.int64)
    mask = np.zeros_like(input_ids)
    for row, sample in enumerate(samples):  # generation continues at the right end: pad left
        input_ids[row, width - len(sample.prompt_ids_P) :] = sample.prompt_ids_P
        mask[row, width - len(sample.prompt_ids_P) :] = 1
    device = language_model.device
    with torch.no_grad(), _own_attention(language_model):
        output = language_model.generate(
            input_ids=torch.from_numpy(input_ids).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    return [
        {
            "sample_key": sample.key,
            "prompt": tokenizer.decode(sample.prompt_ids_P),
            "teacher": tokenizer.decode(sample.response_ids_R, skip_special_tokens=True),
            "student": tokenizer.decode(answer[width:], skip_special_tokens=True),
        }
        for sample, answer in zip(samples, output, strict=True)
    ]


@contextmanager
def _own_attention(language_model: Any) -> Iterator[None]:
    """A block in which a model that was set up for packed rows can generate."""
    if language_model.config._attn_implementation != PER_DOCUMENT:
        yield
        return
    language_model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        language_model.set_attn_implementation(PER_DOCUMENT)
