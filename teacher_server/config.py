"""Settings of the teacher and of the labels. No torch or vllm import here."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from storage.config import Config
from storage.errors import ConfigError
from storage.keys import (
    ColumnSpec,
    GenerationSpec,
    KindSpec,
    LabelSetSpec,
    SamplingSpec,
    TeacherFingerprint,
    TopKSpec,
    canonical_columns,
)
from storage.qa import QaConfig


class GgufModelConfig(Config):
    """A model in a GGUF file, converted once into a Hugging Face directory."""

    type: Literal["gguf"] = "gguf"
    path: str | None = None
    """The GGUF file."""
    package: str | None = None
    """Import name of an installed Python package that carries one GGUF file."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the converted weights."""

    @model_validator(mode="after")
    def _one_source(self) -> "GgufModelConfig":
        if (self.path is None) == (self.package is None):
            raise ValueError("give exactly one of path and package")
        return self

    def __str__(self) -> str:
        return f"GGUF from {self.path or self.package}"


class VllmBackendConfig(Config):
    """vLLM inside the labelling process. How it runs is provenance, never identity."""

    type: Literal["vllm"] = "vllm"
    replicas: int = Field(default=1, ge=1)
    """Engines that label side by side."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs of one engine. Must be 1 on CPU."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Samples that one engine decodes at the same time."""
    max_num_batched_tokens: int = Field(default=8192, ge=1)
    """Tokens of one engine step; prompts longer than this are prefilled in pieces."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of one engine. More than one only on a machine that does nothing else."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """Memory of the key-value cache of one engine on CPU, GiB."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that one engine takes."""
    enforce_eager: bool = False
    """Skip compilation: starts sooner, decodes slower. Always on for CPU."""

    @property
    def in_flight(self) -> int:
        """Samples that one engine holds at the same time: its slots stay full."""
        return 2 * self.max_num_seqs


class TransformersBackendConfig(Config):
    """The reference: one sample at a time through transformers. Slow and obvious."""

    type: Literal["transformers"] = "transformers"
    replicas: int = Field(default=1, ge=1)
    """Models that label side by side."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of one model."""

    @property
    def in_flight(self) -> int:
        """Samples that one worker holds at the same time."""
        return 1


class FakeBackendConfig(Config):
    """A made-up teacher for tests and dry runs: seeded random distributions, no model."""

    type: Literal["fake"] = "fake"
    replicas: int = Field(default=1, ge=1)
    """Workers that label side by side."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of one worker."""
    crash_after_samples: int | None = Field(default=None, ge=0)
    """Kill the process after this many samples, to test recovery."""
    poison_token: int | None = Field(default=None, ge=0)
    """Kill the process at a prompt that holds this token id, to test the search for it."""
    hang_token: int | None = Field(default=None, ge=0)
    """Wait for ever at a prompt that holds this token id, to test deadlines."""

    @property
    def in_flight(self) -> int:
        """Samples that one worker holds at the same time."""
        return 1


BackendConfig = Annotated[
    VllmBackendConfig | TransformersBackendConfig | FakeBackendConfig,
    Field(discriminator="type"),
]


class TeacherConfig(Config):
    """The model that labels."""

    model: str | GgufModelConfig
    """Directory of a Hugging Face checkpoint (safetensors), or a GGUF file to convert."""
    backend: BackendConfig = VllmBackendConfig()
    """What runs the model."""
    adapter: str | None = None
    """Directory of a LoRA adapter, as peft saves it, that the model is used with; part of the
    labels' identity."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Compute dtype of the trunk; part of the labels' identity."""
    head_dtype: Literal["float32", "same"] = "float32"
    """Dtype of the final projection. ``float32`` avoids the ties that bfloat16 logits have;
    ``same`` uses ``dtype``. Part of the labels' identity."""
    trust_remote_code: bool = False
    """Run code that ships with the model. Leave off unless you have read that code; part of the
    labels' identity."""


class SamplingConfig(Config):
    """How the teacher answers. Soft labels are recorded at temperature 1 in every case."""

    temperature: float = Field(default=1.0, ge=0)
    """0 is greedy. Values other than 1 sharpen or flatten the hard labels, not the soft ones."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this mass; 1 is everything."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many likeliest tokens; 0 is all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Sample from tokens at least this likely relative to the likeliest; 0 is all."""
    max_tokens: int = Field(default=1024, ge=1)
    """Length limit of a response."""
    stop: tuple[str, ...] = ()
    """Strings that end a response; their tokens are kept."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Responses drawn for each prompt; more of them extend the same label set."""
    seed: int = Field(default=0, ge=0)
    """Together with the sample key it decides the random numbers of a response."""


