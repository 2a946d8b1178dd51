"""Which labels does this project need, which exist, and what will the rest cost?"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pipeline.project import Project
from pipeline.steps.prepare import PreparedTeacher
from storage.columns import scalar_columns
from storage.errors import InputError
from storage.keys import LabelSetSpec, key_of
from storage.request_table import RequestTable, unique_requests
from storage.selection import Selection, load_selection
from storage.view import LabelView
from teacher_server.config import DataSource, label_set_spec
from teacher_server.prompts import Prompts, Tokenizer, select_samples, stream_prompts

SPLITS = ("train", "heldout")
STATES = ("hits", "upgrades", "misses")
"""What a plan says of every sample; see :class:`storage.view.Plan`."""
SCALAR_BYTES = 10
"""Measured bytes per token of the columns that every shard has."""
OPTIONAL_SCALAR_BYTES = 4
"""Bytes per token of one optional scalar column: float32 hardly compresses."""
TAIL_SAMPLE_BYTES = 6
"""Bytes per entry of the lists of tail samples, before compression 8."""
BYTES_PER_STORED_TOKEN = 2.5
"""Measured bytes per top-k entry of a shard, about the same for every k."""
PROMPTS_VERSION = 2
"""Part of every plan's key; raised when the same rows give other samples. 2: in score mode all
turns of the assistant are labelled, not the last one only."""
PLANS_DIRECTORY = "plans"
PLAN_FILE = "plan.json"
"""The newest plan, for a report of a run that ended before it could write one."""
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PERCENTILES = (50, 90)
KEYS_AT_ONCE = 2**20
"""Samples about which a store is asked at once."""


@dataclass(frozen=True)
class Plan:
    """What a project asks of the label cache."""

    spec: LabelSetSpec
    selections: dict[str, Selection]
    """By split."""
    selection_keys: dict[str, str]
    skipped_rows: tuple[str, ...]
    """Rows that were left out because ``data.on_bad_row`` is ``skip``."""
    context: int
    """Tokens that the teacher can attend to."""

    @cached_property
    def _requests(self) -> RequestTable:
        return unique_requests([self.selections[split].table for split in SPLITS])

    def requests(self) -> RequestTable:
        """All samples of all splits, each once, in order."""
        return self._requests

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest prompt with its response."""
        sampling, requests = self.spec.generation.sampling, self.requests()
        answers = requests.num_response_tokens + 1 if sampling is None else sampling.max_tokens
        return int((requests.num_prompt_tokens + answers).max())


def make_plan(project: Project, teacher: PreparedTeacher) -> Plan:
    """Resolve the prompt files to selections; cached under the content of all inputs.

    Raises:
        InputError: listing unusable rows by file and line, before anything is spent.
    """
    config = project.config
    spec = label_set_spec(
        config.teacher,
        config.label,
        fingerprint=teacher.model.fingerprint,
        vocab_size=teacher.vocab_size,
        tokenizer=teacher.tokenizer,
    )
    sources = {"train": config.data.train, "heldout": config.data.heldout}
    key = key_of(
        {
            "version": PROMPTS_VERSION,
            "files": {name: _content(project, files) for name, files in sources.items()},
            "on_bad_row": config.data.on_bad_row,
            "tokenizer": teacher.tokenizer,
            "tokenizer_settings": _tokenizer_settings(project, Path(teacher.model.directory)),
            "chat_template": teacher.chat_template,
            "mode": config.label.mode,
            "samples_per_prompt": config.label.sampling.samples_per_prompt,
            "context": teacher.context,
            "vocab_size": teacher.vocab_size,
        }
    )
    name = f"{PLANS_DIRECTORY}/{key[:12]}.json"
    known = project.read_json(name)
    objects = project.store.objects
    if known is not None and _stored(project, known):
        selections = {s: load_selection(objects, known["selections"][s]) for s in SPLITS}
    else:
        selections, skipped = _resolve(project, teacher, sources)
        keys = {split: selection.save(objects) for split, selection in selections.items()}
        known = {"selections": keys, "skipped_rows": skipped}
        project.write_json(name, known)
    asked = {
        "label_set": spec.key,
        "teacher_directory": teacher.model.directory,
        "context": teacher.context,
        **known,
    }
    if project.read_json(PLAN_FILE) != asked:
        project.write_json(PLAN_FILE, asked)
    return Plan(
        spec, selections, known["selections"], tuple(known["skipped_rows"]), teacher.context
    )


