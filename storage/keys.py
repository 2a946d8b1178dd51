"""What makes two labels the same: specs, keys and the seeds derived from them.

A key is the digest of a payload that lists everything that can change a label and nothing that
cannot. Prompt text, dataset, batch size, parallelism, shard size and host are provenance, not
identity. ``docs/format.md`` section 2 is the specification.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from storage.config import Config
from storage.errors import UnstableValueError

KEY_VERSION = 1
"""Part of every label set key; raised when the payload of a key changes its meaning."""

KEY_HEX_DIGITS = 32
"""A key is the first 128 bits of a SHA-256, written in lower-case hex."""

PROMPT_HEX_DIGITS = 8
"""A sample key starts with this much of its prompt key, so the samples of a prompt are neighbours
in every order by key and always in one partition."""

Ids = Sequence[int] | npt.NDArray[np.integer]


class TeacherFingerprint(Config):
    """Which teacher, by content: two copies of a checkpoint under different names are equal."""

    weights: str
    """Digest over the bytes of all weight files."""
    config: str
    """Digest of the model's ``config.json`` without the fields that only record its origin."""
    quantization: str | None = None
    """Name of an on-the-fly quantisation method; ``None`` loads the weights as stored."""
    adapters: tuple[str, ...] = ()
    """Digests of LoRA adapters, in the order of application."""
    trust_remote_code: bool = False
    """Whether code shipped with the model may run; such code can change every label."""


class SamplingSpec(Config):
    """How responses are drawn. Soft labels are at temperature 1 whatever stands here."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    stop: tuple[str, ...]
    seed: int


class GenerationSpec(Config):
    """Everything that decides which tokens are labelled, and with which distribution."""

    teacher: TeacherFingerprint
    mode: Literal["generate", "score"]
    compute_dtype: str
    """Dtype of the trunk, such as ``bfloat16``."""
    head_dtype: str
    """Dtype of the final projection; log-softmax is always float32."""
    sampling: SamplingSpec | None
    """``None`` in score mode, where the responses are given."""
    tokenizer: str | None = None
    """Tokenizer digest, present only where stop strings make the tokenizer matter."""

    @property
    def key(self) -> str:
        """The generation key: label sets that share it hold the same tokens."""
        return key_of({"key_version": KEY_VERSION, "generation": self})


class TopKSpec(Config):
    """The k likeliest tokens of every position."""

    type: Literal["topk"] = "topk"
    k: int = Field(default=64, ge=1, le=1024)
    """Tokens kept per position."""

    @property
    def width(self) -> int:
        """Most tokens that a position keeps."""
        return self.k


class MassSpec(Config):
    """The smallest head of every position that holds a given probability (adaptive k)."""

    type: Literal["mass"] = "mass"
    mass: float = Field(default=0.999, gt=0.0, lt=1.0)
    """Probability that the kept tokens reach together."""
    cap: int = Field(default=64, ge=1, le=1024)
    """Most tokens kept, whether they reach the mass or not."""

    @property
    def width(self) -> int:
        """Most tokens that a position keeps."""
        return self.cap


KindSpec = Annotated[TopKSpec | MassSpec, Field(discriminator="type")]
"""The options of a label kind (``storage/labels``), as they stand in the key."""


class StratifiedSpec(Config):
    """Tokens drawn from the tail, one from each of as many equal parts of its probability."""

    type: Literal["stratified"] = "stratified"
    draws: int = Field(ge=1, le=1024)
    """Tokens drawn per position; each stands for an equal share of the tail."""

    @property
    def width(self) -> int:
        """Most tokens that a position keeps."""
        return self.draws


class ThresholdSpec(Config):
    """Every tail token above a probability, and a sample of those below it."""

    type: Literal["threshold"] = "threshold"
    threshold: float = Field(ge=1 / 1024, lt=1.0)
    """A token at least this likely is kept as it is; a rarer one of probability p is kept with
    probability p / threshold and then counts as ``threshold``."""

    @property
    def width(self) -> int:
        """Most tokens that a position keeps."""
        return math.floor(1 / self.threshold) + 1


class CountsSpec(Config):
    """Tokens drawn from the whole distribution with replacement, and how often each was drawn."""

    type: Literal["counts"] = "counts"
    draws: int = Field(ge=1, le=1024)
    """Draws per position."""

    @property
    def width(self) -> int:
        """Most tokens that a position keeps."""
        return self.draws


TailSampleSpec = StratifiedSpec | ThresholdSpec | CountsSpec
"""How tokens are sampled from the teacher's distribution (``storage/tail_samples.py``)."""

