"""The memory estimate against the peak of a small training."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
FACTOR = 1.5
"""Between estimate and peak, in either direction: allocators keep more than tensors take."""

TRAINING = """
import json, resource, sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from storage.testing import make_sample, make_spec
from student_train.config import TrainConfig
from student_train.streaming.reader import collate
from student_train.models.memory import estimate_memory, model_shape, training_shape
from student_train.models.student import make_student
from student_train.optimizer_step import peak_memory_gib
from student_train.schedules import StepState

directory = Path(sys.argv[1])
torch.set_num_threads(1)
LlamaForCausalLM(
    LlamaConfig(
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
).save_pretrained(directory)
spec = make_spec(k=8, vocab_size=4096)
samples = [make_sample(number, spec, num_tokens=250) for number in range(8)]
batch = collate(samples, "sampled", spec, packed=True)
train = TrainConfig.model_validate(
    {
        "model": str(directory),
        "dtype": "float32",
        "batch": {"micro_tokens": batch.input_ids_BT.numel()},
    }
)
shape = model_shape(directory)
estimate = estimate_memory(shape, training_shape(train, shape, 1)).total(on_host=True)
student = make_student(str(directory), train, 4096)
weights = sum(parameter.numel() * 4 for parameter in student.parameters())
before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() - weights
optimizer = torch.optim.AdamW(student.parameters(), fused=True)
for step in range(2):
    student(batch, StepState(step=step, total_steps=2)).total.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
peak = peak_memory_gib(torch.device("cpu")) * 2**30 - before
print(json.dumps({"estimate": estimate, "peak": peak}))
"""


def test_the_estimate_is_close_to_the_peak_of_a_training(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, str(tmp_path / "model")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert 1 / FACTOR < found["peak"] / found["estimate"] < FACTOR, found