class LabelConfig(Config):
    """What is recorded for every token."""

    mode: Literal["generate", "score"] = "generate"
    """``generate``: the teacher answers the prompts. ``score``: the teacher rates what is
    given, a ``completion`` or the turns of the assistant."""
    sampling: SamplingConfig = SamplingConfig()
    """How responses are drawn; unused in score mode."""
    kind: KindSpec = TopKSpec()
    """Soft labels per position; a section without ``type`` is of type ``topk``."""
    columns: tuple[ColumnSpec, ...] = ("entropy",)
    """Optional label columns, in any order. ``entropy``: exact Shannon entropy. ``power_sums``: for
    temperatures from 1 to 4. ``power_sum_200``, ``power_sum_400``: for temperatures 1/2 and 1/4.
    ``power_sum_10``: for the weights of the hybrid loss by power sums.
    At most one section with a type samples single tokens of the tail."""
    commit_samples: int = Field(default=64, ge=1)
    """Samples per commit; a crash loses at most this many of each engine, plus those in flight."""
    tail: Literal["exact", "topk"] = "exact"
    """``exact``: tail mass and optional columns are summed over the full vocabulary inside the
    engine. ``topk``: the tail is one minus the mass of the top-k, for engines that cannot do that;
    another label set, without optional columns."""
    max_bad_samples: float = Field(default=10, ge=0)
    """Samples that may go to quarantine before the job fails: a number, or below 1 a share of all
    that are requested."""
    deadline_s: float = Field(default=1800.0, gt=0)
    """Seconds without a finished sample after which an engine counts as hung and is replaced."""
    qa: QaConfig = QaConfig()
    """How the labels are checked once they are made. Never part of the labels' identity."""

    def bad_samples_allowed(self, num_requested: int) -> int:
        """Samples that may go to quarantine, of so many that are requested."""
        share = self.max_bad_samples < 1
        return int(self.max_bad_samples * num_requested if share else self.max_bad_samples)

    @field_validator("kind", mode="before")
    @classmethod
    def _kind_is_top_k(cls, kind: Any) -> Any:
        return {"type": "topk", **kind} if isinstance(kind, Mapping) else kind

    @field_validator("columns")
    @classmethod
    def _columns_have_one_order(cls, columns: tuple[ColumnSpec, ...]) -> tuple[ColumnSpec, ...]:
        return canonical_columns(columns)

    @model_validator(mode="after")
    def _score_samples_once(self) -> "LabelConfig":
        if self.mode == "score" and self.sampling != SamplingConfig():
            raise ValueError("sampling has no effect in score mode; remove the section")
        return self

    @model_validator(mode="after")
    def _columns_need_the_whole_vocabulary(self) -> "LabelConfig":
        if self.tail == "topk" and self.columns:
            raise ValueError(
                "tail 'topk' knows the top-k only, optional columns need the whole vocabulary; set "
                "columns to []"
            )
        return self


class DataSource(Config):
    """One file or dataset of prompts."""

    path: str
    """A ``.jsonl`` or ``.parquet`` file, or the directory of a dataset saved to disk."""


class DataConfig(Config):
    """Prompts. Train and held-out prompts are separate files, so the split never moves."""

    train: tuple[DataSource, ...] = Field(min_length=1)
    """Prompts whose labels the students learn from."""
    heldout: tuple[DataSource, ...] = ()
    """Prompts whose labels the students are evaluated on."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """``stop`` before any teacher call when a row is unusable, or ``skip`` and list it."""


def label_set_spec(
    teacher: TeacherConfig,
    label: LabelConfig,
    *,
    fingerprint: TeacherFingerprint,
    vocab_size: int,
    tokenizer: str,
) -> LabelSetSpec:
    """The identity of the labels that these settings ask for.

    Args:
        teacher: Dtypes count; the backend and how it runs do not (but the fake one is a teacher
            of its own).
        label: Mode, sampling, kind and columns count; the size of commits does not.
        fingerprint: The teacher by content.
        vocab_size: Effective vocabulary.
        tokenizer: Tokenizer digest; enters only together with stop strings.

    Raises:
        ConfigError: if more tokens are wanted than the vocabulary has.
    """
    if label.kind.width > vocab_size:
        name = "k" if isinstance(label.kind, TopKSpec) else "cap"
        raise ConfigError(
            f"label.kind.{name} is {label.kind.width}, the teacher's vocabulary has {vocab_size} "
            "tokens; lower it"
        )
    sampling = SamplingSpec(**label.sampling.model_dump(exclude={"samples_per_prompt"}))
    if isinstance(teacher.backend, FakeBackendConfig):
        # made-up labels must never be found by somebody who asks for the real teacher's
        fingerprint = TeacherFingerprint(weights="fake", config="fake")
    return LabelSetSpec(
        generation=GenerationSpec(
            teacher=fingerprint,
            mode=label.mode,
            compute_dtype=teacher.dtype,
            head_dtype=teacher.dtype if teacher.head_dtype == "same" else teacher.head_dtype,
            sampling=sampling if label.mode == "generate" else None,
            tokenizer=tokenizer if label.sampling.stop else None,
        ),
        kind=label.kind,
        columns=label.columns,
        tail=label.tail,
        vocab_size=vocab_size,
    )
