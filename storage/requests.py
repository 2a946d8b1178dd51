"""One sample that somebody asks for: what the teacher is given, and where it came from."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage.keys import sample_key


@dataclass(frozen=True, slots=True)
class Source:
    """Where a prompt was read."""

    file: str
    line: int
    """1-based line of a JSONL file, 0-based row of a Parquet file or dataset plus one."""
    id: str


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One sample to be labelled, or looked up."""

    key: str
    sample_index: int
    prompt_ids_P: npt.NDArray[np.int32]
    """int32[P]: tokens given to the teacher."""
    response_ids_R: npt.NDArray[np.int32] | None
    """int32[R]: the known response, None where the teacher has to answer. Known are those of score
    mode, and stored answers that are scored again for more labels."""
    sources: tuple[Source, ...]
    """Every row that asked for this sample; equal prompts are one sample with several sources."""
    label_mask_R: npt.NDArray[np.bool_] | None = None
    """bool[R]: which tokens of a given response are labelled, None for all."""
    finish_reason: str = "given"
    """How a known response ended: that of its sample where the teacher's own, stored answer is
    scored again. Part of neither the key nor a stored selection."""
    stop_reason: str | None = None
    """The stop string that ended a known response, if one did; stored as little."""

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        # a third of what pickling a dataclass costs: millions of them travel to engines
        return type(self), tuple(getattr(self, name) for name in self.__slots__)

    @property
    def is_genuine(self) -> bool:
        """Whether the key is that of the tokens."""
        return self.key == sample_key(
            self.prompt_ids_P,
            self.sample_index,
            response_ids=self.response_ids_R,
            label_mask=self.label_mask_R,
        )
