"""Held-out quality of a model against cached teacher labels; the teacher is not run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from storage.files import write_atomically
from student_train.config import EvaluateJob, HybridLossConfig
from student_train.data import LabelReader, collate, split_by_padded_size
from student_train.losses.config import ForwardKlConfig
from student_train.model import Student, load_causal_lm
from student_train.schedules import StepState
from student_train.weights.config import StaticWeightConfig


def evaluate_student(job: EvaluateJob) -> None:
    """Measure a model on the held-out selection and write the result as JSON.

    The file holds ``metrics`` (means over all labelled positions: ``kl`` on the k+1 categories
    and ``cross_entropy`` of the sampled tokens in nats, ``agreement`` of the argmax tokens),
    their ``num_tokens``, and ``generations``.
    """
    torch.set_num_threads(job.threads)
    reader = LabelReader(job.labels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    language_model = load_causal_lm(job.model, "bfloat16").eval().to(device)
    loss = HybridLossConfig(soft=ForwardKlConfig(), weight=StaticWeightConfig(soft_weight=1.0))
    student = Student(language_model, loss, reader.vocab_size)
    sums = dict.fromkeys(("kl", "cross_entropy", "agreement"), 0.0)
    nowhere = StepState(step=0, total_steps=1)  # nothing that is measured moves
    everything = range(len(reader.selection.requests))
    with torch.inference_mode():
        for indices in split_by_padded_size(
            everything, reader.num_tokens, job.evaluate.micro_tokens
        ):
            batch = collate(reader.read(indices), "sampled", reader.spec).to(device)
            terms = student(batch, nowhere)
            sums["kl"] += float(terms.soft_M.sum())
            sums["cross_entropy"] += float(terms.hard_M.sum())
            same = terms.student_argmax_M == batch.labels.topk_ids_MK[:, 0]
            sums["agreement"] += float(same.sum())
    num_tokens = int(reader.num_rows.sum())
    result = {
        "metrics": {name: sums[name] / num_tokens for name in job.evaluate.metrics},
        "num_tokens": num_tokens,
        "generations": _generate(language_model, reader, job),
    }
    write_atomically(Path(job.output), json.dumps(result, indent=1).encode())


def _generate(language_model: Any, reader: LabelReader, job: EvaluateJob) -> list[dict[str, str]]:
    """Greedy answers to the first held-out prompts, beside the teacher's cached ones."""
    count = min(job.evaluate.generations, len(reader.selection.requests))
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
