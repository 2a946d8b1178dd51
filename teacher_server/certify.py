"""Certify a label set: look at some of its samples, score a few again, store what was found."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Literal

from storage.agreement import (
    ROUNDOFFS,
    Agreement,
    DenseRows,
    Limits,
    Recomputed,
    compare,
)
from storage.certificate import Certificate, publish_certificate
from storage.coverage import Coverage, CoverageCount
from storage.drawing import Drawing, DrawingTest
from storage.errors import BadLabelError
from storage.keys import LabelSetSpec, TeacherFingerprint
from storage.label_set import LabelSet
from storage.provenance import provenance, utc_now
from storage.qa import QaConfig
from storage.samples import LabelledSample
from storage.spot_check import SpotCheck, choose_samples
from teacher_server.errors import TeacherError
from teacher_server.rescore import Rescorer, start_rescorer

StartRescorer = Callable[[LabelSetSpec, bool], Rescorer]
"""Loads the teacher of a label set; told whether to run it in float32."""


def certify(
    label_set: LabelSet,
    model: str,
    settings: QaConfig,
    *,
    adapter: str | None = None,
    threads: int = 1,
    start: StartRescorer | None = None,
) -> Certificate:
    """Check a label set and store the certificate beside it.

    Holds one copy of the teacher at a time: first in the dtype of the set, then in float32. Rows
    that were drawn are read one sample after the other, so memory does not grow with the settings.

    Args:
        label_set: At least one sample must be stored.
        model: Directory of the teacher; :func:`require_teacher` says whether it is the right one.
        settings: What is looked at, and what is refused.
        adapter: Directory of the LoRA adapter that the teacher labelled with.
        threads: CPU threads of the teacher.
        start: Loads the teacher in another way than transformers does.

    Returns:
        The certificate, as it was stored.

    Raises:
        TeacherError: if transformers cannot run this teacher.
        NotLabelledError: if the set is empty.
        ShardCorruptError: if its files are damaged.
    """

    def load(spec: LabelSetSpec, exact: bool) -> Rescorer:
        return start_rescorer(model, spec, threads=threads, exact=exact, adapter=adapter)

    check = choose_samples(label_set, rows=settings.drawn_rows, seed=settings.seed)
    found = _Findings(label_set, settings, start or load)
    found.score_again(check.sample_keys)
    found.read_all(check.sample_keys)
    return publish_certificate(label_set, lambda number: found.certificate(check, number))


def require_teacher(spec: LabelSetSpec, fingerprint: TeacherFingerprint, *, directory: str) -> None:
    """Refuse another model than the one that made the labels.

    Raises:
        TeacherError: naming the directory and what differs.
    """
    wanted = spec.generation.teacher
    differing = [
        name
        for name in ("weights", "config", "adapters")
        if getattr(wanted, name) != getattr(fingerprint, name)
    ]
    if differing:
        raise TeacherError(
            f"{directory!r} is not the teacher of label set {spec.key}: its "
            f"{' and '.join(differing)} differ; give the directory of the teacher with --teacher, "
            "and that of its LoRA adapter with --adapter"
        )


@dataclass
class _Findings:
    label_set: LabelSet
    settings: QaConfig
    start: StartRescorer
    broken: dict[str, str] = field(default_factory=dict)
    """Error by sample key of samples that break the format."""
    agreement: Agreement | None = None
    drawing: Drawing | None = None
    coverage: Coverage | None = None
    engine: dict[str, str] = field(default_factory=dict)

    # -- against the teacher ----------------------------------------------------------------------
    def score_again(self, keys: Sequence[str]) -> None:
        """Compare the first samples with a dense recomputation."""
        spec, settings = self.label_set.spec, self.settings
        samples = self._first_samples(keys)
        if not samples:
            return
        generation = spec.generation
        is_float32 = generation.compute_dtype == generation.head_dtype == "float32"
        rough = [] if is_float32 else self._scored(samples, exact=False)
        exact = self._scored(samples, exact=True, rough=rough)
        noises = rough or repeat(None)
        rows = [Recomputed(*found) for found in zip(samples, exact, noises, strict=False)]
        limits = Limits(
            float32=settings.float32,
            noise_factor=settings.noise_factor,
            max_kl=settings.max_kl,
            vocab_size=spec.vocab_size,
            roundoff=max(ROUNDOFFS[generation.compute_dtype], ROUNDOFFS[generation.head_dtype]),
        )
        self.agreement = compare(rows, spec, limits)

    def _first_samples(self, keys: Sequence[str]) -> list[LabelledSample]:
        """Samples to score again; those that break the format count as looked at."""
        samples: list[LabelledSample] = []
        num_rows = 0
        for key in keys[: self.settings.samples]:
            sample = self._read(key)
            if sample is not None:
                samples.append(sample)
                num_rows += len(sample.positions_N)
            if num_rows >= self.settings.rows:
                break
        return samples

    def _scored(
        self, samples: Sequence[LabelledSample], *, exact: bool, rough: Sequence[DenseRows] = ()
    ) -> list[DenseRows]:
        rescorer = self.start(self.label_set.spec, exact)
        try:
            self.engine = rescorer.describe()
            heads = [[rows.top_ids_NK] for rows in rough] or [[] for _ in samples]
            return [
                rescorer.score(sample, others)
                for sample, others in zip(samples, heads, strict=True)
            ]
        finally:
            rescorer.close()

    # -- by themselves ----------------------------------------------------------------------------
    def read_all(self, keys: Sequence[str]) -> None:
        """Test what needs no teacher on all samples."""
        padding = 1.0 if self.agreement is None else self.agreement.padding_mass
        drawing = DrawingTest(self.label_set.spec.generation.sampling, padding_mass=padding)
        coverage = CoverageCount()
        good = 0
        for key in sorted(keys):  # neighbours lie in one batch
            sample = self._read(key)
            if sample is not None:
                drawing.add(sample)
                coverage.add(sample)
                good += 1
        if good:
            self.drawing, self.coverage = drawing.result(), coverage.result()

    def _read(self, key: str) -> LabelledSample | None:
        """A sample, None if it breaks the format."""
        try:
            (sample,) = self.label_set.read([key])
            sample.check(self.label_set.spec, stored=True)
        except BadLabelError as error:
            self.broken[key] = str(error)
            return None
        return sample

    # -- together ---------------------------------------------------------------------------------
    def certificate(self, check: SpotCheck, number: int) -> Certificate:
        """The certificate with a number."""
        reasons = []
        if self.broken:
            first = self.broken[min(self.broken)]
            reasons.append(
                f"{len(self.broken)} of {len(check.sample_keys)} samples break the format; the "
                f"first: {first}"
            )
        if self.agreement is not None:
            reasons += self.agreement.reasons()
        if self.drawing is not None:
            reasons += self.drawing.reasons(self.settings.min_p_value)
        verdict: Literal["fit", "unfit"] = "unfit" if reasons else "fit"
        return Certificate(
            label_set=self.label_set.key,
            number=number,
            commit=check.commit,
            num_samples=check.num_samples,
            verdict=verdict,
            reasons=tuple(reasons),
            settings=self.settings,
            agreement=self.agreement,
            drawing=self.drawing,
            coverage=self.coverage,
            created_at=utc_now(),
            provenance={**provenance(), **self.engine},
        )
