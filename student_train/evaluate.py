"""Held-out quality of a model against cached teacher labels; the teacher is not run."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from storage.files import write_atomically
from storage.samples import LabelledSample
from student_train.config import EvaluateJob, HybridLossConfig
from student_train.data import LabelReader, collate
from student_train.losses.config import ForwardKlConfig
from student_train.model import Student, load_causal_lm
from student_train.schedules import StepState
from student_train.step_plan import split_by_padded_size
from student_train.weights.config import StaticWeightConfig


def evaluate_student(job: EvaluateJob) -> None:
    """Measure a model on the held-out selection and write the result as JSON.

    The file holds ``metrics`` (means over all labelled positions: ``kl`` on the k+1 categories
    and ``cross_entropy`` of the sampled tokens in nats, ``agreement`` of the argmax tokens),
    their ``num_tokens``, ``generations``, and ``samples``: the same of every sample, in the order
    of the selection.
    """
    torch.set_num_threads(job.threads)
    reader = LabelReader(job.labels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    language_model = load_causal_lm(job.model, "bfloat16").eval().to(device)
    loss = HybridLossConfig(soft=ForwardKlConfig(), weight=StaticWeightConfig(soft_weight=1.0))
    student = Student(language_model, loss, reader.vocab_size)
    measured: list[dict[str, Any]] = []
    nowhere = StepState(step=0, total_steps=1)  # nothing that is measured moves
    everything = range(reader.num_samples)
    with torch.inference_mode():
        for indices in split_by_padded_size(
            everything, reader.num_tokens, job.evaluate.micro_tokens
        ):
            samples = reader.read(indices)
            batch = collate(samples, "sampled", reader.spec).to(device)
            terms = student(batch, nowhere)
            same_M = terms.student_argmax_M == batch.labels.topk_ids_MK[:, 0]
            columns = {"kl": terms.soft_M, "cross_entropy": terms.hard_M, "agreement": same_M}
            measured += _by_sample(samples, columns)
    num_tokens = int(reader.num_rows.sum())
    result = {
        "metrics": {
            name: math.fsum(sample[name] for sample in measured) / num_tokens
            for name in job.evaluate.metrics
        },
        "num_tokens": num_tokens,
        "generations": _generate(language_model, reader, job),
        "samples": measured,
    }
    write_atomically(Path(job.output), json.dumps(result, indent=1).encode())


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


def _generate(language_model: Any, reader: LabelReader, job: EvaluateJob) -> list[dict[str, str]]:
    """Greedy answers to the first held-out prompts, beside the teacher's cached ones."""
    count = min(job.evaluate.generations, reader.num_samples)
    if count == 0:
        return []
    tokenizer = AutoTokenizer.from_pretrained(job.model, local_files_only=True)
    samples = reader.read(range(count))
    width = max(len(sample.prompt_ids_P) for sample in samples)
    input_ids = np.zeros((count, width), dtype=np.int64)
    mask = np.zeros_like(input_ids)
    for row, sample in enumerate(samples):  # generation continues at the right end: pad left
        input_ids[row, width - len(sample.prompt_ids_P) :] = sample.prompt_ids_P
        mask[row, width - len(sample.prompt_ids_P) :] = 1
    with torch.inference_mode():
        output = language_model.generate(
            input_ids=torch.from_numpy(input_ids).to(language_model.device),
            attention_mask=torch.from_numpy(mask).to(language_model.device),
            max_new_tokens=job.evaluate.max_new_tokens,
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
