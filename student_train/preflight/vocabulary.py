"""Token ids: the same text must have the same id on both sides."""

from storage.tokenizer import token_map
from student_train.preflight.findings import Finding
from student_train.preflight.subject import Subject

PROBE = "Tom's 2 dogs  ran 1234.5 km;\n\tif (x != y) { return 'caf\u00e9'; } \u4f60\u597d "
"""Text on which tokenizers with the same tokens cut differently: digits, spaces, marks, letters
beyond ASCII."""

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def check_tokens(subject: Subject) -> Finding:
    """Every token of the teacher has the same id in the student.

    Raises:
        ConfigError: if one of them has no ``tokenizer.json``.
    """
    ours, theirs = token_map(subject.student), token_map(subject.teacher)
    differing = [token for token, number in theirs.items() if ours.get(token) != number]
    if differing:
        token = differing[0]
        return Finding(
            "tokens",
            "refused",
            f"the student's tokenizer {str(subject.student)!r} maps {len(differing)} of "
            f"{len(theirs)} tokens to other ids than the labels' (first: {token!r}, "
            f"{theirs[token]} in the labels, {ours.get(token)} in the student); choose a student "
            "of the teacher's family",
        )
    more = len(ours) - len(theirs)
    also = f"; the student knows {more} more" if more > 0 else ""
    return Finding("tokens", "ok", f"all {len(theirs)} tokens have the ids of the labels{also}")


def check_rows(subject: Subject, num_rows: int) -> Finding:
    """The student's output embedding has a row for every token of the labels.

    Args:
        subject: The student.
        num_rows: Rows of the student's output embedding.
    """
    if num_rows < subject.vocab_size:
        return Finding(
            "vocabulary",
            "refused",
            f"the student's vocabulary has {num_rows} rows, the labels use {subject.vocab_size}; "
            "choose a student with the teacher's tokenizer",
        )
    padding = num_rows - subject.vocab_size
    beyond = f"; {padding} more rows are padding and get no probability" if padding else ""
    return Finding(
        "vocabulary", "ok", f"{subject.vocab_size} tokens of the labels have rows{beyond}"
    )


def check_cutting(subject: Subject) -> Finding:
    """Both tokenizers cut a text in the same way, which equal ids alone do not mean."""
    if subject.gets_teachers_tokenizer:
        return Finding("text", "ok", "the exported student gets the teacher's tokenizer")
    ours, theirs = (
        tokenizer.encode(PROBE, add_special_tokens=False)
        for tokenizer in (subject.student_tokenizer, subject.teacher_tokenizer)
    )
    if ours == theirs:
        return Finding("text", "ok", "both tokenizers cut a probe text alike")
    return Finding(
        "text",
        "refused",
        "the student's tokenizer has the labels' tokens, but cuts text in another way "
        f"({len(ours)} tokens of a probe where the teacher's has {len(theirs)}), so it would be "
        "prompted with what it never learnt; set train.chat_template: teacher",
    )


def check_special_tokens(subject: Subject) -> Finding:
    """Which tokens stand for beginning, end, unknown and padding."""
    if subject.gets_teachers_tokenizer:
        return Finding("special tokens", "ok", "the exported student gets the teacher's")
    differing = {
        name: (getattr(subject.teacher_tokenizer, name), getattr(subject.student_tokenizer, name))
        for name in SPECIAL_TOKENS
        if getattr(subject.teacher_tokenizer, f"{name}_id")
        != getattr(subject.student_tokenizer, f"{name}_id")
    }
    padding = differing.pop("pad_token", None)
    if differing:
        listed = ", ".join(
            f"{name} is {theirs!r} in the labels and {ours!r} in the student"
            for name, (theirs, ours) in differing.items()
        )
        return Finding(
            "special tokens",
            "warning",
            f"special tokens differ: {listed}; set train.chat_template: teacher if the student is "
            "to use the teacher's",
        )
    harmless = "" if padding is None else "; that of padding differs, which has no effect"
    return Finding("special tokens", "ok", f"they have the same ids{harmless}")
