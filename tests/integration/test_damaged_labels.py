"""A mixture of two label sets, of which a shard is damaged when a training has begun."""

import subprocess
import sys
from pathlib import Path

from storage.repair import repair
from storage.samples import LabelledSample
from storage.selection import SampleRequest, Selection
from storage.store import LabelStore
from storage.testing import make_sample, make_spec
from student_train.config import LabelSource, TrainJob
from tests.integration.trainings import (
    REPOSITORY,
    Run,
    environment,
    read_metrics,
    train,
    train_all,
    write_job,
)

VOCAB_SIZE = 260
SAMPLES_PER_SHARD = 4


def write_labels(
    directory: Path, seed: int, numbers: range
) -> tuple[LabelSource, list[LabelledSample]]:
    """A label set of several shards."""
    spec = make_spec(k=8, vocab_size=VOCAB_SIZE, seed=seed)
    store = LabelStore(str(directory), create=True)
    label_set = store.create(spec, {})
    samples = [make_sample(n, spec, num_tokens=3 + n % 8) for n in numbers]
    for start in range(0, len(samples), SAMPLES_PER_SHARD):
        label_set.append(samples[start : start + SAMPLES_PER_SHARD], {})
    requests = tuple(SampleRequest(s.key, 0, s.prompt_ids_P, None, ()) for s in samples)
    selection = Selection(requests).save(store.objects)
    source = LabelSource(store=store.uri, label_set=label_set.key, selection=selection)
    return source, samples


def test_a_damaged_shard_stops_a_training_that_goes_on_once_it_is_labelled_again(
    tmp_path: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    """Over a mixture of two label sets, with real DeepSpeed."""
    labels, samples = write_labels(tmp_path / "store", 0, range(24))
    extra, others = write_labels(tmp_path / "other", 1, range(100, 112))
    path = write_job(
        tmp_path / "out", labels, tiny_student, tiny_teacher, checkpoint={"every_steps": 1}
    )
    job = TrainJob.model_validate_json(path.read_text()).model_copy(update={"mixture": (extra,)})
    path.write_text(job.model_dump_json())
    assert train_all(tmp_path, [Run(path, 2)], world_size=1) == ["stopped after 2"]
    label_set = LabelStore(labels.store).open(labels.label_set)
    file = tmp_path / "store" / label_set.files("labels")[0]
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    file.write_bytes(bytes(damaged))
    ended = subprocess.run(
        [sys.executable, "-m", "student_train", str(path)],
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr[-3000:]
    assert file.name.split(".")[0] in ended.stderr
    assert "distill repair" in ended.stderr
    assert len(read_metrics(path)) == 2
    assert list((tmp_path / "out" / "checkpoints").iterdir())
    repair(label_set, list(label_set.verify()), {})
    label_set.append(samples, {})  # only what is missing is written
    metrics = train(path)
    assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1))
    per_epoch = sum(len(sample.positions_N) for sample in (*samples, *others))
    assert sum(line["supervised_tokens"] for line in metrics) == job.train.epochs * per_epoch
