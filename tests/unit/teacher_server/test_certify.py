"""Certificates of a made-up teacher: honest labels pass, labels altered on purpose are refused."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.agreement import DenseRows
from storage.certificate import Certificate, is_fit, newest_certificate
from storage.dense import label_sample_densely
from storage.errors import BadLabelError, NotLabelledError
from storage.keys import LabelSetSpec, MassSpec, TeacherFingerprint, sample_key
from storage.label_set import LabelSet
from storage.qa import QaConfig
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from storage.store import LabelStore
from storage.tail import logsumexp
from teacher_server.certify import certify, require_teacher
from teacher_server.errors import TeacherError

VOCAB_SIZE, PADDING, K = 60, 4, 12
NUM_SAMPLES, NUM_TOKENS = 24, 40
NOISE_NATS = 0.05
"""Of the shorter dtype: about what bfloat16 does to a model of 30 layers."""

MakeSpec = Callable[..., LabelSetSpec]
Alter = Callable[[LabelledSample, LabelledSample], LabelledSample]


@dataclass(frozen=True)
class MadeUpTeacher:
    """Distributions by last token and position, known to the last bit, and noise on top."""

    seed: int = 0
    noise_nats: float = 0.0
    engine: str = "reference"
    """Engines that share a dtype differ in their noise."""
    padding_nats: float = -30.0
    """Added to the logits of the padding."""

    def rows(self, prompt: Sequence[int], response: Sequence[int]) -> np.ndarray:
        """Log-probs float64[R, V], padding included."""
        context = [int(prompt[-1]), *map(int, response)]
        return np.stack([self.row(context[n], n) for n in range(len(response))])

    def row(self, last: int, position: int) -> np.ndarray:
        return logprobs_of(self, last, position)

    def answer(
        self, number: int, spec: LabelSetSpec, *, temperature: float = 1.0
    ) -> LabelledSample:
        """Sample ``number``, drawn from the ids below the padding."""
        random = np.random.default_rng([self.seed, number])
        prompt = [number % VOCAB_SIZE, number // VOCAB_SIZE, int(random.integers(VOCAB_SIZE))]
        response: list[int] = []
        for position in range(NUM_TOKENS):
            row_V = self.row([prompt[-1], *response][-1], position)[:VOCAB_SIZE]
            if temperature == 0:
                response.append(int(row_V.argmax()))
            else:
                p_V = np.exp(row_V / temperature)
                response.append(int(random.choice(VOCAB_SIZE, p=p_V / p_V.sum())))
        return self.label(prompt, response, spec)

    def label(
        self, prompt: Sequence[int], response: Sequence[int], spec: LabelSetSpec
    ) -> LabelledSample:
        given = np.array(response, np.int32)
        known = given if spec.generation.mode == "score" else None
        request = SampleRequest(
            sample_key(prompt, 0, response_ids=known), 0, np.array(prompt, np.int32), known, ()
        )
        return label_sample_densely(request, given, self.rows(prompt, response), spec)


@lru_cache(maxsize=2**15)
def logprobs_of(teacher: MadeUpTeacher, last: int, position: int) -> np.ndarray:
    """One distribution, float64[V]; the same few are asked for again and again."""
    logits = np.random.default_rng([teacher.seed, last, position]).normal(
        scale=2.5, size=VOCAB_SIZE + PADDING
    )
    logits[VOCAB_SIZE:] += teacher.padding_nats
    where = [*teacher.engine.encode(), teacher.seed, last, position]
    logits += np.random.default_rng(where).normal(scale=teacher.noise_nats, size=len(logits))
    result: np.ndarray = logits - logsumexp(logits[None])
    return result


class MadeUpRescorer:
    """Scores again what a made-up teacher labelled; the obvious way."""

    def __init__(self, teacher: MadeUpTeacher, spec: LabelSetSpec) -> None:
        self.teacher, self.spec = teacher, spec
        self.closed = False

    def describe(self) -> dict[str, str]:
        return {"backend": "made-up"}

    def close(self) -> None:
        self.closed = True

    def score(self, sample: LabelledSample, heads: Sequence[np.ndarray] = ()) -> DenseRows:
        rows_NV = self.teacher.rows(sample.prompt_ids_P, sample.response_ids_R)[sample.positions_N]
        own = self.teacher.label(
            sample.prompt_ids_P.tolist(), sample.response_ids_R.tolist(), self.spec
        )
        live_NV = rows_NV[:, :VOCAB_SIZE]
        numbers = np.arange(len(rows_NV))
        used_NK = sample.topk_ids_NK != -1
        tails, gaps = [], []
        for head_NK in (sample.topk_ids_NK, *heads):
            inside_NV = np.zeros_like(rows_NV, dtype=bool)
            for row, ids_K in enumerate(head_NK):
                inside_NV[row, ids_K[ids_K != -1]] = True
            tails.append(np.log(np.where(inside_NV, 0.0, np.exp(rows_NV)).sum(axis=1)))
            inside_NV = inside_NV[:, :VOCAB_SIZE]
            best_N = np.where(inside_NV, -np.inf, live_NV).max(axis=1)
            gaps.append(np.maximum(best_N - np.where(inside_NV, live_NV, np.inf).min(axis=1), 0))
        ranked_NV = -np.sort(-live_NV, axis=1)
        token_N = live_NV[numbers, sample.token_ids_N]
        there_N = ranked_NV[numbers, np.clip(sample.token_rank_N, 1, VOCAB_SIZE) - 1]
        stored_NK = np.take_along_axis(live_NV, np.maximum(sample.topk_ids_NK, 0), 1)
        return DenseRows(
            logprobs_NK=np.where(used_NK, stored_NK, -np.inf),
            log_tail_mass_N=tails[0],
            token_logprob_N=token_N,
            scalars={name: values.astype(np.float64) for name, values in own.optional.items()},
            top_ids_NK=own.topk_ids_NK,
            rank_gap_N=np.abs(there_N - token_N),
            head_gaps=tuple(gaps),
            padding_mass_N=np.exp(rows_NV[:, VOCAB_SIZE:]).sum(axis=1),
        )


class Laboratory:
    """A store, a teacher in the dtype of the set, and the same one in float32."""

    def __init__(self, uri: str, spec: LabelSetSpec, teacher: MadeUpTeacher) -> None:
        self.spec, self.teacher = spec, teacher
        self._uri = uri
        self.rescorers: list[MadeUpRescorer] = []

    def samples(self, count: int = NUM_SAMPLES, **drawing: Any) -> list[LabelledSample]:
        engine = replace(self.teacher, engine="engine")
        return [engine.answer(number, self.spec, **drawing) for number in range(count)]

    def store(self, samples: Iterable[LabelledSample]) -> LabelSet:
        label_set = LabelStore(self._uri, create=True).create(self.spec, {})
        label_set.append(list(samples), {})
        return label_set

    def certify(self, label_set: LabelSet, **settings: Any) -> Certificate:
        return certify(label_set, "unused", QaConfig(**settings), start=self._start)

    def refused(self, samples: Iterable[LabelledSample], **settings: Any) -> str:
        """Why labels are unfit; empty if they are fit."""
        return "\n".join(self.certify(self.store(samples), **settings).reasons)

    def _start(self, spec: LabelSetSpec, exact: bool) -> MadeUpRescorer:
        assert all(rescorer.closed for rescorer in self.rescorers)  # one model at a time
        teacher = replace(self.teacher, noise_nats=0.0) if exact else self.teacher
        self.rescorers.append(MadeUpRescorer(teacher, spec))
        return self.rescorers[-1]


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def lab(tmp_path: Path, make_spec: MakeSpec, dtype: str) -> Laboratory:
    return laboratory(tmp_path, make_spec, dtype)


def laboratory(
    folder: Path, make_spec: MakeSpec, dtype: str, *, seed: int = 0, **changes: Any
) -> Laboratory:
    options = {"k": K, "vocab_size": VOCAB_SIZE, "max_tokens": NUM_TOKENS}
    padding_nats = changes.pop("padding_nats", -30.0)
    spec = make_spec(**{**options, **changes})
    generation = spec.generation.model_copy(update={"compute_dtype": dtype})
    noise = 0.0 if dtype == "float32" else NOISE_NATS
    return Laboratory(
        str(folder / "labels"),
        spec.model_copy(update={"generation": generation}),
        MadeUpTeacher(seed, noise, padding_nats=padding_nats),
    )


# -- honest labels --------------------------------------------------------------------------------
def test_honest_labels_are_fit(lab: Laboratory, dtype: str) -> None:
    label_set = lab.store(lab.samples())
    found = lab.certify(label_set)
    assert (found.verdict, found.reasons) == ("fit", ())
    assert newest_certificate(label_set) == found
    assert is_fit(label_set)
    assert (found.label_set, found.number, found.commit) == (label_set.key, 1, 1)
    assert found.num_samples == NUM_SAMPLES
    agreement, drawing, coverage = found.agreement, found.drawing, found.coverage
    assert agreement is not None
    assert drawing is not None
    assert coverage is not None
    assert agreement.num_rows == drawing.tested_rows == coverage.num_rows == 24 * 40
    assert len(agreement.sample_keys) == NUM_SAMPLES
    assert found.provenance["backend"] == "made-up"
    assert len(lab.rescorers) == (1 if dtype == "float32" else 2)
    assert all(rescorer.closed for rescorer in lab.rescorers)
    logprob = agreement.differences["logprob"]
    if dtype == "float32":  # nothing but the rounding of what is stored
        assert logprob.max < 1e-6
    else:  # two independent noises of the same size
        assert logprob.typical_noise is not None
        assert logprob.typical == pytest.approx(logprob.typical_noise, rel=0.2)


@pytest.mark.parametrize("seed", range(1, 16))
def test_honest_labels_of_many_teachers_are_fit(
    tmp_path: Path, make_spec: MakeSpec, dtype: str, seed: int
) -> None:
    """A false alarm is expected once in some 1e5 sets: 15 of them show gross mistakes only."""
    lab = laboratory(tmp_path, make_spec, dtype, seed=seed)
    assert lab.refused(lab.samples(8)) == ""


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 2.0, "top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.05, "temperature": 1.5},
        {"top_k": 30, "top_p": 0.9},
        {"mode": "score"},
    ],
    ids=str,
)
def test_labels_are_fit_whatever_the_sampling(
    tmp_path: Path, make_spec: MakeSpec, settings: dict[str, Any]
) -> None:
    """Tokens come from the reference's own way of sampling; soft labels stay at temperature 1."""
    import torch

    from teacher_server.backends.transformers_reference import draw

    lab = laboratory(tmp_path, make_spec, "float32", **settings)
    sampling = lab.spec.generation.sampling
    plain = make_spec(max_tokens=NUM_TOKENS).generation.sampling
    assert plain is not None
    samples = []
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        prompt, response = [number, 7], list[int]()
        for position in range(NUM_TOKENS):
            row_V = torch.from_numpy(lab.teacher.row([7, *response][-1], position)[:VOCAB_SIZE])
            response.append(draw(row_V, sampling or plain, generator))
        samples.append(lab.teacher.label(prompt, response, lab.spec))
    found = lab.certify(lab.store(samples))
    assert found.reasons == ()
    assert found.drawing is not None
    tested = found.drawing.tested_rows
    assert tested == 0 if sampling is None else tested > 100


