"""Filters: from a selection to the selection of those samples that a condition keeps.

A condition looks at scalars of a sample, never at its top-k. It is resolved once, into a selection
that is stored beside the others, so whoever reads that knows nothing of the condition and sees the
same samples whatever is labelled later. Stored samples never change, so the same condition on the
same selection gives the same selection at any time.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from storage.config import Config
from storage.errors import ConfigError, NotLabelledError, ShardCorruptError
from storage.keys import LabelSetSpec
from storage.label_set import LabelSet
from storage.records import ShardRecord
from storage.selection import Selection
from storage.store import LabelStore

STATISTICS = {
    "mean_logprob": ("token_logprob", np.add),
    "min_logprob": ("token_logprob", np.minimum),
    "mean_tail_mass": ("log_tail_mass", np.add),
    "max_tail_mass": ("log_tail_mass", np.maximum),
    "mean_entropy": ("entropy", np.add),
    "max_entropy": ("entropy", np.maximum),
}
"""What is known of the label rows of a sample: a column of them, and how it is summed up."""


class FilterConfig(Config):
    """Which samples of a selection are kept: those that meet every condition given."""

    finish_reason: tuple[str, ...] | None = Field(default=None, min_length=1)
    """How the response ended: ``stop``, ``length`` (cut by ``max_tokens``) or ``given``."""
    min_response_tokens: int | None = Field(default=None, ge=1)
    """Shortest response."""
    max_response_tokens: int | None = Field(default=None, ge=1)
    """Longest response."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of prompt and response together, such as the student's context."""
    min_entropy: float | None = Field(default=None, ge=0)
    """Least mean entropy of a response, nats per token; needs the column ``entropy``."""
    max_entropy: float | None = Field(default=None, ge=0)
    """Largest mean entropy of a response, nats per token; needs the column ``entropy``."""
    max_tail_mass: float | None = Field(default=None, ge=0, le=1)
    """Largest mean probability outside the stored tokens."""
    sql: str | None = Field(default=None, min_length=1)
    """A condition in DuckDB's SQL on the columns ``sample_key``, ``prompt_tokens``,
    ``response_tokens``, ``label_rows``, ``finish_reason``, ``stop_reason``, ``mean_logprob``,
    ``min_logprob``, ``mean_tail_mass``, ``max_tail_mass``, and with the label column ``entropy``
    also ``mean_entropy`` and ``max_entropy``: ``min_logprob > -8 and response_tokens < 512``."""

    @property
    def is_empty(self) -> bool:
        """Whether it keeps everything."""
        return self == FilterConfig()

    def predicate(self) -> str:
        """The conditions as one SQL expression."""
        bounds = {
            "response_tokens >= {}": self.min_response_tokens,
            "response_tokens <= {}": self.max_response_tokens,
            "prompt_tokens + response_tokens <= {}": self.max_tokens,
            "mean_entropy >= {}": self.min_entropy,
            "mean_entropy <= {}": self.max_entropy,
            "mean_tail_mass <= {}": self.max_tail_mass,
        }
        conditions = [text.format(repr(b)) for text, b in bounds.items() if b is not None]
        if self.finish_reason is not None:
            quoted = ", ".join("'" + name.replace("'", "''") + "'" for name in self.finish_reason)
            conditions.append(f"finish_reason in ({quoted})")
        if self.sql is not None:
            conditions.append(f"({self.sql})")
        return " and ".join(conditions) or "true"


def filter_selection(
    store: LabelStore, spec: LabelSetSpec, selection_key: str, config: FilterConfig
) -> str:
    """Store the selection of those samples that are kept, in their order, and return its key.

    Without a condition it is the given one. Reads the scalar columns of the samples, verified,
    shard by shard; in memory are some numbers per sample.

    Raises:
        ConfigError: if DuckDB refuses the condition, or nothing is kept.
        NotLabelledError: if a sample is not stored.
        ShardCorruptError: if the bytes differ from what was committed.
    """
    if config.is_empty:
        return selection_key
    selection = store.selection(selection_key)
    kept = _kept(sample_facts(store, spec, selection), config)
    if len(kept) == 0:
        raise ConfigError(
            f"the filter {config.predicate()!r} keeps none of the {len(selection.requests)} "
            f"samples of selection {selection_key}; loosen it"
        )
    requests = tuple(selection.requests[place] for place in kept.tolist())
    return replace(selection, requests=requests).save(store.objects)