def forget_plans(project: Project) -> None:
    """Let the prompt files be read and checked again."""
    shutil.rmtree(project.directory / PLANS_DIRECTORY, ignore_errors=True)


def _stored(project: Project, known: dict[str, Any]) -> bool:
    """Whether the store, which may be new or emptied, has the selections of a cached plan."""
    stored = set(project.store.objects.paths("selections"))
    return all(f"selections/{key}.arrow" in stored for key in known["selections"].values())


def _tokenizer_settings(project: Project, directory: Path) -> dict[str, str]:
    """Digests of what decides on special tokens, and of templates beside the main one."""
    files = [directory / name for name in TOKENIZER_SETTINGS]
    files += sorted((directory / "additional_chat_templates").glob("*.jinja"))
    return {file.name: project.memo.digest(file) for file in files if file.is_file()}


def _content(project: Project, sources: tuple[DataSource, ...]) -> list[Any]:
    content: list[Any] = []
    for source in sources:
        path = Path(source.path)
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        content.append([source.path, [project.memo.digest(f) for f in files if f.is_file()]])
    return content


def _resolve(
    project: Project, teacher: PreparedTeacher, sources: dict[str, tuple[DataSource, ...]]
) -> tuple[dict[str, Selection], list[str]]:
    """Read, check and tokenize all prompts; also returns the rows that are left out.

    Raises:
        InputError: if rows are unusable, or none is left.
    """
    config = project.config

    def load_tokenizer() -> Tokenizer:
        from transformers import AutoTokenizer

        directory = teacher.model.directory
        trusted = config.teacher.trust_remote_code
        found = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trusted
        )
        return cast(Tokenizer, found)

    with project.console.status("reading prompts"):
        prompts = {
            split: stream_prompts(files, mode=config.label.mode) for split, files in sources.items()
        }
        tokenizer = cast(Tokenizer, _LazyTokenizer(load_tokenizer))
        selections = {
            split: select_samples(
                rows,
                tokenizer,
                config.label,
                context=teacher.context,
                vocab_size=teacher.vocab_size,
            )
            for split, rows in prompts.items()
        }
    bad = [row for rows in prompts.values() for row in rows.bad]
    if config.data.on_bad_row == "stop":
        Prompts(bad=bad).require_all_good()
    if not selections["train"].requests:
        raise InputError(
            f"the files of data.train hold no usable prompt ({len(prompts['train'].bad)} unusable "
            "rows); there is nothing to label or to learn from"
        )
    return selections, [str(row) for row in bad]


class _LazyTokenizer:
    """A tokenizer that is loaded when a row needs it: token ids need none.

    Args:
        load: Loads it; takes seconds.
    """

    def __init__(self, load: Callable[[], Tokenizer]) -> None:
        self._load = load

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return self._load()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def forecast(project: Project, plan: Plan) -> dict[str, Any]:
    """What is stored, and the expected tokens and bytes of the rest, before anything is spent.

    ``prompt_tokens`` and ``cut_by_context`` are of all prompts, cached or not, each counted once
    however many responses are drawn; what begins with ``expected`` is of the samples to label.
    """
    view = project.store.view(plan.spec)
    requests = plan.requests()
    states = states_of(view, requests)
    to_label = requests.take(np.flatnonzero(states != STATES.index("hits")))
    expected = expected_response_tokens(plan, to_label, view)
    prompt_tokens = int(to_label.num_prompt_tokens.sum())
    labelled = expected - int(to_label.num_unlabelled_tokens.sum())
    tables = {split: selection.table for split, selection in plan.selections.items()}
    return {
        "label_set": plan.spec.key,
        "store": project.store_uri,
        "splits": {
            split: {
                "prompts": int(table.num_sources[table.sample_index == 0].sum()),
                "samples": len(table),
                **counts(states_of(view, table)),
            }
            for split, table in tables.items()
        },
        **counts(states),
        "in_both_splits": sum(map(len, tables.values())) - len(requests),
        "expected_response_tokens": expected,
        "expected_prompt_tokens": prompt_tokens,
        "expected_forward_tokens": prompt_tokens + expected,
        "expected_labelled_tokens": labelled,
        "expected_bytes": round(labelled * _bytes_per_token(plan.spec)),
        "prompt_tokens": _prompt_lengths(requests),
        "cut_by_context": _cut_by_context(plan, requests),
        "skipped_rows": list(plan.skipped_rows),
    }