def test_greedy_labels_are_fit(tmp_path: Path, make_spec: MakeSpec, dtype: str) -> None:
    lab = laboratory(tmp_path, make_spec, dtype, temperature=0.0)
    found = lab.certify(lab.store(lab.samples(8, temperature=0)))
    assert found.reasons == ()
    assert found.drawing is not None
    assert (found.drawing.method, found.drawing.p_value) == ("greedy", None)


def test_padding_that_is_never_drawn_is_no_mistake(tmp_path: Path, make_spec: MakeSpec) -> None:
    """A random model gives its padding 4 of 64 parts; they are in the stored tail."""
    lab = laboratory(tmp_path, make_spec, "float32", padding_nats=0.0)
    found = lab.certify(lab.store(lab.samples()))
    assert found.reasons == ()
    assert found.agreement is not None
    assert found.agreement.padding_mass > 0.01
    assert found.drawing is not None
    assert found.drawing.tested_rows < found.drawing.num_rows  # the tail is left out


def test_adaptive_heads_are_fit(tmp_path: Path, make_spec: MakeSpec, dtype: str) -> None:
    lab = laboratory(tmp_path, make_spec, dtype)
    lab.spec = lab.spec.model_copy(update={"kind": MassSpec(mass=0.9, cap=20)})
    found = lab.certify(lab.store(lab.samples()))
    assert found.reasons == ()
    assert found.coverage is not None
    assert 1 < found.coverage.mean_kept_ids < 20
    assert found.coverage.kept_mass["p50"] >= 0.9


