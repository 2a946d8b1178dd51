"""Which labels does this project need, which exist, and what will the rest cost?"""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from pipeline.project import Project
from pipeline.steps.prepare import PreparedTeacher
from storage.columns import scalar_columns
from storage.errors import InputError
from storage.keys import LabelSetSpec, key_of
from storage.selection import SampleRequest, Selection, load_selection
from storage.view import LabelView
from teacher_server.config import DataSource, label_set_spec
from teacher_server.prompts import Prompts, Tokenizer, read_prompts, select_samples

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


@dataclass(frozen=True, slots=True)
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

    def requests(self) -> list[SampleRequest]:
        """All samples of all splits, each once, in order."""
        unique = {r.key: r for split in SPLITS for r in self.selections[split].requests}
        return list(unique.values())

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest prompt with its response."""
        sampling = self.spec.generation.sampling
        return max(
            len(r.prompt_ids_P) + (sampling.max_tokens if sampling is not None else _length(r) + 1)
            for r in self.requests()
        )


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
    if known is None or not _stored(project, known):
        known = _resolve(project, teacher, sources)
        project.write_json(name, known)
    asked = {
        "label_set": spec.key,
        "teacher_directory": teacher.model.directory,
        "context": teacher.context,
        **known,
    }
    if project.read_json(PLAN_FILE) != asked:
        project.write_json(PLAN_FILE, asked)
    objects = project.store.objects
    selections = {split: load_selection(objects, known["selections"][split]) for split in SPLITS}
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
) -> dict[str, Any]:
    """Read, check and tokenize all prompts; nothing is stored unless all splits are usable."""
    config = project.config
    with project.console.status("reading prompts"):
        prompts = {
            split: read_prompts(files, mode=config.label.mode) for split, files in sources.items()
        }
    if config.data.on_bad_row == "stop":
        _all(prompts).require_all_good()
    with project.console.status("tokenizing prompts"):
        from transformers import AutoTokenizer

        tokenizer = cast(
            Tokenizer,
            AutoTokenizer.from_pretrained(
                teacher.model.directory,
                local_files_only=True,
                trust_remote_code=config.teacher.trust_remote_code,
            ),
        )
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
    if config.data.on_bad_row == "stop":
        _all(prompts).require_all_good()
    if not selections["train"].requests:
        raise InputError(
            f"the files of data.train hold no usable prompt ({len(prompts['train'].bad)} unusable "
            "rows); there is nothing to label or to learn from"
        )
    objects = project.store.objects
    return {
        "selections": {split: selection.save(objects) for split, selection in selections.items()},
        "skipped_rows": [str(row) for row in _all(prompts).bad],
    }


def _all(prompts: dict[str, Prompts]) -> Prompts:
    return Prompts(
        rows=[row for split in prompts.values() for row in split.rows],
        bad=[row for split in prompts.values() for row in split.bad],
    )


def forecast(project: Project, plan: Plan) -> dict[str, Any]:
    """What is stored, and the expected tokens and bytes of the rest, before anything is spent.

    ``prompt_tokens`` and ``cut_by_context`` are of all prompts, cached or not, each counted once
    however many responses are drawn; what begins with ``expected`` is of the samples to label.
    """
    view = project.store.view(plan.spec)
    requests = plan.requests()
    states = _states(view, requests)
    to_label = [r for r in requests if states[r.key] != "hits"]
    expected = expected_response_tokens(plan, to_label, view)
    prompt_tokens = sum(len(r.prompt_ids_P) for r in to_label)
    labelled = expected - sum(map(_unlabelled, to_label))
    shared = set(plan.selections["train"].sample_keys) & set(plan.selections["heldout"].sample_keys)
    return {
        "label_set": plan.spec.key,
        "store": project.store_uri,
        "splits": {
            split: {
                "prompts": sum(len(r.sources) for r in selection.requests if r.sample_index == 0),
                "samples": len(selection.requests),
                **_counts(states, selection.requests),
            }
            for split, selection in plan.selections.items()
        },
        **_counts(states, requests),
        "in_both_splits": len(shared),
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


def _states(view: LabelView, requests: Sequence[SampleRequest]) -> dict[str, str]:
    """By sample key: what is stored of it, one of STATES."""
    found = view.plan([request.key for request in requests])
    columns = (getattr(found, state).tolist() for state in STATES)
    return {
        request.key: STATES[flags.index(True)]
        for request, *flags in zip(requests, *columns, strict=True)
    }


def _counts(states: dict[str, str], requests: Sequence[SampleRequest]) -> dict[str, int]:
    """How many of these samples are in each state."""
    counter = Counter(states[request.key] for request in requests)
    return {state: counter[state] for state in STATES}


def expected_response_tokens(plan: Plan, requests: Sequence[SampleRequest], view: LabelView) -> int:
    """Response tokens that labelling these samples will make.

    Exact in score mode; otherwise the mean length of the responses that this teacher gave so far
    with this sampling, whatever was stored of them, or the limit if it gave none: ``max_tokens``,
    or what the context leaves.
    """
    sampling = plan.spec.generation.sampling
    if sampling is None:
        return sum(_length(request) for request in requests)
    totals = [label_set.totals() for label_set in (*view.sets, *view.upgradable)]
    num_samples = sum(found.num_samples for found in totals)
    if num_samples == 0:
        return sum(min(sampling.max_tokens, _room(plan, request)) for request in requests)
    return round(len(requests) * sum(found.num_tokens for found in totals) / num_samples)


def _prompt_lengths(requests: Sequence[SampleRequest]) -> dict[str, int]:
    """Percentiles of the tokens of a prompt, each a length that occurs."""
    lengths = [len(request.prompt_ids_P) for request in requests if request.sample_index == 0]
    found = np.percentile(lengths, [*PERCENTILES, 100], method="inverted_cdf")
    names = (*(f"p{percentile}" for percentile in PERCENTILES), "max")
    return {name: int(length) for name, length in zip(names, found, strict=True)}


def _cut_by_context(plan: Plan, requests: Sequence[SampleRequest]) -> int:
    """Prompts whose responses the context may end before ``max_tokens`` does."""
    sampling = plan.spec.generation.sampling
    if sampling is None:
        return 0
    return sum(
        _room(plan, request) < sampling.max_tokens
        for request in requests
        if request.sample_index == 0
    )


def _room(plan: Plan, request: SampleRequest) -> int:
    """Tokens that the context leaves for the response."""
    return plan.context - len(request.prompt_ids_P)


def _unlabelled(request: SampleRequest) -> int:
    """Response tokens that the label mask leaves out."""
    return 0 if request.label_mask_R is None else int((~request.label_mask_R).sum())


def _length(request: SampleRequest) -> int:
    return 0 if request.response_ids_R is None else len(request.response_ids_R)