ColumnName = Literal["entropy", "power_sum_10", "power_sum_200", "power_sum_400", "power_sums"]
"""Optional columns that need no options (``storage/columns.py``)."""


def _type_of(column: object) -> str | None:
    """Which member of ``ColumnSpec`` a value is meant to be."""
    if isinstance(column, str):
        return "str"
    found = column.get("type") if isinstance(column, Mapping) else getattr(column, "type", None)
    return found if isinstance(found, str) else None


ColumnSpec = Annotated[
    Annotated[ColumnName, Tag("str")]
    | Annotated[StratifiedSpec, Tag("stratified")]
    | Annotated[ThresholdSpec, Tag("threshold")]
    | Annotated[CountsSpec, Tag("counts")],
    Discriminator(
        _type_of,
        custom_error_type="unknown_column",
        custom_error_message=f"a column is a name ({', '.join(get_args(ColumnName))}) or a section "
        "with the type stratified, threshold or counts",
    ),
]
"""An optional label column as it stands in the key: a name, or the options of tail samples."""


def canonical_columns(columns: Iterable[ColumnSpec]) -> tuple[ColumnSpec, ...]:
    """The columns in the one order that enters a key: names sorted, tail samples last, each once.

    Raises:
        ValueError: if tail samples are wanted in two ways.
    """
    wanted = list(columns)
    names = sorted({column for column in wanted if isinstance(column, str)})
    samples: list[ColumnSpec] = []
    for column in wanted:
        if not isinstance(column, str) and column not in samples:
            samples.append(column)
    if len(samples) > 1:
        raise ValueError(
            "a label set holds tail samples of one kind, got "
            f"{' and '.join(canonical_json(sample) for sample in samples)}; choose one"
        )
    return (*names, *samples)


class LabelSetSpec(Config):
    """The request that a label set answers. Its digest is the address of the set."""

    generation: GenerationSpec
    kind: KindSpec
    columns: tuple[ColumnSpec, ...]
    """Optional label columns: names sorted, then at most one kind of tail samples, each once."""
    tail: Literal["exact", "topk"]
    """``exact``: the tail mass was summed over the full vocabulary in the engine;
    ``topk``: derived as one minus the mass of the top-k."""
    vocab_size: int
    """Effective vocabulary: ids at or above it cannot occur."""

    @model_validator(mode="after")
    def _columns_have_one_order(self) -> "LabelSetSpec":
        if self.columns != canonical_columns(self.columns):
            raise ValueError(
                "columns must be distinct, names sorted, tail samples last; got "
                f"{canonical_json(self.columns)}"
            )
        return self

    @property
    def tail_samples(self) -> TailSampleSpec | None:
        """How tail samples are drawn, None if the set holds none."""
        found = [column for column in self.columns if not isinstance(column, str)]
        return found[0] if found else None

    @property
    def key(self) -> str:
        """The label set key."""
        return key_of({"key_version": KEY_VERSION, "label_set": self})


