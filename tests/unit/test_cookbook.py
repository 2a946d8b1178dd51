"""Every question of ``docs/cookbook.md`` has the answer that numpy finds from the same labels."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from pipeline.run_tables import run_tables
from storage.dense import label_sample_densely
from storage.fingerprint import DigestMemo, tokenizer_digest
from storage.keys import LabelSetSpec, sample_key
from storage.samples import LabelledSample
from storage.selection import SampleRequest, Selection, Source
from storage.sql import Database, open_database
from storage.store import LabelStore
from storage.testing import make_spec

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "cookbook.md").read_text()
QUESTIONS = {
    int(number): sql
    for number, sql in re.findall(
        r"^## (\d+)\. [^\n]+\n.*?^```sql\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL
    )
}
VOCAB_SIZE = 40
SPEC = make_spec(k=8, vocab_size=VOCAB_SIZE)
OTHER = make_spec(k=8, vocab_size=VOCAB_SIZE, seed=1)
PARAMETERS = {12: {"nats": 2.5}}
LABEL_S = 120.0
FILES = ("data/chat.jsonl", "data/math.jsonl", "data/zen.parquet")
Rows = list[tuple[Any, ...]]
Labels = Sequence[LabelledSample]


def made(number: int, spec: LabelSetSpec, *, index: int = 0, seed: int = 0) -> LabelledSample:
    """A sample of 3 to 14 tokens; positions differ in how certain the teacher is."""
    random = np.random.default_rng([number, 7])
    prompt_P = random.integers(0, VOCAB_SIZE, size=3 + number % 4).astype(np.int32)
    random = np.random.default_rng([number, index, seed])
    num_tokens = 3 + (5 * number + index) % 12
    logits_RV = random.normal(size=(num_tokens, VOCAB_SIZE))
    logits_RV *= random.uniform(0.5, 6.0, size=(num_tokens, 1))
    # half of what both teachers think is the same
    logits_RV += 3 * np.random.default_rng(number).normal(size=(14, VOCAB_SIZE))[:num_tokens]
    logprobs_RV = logits_RV - np.log(np.exp(logits_RV).sum(axis=1, keepdims=True))
    response_R = np.array([random.choice(VOCAB_SIZE, p=np.exp(row)) for row in logprobs_RV])
    request = SampleRequest(sample_key(prompt_P, index), index, prompt_P, None, ())
    sample = label_sample_densely(request, response_R.astype(np.int32), logprobs_RV, spec)
    return replace(sample, finish_reason="stop" if number % 3 else "length")


SAMPLES = [made(number, SPEC) for number in range(30)]
SAMPLES += [made(number, SPEC, index=1) for number in range(4)]
OTHERS = [made(number, OTHER, seed=1) for number in range(5, 35)]
DOMAIN = {sample.key: n % 3 for n, sample in enumerate(SAMPLES)}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """The made store and run, with the sets called a and b."""
    root = tmp_path_factory.mktemp("cookbook")
    write_tokenizer(root / "teacher")
    write_run(root / "runs" / "demo")
    facts = {
        "teacher": str(root / "teacher"),
        "tokenizer": tokenizer_digest(root / "teacher", DigestMemo(None)),
    }
    store = LabelStore(str(root / "labels"), create=True)
    store.create(SPEC, facts).append(SAMPLES[:20], {})
    store.create(SPEC, facts).append(SAMPLES[20:], {})
    requests = [
        SampleRequest(s.key, s.sample_index, s.prompt_ids_P, None, (source(n),))
        for n, s in enumerate(SAMPLES)
    ]
    Selection(tuple(requests)).save(store.objects)
    with open_database(store, tables=run_tables(root / "runs")) as opened:
        yield opened


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """Two teachers, called a and b."""
    store = LabelStore(str(tmp_path_factory.mktemp("two")), create=True)
    store.create(SPEC, {}).append(SAMPLES, {})
    store.create(OTHER, {}).append(OTHERS, {})
    with open_database(store, {"a": SPEC.key, "b": OTHER.key}) as opened:
        yield opened


def source(number: int) -> Source:
    return Source(FILES[number % 3], number + 1, f"id{number}")


def write_tokenizer(directory: Path) -> None:
    directory.mkdir()
    vocabulary = {word(number): number for number in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=word(0)))
    tokenizer.save(str(directory / "tokenizer.json"))


def word(token: int) -> str:
    return f"w{token}"


KLS = {"untrained": 4.0, "soft": 1.5, "hard": 2.5}
TRAIN_S = {"soft": 90.0, "hard": 30.0}


def write_run(folder: Path) -> None:
    def write(path: str, *documents: object) -> None:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(document) + "\n" for document in documents))

    write("config.json", {"name": "demo"})
    write(
        "events.jsonl",
        {"event": "started", "step": "label"},
        {"event": "finished", "step": "label", "seconds": LABEL_S, "response_tokens": 5},
    )
    for name, kl in KLS.items():
        metrics = {"kl": kl, "cross_entropy": kl + 1, "agreement": 0.1}
        where = "untrained/0" if name == "untrained" else f"students/{name}-00"
        write(f"{where}/evaluation-x.json", {"metrics": metrics, "num_tokens": 9})
    for name, seconds in TRAIN_S.items():
        result = {"name": name, "key": "00", "train": {"loss": {"type": "hybrid"}}, "steps": 2}
        result |= {"trained_tokens": 7, "seconds": seconds, "final": {"loss": 1.0}}
        write(f"students/{name}-00/student.json", result)


# -- the same from the samples themselves ----------------------------------------------------------
@dataclass(frozen=True)
class Token:
    """One labelled token."""

    sample: LabelledSample
    n: int

    @property
    def key(self) -> str:
        return self.sample.key

    @property
    def token(self) -> int:
        return int(self.sample.token_ids_N[self.n])

    @property
    def logprob(self) -> float:
        return float(self.sample.token_logprob_N[self.n])

    @property
    def rank(self) -> int:
        return int(self.sample.token_rank_N[self.n])

    @property
    def tail(self) -> float:
        return float(np.exp(np.float64(self.sample.log_tail_mass_N[self.n])))

    @property
    def entropy(self) -> float:
        assert self.sample.entropy_N is not None
        return float(self.sample.entropy_N[self.n])

    @property
    def domain(self) -> str:
        return ("chat", "math", "zen")[DOMAIN[self.key]]

    @property
    def masses_K(self) -> np.ndarray:
        """Of the stored ids, rounded to 1/256 nat."""
        return np.exp(np.rint(self.sample.topk_logprobs_NK[self.n].astype(np.float64) * 256) / 256)


TOKENS = [Token(sample, n) for sample in SAMPLES for n in range(len(sample.positions_N))]


def grouped(items: Sequence[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    found = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return dict(sorted(found.items()))


def mean(values: Sequence[float]) -> float:
    return float(np.mean(np.array(values, np.float64)))


def hesitation() -> Rows:
    ordered = sorted(TOKENS, key=lambda t: (-t.entropy, t.key, t.n))[:20]
    return [(t.key, t.n, word(t.token), t.entropy, np.exp(t.logprob)) for t in ordered]


def carriers() -> Rows:
    groups = grouped(TOKENS, lambda t: t.token)
    nats = {token: -sum(t.logprob for t in found) for token, found in groups.items()}
    total = sum(nats.values())
    order = sorted(nats, key=lambda token: (-nats[token], token))[:20]
    return [(t, word(t), len(groups[t]), nats[t], nats[t] / total) for t in order]


def coverage() -> Rows:
    rows = []
    for domain, found in grouped(TOKENS, lambda t: t.domain).items():
        kept = [1 - t.tail for t in found]
        rows.append((domain, len(found), mean(kept), np.quantile(kept, 0.01)))
    return rows


def along_the_response() -> Rows:
    groups = grouped(TOKENS, lambda t: t.n // 4 * 4)
    return [
        (start, len(f), mean([t.entropy for t in f]), mean([-t.logprob for t in f]))
        for start, f in groups.items()
    ]


def repeated_prompts() -> Rows:
    groups = grouped(SAMPLES, lambda s: s.prompt_key)
    rows = [
        (key, len(found), len({tuple(s.response_ids_R.tolist()) for s in found}))
        for key, found in groups.items()
    ]
    return sorted((row for row in rows if row[1] > 1), key=lambda row: (-row[1], row[0]))


def calibration() -> Rows:
    ids = [
        (mass, int(token == t.token))
        for t in TOKENS
        for mass, token in zip(t.masses_K.tolist(), t.sample.topk_ids_NK[t.n].tolist(), strict=True)
    ]
    groups = grouped(ids, lambda found: min(int(found[0] * 10), 9))
    return [
        (bucket, len(f), mean([p for p, _ in f]), mean([hit for _, hit in f]))
        for bucket, f in groups.items()
    ]


def enough_ids() -> Rows:
    tails_NK = 1 - np.cumsum([t.masses_K for t in TOKENS], axis=1)
    return [(k + 1, np.quantile(tails_NK[:, k], [0.5, 0.9, 0.99]).tolist()) for k in range(8)]


def cost() -> Rows:
    groups = grouped(list(enumerate(SAMPLES)), lambda pair: pair[0] % 3)
    spent = {
        domain: sum(len(s.prompt_ids_P) + len(s.response_ids_R) for _, s in found)
        for domain, found in groups.items()
    }
    total = sum(spent.values())
    names = ("chat", "math", "zen")
    return [(names[d], tokens, LABEL_S * tokens / total) for d, tokens in spent.items()]


def outside() -> Rows:
    return [
        (
            domain,
            mean([t.token not in t.sample.topk_ids_NK[t.n] for t in f]),
            max(t.rank for t in f),
        )
        for domain, f in grouped(TOKENS, lambda t: t.domain).items()
    ]


def cut() -> Rows:
    rows = []
    for domain, found in grouped(list(enumerate(SAMPLES)), lambda pair: pair[0] % 3).items():
        lengths = [len(s.response_ids_R) for _, s in found]
        ends = [s.finish_reason == "length" for _, s in found]
        name = ("chat", "math", "zen")[domain]
        rows.append((name, len(found), mean(ends), mean(lengths), max(lengths)))
    return rows


def spread() -> Rows:
    parts = np.array_split(np.sort([t.entropy for t in TOKENS]), 10)  # the first are the longest
    total = sum(part.sum() for part in parts)
    return [(n + 1, part.max(), part.sum() / total) for n, part in enumerate(parts)]


def unlucky() -> Rows:
    found = [t for t in TOKENS if t.entropy < 2.5 and t.rank > 1]
    ordered = sorted(found, key=lambda t: (t.logprob, t.key, t.n))[:20]
    return [(t.key, t.n, word(t.token), t.rank, t.entropy, t.logprob) for t in ordered]


def agreement() -> Rows:
    others = {sample.key: sample for sample in OTHERS}
    agree = []
    for one in SAMPLES:
        if one.key not in others:
            continue
        other = others[one.key]
        pairs = zip(one.response_ids_R, other.response_ids_R, strict=False)
        for n, (mine, theirs) in enumerate(pairs):
            agree.append(one.topk_ids_NK[n, 0] == other.topk_ids_NK[n, 0])
            if mine != theirs:
                break
    return [(len(agree), mean(agree))]


def gain() -> Rows:
    rows = [
        ("demo", name, 4.0 - KLS[name], (4.0 - KLS[name]) / (seconds / 60))
        for name, seconds in TRAIN_S.items()
    ]
    return sorted(rows, key=lambda row: -row[2])


def surprise() -> Rows:
    perplexity = {s.key: np.exp(-s.token_logprob_N.astype(np.float64).mean()) for s in SAMPLES}
    order = sorted(enumerate(SAMPLES), key=lambda pair: (-perplexity[pair[1].key], pair[1].key))
    return [
        (
            s.key,
            perplexity[s.key],
            len(s.response_ids_R),
            source(n).file,
            source(n).line,
            " ".join(word(token) for token in s.prompt_ids_P)[:60],
        )
        for n, s in order[:10]
    ]


ANSWERS: dict[int, Callable[[], Rows]] = {
    1: hesitation,
    2: carriers,
    3: coverage,
    4: along_the_response,
    5: repeated_prompts,
    6: calibration,
    7: enough_ids,
    8: cost,
    9: outside,
    10: cut,
    11: spread,
    12: unlucky,
    13: agreement,
    14: gain,
    15: surprise,
}


def test_the_page_has_these_questions() -> None:
    assert sorted(QUESTIONS) == sorted(ANSWERS)
    assert PAGE.count("```sql\n") == len(QUESTIONS)


@pytest.mark.parametrize("number", sorted(QUESTIONS))
def test_a_question_has_the_answer_that_numpy_finds(
    number: int, database: Database, two_sets: Database
) -> None:
    asked = two_sets if number == 13 else database
    table = asked.query(QUESTIONS[number], PARAMETERS.get(number)).table()
    found = [tuple(row.values()) for row in table.to_pylist()]
    expected = ANSWERS[number]()
    assert len(found) == len(expected) > 0
    for row, wanted in zip(found, expected, strict=True):
        assert len(row) == len(wanted)
        for value, right in zip(row, wanted, strict=True):
            if isinstance(right, str):
                assert value == right
            else:
                np.testing.assert_allclose(np.asarray(value, float), right, rtol=1e-5, atol=1e-9)
    assert database.notes == []


def test_the_page_lists_the_columns_of_every_view(database: Database) -> None:
    for view, columns in re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", PAGE, re.MULTILINE):
        names = database.query(f"select * from {view} limit 0").schema.names
        listed = re.findall(r"`(\w+)`", columns)
        short = {"labels": 0, "samples": 6, "topk": 7}.get(view, 0)
        listed = [name for name in listed if name != "labels"]
        assert names[short:] == listed, view
