"""Make the golden store of format version 1 anew.

Run by hand, from the repository, only while version 1 is unreleased:

    python tests/golden/v1/make.py

Everything in it is a literal or derived from one, so a second run differs in names and dates only.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from storage import log
from storage.columns import select_rows
from storage.keys import (
    GenerationSpec,
    LabelSetSpec,
    MassSpec,
    SamplingSpec,
    TeacherFingerprint,
    TopKSpec,
    sample_key,
)
from storage.narrow import narrow
from storage.samples import LabelledSample
from storage.schema import FORMAT_VERSION
from storage.selection import SampleRequest, Selection, Source
from storage.sidecar import SidecarSpec
from storage.store import LabelStore
from storage.tail import log_tail_mass_of

HERE = Path(__file__).resolve().parent
STORE = HERE / "store"
VOCAB_SIZE = 70_000
"""Needs all three bytes of an id."""

GENERATED = GenerationSpec(
    teacher=TeacherFingerprint(weights="a" * 32, config="b" * 32),
    mode="generate",
    compute_dtype="bfloat16",
    head_dtype="float32",
    sampling=SamplingSpec(
        temperature=0.7, top_p=0.95, top_k=0, min_p=0.0, max_tokens=16, stop=("\n\n",), seed=7
    ),
    tokenizer="c" * 32,
)
GIVEN = GENERATED.model_copy(update={"mode": "score", "sampling": None, "tokenizer": None})

TOPK = LabelSetSpec(
    generation=GIVEN,
    kind=TopKSpec(k=4),
    columns=("entropy",),
    tail="exact",
    vocab_size=VOCAB_SIZE,
)
"""k = 4, with entropy, of given responses."""
MASS = LabelSetSpec(
    generation=GENERATED,
    kind=MassSpec(mass=0.7, cap=4),
    columns=(),
    tail="exact",
    vocab_size=VOCAB_SIZE,
)
"""Heads of 70 %, at most 4 tokens, of generated responses."""

PROBABILITIES = np.array([0.5, 0.25, 0.125, 0.0625])
"""Of the top 4 at even positions: 1/16 is left for the tail, and 70 % are two tokens."""
FLAT = np.array([0.25, 0.125, 0.125, 0.0625])
"""At odd positions: 7/16 are left, and no 4 tokens reach 70 %."""


def sample(number: int, num_tokens: int) -> LabelledSample:
    """A generated response: of the likeliest tokens where the number is even, else the third."""
    rows = np.arange(num_tokens, dtype=np.int32)
    prompt = np.array([1, 2, 3, number], dtype=np.int32)
    ids_NK = np.stack([17 + rows, 300 + rows, 65_536 + rows, 69_999 - rows], axis=1)
    logprobs_NK = np.log(np.where(rows[:, None] % 2 == 0, PROBABILITIES, FLAT))
    place = 0 if number % 2 == 0 else 2
    stopped = number % 2 == 0
    return LabelledSample(
        key=sample_key(prompt, 0),
        sample_index=0,
        prompt_ids_P=prompt,
        response_ids_R=ids_NK[:, place].astype(np.int32),
        positions_N=rows,
        token_logprob_N=logprobs_NK[:, place].astype(np.float32),
        token_rank_N=np.full(num_tokens, place + 1, np.int32),
        log_tail_mass_N=log_tail_mass_of(logprobs_NK).astype(np.float32),
        topk_ids_NK=ids_NK.astype(np.int32),
        topk_logprobs_NK=logprobs_NK.astype(np.float32),
        optional={"entropy": (rows / 8).astype(np.float32)},
        finish_reason="stop" if stopped else "length",
        stop_reason="\n\n" if stopped else None,
    )


def given(number: int, labelled: list[int]) -> LabelledSample:
    """A given response of 5 tokens, labelled at some positions."""
    whole = sample(number, 5)
    mask_R = np.isin(np.arange(5), labelled)
    rows = {
        name: getattr(whole, name)[labelled]
        for name in LabelledSample.__dataclass_fields__
        if name.endswith(("_N", "_NK"))
    }
    rows["optional"] = select_rows(whole.optional, labelled)
    key = sample_key(whole.prompt_ids_P, 0, response_ids=whole.response_ids_R, label_mask=mask_R)
    return replace(whole, key=key, finish_reason="given", stop_reason=None, **rows)


def main() -> None:
    assert FORMAT_VERSION == 1, "the golden store of a released version is never made again"
    shutil.rmtree(STORE, ignore_errors=True)
    store = LabelStore(str(STORE), create=True)
    facts = {"made_by": "tests/golden/v1/make.py"}
    topk = store.create(TOPK, facts)
    log.MERGE_FACTOR = 2  # the two records get a sum, which usually takes 16
    topk.append([given(0, [0, 1, 2, 3, 4]), given(1, [1, 2, 4])], facts)
    topk.append([given(2, [0, 1, 2, 3, 4])], facts)
    mass = store.create(MASS, facts)
    mass.append([narrow(sample(number, 3), MASS) for number in range(2)], facts)
    producer = SidecarSpec(producer={"student": "d" * 32}, columns=("kl",))
    values = {given(1, [1, 2, 4]).key: {"kl": [0.5, 0.25, 0.125]}}
    topk.sidecar(producer).append(values)
    found = given(1, [1, 2, 4])
    request = SampleRequest(
        key=found.key,
        sample_index=0,
        prompt_ids_P=found.prompt_ids_P,
        response_ids_R=found.response_ids_R,
        sources=(Source("train.jsonl", 3, "third"),),
        label_mask_R=found.label_mask_R,
    )
    selection = Selection((request,)).save(store.objects)
    sizes = [path.stat().st_size for path in STORE.rglob("*") if path.is_file()]
    assert sum(sizes) < 50 * 1024
    facts = {"topk": TOPK.key, "mass": MASS.key, "sidecar": producer.key, "selection": selection}
    facts |= {"files": str(len(sizes)), "bytes": str(sum(sizes))}
    print(json.dumps(facts, indent=1))  # noqa: T201 - a script


if __name__ == "__main__":
    main()
