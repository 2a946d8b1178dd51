"""A long epoch is streamed in memory that does not grow with what was read.

Samples: ``DISTILL_SOAK_SAMPLES`` (default 1,000,000 short ones, some minutes).
"""

import json
import multiprocessing
import os
from functools import partial
from pathlib import Path

import pytest

from benchmarks.made_up_labels import Answers
from student_train.config import BatchConfig, LabelSource, LoaderConfig, TrainConfig
from student_train.streaming.reader import LabelReader, collate
from student_train.streaming.stream import BatchStream
from student_train.trainer import plan_training

NUM_SAMPLES = int(os.environ.get("DISTILL_SOAK_SAMPLES", "1000000"))
ANSWERS = Answers(
    num_samples=NUM_SAMPLES, median_tokens=8, sigma=0.5, prompt_tokens=8, k=8, vocab_size=1000
)
WARM_UP = 0.1
"""Share of the epoch after which memory is what it stays."""
MAX_GROWTH_MIB = 64
MAX_FIXED_MIB = 128
MAX_BYTES_PER_SAMPLE = 1000
"""Of what finding and planning the samples take, and what does not depend on their number."""


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def write(directory: str, found: str) -> None:
    Path(found).write_text(ANSWERS.write(Path(directory)).model_dump_json())


def stream_epoch(source: str, found: str) -> None:
    """Stream all batches and write down what memory was taken."""
    before = resident_mib()
    reader = LabelReader(LabelSource.model_validate_json(Path(source).read_text()))
    train = TrainConfig(model="", batch=BatchConfig(tokens=65536))
    plan = plan_training(reader, train)
    planned = resident_mib()
    loader = LoaderConfig(memory_mib=256)
    rows, highest, warm = 0, 0.0, 0.0
    total = int(reader.num_rows.sum())
    with BatchStream(
        reader,
        plan,
        first_step=0,
        rank_of_world=(0, 1),
        collate=partial(collate, hard="sampled", spec=reader.spec, packed=True),
        loader=loader,
    ) as stream:
        while True:
            try:
                rows += len(stream.next().rows_M)
            except StopIteration:
                break
            memory = resident_mib()
            if rows < WARM_UP * total:
                warm = max(warm, memory)
            highest = max(highest, memory)
    facts = {"rows": rows, "total": total, "growth_mib": highest - warm}
    facts |= {"planning_mib": planned - before, "highest_mib": highest}
    Path(found).write_text(json.dumps(facts))


def in_a_process_of_its_own(function: object, *arguments: str) -> None:
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)  # type: ignore[arg-type]
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.soak
def test_memory_stays_flat_over_an_epoch(tmp_path: Path) -> None:
    source, found = tmp_path / "source.json", tmp_path / "found.json"
    in_a_process_of_its_own(write, str(tmp_path / "store"), str(source))
    in_a_process_of_its_own(stream_epoch, str(source), str(found))
    facts = json.loads(found.read_text())
    assert facts["rows"] == facts["total"] > NUM_SAMPLES, facts
    assert facts["growth_mib"] < MAX_GROWTH_MIB, facts
    most_mib = MAX_FIXED_MIB + NUM_SAMPLES * MAX_BYTES_PER_SAMPLE / 2**20
    assert facts["planning_mib"] < most_mib, facts
