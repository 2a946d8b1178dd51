"""Which samples to look at: those that a condition in SQL names, in the order of a measure."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.inspection.measures import MEASURES
from pipeline.inspection.source import PLAIN_IDS, Inspector
from storage.errors import ConfigError
from storage.sql import open_database
from storage.store import LabelStore

SORTS = {
    "key": "SELECT sample_key, sample_key AS value FROM samples",
    "tokens": "SELECT sample_key, num_tokens AS value FROM samples",
    "entropy": "SELECT sample_key, avg(entropy) AS value FROM labels GROUP BY sample_key",
    "tail": "SELECT sample_key, avg(exp(log_tail_mass)) AS value FROM labels GROUP BY sample_key",
    "surprise": "SELECT sample_key, avg(-token_logprob) AS value FROM labels GROUP BY sample_key",
    "rank": "SELECT sample_key, avg(token_rank) AS value FROM labels GROUP BY sample_key",
    "bridge": "SELECT sample_key, avg(exp(logprob)) AS value FROM topk WHERE rank = 1 "
    "GROUP BY sample_key",
}
"""Queries for the number that samples are sorted by: a size, or the mean over their positions."""

COMPARED_SORT = "kl"
"""What no query knows: samples have to be compared one after another."""

COMPARED_SAMPLES = 256
"""Samples that are compared to sort by KL, the first that meet the condition."""

MAX_CHOSEN = 100_000
"""Samples whose order is kept."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What a user asked for."""

    where: str | None = None
    """A condition over the view ``samples``."""
    sort: str | None = None
    descending: bool = False

    def __post_init__(self) -> None:
        """Refuse a sort that does not exist.

        Raises:
            ConfigError: naming those that do.
        """
        known = (*SORTS, COMPARED_SORT)
        if self.sort is not None and self.sort not in known:
            raise ConfigError(f"samples cannot be sorted by {self.sort!r}; take {', '.join(known)}")

    @property
    def needs_query(self) -> bool:
        """Whether it takes a query to answer; otherwise samples come in the order of commits."""
        return bool(self.where) or self.sort is not None


def chosen_keys(
    inspector: Inspector, choice: Choice, *, limit: int = MAX_CHOSEN, tokenizer: str | None = None
) -> list[str]:
    """Keys of the samples that were asked for, in order; at most ``limit``.

    Args:
        inspector: Reads the label set, and compares it for the sort by KL.
        choice: What was asked for.
        limit: How many.
        tokenizer: As the user named it, for conditions on the text of samples.

    Raises:
        SqlError: if the condition is not SQL.
        ConfigError: for a sort by KL with nothing to compare with, or by a missing column.
    """
    compares = choice.sort == COMPARED_SORT
    if compares and not inspector.compares:
        raise ConfigError(
            "--sort kl compares with the labels: add --student DIR or --with KEY to compare"
        )
    query = _query(choice, COMPARED_SAMPLES if compares else limit)
    _require_column(inspector, choice)
    named = [] if tokenizer in (None, PLAIN_IDS) else [Path(str(tokenizer))]
    store = LabelStore(inspector.store)
    with open_database(store, {"inspected": inspector.label_set.key}, tokenizers=named) as database:
        keys: list[str] = database.query(query).table()["sample_key"].to_pylist()
    return _by_kl(inspector, keys, choice)[:limit] if compares else keys


def _query(choice: Choice, limit: int) -> str:
    # the condition is the user's own SQL; the database only answers questions about its views.
    # Line breaks keep a comment in it from swallowing what follows
    where = f"WHERE (\n{choice.where}\n)" if choice.where else ""
    chosen = f"SELECT sample_key FROM samples {where}"  # noqa: S608
    if choice.sort is None or choice.sort == COMPARED_SORT:
        return f"{chosen} LIMIT {limit}"
    order = "DESC" if choice.descending else "ASC"
    return (
        f"WITH chosen AS ({chosen}), numbers AS ({SORTS[choice.sort]}) "  # noqa: S608
        "SELECT sample_key FROM chosen JOIN numbers USING (sample_key) "
        f"ORDER BY value {order}, sample_key LIMIT {limit}"
    )


def _require_column(inspector: Inspector, choice: Choice) -> None:
    if choice.sort == "entropy" and "entropy" not in inspector.label_set.spec.columns:
        others = ", ".join(name for name in (*SORTS, COMPARED_SORT) if name != "entropy")
        raise ConfigError(
            f"label set {inspector.label_set.key} has no column entropy to sort by; take {others}"
        )


def _by_kl(inspector: Inspector, keys: Sequence[str], choice: Choice) -> list[str]:
    means = {sample.key: sample.mean(COMPARED_SORT) for sample in inspector.read(keys)}
    sign = -1.0 if choice.descending else 1.0
    return sorted(means, key=lambda key: (sign * means[key], key))


def default_measure(inspector: Inspector) -> str:
    """What to colour by if nobody said: entropy where it is known."""
    known = "entropy" in inspector.label_set.spec.columns
    return next(iter(MEASURES)) if known else "surprise"
