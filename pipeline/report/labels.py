"""The labels of a project: what is stored, and one response token by token."""

from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.project import Project
from pipeline.steps.plan import Plan
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from storage.tokenizer import TokenDecoder
from storage.view import LabelView

TOP_TOKENS = 5
LOOKED_AT = 8
"""Samples of which the longest response is shown."""
PROMPT_TAIL = 64
"""Last tokens of a prompt in a list: first ones are often the same for all."""


def label_facts(project: Project, plan: Plan, view: LabelView) -> dict[str, Any]:
    """Which labels a project reads, and how much is stored of them."""
    return {
        "key": plan.spec.key,
        "store": project.store_uri,
        "k": plan.spec.kind.width,
        "mode": plan.spec.generation.mode,
        "samples": {name: len(s.requests) for name, s in plan.selections.items()},
        "selections": plan.selection_keys,
        **_stored(view, plan.requests()),
        "skipped_rows": list(plan.skipped_rows),
    }


def stored_requests(view: LabelView, requests: Sequence[SampleRequest]) -> list[SampleRequest]:
    """Those that have labels, in order."""
    return list(compress(requests, view.contains([request.key for request in requests]).tolist()))


def owners(view: LabelView, keys: Sequence[str]) -> dict[str, str]:
    """By sample key, the key of the label set from which it is read; others are left out."""
    found: dict[str, str] = {}
    left = list(keys)
    for label_set in view.sets:
        there = label_set.contains(left).tolist() if left else []
        found |= dict.fromkeys(compress(left, there), label_set.key)
        left = [key for key, known in zip(left, there, strict=True) if not known]
    return found


def longest_response(
    project: Project, plan: Plan, tokenizer: Path, requests: Sequence[SampleRequest]
) -> dict[str, Any] | None:
    """One response, token by token: entropy, and the likeliest tokens; None without any."""
    if not requests:
        return None
    keys = [request.key for request in requests[:LOOKED_AT]]
    sample = max(project.store.view(plan.spec).read(keys), key=lambda s: len(s.positions_N))
    decoder = TokenDecoder(tokenizer)
    return {
        "sample_key": sample.key,
        "prompt": decoder.text(sample.prompt_ids_P.tolist()),
        "tokens": [_token(sample, decoder, n) for n in range(len(sample.positions_N))],
    }


def _stored(view: LabelView, requests: Sequence[SampleRequest]) -> dict[str, Any]:
    """Sizes of the samples that a project reads, and the label sets in which they lie.

    The bytes of a set are shared out evenly over its tokens.
    """
    served_by: dict[str, int] = {}
    num_tokens, num_bytes = 0, 0.0
    owner = owners(view, [request.key for request in requests])
    for label_set in view.sets:
        mine = [key for key, found in owner.items() if found == label_set.key]
        if mine:
            totals = label_set.totals()
            tokens = int(label_set.locate(mine).entries.num_tokens.sum())
            served_by[label_set.key] = len(mine)
            num_tokens += tokens
            num_bytes += totals.num_bytes * tokens / totals.num_tokens
    prompts = sum(len(request.prompt_ids_P) for request in requests if request.key in owner)
    return {
        "served_by": served_by,
        "stored_samples": len(owner),
        "stored_tokens": num_tokens,
        "stored_bytes": round(num_bytes),
        # what a teacher reads and writes to label each of them once
        "forward_tokens": prompts + num_tokens,
    }


def _token(sample: LabelledSample, decoder: TokenDecoder, n: int) -> dict[str, Any]:
    top = zip(sample.topk_ids_NK[n], sample.topk_logprobs_NK[n], strict=True)
    entropy = None if sample.entropy_N is None else round(float(sample.entropy_N[n]), 4)
    return {
        "text": decoder.token(int(sample.token_ids_N[n])),
        "entropy": entropy,
        "probability": float(np.exp(sample.token_logprob_N[n])),
        "rank": int(sample.token_rank_N[n]),
        "tail_mass": float(np.exp(sample.log_tail_mass_N[n])),
        "top": [
            {"text": decoder.token(int(token)), "probability": float(np.exp(logprob))}
            for (token, logprob), _ in zip(top, range(TOP_TOKENS), strict=False)
        ],
    }
