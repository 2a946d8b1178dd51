"""CPU seconds of questions in SQL over a label set, from opening the store to the last row.

The labels are made: a few responses of real distributions, repeated for many prompts. Size and
layout are those of a large set, and no question profits from the repetition. ``--keep DIR`` keeps
the store for the next run.
"""

import harness

# isort: split
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.dataset

from storage.keys import LabelSetSpec, sample_key
from storage.label_set import LabelSet
from storage.samples import LabelledSample
from storage.sql import open_database
from storage.store import LabelStore
from storage.testing import make_sample, make_spec

TOKENS = 512
"""Response tokens of a sample."""

RESPONSES = 16
"""Different ones."""

COMMIT_SAMPLES = 512
QUICK_TOKENS, FULL_TOKENS = 2**20, 10_000_000
SPEC = make_spec(k=16, vocab_size=1000)

LIMIT_S = 10.0
"""What is promised for a question over 10 M tokens."""

SMALLEST_LIMIT_S = 1.0
"""Of fewer tokens the limit is in proportion, but not below this."""

FIRST_ROW_LIMIT_S = 1.0
FIRST_ROW = "first row of `select *`"
UNVERIFIED = "mean entropy, unverified"


@dataclass(frozen=True, slots=True)
class Question:
    """A question and what is promised."""

    name: str
    sql: str
    """``{sample_key}`` stands for the key of a stored sample."""
    limit_s: float | None = LIMIT_S


QUESTIONS = [
    Question("count", "select count(*) from labels"),
    Question("mean entropy", "select avg(entropy), avg(-token_logprob) from labels"),
    Question(
        "percentiles of the tail",
        "select quantile_cont(exp(log_tail_mass), [0.5, 0.9, 0.99]) from labels",
    ),
    Question(
        "entropy by position",
        "select position // 64, avg(entropy) from labels group by 1 order by 1",
    ),
    Question("a condition", "select count(*), avg(token_rank) from labels where entropy > 3"),
    Question("ends of responses", "select finish_reason, avg(entropy) from labels group by 1"),
    Question(
        "worst samples",
        "select sample_key, avg(entropy) e from labels group by 1 order by e desc limit 10",
    ),
    Question("samples", "select avg(num_tokens), max(num_prompt_tokens) from samples"),
    Question(
        "one sample, decoded",
        "select * from topk where sample_key = '{sample_key}'",
    ),
    Question("likeliest tokens", "select avg(exp(logprob)) from topk where rank = 1", None),
]


def made_set(store: LabelStore, num_tokens: int, spec: LabelSetSpec = SPEC) -> LabelSet:
    """A set of so many tokens; what is there already is kept."""
    label_set = store.create(spec, {}, expected_tokens=num_tokens)
    known = [make_sample(number, spec, num_tokens=TOKENS) for number in range(RESPONSES)]
    stored = label_set.totals().num_samples
    for start in range(stored, num_tokens // TOKENS, COMMIT_SAMPLES):
        stop = min(start + COMMIT_SAMPLES, num_tokens // TOKENS)
        label_set.append([_copy(known[n % RESPONSES], n) for n in range(start, stop)], {})
    return label_set


def _copy(sample: LabelledSample, number: int) -> LabelledSample:
    """The same labels for another prompt."""
    random = np.random.default_rng(number)
    prompt_P = random.integers(0, SPEC.vocab_size, size=32 + number % 64).astype(np.int32)
    return replace(sample, key=sample_key(prompt_P, 0), prompt_ids_P=prompt_P)


def ask(store: LabelStore, sql: str) -> None:
    """A question, from opening the store to the last row."""
    with open_database(store) as database:
        database.query(sql).table()


def first_row(store: LabelStore) -> None:
    """Everything of one row."""
    with open_database(store) as database:
        next(database.query("select * from labels").batches)


def unverified(store: LabelStore, label_set: LabelSet) -> None:
    """Mean entropy by DuckDB over the files, which nobody checks."""
    paths = [f"{store.uri}/{path}" for path in label_set.files("labels")]
    labels = pyarrow.dataset.dataset(paths, format="ipc")
    with duckdb.connect() as connection:
        connection.register("labels", labels)
        connection.execute(QUESTIONS[1].sql).fetchall()


def main() -> int:
    """Make the set, ask, report."""
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="store to keep for the next run")
    arguments = parser.parse_args()
    num_tokens = QUICK_TOKENS if arguments.quick else FULL_TOKENS
    with tempfile.TemporaryDirectory() as folder:
        store = LabelStore(str(arguments.keep or Path(folder) / "labels"), create=True)
        label_set = made_set(store, num_tokens)
        totals = label_set.totals()
        stored_key = _copy(make_sample(0, SPEC), 0).key
        scale = totals.num_rows / FULL_TOKENS
        asked: dict[str, Callable[[], object]] = {
            question.name: partial(ask, store, question.sql.format(sample_key=stored_key))
            for question in QUESTIONS
        }
        asked[FIRST_ROW] = partial(first_row, store)
        asked[UNVERIFIED] = partial(unverified, store, label_set)
        times = harness.interleaved(asked)
    limits = {question.name: question.limit_s for question in QUESTIONS}
    limits |= {FIRST_ROW: FIRST_ROW_LIMIT_S, UNVERIFIED: None}
    goals = []
    for name, limit in limits.items():
        found = times.of(name)
        if limit is not None and name != FIRST_ROW:
            limit = max(SMALLEST_LIMIT_S, limit * scale)
        goals.append(
            harness.Goal(
                name,
                "" if limit is None else f"<= {limit:.0f} s",
                found.text(" s"),
                None if limit is None else found.median <= limit,
                "DuckDB over the same files" if name == UNVERIFIED else "",
            )
        )
    questions = [f"{question.name}: `{question.sql}`" for question in QUESTIONS]
    return harness.report(
        goals,
        notes=[
            f"{totals.num_rows} tokens, {totals.num_samples} samples, {totals.num_shards} shards, "
            f"{totals.num_bytes / 1e6:.0f} MB on a local disk, k = 16. CPU seconds of all "
            "threads: where nothing else runs, an answer takes less on the clock.",
            *questions,
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
