"""``distill preflight``, and what ``distill run`` refuses before the teacher is asked."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import run as run_module
from pipeline.cli import main
from pipeline.preflight import require_fit_before_labels
from pipeline.project import Project
from pipeline.run import plan_project, run_project
from pipeline.steps.label import requested_label_set
from storage.testing import make_sample
from student_train.errors import PreflightError

Capture = pytest.CaptureFixture[str]
Open = Callable[..., Project]

SHAPE = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}


@pytest.fixture
def student(tmp_path: Path, teacher_directory: Path) -> Path:
    """A copy of the teacher."""
    directory = tmp_path / "student"
    shutil.copytree(teacher_directory, directory)
    edit(directory / "config.json", num_attention_heads=2, num_key_value_heads=1, **SHAPE)
    return directory


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def chat_prompts(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "w1 w2"}]}
    for split in ("train", "heldout"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")


def findings(document: Any, student: str = "student") -> dict[str, str]:
    return {finding["check"]: finding["verdict"] for finding in document["students"][student]}


def test_before_labels_a_student_that_fits_is_in_order(
    as_json: Callable[..., Any], project_file: Path, student: Path
) -> None:
    document = as_json("preflight", str(project_file), "--set", f"train.model={student}")
    verdicts = findings(document)
    assert verdicts.pop("label columns") == "unknown"
    assert set(verdicts.values()) == {"ok"}
    assert {"tokens", "chat template", "vocabulary", "context", "memory"} < set(verdicts)


def test_what_does_not_fit_is_in_a_table_and_the_exit_code(
    project_file: Path, student: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    edit(student / "config.json", max_position_embeddings=13, vocab_size=20)
    words = ["preflight", str(project_file), "--set", f"train.model={student}"]
    assert main(words) == 2
    shown = capsys.readouterr()
    assert "with label.sampling.max_tokens samples reach 14 tokens" in shown.out
    assert "the student's vocabulary has 20 rows" in shown.out
    assert shown.err.splitlines()[-1].startswith("error: refused: student;")


def test_one_of_several_students_can_be_asked_for(
    as_json: Callable[..., Any], project_file: Path, student: Path, capsys: Capture
) -> None:
    words = ["preflight", str(project_file), "--set", f"train.model={student}"]
    words += ["--set", "students={a: {epochs: 2}, b: {}}"]
    assert set(as_json(*words)["students"]) == {"a", "b"}
    assert set(as_json(*words, "--student", "b")["students"]) == {"b"}
    assert main([*words, "--student", "c"]) == 2
    assert "there is no student 'c'; the config has a, b" in capsys.readouterr().err


def test_a_project_without_students_has_nothing_to_check(
    project_file: Path, capsys: Capture
) -> None:
    assert main(["preflight", str(project_file)]) == 2
    assert "has no section train" in capsys.readouterr().err


def test_a_filter_makes_room_in_the_context(
    as_json: Callable[..., Any], project_file: Path, student: Path
) -> None:
    """Prompts of 4 tokens and answers of 10: those that do not fit can be left out."""
    edit(student / "config.json", max_position_embeddings=13)
    words = ["preflight", str(project_file), "--set", f"train.model={student}"]
    assert findings(as_json(*words, code=2))["context"] == "refused"
    words += ["--set", "train.data.filter.max_tokens=13"]
    assert findings(as_json(*words))["context"] == "ok"


def test_no_labels_are_made_for_a_student_that_cannot_use_them(
    open_project: Open, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = open_project(f"train.model={student}")

    def label(*_: object, **__: object) -> None:
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(run_module, "label_project", label)
    edit(student / "config.json", vocab_size=20)
    with pytest.raises(PreflightError, match="student 'student': the student's vocabulary has 20"):
        run_project(project)


def test_a_student_without_template_is_refused_unless_it_gets_the_teachers(
    open_project: Open, student: Path, teacher_directory: Path, tmp_path: Path
) -> None:
    chat_prompts(tmp_path)
    template = "{% for m in messages %}w0 {{ m.content }} w9 {% endfor %}"
    teacher = tmp_path / "chatty"
    shutil.copytree(teacher_directory, teacher)
    edit(teacher / "tokenizer_config.json", chat_template=template)
    settings = [f"train.model={student}", f"teacher.model={teacher}"]
    settings += ["label.sampling.max_tokens=4"]
    with pytest.raises(PreflightError, match=r"chat template.*set train.chat_template: teacher"):
        require_fit_before_labels(open_project(*settings))
    require_fit_before_labels(open_project(*settings, "train.chat_template=teacher"))


def test_with_labels_the_training_looks_itself(open_project: Open, student: Path) -> None:
    project = open_project(f"train.model={student}")
    label_made_up(project)
    edit(student / "config.json", vocab_size=20)
    require_fit_before_labels(project)


def test_after_labelling_columns_and_lengths_are_known(
    as_json: Callable[..., Any], open_project: Open, project_file: Path, student: Path
) -> None:
    label_made_up(open_project())
    document = as_json("preflight", str(project_file), "--set", f"train.model={student}")
    verdicts = findings(document)
    assert set(verdicts.values()) == {"ok"}
    (context,) = (f for f in document["students"]["student"] if f["check"] == "context")
    assert context["sentence"].startswith("the longest sample has 9 tokens")


def test_the_self_test_needs_labels(project_file: Path, student: Path, capsys: Capture) -> None:
    words = ["preflight", str(project_file), "--set", f"train.model={student}", "--self-test"]
    assert main(words) == 2
    shown = capsys.readouterr()
    assert "the self-test needs labels; run `distill label` first" in shown.err
    assert "not labelled yet" in " ".join(shown.out.split())


def label_made_up(project: Project) -> None:
    """Give every sample of the plan five made-up tokens."""
    teacher, plan = plan_project(project)
    label_set = requested_label_set(project, plan, teacher)
    samples = [
        replace(make_sample(number, plan.spec), key=request.key, prompt_ids_P=request.prompt_ids_P)
        for number, request in enumerate(plan.requests())
    ]
    label_set.append(samples, {})