# -- altered labels -------------------------------------------------------------------------------
def consistent(sample: LabelledSample) -> LabelledSample:
    """With a token log-prob and rank that fit the row, so that the store takes the sample."""
    is_token_NK = sample.topk_ids_NK == sample.token_ids_N[:, None]
    listed_N = is_token_NK.any(axis=1)
    listed_lp_N = np.where(is_token_NK, sample.topk_logprobs_NK, 0).sum(axis=1)
    last_N = sample.topk_logprobs_NK[:, -1]
    return replace(
        sample,
        token_logprob_N=np.where(listed_N, listed_lp_N, last_N - 0.5).astype(np.float32),
        token_rank_N=np.where(listed_N, is_token_NK.argmax(axis=1) + 1, K + 1).astype(np.int32),
    )


def at_temperature(sample: LabelledSample, temperature: float) -> LabelledSample:
    logprobs_NK = sample.topk_logprobs_NK.astype(np.float64) / temperature
    tail_N = sample.log_tail_mass_N.astype(np.float64) / temperature
    total_N = logsumexp(np.concatenate([logprobs_NK, tail_N[:, None]], axis=1))
    return replace(
        sample,
        topk_logprobs_NK=(logprobs_NK - total_N[:, None]).astype(np.float32),
        log_tail_mass_N=(tail_N - total_N).astype(np.float32),
    )


