"""Teachers that die, hang or are told to stop, and labels that are widened, under real Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from storage.quarantine import Quarantine
from storage.store import LabelStore
from tests.conftest import REPOSITORY

Distill = Callable[..., subprocess.CompletedProcess[str]]

POISON = "Z"
"""Only the poisoned prompts hold this letter; the tokenizer makes a token of every byte."""


def poison_token(project_file: Path) -> int:
    import yaml
    from transformers import AutoTokenizer

    model = yaml.safe_load(project_file.read_text())["teacher"]["model"]
    (token,) = AutoTokenizer.from_pretrained(model).encode(POISON)
    return token


def write_prompts(project_file: Path, prompts: list[str]) -> None:
    rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    (project_file.parent / "train.jsonl").write_text(rows)
    (project_file.parent / "heldout.jsonl").write_text("")


def only_set(project_file: Path):
    store = LabelStore(str(project_file.parent / "labels"))
    (key,) = store.keys()
    return store.open(key)


def fake(**options: object) -> tuple[str, ...]:
    return ("--set", f"teacher.backend={json.dumps({'type': 'fake', **options})}")


def test_a_prompt_that_kills_the_engine_is_found_and_the_rest_goes_on(
    project_file: Path, distill: Distill
) -> None:
    write_prompts(project_file, [*(f"question {n}" for n in range(9)), f"deadly {POISON}"])
    poisoned = fake(poison_token=poison_token(project_file))
    first = json.loads(distill("label", project_file, *poisoned, "--json").stdout)
    assert first["labelled"] == 9
    (guilty,) = first["quarantined"]
    label_set = only_set(project_file)
    (sample,) = Quarantine(label_set).samples()
    assert (sample.sample, sample.reason) == (guilty, "engine died")
    files = {path: path.read_bytes() for path in label_set.objects.root.rglob("*.arrow")}

    # it is left out from now on, and said so; nothing that is committed changes
    again = distill("label", project_file, *poisoned)
    assert "1 samples are in quarantine" in again.stdout
    assert {path: path.read_bytes() for path in files} == files
    strict = ("--set", "label.max_bad_samples=0")
    refused = distill("label", project_file, *poisoned, *strict, expect=2)
    assert guilty in refused.stderr
    assert "--retry-quarantined" in refused.stderr

    healed = distill("label", project_file, *fake(), "--retry-quarantined", "--json")
    assert json.loads(healed.stdout)["labelled"] == 1
    assert json.loads(healed.stdout)["quarantined"] == []


def test_an_engine_that_hangs_is_replaced(project_file: Path, distill: Distill) -> None:
    write_prompts(project_file, ["one", f"endless {POISON}", "two", "three"])
    hanging = fake(hang_token=poison_token(project_file))
    done = distill("label", project_file, *hanging, "--set", "label.deadline_s=3", "--json")
    assert json.loads(done.stdout)["labelled"] == 3
    (sample,) = Quarantine(only_set(project_file)).samples()
    assert sample.reason == "engine hung"


def test_sigterm_finishes_what_was_begun_and_the_next_run_goes_on(
    project_file: Path, distill: Distill
) -> None:
    num_samples = 3000
    write_prompts(project_file, [f"question {n}" for n in range(num_samples)])
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "label", str(project_file), *fake()],
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    commits = project_file.parent / "labels" / "label_sets"
    deadline = time.monotonic() + 120
    while not any(commits.glob("*/commits/*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output + errors
    assert "run the command again to go on" in errors
    assert "Traceback" not in errors
    label_set = only_set(project_file)
    stored = label_set.totals().num_samples
    assert 0 < stored < num_samples
    assert list(label_set.verify()) == []
    files = {path: path.read_bytes() for path in label_set.objects.root.rglob("shards/*.arrow")}

    done = json.loads(distill("label", project_file, *fake(), "--json").stdout)
    assert done["labelled"] == num_samples - stored
    assert {path: path.read_bytes() for path in files} == files


def test_more_labels_for_stored_responses_are_scored_not_drawn_again(
    project_file: Path, distill: Distill
) -> None:
    unchecked = ("--set", "label.qa.enabled=false", "--json")
    narrow = ("--set", "label.kind.k=4", "--set", "label.columns=[]")
    first = json.loads(distill("label", project_file, *narrow, *unchecked).stdout)
    forecast = json.loads(distill("plan", project_file, "--json").stdout)
    assert (forecast["upgrades"], forecast["misses"]) == (30, 0)
    second = json.loads(distill("label", project_file, *unchecked).stdout)
    assert second["labelled"] == 30
    store = LabelStore(str(project_file.parent / "labels"))
    old, new = (store.open(found["label_set"]) for found in (first, second))
    keys = [r.key for r in store.selection(store.selections()[0]).requests]
    for before, after in zip(old.read(keys), new.read(keys), strict=True):
        np.testing.assert_array_equal(before.response_ids_R, after.response_ids_R)
        assert (before.finish_reason, before.stop_reason) == (
            after.finish_reason,
            after.stop_reason,
        )
        np.testing.assert_array_equal(before.topk_ids_NK, after.topk_ids_NK[:, :4])
        np.testing.assert_allclose(before.token_logprob_N, after.token_logprob_N, rtol=0, atol=1e-4)
        assert after.entropy_N is not None
