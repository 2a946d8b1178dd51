"""A teacher without a model: distributions that depend on the last token and the position.

For tests and dry runs. It keeps every promise of the interface (real distributions, exact columns,
sampling by the sample's own seed), and can die or hang on request.
"""

import os
import signal
import time
from collections.abc import Iterable, Iterator

import numpy as np

from storage.dense import label_sample_densely
from storage.keys import sampling_seed
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from teacher_server.backends.base import TeacherJob
from teacher_server.config import FakeBackendConfig
from teacher_server.errors import TeacherError


class FakeBackend:
    """Seeded random distributions over the effective vocabulary."""

    def __init__(self, job: TeacherJob) -> None:
        assert isinstance(job.backend, FakeBackendConfig)
        sampling = job.spec.generation.sampling
        if sampling is not None and sampling.stop:
            raise TeacherError("the fake backend has no text to find stop strings in")
        self.forward_tokens = 0
        self._spec = job.spec
        self._max_model_len = job.max_model_len
        self._faults = job.backend
        self._finished = 0

    def describe(self) -> dict[str, str]:
        """Engine, version and device."""
        return {"backend": "fake", "engine_version": "0", "device": "none"}

    def close(self) -> None:
        """Nothing to free."""

    def label(self, requests: Iterable[SampleRequest]) -> Iterator[LabelledSample]:
        """See the protocol."""
        for request in requests:
            self._fail_as_asked(request)
            self._finished += 1
            yield self._label_one(request)

    def _fail_as_asked(self, request: SampleRequest) -> None:
        faults, prompt = self._faults, request.prompt_ids_P.tolist()
        limit = faults.crash_after_samples
        if (limit is not None and self._finished >= limit) or faults.poison_token in prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        while faults.hang_token in prompt:
            time.sleep(3600)

    def _label_one(self, request: SampleRequest) -> LabelledSample:
        sampling = self._spec.generation.sampling
        seed = 0 if sampling is None else sampling_seed(sampling.seed, request.key)
        random = np.random.default_rng(seed)
        given = request.response_ids_R
        if given is None:
            assert sampling is not None
            length = min(sampling.max_tokens, self._max_model_len - len(request.prompt_ids_P))
        else:
            length = len(given)
        last = int(request.prompt_ids_P[-1])
        response, rows = [], []
        for position in range(length):
            rows.append(self._logprobs(last, position))
            token = random.choice(self._spec.vocab_size, p=np.exp(rows[-1]))
            last = int(token if given is None else given[position])
            response.append(last)
        self.forward_tokens += len(request.prompt_ids_P) + length
        return label_sample_densely(
            request,
            np.array(response, dtype=np.int32),
            np.stack(rows),
            self._spec,
        )

    def _logprobs(self, last: int, position: int) -> np.ndarray:
        logits = np.random.default_rng([last, position]).normal(scale=2, size=self._spec.vocab_size)
        logprobs: np.ndarray = logits - np.log(np.exp(logits).sum())
        return logprobs
