"""Lengths and costs of a plan, before anything is spent."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.project import Project
from pipeline.run import plan_project
from pipeline.steps.plan import Plan, forecast

OpenProject = Callable[..., Project]
WritePrompts = Callable[..., Path]
IDS_OF_W1 = 3


def plan_of(project: Project) -> Plan:
    with project.running():
        return plan_project(project)[1]


def of_length(num_tokens: int, word: str = "w1") -> str:
    return " ".join([word] * num_tokens)


def test_lengths_of_prompts_are_percentiles_that_occur(
    open_project: OpenProject, write_prompts: WritePrompts
) -> None:
    write_prompts("train", [of_length(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 20)])
    write_prompts("heldout", [of_length(9)])
    project = open_project("label.sampling.samples_per_prompt=3")
    found = forecast(project, plan_of(project))
    # of 1 to 9 and 20: half of them have at most 5 tokens, nine of ten at most 9
    assert found["prompt_tokens"] == {"p50": 5, "p90": 9, "max": 20}


def test_prompts_whose_responses_the_context_may_cut_are_counted(
    open_project: OpenProject, write_prompts: WritePrompts
) -> None:
    """The context has 32 tokens and a response up to 10: 22 leave room, 23 do not."""
    write_prompts("train", [of_length(22), of_length(23), of_length(31)])
    write_prompts("heldout", [of_length(23), of_length(1)])
    project = open_project("label.sampling.samples_per_prompt=2")
    found = forecast(project, plan_of(project))
    assert found["cut_by_context"] == 2  # one of them is in both splits
    # no length is known: the limit, or what the context leaves
    assert found["expected_response_tokens"] == 2 * (10 + 9 + 1 + 10)
    assert found["expected_prompt_tokens"] == 2 * (22 + 23 + 31 + 1)
    assert found["expected_forward_tokens"] == 2 * (22 + 23 + 31 + 1) + 2 * (10 + 9 + 1 + 10)
    assert found["expected_labelled_tokens"] == found["expected_response_tokens"]


def test_masked_tokens_go_through_the_teacher_and_are_not_stored(
    open_project: OpenProject, write_prompts: WritePrompts
) -> None:
    write_prompts(
        "train",
        [
            {
                "prompt": "w1 w2",
                "completion_ids": [IDS_OF_W1] * 6,
                "label_mask": [1, 1, 0, 0, 0, 1],
            }
        ],
    )
    write_prompts("heldout", [{"prompt": "w1", "completion_ids": [IDS_OF_W1] * 4}])
    project = open_project(
        "label.mode=score", "label.sampling={}", "label.sampling.max_tokens=1024"
    )
    found = forecast(project, plan_of(project))
    assert found["expected_forward_tokens"] == 2 + 6 + 1 + 4
    assert found["expected_response_tokens"] == 6 + 4
    assert found["expected_labelled_tokens"] == 3 + 4
    assert found["expected_bytes"] == (3 + 4) * 24  # 14 of scalars, 4 * 2.5 of the top-4
    assert found["cut_by_context"] == 0


def test_masks_of_a_plan_are_stored_and_read(
    open_project: OpenProject, write_prompts: WritePrompts
) -> None:
    row = {"prompt": "w1", "completion_ids": [IDS_OF_W1] * 3, "label_mask": [1, 0, 1]}
    write_prompts("train", [row])
    write_prompts("heldout", [])
    overrides = ("label.mode=score", "label.sampling={}", "label.sampling.max_tokens=1024")
    first, again = (plan_of(open_project(*overrides)) for _ in range(2))
    assert first.selection_keys == again.selection_keys
    (request,) = again.requests()
    assert request.is_genuine
    assert request.label_mask_R is not None
    assert request.label_mask_R.tolist() == [True, False, True]


def test_settings_of_the_tokenizer_make_another_plan(
    open_project: OpenProject, teacher_directory: Path, tmp_path: Path
) -> None:
    """The end-of-sequence token is in no other file, and it ends every completion."""
    copy = tmp_path / "teacher"
    copy.mkdir()
    for file in teacher_directory.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    project = open_project(f"teacher.model={copy}")
    plan_of(project)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "w0"}))
    plan_of(open_project(f"teacher.model={copy}"))
    assert len(list((project.directory / "plans").iterdir())) == 2


def test_lengths_and_cuts_are_shown(
    open_project: OpenProject,
    write_prompts: WritePrompts,
    project_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_prompts("train", [of_length(n) for n in (2, 4, 25)])
    assert main(["plan", str(project_file)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "tokens of a prompt: p50 2, p90 25, max 25; the context has 32" in shown
    assert "note: 1 prompts leave less room than label.sampling.max_tokens" in shown
    write_prompts("train", ["w1"])
    assert main(["plan", str(project_file)]) == 0
    assert "leave less room" not in capsys.readouterr().out
