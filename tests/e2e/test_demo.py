"""The shrunken demo from start to finish; the tests are stations of one story, in order."""

import html.parser
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from storage.store import LabelStore

REPOSITORY = Path(__file__).parent.parent.parent

TOTAL = 24
"""20 training and 4 held-out prompts."""

BF16_NATS = 0.5
"""The noise that bfloat16 itself has against float32 on this teacher, at most."""


def test_a_run_killed_while_labelling_is_completed_without_touching_what_was_committed(
    demo,
) -> None:
    process = demo.start("run")
    deadline = time.monotonic() + 600
    while not demo.committed_files():
        assert process.poll() is None, "the run ended before anything was committed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = demo.committed_files()

    output = demo.run("run")

    after = demo.committed_files()
    assert {name: after[name] for name in before} == before
    assert len(demo.stored_keys()) == TOTAL
    assert set(demo.stored_keys().values()) == {1}
    assert "student hybrid: trained (teacher forward tokens: 0)" in output


def test_labels_are_the_distributions_that_predicted_each_token(demo) -> None:
    """Recomputed with transformers in float32, from the tokens alone."""
    store = LabelStore(str(demo.directory / "labels"))
    (key,) = store.keys()
    label_set = store.open(key)
    (teacher,) = demo.run_folder.glob("models/gguf-*")
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    for sample in label_set.read(sorted(demo.stored_keys())[:4]):
        tokens = np.concatenate([sample.prompt_ids_P, sample.response_ids_R])
        with torch.inference_mode():
            logits = model(torch.tensor(tokens[None], dtype=torch.long)).logits[0]
        start = len(sample.prompt_ids_P) - 1
        rows_RV = logits[start : start + len(sample.response_ids_R)].log_softmax(dim=-1).numpy()
        expected = np.take_along_axis(rows_RV, sample.topk_ids_NK.astype(np.int64), axis=1)
        assert np.abs(expected - sample.topk_logprobs_NK)[:, :8].max() < BF16_NATS
        entropy = -(np.exp(rows_RV) * rows_RV).sum(axis=1)
        assert np.abs(entropy - sample.entropy_N).max() < BF16_NATS
        # shifted by one position, the same comparison fails
        shifted = np.take_along_axis(rows_RV[:-1], sample.topk_ids_NK[1:].astype(np.int64), axis=1)
        assert np.abs(shifted - sample.topk_logprobs_NK[1:])[:, :8].max() > 2 * BF16_NATS


def test_a_second_run_does_nothing_and_says_so(demo) -> None:
    events = demo.events()
    output = demo.run("run")
    assert "the teacher was called 0 times" in output
    assert "student hybrid: already published, skipped" in output
    new = demo.events()[len(events) :]
    assert [event["event"] for event in new] == ["run started", "run ended"]  # and no step


def test_another_student_reuses_the_labels(demo) -> None:
    output = demo.run("run", "--set", "students.mine.loss.weight.soft_weight=0.8")
    assert "the teacher was called 0 times" in output
    assert "student hybrid: already published, skipped" in output
    assert "student mine: trained (teacher forward tokens: 0)" in output
    assert set(demo.stored_keys().values()) == {1}


def test_trained_students_are_closer_to_the_teacher_than_the_untrained_one(demo) -> None:
    report = json.loads((demo.run_folder / "report.json").read_text())
    kl = {entry["name"]: entry["metrics"]["kl"] for entry in report["evaluations"]}
    assert set(kl) == {"untrained", "hybrid", "mine"}
    assert kl["hybrid"] < 0.8 * kl["untrained"]
    assert kl["mine"] < 0.8 * kl["untrained"]


def test_the_report_is_one_self_contained_page(demo) -> None:
    page = (demo.run_folder / "report.html").read_text()
    found: list[str] = []

    class Links(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            found.extend(v or "" for k, v in attributes if k in ("src", "href"))

    Links().feed(page)
    # the viewer that `distill view` serves on this machine is all that it leads to
    assert all(link.startswith(("#", "http://127.0.0.1:")) for link in found)
    assert "hybrid" in page


def test_an_exported_student_answers_in_vllm(demo) -> None:
    (student,) = demo.run_folder.glob("students/hybrid-*/model")
    script = (
        "import os, sys\n"
        "from teacher_server.backends.vllm_engine import vllm_environment\n"
        "from teacher_server.config import VllmBackendConfig\n"
        "os.environ.update(vllm_environment(VllmBackendConfig()))\n"
        "from vllm import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=256)\n"
        "chat = [{'role': 'user', 'content': 'What is bread?'}]\n"
        "(answer,) = llm.chat(chat, SamplingParams(max_tokens=4, temperature=0))\n"
        "assert len(answer.outputs[0].token_ids) >= 1\n"
        "print('answered')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(student)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=300,
        check=False,
    )
    assert "answered" in done.stdout, done.stderr[-3000:]