def with_rows_of(sample: LabelledSample, other: LabelledSample, shift: int) -> LabelledSample:
    return replace(
        sample,
        topk_ids_NK=np.roll(other.topk_ids_NK, shift, axis=0),
        topk_logprobs_NK=np.roll(other.topk_logprobs_NK, shift, axis=0),
        log_tail_mass_N=np.roll(other.log_tail_mass_N, shift),
        optional={name: np.roll(values, shift) for name, values in other.optional.items()},
    )


def with_another_last_id(sample: LabelledSample) -> LabelledSample:
    """The 12th likeliest id is replaced by one that is not stored, under its log-prob."""
    ids_NK = sample.topk_ids_NK.copy()
    for row, ids_K in enumerate(ids_NK):
        unstored = set(range(VOCAB_SIZE)) - set(ids_K.tolist()) - {int(sample.token_ids_N[row])}
        ids_K[-1] = min(unstored)
    return replace(sample, topk_ids_NK=ids_NK)


def with_tail(sample: LabelledSample, factor: float) -> LabelledSample:
    """The tail is scaled, and the head so that both sum to one."""
    tail_N = factor * np.exp(sample.log_tail_mass_N.astype(np.float64))
    change_N = np.log1p(-tail_N) - np.log1p(-tail_N / factor)
    return replace(
        sample,
        topk_logprobs_NK=(sample.topk_logprobs_NK + change_N[:, None]).astype(np.float32),
        log_tail_mass_N=np.log(tail_N).astype(np.float32),
    )


ALTERATIONS: dict[str, Alter] = {
    "ids permuted": lambda s, _: replace(s, topk_ids_NK=s.topk_ids_NK[:, ::-1]),
    "two ids swapped": lambda s, _: replace(s, topk_ids_NK=s.topk_ids_NK[:, [1, 0, *range(2, K)]]),
    "last id replaced": lambda s, _: with_another_last_id(s),
    "shifted by one": lambda s, _: with_rows_of(s, s, 1),
    "shifted back by one": lambda s, _: with_rows_of(s, s, -1),
    "temperature 0.9": lambda s, _: at_temperature(s, 0.9),
    "temperature 1.1": lambda s, _: at_temperature(s, 1.1),
    "labels of another sample": lambda s, other: with_rows_of(s, other, 0),
    "tail halved": lambda s, _: with_tail(s, 0.5),
    "no tail": lambda s, _: with_tail(s, 1e-6),
    "entropy of another row": lambda s, _: replace(
        s, optional={"entropy": np.roll(s.optional["entropy"], 1)}
    ),
    "entropy in bits": lambda s, _: replace(
        s, optional={"entropy": s.optional["entropy"] / np.float32(np.log(2))}
    ),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_altered_labels_are_refused(lab: Laboratory, name: str) -> None:
    samples = lab.samples()
    altered = [
        consistent(ALTERATIONS[name](sample, samples[number - 1]))
        for number, sample in enumerate(samples)
    ]
    assert lab.refused(altered) != ""


@pytest.mark.parametrize("name", ALTERATIONS)
def test_one_altered_sample_is_refused_if_all_are_scored_again(lab: Laboratory, name: str) -> None:
    samples = lab.samples()
    samples[5] = consistent(ALTERATIONS[name](samples[5], samples[4]))
    found = lab.certify(lab.store(samples), samples=NUM_SAMPLES)
    assert found.verdict == "unfit"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_logprob_N", "token_logprob"),
        ("token_rank_N", "token_rank"),
    ],
)
def test_wrong_numbers_of_the_token_are_refused(lab: Laboratory, name: str, expected: str) -> None:
    """Only where the token is not among the stored ids does the store not know better."""

    def alter(sample: LabelledSample) -> LabelledSample:
        outside_N = ~(sample.topk_ids_NK == sample.token_ids_N[:, None]).any(axis=1)
        values = getattr(sample, name)
        wrong = values - 1 if name == "token_logprob_N" else values + 8
        return replace(sample, **{name: np.where(outside_N, wrong, values).astype(values.dtype)})

    assert f"{expected} differs" in lab.refused(map(alter, lab.samples()))


