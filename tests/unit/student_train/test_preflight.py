"""A student that would misread the cached ids is refused before the first step."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from storage.keys import MassSpec
from storage.selection import SampleRequest, Selection
from storage.store import LabelStore
from storage.testing import make_sample, make_spec
from student_train import __main__ as command
from student_train.config import HybridLossConfig, LabelSource, TrainConfig, TrainJob
from student_train.errors import PreflightError
from student_train.losses.base import PADDING_ID
from student_train.models.student import Student
from student_train.preflight import before_training
from student_train.preflight.before_training import PREFLIGHT_FILE, require_fit_job
from student_train.preflight.checks import check_columns, check_unlabelled
from student_train.preflight.findings import Finding, require_fit
from student_train.preflight.room import Memory, Ranks
from student_train.preflight.vocabulary import check_cutting, check_rows, check_tokens
from student_train.schedules import StepState
from student_train.streaming.reader import LabelReader, collate
from tests.unit.student_train.conftest import VOCAB_SIZE
from tests.unit.student_train.preflight_models import (
    FAMILIES,
    NO_SPECIAL_TOKENS,
    chat_prompt,
    make_tokenizer,
    save_model,
    subject_of,
)
from tests.unit.student_train.preflight_models import VOCAB_SIZE as BYTE_VOCAB_SIZE

SaveStudent = Callable[..., Path]
ENOUGH = Ranks(1, Memory(2**40, on_host=True))


def check(student: Path, teacher: Path, labels: LabelSource, **train: Any) -> None:
    settings = TrainConfig.model_validate({"model": str(student), **train})
    output = student.parent / "run"
    job = TrainJob(
        labels=labels,
        model=str(student),
        tokenizer=str(teacher),
        train=settings,
        output=str(output),
    )
    require_fit_job(job, LabelReader(labels))


def test_a_student_with_the_teachers_tokenizer_fits(
    tmp_path: Path, save_student: SaveStudent, labels: LabelSource
) -> None:
    check(save_student(tmp_path / "student"), save_student(tmp_path / "teacher"), labels)
    findings = json.loads((tmp_path / "run" / PREFLIGHT_FILE).read_text())
    assert {finding["verdict"] for finding in findings} == {"ok"}
    assert len({finding["check"] for finding in findings}) == len(findings) > 8


def test_a_student_whose_tokenizer_has_more_tokens_fits(
    tmp_path: Path, save_student: SaveStudent, labels: LabelSource
) -> None:
    student = save_student(tmp_path / "student")
    document = json.loads((student / "tokenizer.json").read_text())
    document["model"]["vocab"]["w40"] = 40
    (student / "tokenizer.json").write_text(json.dumps(document))
    check(student, save_student(tmp_path / "teacher"), labels)


def test_another_tokenizer_is_refused_naming_a_token(
    tmp_path: Path, save_student: SaveStudent, labels: LabelSource
) -> None:
    student = save_student(tmp_path / "student", swap_tokens=True)
    teacher = save_student(tmp_path / "teacher")
    expected = r"maps 2 of 40 tokens to other ids .*first: 'w7', 7 in the labels, 8 in the student"
    with pytest.raises(PreflightError, match=expected):
        check(student, teacher, labels)
    with pytest.raises(PreflightError, match=expected):  # other ids are no matter of files
        check(student, teacher, labels, chat_template="teacher")


def test_a_token_that_the_student_lacks_is_named(
    tmp_path: Path, save_student: SaveStudent, labels: LabelSource
) -> None:
    student = save_student(tmp_path / "student")
    document = json.loads((student / "tokenizer.json").read_text())
    del document["model"]["vocab"]["w39"]
    (student / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(PreflightError, match="'w39', 39 in the labels, None in the student"):
        check(student, save_student(tmp_path / "teacher"), labels)


def test_a_student_without_a_tokenizer_is_refused(
    tmp_path: Path, save_student: SaveStudent, labels: LabelSource
) -> None:
    student = save_student(tmp_path / "student")
    (student / "tokenizer.json").unlink()
    with pytest.raises(PreflightError, match=r"has no tokenizer\.json"):
        check(student, save_student(tmp_path / "teacher"), labels)


def test_the_same_tokens_that_cut_text_otherwise_are_refused(tmp_path: Path) -> None:
    student = save_model(tmp_path / "student", digits=True)
    teacher = save_model(tmp_path / "teacher")
    subject = subject_of(student, teacher)
    assert check_tokens(subject).verdict == "ok"
    found = check_cutting(subject)
    assert found.verdict == "refused"
    assert found.sentence.endswith("set train.chat_template: teacher")
    assert check_cutting(subject_of(student, teacher, chat_template="teacher")).verdict == "ok"


@pytest.mark.parametrize("context", [11, 12])
def test_a_context_shorter_than_the_longest_sample_is_refused(
    tmp_path: Path, save_student: SaveStudent, labels: LabelSource, context: int
) -> None:
    # sample 5: a prompt of 4 + 5 % 3 = 6 tokens, a response of 2 + 5 = 7: 13 tokens
    student = save_student(tmp_path / "student", max_position_embeddings=context)
    expected = f"longest sample has 13 tokens, the student's context is {context}; lower"
    with pytest.raises(PreflightError, match=expected):
        check(student, save_student(tmp_path / "teacher"), labels)


def test_a_context_of_exactly_the_longest_sample_fits(
    tmp_path: Path, save_student: SaveStudent, labels: LabelSource
) -> None:
    student = save_student(tmp_path / "student", max_position_embeddings=13)
    check(student, save_student(tmp_path / "teacher"), labels)


def test_everything_that_is_wrong_is_said_at_once(
    tmp_path: Path, save_student: SaveStudent, labels: LabelSource
) -> None:
    student = save_student(tmp_path / "student", swap_tokens=True, max_position_embeddings=12)
    loss = {"weight": {"type": "entropy", "measure": "power_sum"}}
    with pytest.raises(PreflightError) as caught:
        check(student, save_student(tmp_path / "teacher"), labels, loss=loss)
    first, *reasons = str(caught.value).splitlines()
    assert first == "student and labels do not fit in 3 ways:"
    assert ["maps 2 of 40" in reasons[0], "columns" in reasons[1], "13 tokens" in reasons[2]] == [
        True
    ] * 3


def test_refusals_are_raised_and_warnings_are_not() -> None:
    require_fit([Finding("a", "warning", "careful"), Finding("b", "unknown", "later")])
    with pytest.raises(PreflightError, match=r"^too small$"):
        require_fit([Finding("a", "warning", "careful"), Finding("b", "refused", "too small")])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_vocabulary_fits_and_a_smaller_one_is_refused(tmp_path: Path, family: str) -> None:
    teacher = save_model(tmp_path / "teacher", family)
    prompt = chat_prompt(make_tokenizer())
    padded = save_model(tmp_path / "padded", family, changes={"vocab_size": 320})
    findings = check_unlabelled(subject_of(padded, teacher, prompt), 64, ENOUGH)
    assert {finding.verdict for finding in findings} == {"ok", "unknown"}  # no columns yet
    (rows,) = (finding for finding in findings if finding.check == "vocabulary")
    assert f"{320 - BYTE_VOCAB_SIZE - 1} more rows are padding" in rows.sentence
    small = save_model(tmp_path / "small", family, changes={"vocab_size": 200})
    findings = check_unlabelled(subject_of(small, teacher, prompt), 64, ENOUGH)
    (refused,) = (finding for finding in findings if finding.verdict == "refused")
    assert refused.sentence.startswith("the student's vocabulary has 200 rows, the labels use 262;")


def test_rows_of_exactly_the_vocabulary_fit(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    found = check_rows(subject_of(model, model), BYTE_VOCAB_SIZE + 1)
    assert (found.verdict, "padding" in found.sentence) == ("ok", False)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_looked_at_before_there_are_labels(tmp_path: Path, family: str) -> None:
    """Template, context and all the rest, in one go; columns and endings are still unknown."""
    student = save_model(tmp_path / "student", family, template=NO_SPECIAL_TOKENS)
    teacher = save_model(tmp_path / "teacher", family)
    subject = subject_of(student, teacher, chat_prompt(make_tokenizer()))
    findings = check_unlabelled(subject, 65, ENOUGH)
    verdicts = {finding.check: finding.verdict for finding in findings}
    assert len(verdicts) == len(findings)
    assert {name for name, verdict in verdicts.items() if verdict == "refused"} == {
        "chat template",
        "context",
    }
    assert verdicts["label columns"] == "unknown"


def test_a_student_that_cannot_be_loaded_is_one_sentence(tmp_path: Path) -> None:
    teacher = save_model(tmp_path / "teacher")
    student = save_model(tmp_path / "student")
    (student / "config.json").write_text(json.dumps({"model_type": "not_known_anywhere"}))
    findings = check_unlabelled(subject_of(student, teacher), 64, ENOUGH)
    (refused,) = (finding for finding in findings if finding.verdict == "refused")
    assert "cannot be loaded" in refused.sentence


def test_labels_with_a_varying_number_of_tokens_fit(
    tmp_path: Path, save_student: SaveStudent, tiny_model: Callable[..., Any]
) -> None:
    """As many tokens as reach a mass: the rows of one batch store different numbers of them."""
    spec = make_spec(vocab_size=VOCAB_SIZE, kind=MassSpec(mass=0.5, cap=6))
    samples = [make_sample(number, spec, num_tokens=4) for number in range(3)]
    store = LabelStore(str(tmp_path / "store"), create=True)
    label_set = store.create(spec, {})
    label_set.append(samples, {})
    requests = (SampleRequest(s.key, s.sample_index, s.prompt_ids_P, None, ()) for s in samples)
    selection = Selection(tuple(requests)).save(store.objects)
    source = LabelSource(store=store.uri, label_set=label_set.key, selection=selection)
    student = save_student(tmp_path / "student")
    check(student, student, source)
    reader = LabelReader(source)
    batch = collate(reader.read(range(3)), "sampled", reader.spec)
    stored = (batch.labels.topk_ids_MK != PADDING_ID).sum(dim=-1)
    assert len(set(stored.tolist())) > 1
    model = Student(tiny_model(), HybridLossConfig(), reader.vocab_size)
    terms = model(batch, StepState(step=0, total_steps=1))
    assert bool(torch.isfinite(terms.total))
    terms.total.backward()


def test_a_loss_whose_columns_are_not_stored_is_refused_naming_them(labels: LabelSource) -> None:
    loss = HybridLossConfig.model_validate({"weight": {"type": "entropy", "measure": "power_sum"}})
    found = check_columns(loss, LabelReader(labels))
    assert found.verdict == "refused"
    assert "needs the label columns power_sum_10" in found.sentence
    assert "label again" in found.sentence


def test_a_loss_whose_columns_are_stored_is_served(labels: LabelSource) -> None:
    loss = HybridLossConfig.model_validate({"weight": "entropy"})
    assert check_columns(loss, LabelReader(labels)).verdict == "ok"


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "ranks"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_what_another_rank_refuses_is_refused_here_too(
    tmp_path: Path, save_student: SaveStudent, labels: LabelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host with too little memory: the others would wait for its rank."""
    student = save_student(tmp_path / "student")
    check(student, student, labels)
    elsewhere = Finding("memory", "refused", "that host is too small")
    monkeypatch.setattr(before_training, "gather_over_ranks", lambda own: [own, [elsewhere]])
    with pytest.raises(PreflightError, match=r"^that host is too small$"):
        check(student, student, labels)


