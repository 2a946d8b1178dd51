"""Where inspected samples come from: a label set, its tokenizer, and what it is compared with."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.inspection.compare import of_other_labels, same_tokens
from pipeline.inspection.record import InspectedSample, Prediction, inspect_sample
from pipeline.inspection.vocabulary import Vocabulary
from storage.errors import ConfigError
from storage.label_set import LabelSet

if TYPE_CHECKING:
    from pipeline.inspection.student import StudentModel

PLAIN_IDS = "ids"
"""Given as the tokenizer: show the numbers of tokens."""

MAX_STUDENTS = 2
SHOWN_KEY_DIGITS = 12


class Inspector:
    """Reads samples of one label set and puts the predictions of others beside them.

    Students are loaded when the first sample is read.

    Args:
        label_set: The set.
        store: URI of its store.
        vocabulary: Its tokens as text.
        others: Label sets to compare with.
        students: Directories of students to compare with.

    Raises:
        ConfigError: for more than two students, or the set itself among the others.
    """

    def __init__(
        self,
        label_set: LabelSet,
        store: str,
        vocabulary: Vocabulary,
        *,
        others: Sequence[LabelSet] = (),
        students: Sequence[Path] = (),
    ) -> None:
        if len(students) > MAX_STUDENTS:
            raise ConfigError(
                f"{len(students)} students were given; compare at most {MAX_STUDENTS} at a time"
            )
        if any(other.key == label_set.key for other in others):
            raise ConfigError(f"label set {label_set.key} cannot be compared with itself")
        self.label_set, self.store, self.vocabulary = label_set, store, vocabulary
        self._others, self._directories = others, students
        self._students: list[StudentModel] | None = None

    @property
    def compares(self) -> bool:
        """Whether there is a second prediction of every sample."""
        return bool(self._others or self._directories)

    def read(self, keys: Sequence[str]) -> Iterator[InspectedSample]:
        """Samples in the order of their keys, verified.

        Raises:
            NotLabelledError: if one is not stored.
            LabelStoreError: if another label set does not have the same tokens.
        """
        for sample in self.label_set.read(keys):
            predictions: list[Prediction] = [
                of_other_labels(sample, same_tokens(sample, other), other.key[:SHOWN_KEY_DIGITS])
                for other in self._others
            ]
            predictions += [student.predict(sample) for student in self._loaded()]
            yield inspect_sample(
                sample,
                self.vocabulary,
                store=self.store,
                label_set=self.label_set.key,
                others=predictions,
            )

    def _loaded(self) -> "list[StudentModel]":
        if self._students is None:
            self._students = []
            for directory, name in zip(
                self._directories, student_names(self._directories), strict=True
            ):
                from pipeline.inspection.student import StudentModel

                student = StudentModel(directory, self.label_set.spec.vocab_size, name=name)
                self._students.append(student)
        return self._students


def student_names(directories: Sequence[Path]) -> list[str]:
    """What to call students: the name of their folder, or the whole path where that is not enough.

    The exported model of a student lies in its folder as ``model``.
    """
    names = [d.parent.name if d.name == "model" else d.name for d in directories]
    unique = len(set(names)) == len(names) and all(names)
    return names if unique else [str(directory) for directory in directories]


def find_vocabulary(label_set: LabelSet, tokenizer: str | None) -> Vocabulary:
    """The vocabulary of a label set's teacher.

    Args:
        label_set: The set; its provenance names the teacher.
        tokenizer: Directory of a tokenizer, or ``ids``; None for the teacher's own, which must
            still be on this machine and have the recorded tokenizer.

    Raises:
        ConfigError: if there is none.
    """
    if tokenizer == PLAIN_IDS:
        return Vocabulary({})
    if tokenizer is not None:
        return Vocabulary.read(Path(tokenizer))
    recorded = label_set.document.provenance
    teacher = recorded.get("teacher", "")
    directory = _directory_of(teacher)
    if directory is None:
        raise ConfigError(
            f"the tokenizer of label set {label_set.key} is not on this machine (its teacher was "
            f"{teacher!r}); name its directory with --tokenizer DIR, or show numbers with "
            f"--tokenizer {PLAIN_IDS}"
        )
    _require_recorded(directory, recorded.get("tokenizer"))
    return Vocabulary.read(directory)


def _directory_of(teacher: str) -> Path | None:
    """A local directory, or the cached copy of a model on a hub."""
    if teacher and (Path(teacher) / "tokenizer.json").is_file():
        return Path(teacher)
    if teacher.count("/") != 1 or teacher.startswith((".", "/", "~")):
        return None
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        cached = try_to_load_from_cache(teacher, "tokenizer.json")
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _require_recorded(directory: Path, recorded: str | None) -> None:
    """The tokenizer must be the one of the labels.

    Raises:
        ConfigError: if it was changed since.
    """
    from storage.fingerprint import DigestMemo, tokenizer_digest

    if recorded is not None and tokenizer_digest(directory, DigestMemo(None)) != recorded:
        raise ConfigError(
            f"the tokenizer in {str(directory)!r} is not the one of these labels, it was replaced "
            "since; name the directory of the right one with --tokenizer DIR"
        )
