"""What a teacher backend must offer."""

import importlib
from collections.abc import Iterable, Iterator
from typing import Protocol, cast

from storage.config import Config
from storage.keys import LabelSetSpec
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from teacher_server.adapters import Adapter, read_adapter
from teacher_server.backends import BACKENDS
from teacher_server.config import BackendConfig
from teacher_server.errors import TeacherError


class TeacherJob(Config):
    """What every backend is told: which model, how it runs, which labels are wanted."""

    model: str
    """Directory of the teacher."""
    adapter: str | None = None
    """Directory of the LoRA adapter that it is used with."""
    backend: BackendConfig
    spec: LabelSetSpec
    max_model_len: int
    """Prompt plus response of the longest request, tokens."""

    def lora(self) -> Adapter | None:
        """The adapter, None where the labels are those of the plain model.

        Raises:
            TeacherError: if it does not fit the model, or labels and job do not agree on it.
        """
        wanted = len(self.spec.generation.teacher.adapters)
        if wanted != (self.adapter is not None):
            raise TeacherError(
                f"the labels are those of a teacher with {wanted} adapters, and {self.adapter!r} "
                "was given as its adapter; give the directory of the one that made the labels"
            )
        return None if self.adapter is None else read_adapter(self.adapter, self.model)


class TeacherBackend(Protocol):
    """Runs a teacher. Made in the process that will run it; holds its engine until it is closed.

    All backends write the same labels within numerical tolerance.
    """

    forward_tokens: int
    """Tokens that went through the teacher since it was started (prompt and response)."""

    def __init__(self, job: TeacherJob) -> None: ...

    def describe(self) -> dict[str, str]:
        """Engine, version and device, for provenance."""

    def label(self, requests: Iterable[SampleRequest]) -> Iterator[LabelledSample]:
        """Label samples, yielding each as soon as it is finished, in any order.

        Requests are pulled as the engine has room, so neither they nor the results pile up.

        A request with a response is scored, whatever the mode: it may be a stored answer that gets
        more labels. Its sample ends as the request says (``finish_reason``, ``stop_reason``), and
        only positions where ``label_mask_R`` is true are labelled.
        """

    def close(self) -> None:
        """Free the engine."""


def start_backend(job: TeacherJob) -> TeacherBackend:
    """Start the backend that ``job.backend.type`` names."""
    module, name = BACKENDS[job.backend.type].split(":")
    backend = getattr(importlib.import_module(module), name)
    return cast(TeacherBackend, backend(job))