def test_a_warning_is_said_and_does_not_stop(
    tmp_path: Path,
    save_student: SaveStudent,
    labels: LabelSource,
    capsys: pytest.CaptureFixture[str],
) -> None:
    student = save_student(tmp_path / "student")
    settings = json.loads((student / "tokenizer_config.json").read_text())
    settings["eos_token"] = "w9"
    (student / "tokenizer_config.json").write_text(json.dumps(settings))
    check(student, save_student(tmp_path / "teacher"), labels)
    assert "warning: special tokens: special tokens differ: eos_token is '</s>'" in (
        capsys.readouterr().err
    )


def test_a_job_is_checked_without_training(
    tmp_path: Path,
    save_student: SaveStudent,
    labels: LabelSource,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    student = save_student(tmp_path / "student")
    file = tmp_path / "job.json"

    def run(*words: str, **changes: Any) -> tuple[int, str]:
        job = TrainJob(
            labels=labels,
            model=str(student),
            tokenizer=str(student),
            train=TrainConfig(model=str(student), **changes),
            output=str(tmp_path / "run"),
        )
        file.write_text(job.model_dump_json())
        monkeypatch.setattr("sys.argv", ["student_train", str(file), *words])
        code = command.main()
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    code, shown = run("--preflight")
    assert (code, "ok       vocabulary: 40 tokens of the labels have rows" in shown) == (0, True)
    assert not (tmp_path / "run").exists()
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 12}))
    code, shown = run("--preflight")
    assert (code, "error: the longest sample has 13 tokens" in shown) == (2, True)
    (student / "config.json").write_text(json.dumps(config))
    # labels that nobody's weights gave
    code, shown = run("--self-test")
    assert (code, "failed   forward_kl" in shown) == (2, True)
    assert "error: the teacher as its own student should have a loss near 0" in shown
    code, shown = run("--frobnicate")
    assert (code, "usage: python -m student_train" in shown) == (2, True)