def canonical_json(value: object) -> str:
    """Serialise ``value`` to the one text that a key hashes.

    Mappings are sorted by key, floats are written by ``repr`` of their shortest round trip and
    integers that happen to be floats stay floats, so equal values give equal text on every
    platform and in every field order.

    Raises:
        UnstableValueError: for anything without a stable form (objects, callables, NaN, infinity,
            keys that are not strings). Falling back to ``str(value)`` would put a memory address
            into the key and silently miss the cache.
    """
    return json.dumps(_stable(value, "$"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _stable(value: object, path: str) -> object:
    if isinstance(value, BaseModel):
        return _stable({name: getattr(value, name) for name in type(value).model_fields}, path)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UnstableValueError(f"{path} must be finite to enter a key, got {value!r}")
        return value + 0.0  # -0.0 and 0.0 are one value
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise UnstableValueError(f"{path} has the key {name!r}; keys must be strings")
        return {name: _stable(item, f"{path}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_stable(item, f"{path}[{index}]") for index, item in enumerate(value)]
    raise UnstableValueError(
        f"{path} is a {type(value).__name__}, which has no stable form to enter a key; "
        "use text, numbers, booleans, lists and mappings"
    )


def key_of(payload: object) -> str:
    """Digest of ``canonical_json(payload)``: ``KEY_HEX_DIGITS`` lower-case hex digits."""
    return hashlib.sha256(canonical_json(payload).encode()).hexdigest()[:KEY_HEX_DIGITS]


def prompt_key(prompt_ids: Ids) -> str:
    """Digest of the token ids of a prompt."""
    return _digest_of_ids("prompt", prompt_ids)


def sample_key(
    prompt_ids: Ids,
    sample_index: int,
    *,
    response_ids: Ids | None = None,
    label_mask: Ids | npt.NDArray[np.bool_] | None = None,
) -> str:
    """Address of one sample: the same in every dataset, order, batch and world size.

    The first ``PROMPT_HEX_DIGITS`` digits are those of the prompt key.

    Args:
        prompt_ids: int[P], tokens given to the teacher.
        sample_index: Number of the response to this prompt, from 0.
        response_ids: int[R], the given response in score mode; ``None`` when it is generated.
        label_mask: bool[R], which response tokens are labelled; ``None`` for all.
    """
    parts: list[Ids] = [prompt_ids, [sample_index]]
    if response_ids is not None:
        mask = np.ones(len(response_ids)) if label_mask is None else np.asarray(label_mask)
        parts += [response_ids, mask.astype(np.int64)]
    key = _digest_of_ids("sample", *parts)
    return prompt_key(prompt_ids)[:PROMPT_HEX_DIGITS] + key[PROMPT_HEX_DIGITS:]


def sampling_seed(seed: int, key: str) -> int:
    """Seed of one sample in [0, 2**63): from the request's seed and the sample key only."""
    digest = hashlib.sha256(f"distillcache seed\0{seed}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _digest_of_ids(domain: str, *parts: Ids) -> str:
    """Hash integer lists; lengths go in first, so two splits of the same ids differ."""
    state = _domain(domain)
    for part in parts:
        array = np.asarray(part, dtype="<i8")
        state.update(array.size.to_bytes(8, "little"))
        state.update(array.tobytes())
    return state.hexdigest()[:KEY_HEX_DIGITS]


def _domain(name: str) -> "hashlib._Hash":
    """A digest that nothing was added to."""
    return hashlib.sha256(f"distillcache {name} v1\0".encode())


def sample_keys(
    prompts: Sequence[memoryview],
    sample_index: Sequence[int],
    given: Sequence[Sequence[memoryview]],
) -> npt.NDArray[np.uint64]:
    """Addresses of many samples, uint64[N, 2]: as :func:`sample_key`, at a tenth of its cost.

    Args:
        prompts: Token ids of the prompts, each as the bytes of little-endian 64-bit integers.
        sample_index: Numbers of the responses to their prompts.
        given: Response and label mask of every sample as such bytes; empty where it is generated.
    """
    of_prompt, of_sample = (_domain(name) for name in ("prompt", "sample"))
    digests = []
    for prompt, number, parts in zip(prompts, sample_index, given, strict=True):
        data = _sized(prompt)
        head, state = of_prompt.copy(), of_sample.copy()
        head.update(data)
        state.update(data + _ONE + number.to_bytes(8, "little", signed=True))
        for part in parts:
            state.update(_sized(part))
        digests.append(head.digest()[: PROMPT_HEX_DIGITS // 2])
        digests.append(state.digest()[PROMPT_HEX_DIGITS // 2 : KEY_HEX_DIGITS // 2])
    return np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2).astype(np.uint64)


_ONE = (1).to_bytes(8, "little")


def _sized(ids: memoryview) -> bytes:
    """A list of 64-bit integers with its length in front."""
    return (ids.nbytes // 8).to_bytes(8, "little") + ids