def sample_facts(store: LabelStore, spec: LabelSetSpec, selection: Selection) -> pa.Table:
    """One row per sample of a selection, in its order: the columns that ``FilterConfig.sql`` names.

    Raises:
        NotLabelledError: if a sample is not stored.
        ShardCorruptError: if the bytes differ from what was committed.
    """
    keys = selection.sample_keys
    names = [
        name
        for name, (column, _) in STATISTICS.items()
        if column != "entropy" or "entropy" in spec.columns
    ]
    statistics = {name: np.full(len(keys), np.nan) for name in names}
    label_rows, response_tokens = np.zeros((2, len(keys)), dtype=np.int64)
    finish_reasons: list[str] = [""] * len(keys)
    stop_reasons: list[str | None] = [None] * len(keys)
    rest = np.arange(len(keys))
    for found in store.view(spec).sets:
        there = found.contains([keys[place] for place in rest])
        mine, rest = rest[there], rest[~there]
        entries = found.locate([keys[place] for place in mine]).entries
        label_rows[mine], response_tokens[mine] = entries.num_rows, entries.num_tokens
        for number in np.unique(entries.shard).tolist():
            chosen = np.flatnonzero(entries.shard == number)
            places, rows = mine[chosen], entries.row[chosen]
            shard = found.index.shard(number)
            reasons, values = _shard_facts(found, shard, names)
            for name in names:
                statistics[name][places] = values[name][rows]
            for place, row in zip(places.tolist(), rows.tolist(), strict=True):
                finish_reasons[place], stop_reasons[place] = reasons[row]
    if len(rest):
        raise NotLabelledError(
            f"no label set satisfies {spec.key} for {len(rest)} of {len(keys)} samples "
            f"(the first is {keys[rest[0]]}); run `distill label` first"
        )
    prompts = [len(request.prompt_ids_P) for request in selection.requests]
    return pa.table(
        {
            "sample_key": keys,
            "prompt_tokens": np.array(prompts, dtype=np.int64),
            "response_tokens": response_tokens,
            "label_rows": label_rows,
            "finish_reason": finish_reasons,
            "stop_reason": pa.array(stop_reasons, pa.string()),
            **statistics,
        }
    )


def _shard_facts(
    label_set: LabelSet, shard: ShardRecord, names: Sequence[str]
) -> tuple[list[tuple[str, str | None]], dict[str, npt.NDArray[np.float64]]]:
    """How every sample of a shard ended, and its statistics, by its row in the samples file."""
    columns = sorted({STATISTICS[name][0] for name in names})
    values = {name: np.full(shard.num_samples, np.nan) for name in names}
    try:
        with label_set.open_table(shard, "samples") as file:
            table = file.table(["finish_reason", "stop_reason"])
        with label_set.open_table(shard, "labels") as file:
            for batch in file.batches(["sample", *columns]):
                _summarise(batch, values)
    except FileNotFoundError as error:
        raise ShardCorruptError(
            f"{error}: it was compacted meanwhile, or it is lost; try again, and run "
            "`distill verify` if that does not help"
        ) from error
    reasons = zip(table["finish_reason"].to_pylist(), table["stop_reason"].to_pylist(), strict=True)
    return list(reasons), values


def _summarise(batch: pa.RecordBatch, values: dict[str, npt.NDArray[np.float64]]) -> None:
    """Sum up one batch, which holds whole samples."""
    if len(batch) == 0:
        return
    sample_N = batch.column("sample").to_numpy()
    starts = np.flatnonzero(np.diff(sample_N, prepend=-1))
    counts = np.diff(starts, append=len(sample_N))
    for name, of_samples in values.items():
        column, operation = STATISTICS[name]
        rows_N = batch.column(column).to_numpy().astype(np.float64)
        if column == "log_tail_mass":
            rows_N = np.exp(rows_N)
        found = operation.reduceat(rows_N, starts)
        of_samples[sample_N[starts]] = found / counts if operation is np.add else found


def _kept(facts: pa.Table, config: FilterConfig) -> npt.NDArray[np.int64]:
    """Rows of the table that meet the conditions, ascending."""
    import duckdb

    numbered = facts.append_column("place", pa.array(np.arange(len(facts))))
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.register("samples", numbered)
        connection.execute("set enable_external_access = false")
        try:
            query = f"select place from samples where {config.predicate()} order by place"  # noqa: S608 - the user's own condition, on his own numbers
            found: dict[str, Any] = connection.execute(query).fetchnumpy()
        except duckdb.Error as error:
            raise ConfigError(
                f"the filter {config.predicate()!r} is no condition on samples: {error}; "
                f"the columns are {', '.join(facts.column_names)}"
            ) from error
    return np.asarray(found["place"], dtype=np.int64)
