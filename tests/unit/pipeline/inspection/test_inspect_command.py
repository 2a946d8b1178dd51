"""``distill inspect``: what it chooses, prints and writes, and what it refuses."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.inspection.choose import Choice, chosen_keys
from pipeline.inspection.source import Inspector, find_vocabulary
from pipeline.inspection.testing import TEXTS, keys_of, make_store, text_sample, write_tokenizer
from storage.label_set import LabelSet
from storage.store import LabelStore

AsJson = Callable[..., Any]
Capture = pytest.CaptureFixture[str]


def run(stored: LabelSet, *words: str) -> int:
    return main(["inspect", stored.key[:8], "--store", stored.objects.uri, *words])


def test_json_of_one_sample(stored: LabelSet, keys: dict[str, str], as_json: AsJson) -> None:
    (found,) = as_json(
        "inspect", stored.key, "--store", stored.objects.uri, "--sample", keys["emoji"]
    )
    assert found["sample_key"] == keys["emoji"]
    assert found["response"][-1] == {"id": 0, "text": "<|end|>", "kind": "special"}
    assert len(found["models"][0]["top_ids"][0]) == 8


def test_where_takes_conditions_on_samples(
    stored: LabelSet, keys: dict[str, str], as_json: AsJson
) -> None:
    lengths = {s.key: len(s.response_ids_R) for s in stored.read(list(keys.values()))}
    found = as_json(
        *("inspect", stored.key, "--store", stored.objects.uri),
        *("--where", "num_tokens > 20 -- and a comment"),
    )
    assert {s["sample_key"] for s in found} == {k for k, length in lengths.items() if length > 20}


@pytest.mark.parametrize("sort", ["key", "tokens", "entropy", "tail", "surprise", "rank", "bridge"])
@pytest.mark.parametrize("descending", [False, True])
def test_samples_are_sorted_by_the_mean_of_a_measure(
    inspector: Inspector, keys: dict[str, str], sort: str, descending: bool
) -> None:
    samples = list(inspector.read(list(keys.values())))
    values: dict[str, Any] = {
        sample.key: sample.key
        if sort == "key"
        else len(sample.response)
        if sort == "tokens"
        else sample.mean(sort)
        for sample in samples
    }
    expected = sorted(values, key=values.__getitem__, reverse=descending)
    choice = Choice(sort=sort, descending=descending)
    assert chosen_keys(inspector, choice) == expected
    assert chosen_keys(inspector, choice, limit=2) == expected[:2]


def test_kl_sorts_what_is_compared(tmp_path: Path) -> None:
    first, second = make_store(tmp_path), make_store(tmp_path, seed=1)
    vocabulary = find_vocabulary(first, None)
    inspector = Inspector(first, first.objects.uri, vocabulary, others=[second])
    found = chosen_keys(inspector, Choice(sort="kl", descending=True))
    means = [sample.mean("kl") for sample in inspector.read(found)]
    assert means == sorted(means, reverse=True)
    assert len(found) == len(TEXTS)


def test_limit_and_the_order_of_commits(stored: LabelSet, as_json: AsJson) -> None:
    words = ("inspect", stored.key, "--store", stored.objects.uri)
    assert [s["sample_key"] for s in as_json(*words, "--limit", "2")] == [
        s["sample_key"] for s in as_json(*words)
    ][:2]


def test_labels_that_are_added_appear(tmp_path: Path, as_json: AsJson) -> None:
    label_set = make_store(tmp_path, ["hello"])
    words = ("inspect", label_set.key, "--store", label_set.objects.uri)
    assert len(as_json(*words)) == 1
    tokenizer = write_tokenizer(tmp_path / "teacher")
    more = text_sample(tokenizer, "another", "hello", label_set.spec)
    LabelStore(label_set.objects.uri).open(label_set.key).append([more], {})
    assert len(as_json(*words)) == 2


def test_html_is_written_whole(stored: LabelSet, keys: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "new" / "page.html"
    assert run(stored, "--sample", keys["hostile"], "--html", str(file), "--by", "rank") == 0
    page = file.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert keys["hostile"] in page
    assert list(file.parent.iterdir()) == [file]


def test_plain_ids(stored: LabelSet, as_json: AsJson) -> None:
    (found, *_) = as_json(
        "inspect", stored.key, "--store", stored.objects.uri, "--tokenizer", "ids"
    )
    assert all(token["text"] == f"<{token['id']}>" for token in found["response"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--by", "loss"), "there is no measure 'loss'"),
        (("--by", "kl"), "labels has no kl"),
        (("--sample", "xyz"), "xyz"),
        (("--sample", "0" * 32), "lacks 1 of 1 samples"),
        (("--sample", "0" * 32, "--where", "true"), "cannot be used with --where"),
        (("--where", "nonsense = 1"), "nonsense"),
        (("--where", "true) UNION (SELECT 1"), "error:"),
        (("--where", "num_tokens > 1000000"), "no sample that meets the condition"),
        (("--where", "sample_key IN (SELECT content FROM read_text('/etc/passwd'))"), "read_text"),
        (("--sort", "loss", "desc"), "cannot be sorted by 'loss'"),
        (("--sort", "tokens", "down"), "asc or desc, got 'down'"),
        (("--sort", "kl", "desc"), "add --student DIR or --with KEY"),
        (("--position", "100000"), "position 100000"),
        (("--with", "ffffffff"), "no label set"),
        (("--tokenizer", "nowhere"), "has no tokenizer.json"),
        (("--html", "/dev/null/page.html"), "cannot write"),
    ],
)
def test_bad_input_is_one_clear_message(
    stored: LabelSet, capsys: Capture, words: tuple[str, ...], message: str
) -> None:
    assert run(stored, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert "Traceback" not in error


def test_a_damaged_shard_is_told(tmp_path: Path, capsys: Capture) -> None:
    label_set = make_store(tmp_path)
    (shard,) = tmp_path.rglob("*.labels.arrow")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert run(label_set) == 2
    assert "distill repair" in capsys.readouterr().err


def test_an_empty_set_is_told(tmp_path: Path, capsys: Capture) -> None:
    assert run(make_store(tmp_path, ["hello"]), "--limit", "1") == 0
    store = LabelStore(str(tmp_path / "labels"))
    spec = make_store(tmp_path, ["hello"]).spec.model_copy(update={"columns": ()})
    empty = store.create(spec, {"teacher": str(tmp_path / "teacher")})
    assert run(empty) == 2
    assert "has no sample yet" in capsys.readouterr().err


def test_inspecting_needs_no_torch(stored: LabelSet, keys: dict[str, str]) -> None:
    program = (
        "import sys, json\n"
        "for name in ('torch', 'transformers', 'vllm', 'ray', 'deepspeed'):\n"
        "    sys.modules[name] = None\n"
        "from pipeline.cli import main\n"
        "sys.exit(main(json.loads(sys.argv[1])))\n"
    )
    words = ["inspect", stored.key, "--store", stored.objects.uri, "--sample", keys["plain"]]
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(words)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "hello" in done.stdout


def test_no_two_texts_share_a_key(stored: LabelSet) -> None:
    assert len(set(keys_of(stored))) == len(TEXTS)
