"""What is known of a student, its teacher and their labels before the first step."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from student_train.config import TrainConfig
from student_train.streaming.reader import LabelReader

LOOKED_AT = 64
"""Prompts and responses that checks look at, spread over a selection."""

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Subject:
    """A student that is to learn from labels. Tokenizers are loaded when they are asked for."""

    train: TrainConfig
    student: Path
    """Directory of the untrained student."""
    teacher: Path
    """Directory of the teacher's tokenizer."""
    vocab_size: int
    """Effective vocabulary of the labels."""
    prompts: Sequence[Ids] = ()
    """int32[P] each: some of the prompts, as the teacher got them."""
    trust_teacher_code: bool = False
    """Whether code that comes with the teacher's tokenizer may run."""

    @cached_property
    def student_tokenizer(self) -> Any:
        """The student's own tokenizer.

        Raises:
            OSError, ValueError: if there is none that can be used.
        """
        return _load_tokenizer(self.student, trust_code=False)

    @cached_property
    def teacher_tokenizer(self) -> Any:
        """The tokenizer that the labels were made with.

        Raises:
            OSError, ValueError: if there is none that can be used.
        """
        return _load_tokenizer(self.teacher, trust_code=self.trust_teacher_code)

    @property
    def gets_teachers_tokenizer(self) -> bool:
        """Whether the exported student has the tokenizer files of the teacher."""
        return self.train.chat_template == "teacher"


@dataclass(frozen=True, slots=True)
class Endings:
    """How responses ended by themselves."""

    tokens: Counter[int] = field(default_factory=Counter)
    """Last tokens of responses that the teacher ended, and how often each was seen."""


def some_prompts(prompts: Sequence[Ids]) -> list[Ids]:
    """At most :data:`LOOKED_AT` of them, spread evenly."""
    return [prompts[index] for index in spread(len(prompts))]


def spread(count: int) -> list[int]:
    """At most :data:`LOOKED_AT` places below ``count``, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, LOOKED_AT))})


def look_at(reader: LabelReader) -> tuple[list[Ids], Endings]:
    """Prompts and endings of some cached samples."""
    samples = reader.read(spread(reader.num_samples))
    ended = (s for s in samples if s.finish_reason == "stop" and s.stop_reason is None)
    endings = Endings(Counter(int(sample.response_ids_R[-1]) for sample in ended))
    return [sample.prompt_ids_P for sample in samples], endings


def _load_tokenizer(directory: Path, *, trust_code: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        directory, local_files_only=True, trust_remote_code=trust_code
    )