def test_samples_that_break_the_format_are_refused(
    lab: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = lab.samples()
    altered = [with_rows_of(s, samples[n - 1], 0) for n, s in enumerate(samples)]
    with pytest.raises(BadLabelError):
        lab.store(altered)
    with monkeypatch.context() as patch:
        patch.setattr(LabelledSample, "check", lambda *_, **__: None)
        label_set = lab.store(altered)
    found = lab.certify(label_set)
    assert found.verdict == "unfit"
    assert "24 of 24 samples break the format" in found.reasons[0]
    assert (found.agreement, found.drawing, found.coverage) == (None, None, None)


# -- altered responses ----------------------------------------------------------------------------
def test_tokens_replaced_by_the_likeliest_are_refused(lab: Laboratory) -> None:
    """Their labels are right: only the test of drawing can tell."""
    reasons = lab.refused(lab.samples(temperature=0))
    assert "sampled tokens do not follow the stored distributions" in reasons
    assert "differs" not in reasons


@pytest.mark.parametrize("temperature", [0.8, 1.25])
def test_tokens_drawn_at_another_temperature_are_refused(
    lab: Laboratory, temperature: float
) -> None:
    reasons = lab.refused(lab.samples(temperature=temperature))
    assert "sampled tokens do not follow the stored distributions" in reasons
    assert "differs" not in reasons


def test_responses_whose_context_was_exchanged_are_refused(lab: Laboratory) -> None:
    """Prompt and labels stay, every other token is replaced by the likeliest of its row."""

    def alter(sample: LabelledSample) -> LabelledSample:
        response_R = sample.response_ids_R.copy()
        response_R[::2] = sample.topk_ids_NK[::2, 0]
        return consistent(replace(sample, response_ids_R=response_R))

    assert lab.refused(map(alter, lab.samples())) != ""


def test_greedy_responses_with_drawn_tokens_are_refused(
    tmp_path: Path, make_spec: MakeSpec
) -> None:
    lab = laboratory(tmp_path, make_spec, "float32", temperature=0.0)
    assert "is not the likeliest" in lab.refused(lab.samples(4))


@pytest.mark.parametrize("limits", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}], ids=str)
def test_tokens_beyond_the_limits_of_sampling_are_refused(
    tmp_path: Path, make_spec: MakeSpec, limits: dict[str, Any]
) -> None:
    lab = laboratory(tmp_path, make_spec, "float32", **limits)
    assert "cannot be drawn" in lab.refused(lab.samples(8))


# -- what is looked at ----------------------------------------------------------------------------
def test_settings_bound_what_is_looked_at(lab: Laboratory) -> None:
    label_set = lab.store(lab.samples())
    found = lab.certify(label_set, samples=3, drawn_rows=401)
    assert found.agreement is not None
    assert len(found.agreement.sample_keys) == 3
    assert found.drawing is not None
    assert found.drawing.num_samples == 11  # 10 * 40 rows are not enough
    found = lab.certify(label_set, rows=81)
    assert found.number == 2
    assert found.agreement is not None
    assert len(found.agreement.sample_keys) == 3


def test_a_mistake_is_missed_as_often_as_the_settings_say(lab: Laboratory) -> None:
    """Six of 24 samples are wrong and two are scored: (18 * 17) / (24 * 23) = 55 % miss them."""
    samples = lab.samples()
    samples[:6] = [
        consistent(with_rows_of(sample, samples[n - 1], 0)) for n, sample in enumerate(samples[:6])
    ]
    label_set = lab.store(samples)
    keys = {sample.key for sample in samples[:6]}
    missed = 0
    for seed in range(40):
        found = lab.certify(label_set, samples=2, seed=seed, min_p_value=1e-300)
        assert found.agreement is not None
        chosen = keys & set(found.agreement.sample_keys)
        assert (found.verdict == "fit") == (not chosen)
        missed += not chosen
    assert 12 <= missed <= 32  # 22 expected, standard deviation 3.1


def test_an_empty_set_cannot_be_certified(lab: Laboratory) -> None:
    label_set = LabelStore(lab._uri, create=True).create(lab.spec, {})
    with pytest.raises(NotLabelledError, match="holds no sample; label some first"):
        lab.certify(label_set)


def test_another_model_is_refused(make_spec: MakeSpec) -> None:
    spec = make_spec()
    require_teacher(spec, spec.generation.teacher, directory="same")
    other = TeacherFingerprint(weights="x", config="c")
    with pytest.raises(TeacherError, match=r"'elsewhere' is not the teacher.*its weights differ"):
        require_teacher(spec, other, directory="elsewhere")
