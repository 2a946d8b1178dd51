"""Checks before the first step: do this student and these labels speak about the same tokens?"""

from pathlib import Path

from transformers import AutoConfig

from storage.tokenizer import token_map
from student_train.config import SupervisionConfig, missing_columns
from student_train.data import LabelReader
from student_train.errors import PreflightError


def check_student_fits_labels(model: str, tokenizer: str, reader: LabelReader) -> None:
    """Refuse a student that would misread the cached ids.

    Raises:
        PreflightError: one sentence with a way out.
    """
    ours, theirs = token_map(Path(model)), token_map(Path(tokenizer))
    differing = [token for token, number in theirs.items() if ours.get(token) != number]
    if differing:
        token = differing[0]
        raise PreflightError(
            f"the student's tokenizer {model!r} maps {len(differing)} of {len(theirs)} tokens to "
            f"other ids than the labels' (first: {token!r}, {theirs[token]} in the labels, "
            f"{ours.get(token)} in the student); choose a student of the teacher's family"
        )
    config = AutoConfig.from_pretrained(model, local_files_only=True)
    context = getattr(config, "max_position_embeddings", None)
    longest = int(reader.num_tokens.max())
    if context is not None and longest > context:
        raise PreflightError(
            f"the longest sample has {longest} tokens, the student's context is {context}; "
            "lower label.sampling.max_tokens or choose a student with a longer context"
        )


def check_labels_serve_loss(loss: SupervisionConfig, reader: LabelReader) -> None:
    """Refuse labels that lack an optional column which the loss is computed from.

    Raises:
        PreflightError: naming the columns.
    """
    missing = missing_columns(loss, reader.spec.columns)
    if missing:
        raise PreflightError(
            f"the loss (soft {loss.soft.type}, weight {loss.weight.type}) needs the label columns "
            f"{', '.join(missing)}, which label set {reader.spec.key} lacks; add them to "
            "label.columns and label again (stored responses are kept, only their labels are made "
            "anew)"
        )