def _bytes_per_token(spec: LabelSetSpec) -> float:
    """Stored bytes of a labelled token, as measured."""
    samples = 0 if spec.tail_samples is None else spec.tail_samples.width
    return (
        SCALAR_BYTES
        + OPTIONAL_SCALAR_BYTES * len(scalar_columns(spec.columns))
        + TAIL_SAMPLE_BYTES * samples
        + BYTES_PER_STORED_TOKEN * spec.kind.width
    )


def states_of(view: LabelView, requests: RequestTable) -> npt.NDArray[np.int8]:
    """int8[N]: what is stored of every sample, as its place in STATES."""
    states = np.zeros(len(requests), dtype=np.int8)
    for start in range(0, len(requests), KEYS_AT_ONCE):
        numbers = range(start, min(start + KEYS_AT_ONCE, len(requests)))
        found = view.plan(requests.keys(numbers))
        for number, state in enumerate(STATES):
            states[numbers.start : numbers.stop][getattr(found, state)] = number
    return states


def counts(states: npt.NDArray[np.int8]) -> dict[str, int]:
    """How many samples are in each state."""
    found = np.bincount(states, minlength=len(STATES))
    return dict(zip(STATES, found.tolist(), strict=True))


def expected_response_tokens(plan: Plan, requests: RequestTable, view: LabelView) -> int:
    """Response tokens that labelling these samples will make.

    Exact in score mode; otherwise the mean length of the responses that this teacher gave so far
    with this sampling, whatever was stored of them, or the limit if it gave none: ``max_tokens``,
    or what the context leaves.
    """
    sampling = plan.spec.generation.sampling
    if sampling is None:
        return int(requests.num_response_tokens.sum())
    totals = [label_set.totals() for label_set in (*view.sets, *view.upgradable)]
    num_samples = sum(found.num_samples for found in totals)
    if num_samples == 0:
        return int(np.minimum(sampling.max_tokens, _room(plan, requests)).sum())
    return round(len(requests) * sum(found.num_tokens for found in totals) / num_samples)


def _prompt_lengths(requests: RequestTable) -> dict[str, int]:
    """Percentiles of the tokens of a prompt, each a length that occurs."""
    lengths = requests.num_prompt_tokens[requests.sample_index == 0]
    found = np.percentile(lengths, [*PERCENTILES, 100], method="inverted_cdf")
    names = (*(f"p{percentile}" for percentile in PERCENTILES), "max")
    return {name: int(length) for name, length in zip(names, found, strict=True)}


def _cut_by_context(plan: Plan, requests: RequestTable) -> int:
    """Prompts whose responses the context may end before ``max_tokens`` does."""
    sampling = plan.spec.generation.sampling
    if sampling is None:
        return 0
    return int((_room(plan, requests) < sampling.max_tokens)[requests.sample_index == 0].sum())


def _room(plan: Plan, requests: RequestTable) -> npt.NDArray[np.int64]:
    """int64[N]: tokens that the context leaves for the response."""
    return plan.context - requests.num_prompt_tokens
