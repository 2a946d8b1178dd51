"""Made-up labels in any number, written by the real writer. Not a benchmark by itself.

They cost little to make: rows are taken from one table of random distributions.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from storage.keys import LabelSetSpec, sample_key
from storage.samples import LabelledSample
from storage.selection import SampleRequest, Selection
from storage.store import LabelStore
from storage.testing import make_spec
from student_train.config import LabelSource

TABLE_ROWS = 4096
LONGEST = 2048
COMMIT_SAMPLES = 50_000


@dataclass(frozen=True, slots=True)
class Answers:
    """How many samples, and how long they are."""

    num_samples: int
    median_tokens: int
    """Of a response; lengths are log-normal, as those of answers are."""
    sigma: float
    """Of the logarithm of the length."""
    prompt_tokens: int
    k: int
    vocab_size: int

    @property
    def spec(self) -> LabelSetSpec:
        """Of their label set."""
        return make_spec(k=self.k, vocab_size=self.vocab_size)

    def samples(self) -> Iterator[LabelledSample]:
        """Every sample; the same in every process."""
        random = np.random.default_rng(0)
        table = _table(random, self.k, self.vocab_size)
        logs = random.normal(np.log(self.median_tokens), self.sigma, self.num_samples)
        for length in np.clip(np.exp(logs), 2, LONGEST).astype(int).tolist():
            rows = (random.integers(TABLE_ROWS) + np.arange(length)) % TABLE_ROWS
            prompt = random.integers(self.vocab_size, size=self.prompt_tokens).astype(np.int32)
            ranks = random.integers(min(self.k, 4), size=length)
            yield LabelledSample(
                key=sample_key(prompt, 0),
                sample_index=0,
                prompt_ids_P=prompt,
                response_ids_R=table.ids[rows, ranks],
                positions_N=np.arange(length, dtype=np.int32),
                token_logprob_N=table.logprobs[rows, ranks],
                token_rank_N=(ranks + 1).astype(np.int32),
                log_tail_mass_N=table.log_tail[rows],
                topk_ids_NK=table.ids[rows],
                topk_logprobs_NK=table.logprobs[rows],
                optional={"entropy": np.full(length, 2.0, np.float32)},
                finish_reason="stop",
            )

    def write(self, directory: Path) -> LabelSource:
        """A store with these labels and a selection of all of them."""
        return write_labels(directory, self.spec, self.samples())


def write_labels(
    directory: Path, spec: LabelSetSpec, samples: Iterable[LabelledSample]
) -> LabelSource:
    """A store with these samples and a selection of all of them."""
    store = LabelStore(str(directory), create=True)
    label_set = store.create(spec, {})
    requests = []
    with label_set.writer({}, commit_samples=COMMIT_SAMPLES) as writer:
        for sample in samples:
            writer.add(sample)
            requests.append(SampleRequest(sample.key, 0, sample.prompt_ids_P, None, ()))
    selection = Selection(tuple(requests)).save(store.objects)
    return LabelSource(store=store.uri, label_set=label_set.key, selection=selection)


@dataclass(frozen=True, slots=True)
class _Table:
    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    log_tail: npt.NDArray[np.float32]


def _table(random: np.random.Generator, k: int, vocab_size: int) -> _Table:
    """Distributions of four times k tokens, of which the likeliest k are stored."""
    scores = np.sort(random.normal(scale=2.5, size=(TABLE_ROWS, 4 * k)), axis=1)[:, ::-1]
    logprobs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    head = logprobs[:, :k].astype(np.float32)
    tail = 1 - np.exp(head.astype(np.float64)).sum(axis=1)
    ids = np.stack([random.permutation(vocab_size)[:k] for _ in range(TABLE_ROWS)])
    return _Table(ids.astype(np.int32), head, np.log(tail).astype(np.float32))
