"""The plan: which labels exist, and what the rest will cost, before anything is spent."""

from collections.abc import Callable, Sequence
from pathlib import Path
from shutil import rmtree

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.project import Project
from pipeline.run import plan_project
from pipeline.steps.plan import Plan, forecast
from storage.errors import ConfigError, InputError
from storage.selection import SampleRequest
from storage.testing import label_sample_densely

OpenProject = Callable[..., Project]
WritePrompts = Callable[..., Path]


def plan_of(project: Project) -> Plan:
    with project.running():
        return plan_project(project)[1]


def label(project: Project, plan: Plan, requests: Sequence[SampleRequest], num_tokens: int) -> None:
    """Store made-up labels of responses of this length."""
    random = np.random.default_rng(0)
    logits_RV = random.normal(size=(num_tokens, plan.spec.vocab_size))
    logprobs_RV = logits_RV - np.log(np.exp(logits_RV).sum(axis=1, keepdims=True))
    response_R = np.arange(num_tokens, dtype=np.int32)
    samples = [
        label_sample_densely(
            request,
            response_R if request.response_ids_R is None else request.response_ids_R,
            logprobs_RV,
            plan.spec,
        )
        for request in requests
    ]
    project.store.create(plan.spec, {}).append(samples, {})


def counts(split: dict[str, int]) -> tuple[int, ...]:
    """Prompts, samples, hits, upgrades and misses of a split."""
    return tuple(split[name] for name in ("prompts", "samples", "hits", "upgrades", "misses"))


def test_a_new_project_misses_everything(open_project: OpenProject) -> None:
    project = open_project()
    plan = plan_of(project)
    found = forecast(project, plan)
    assert found["splits"] == {
        "train": {"prompts": 4, "samples": 4, "hits": 0, "upgrades": 0, "misses": 4},
        "heldout": {"prompts": 2, "samples": 2, "hits": 0, "upgrades": 0, "misses": 2},
    }
    assert (found["hits"], found["misses"]) == (0, 6)
    # 1 + 2 + 3 + 4 tokens of train, 1 + 2 of held-out prompts
    assert found["expected_prompt_tokens"] == 13
    # no response is known yet: the limit of 10 tokens for each of the 6
    assert found["expected_response_tokens"] == 60
    # 14 bytes of scalars and 4 * 2.5 of the top-4 per token
    assert found["expected_bytes"] == 60 * 24
    assert found["in_both_splits"] == 0
    assert found["label_set"] == plan.spec.key


def test_planning_writes_no_label_and_no_label_set(open_project: OpenProject) -> None:
    project = open_project()
    plan_of(project)
    assert project.store.keys() == []


def test_cached_labels_are_hits_and_tell_the_expected_length(open_project: OpenProject) -> None:
    project = open_project()
    plan = plan_of(project)
    label(project, plan, plan.selections["train"].requests[:3], num_tokens=4)
    found = forecast(project, plan)
    assert counts(found["splits"]["train"]) == (4, 4, 3, 0, 1)
    assert (found["hits"], found["misses"]) == (3, 3)
    assert found["expected_response_tokens"] == 3 * 4  # three misses, 4 tokens on average
    assert found["expected_prompt_tokens"] == 4 + 1 + 2


def test_prompts_that_are_added_are_the_only_new_misses(
    open_project: OpenProject, write_prompts: WritePrompts
) -> None:
    project = open_project()
    plan = plan_of(project)
    label(project, plan, plan.requests(), num_tokens=4)
    assert forecast(project, plan)["misses"] == 0
    # in another order, with one that is new
    write_prompts("train", ["w9 w9", "w1 w2 w3 w4", "w1 w2 w3", "w1 w2", "w1"])
    found = forecast(project, plan_of(project))
    assert (found["hits"], found["misses"]) == (6, 1)
    assert found["expected_prompt_tokens"] == 2


def test_more_responses_per_prompt_extend_the_same_label_set(open_project: OpenProject) -> None:
    project = open_project()
    plan = plan_of(project)
    label(project, plan, plan.requests(), num_tokens=4)
    more = open_project("label.sampling.samples_per_prompt=2")
    found = forecast(more, plan_of(more))
    assert found["label_set"] == plan.spec.key
    assert counts(found["splits"]["train"]) == (4, 8, 4, 0, 4)


def test_another_teacher_dtype_misses_everything(open_project: OpenProject) -> None:
    project = open_project()
    plan = plan_of(project)
    label(project, plan, plan.requests(), num_tokens=4)
    other = open_project("teacher.dtype=bfloat16")
    assert forecast(other, plan_of(other))["misses"] == 6


def test_a_smaller_request_is_served_by_the_stored_labels(open_project: OpenProject) -> None:
    project = open_project()
    plan = plan_of(project)
    label(project, plan, plan.requests(), num_tokens=4)
    smaller = open_project("label.kind.k=3", "label.columns=[]")
    found = forecast(smaller, plan_of(smaller))
    assert found["label_set"] != plan.spec.key
    assert (found["hits"], found["upgrades"], found["misses"]) == (6, 0, 0)
    assert found["expected_response_tokens"] == found["expected_bytes"] == 0


def test_a_larger_request_is_an_upgrade_where_the_response_is_stored(
    open_project: OpenProject,
) -> None:
    project = open_project()
    plan = plan_of(project)
    label(project, plan, plan.selections["train"].requests[:3], num_tokens=4)
    larger = open_project("label.kind.k=5")
    found = forecast(larger, plan_of(larger))
    assert counts(found["splits"]["train"]) == (4, 4, 0, 3, 1)
    assert counts(found["splits"]["heldout"]) == (2, 2, 0, 0, 2)
    assert (found["hits"], found["upgrades"], found["misses"]) == (0, 3, 3)
    # upgrades cost as much as misses: the same teacher's responses have 4 tokens on average
    assert found["expected_response_tokens"] == 6 * 4
    assert found["expected_prompt_tokens"] == 13


def test_the_plan_is_shown_as_a_table(
    open_project: OpenProject, project_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = open_project()
    plan = plan_of(project)
    label(project, plan, plan.selections["train"].requests[:3], num_tokens=4)
    wider = open_project("label.kind.k=6")
    label(wider, plan_of(wider), plan.selections["train"].requests[:1], num_tokens=4)
    assert main(["plan", str(project_file), "--set", "label.kind.k=5"]) == 0
    shown = capsys.readouterr().out
    rows = [line.replace("\u2502", " ").split() for line in shown.splitlines()]
    # prompts, samples, cached, upgradable, to label
    assert ["train", "4", "4", "1", "2", "1"] in rows
    assert ["heldout", "2", "2", "0", "0", "2"] in rows
    assert ["distinct", "6", "1", "2", "3"] in rows
    text = " ".join(shown.split())
    assert "2 upgradable samples keep their responses" in text
    assert "to label: 5 samples" in text


def test_equal_prompts_are_one_sample(
    open_project: OpenProject, write_prompts: WritePrompts
) -> None:
    write_prompts("train", ["w1", "w2", "w1"])
    write_prompts("heldout", ["w2", "w3"])
    project = open_project()
    found = forecast(project, plan_of(project))
    assert counts(found["splits"]["train"]) == (3, 2, 0, 0, 2)
    assert found["misses"] == 3  # w1, w2, w3
    assert found["in_both_splits"] == 1


def test_scored_completions_have_exactly_known_costs(
    open_project: OpenProject, write_prompts: WritePrompts
) -> None:
    write_prompts("train", [{"prompt": "w1 w2", "completion": "w3 w4 w5"}])
    write_prompts(
        "heldout",
        [
            {
                "messages": [
                    {"role": "user", "content": "w1"},
                    {"role": "assistant", "content": "w2"},
                ]
            }
        ],
    )
    project = open_project(
        "label.mode=score", "label.sampling={}", "label.sampling.max_tokens=1024"
    )
    plan = plan_of(project)
    found = forecast(project, plan)
    # 3 tokens and an end, which a completion gets; the template here writes none
    assert found["expected_response_tokens"] == 4 + 1
    assert found["expected_prompt_tokens"] == 2 + 1
    assert plan.max_model_len == 2 + 4 + 1
    label(project, plan, plan.selections["train"].requests, num_tokens=4)
    assert forecast(project, plan)["expected_response_tokens"] == 1


def test_room_is_planned_for_the_longest_prompt_and_a_full_response(
    open_project: OpenProject,
) -> None:
    assert plan_of(open_project()).max_model_len == 4 + 10


def test_an_unchanged_project_is_planned_from_its_record(open_project: OpenProject) -> None:
    one, other = plan_of(open_project()), plan_of(open_project())
    assert one.selection_keys == other.selection_keys
    assert len(list((open_project().directory / "plans").iterdir())) == 1


def test_a_store_that_was_emptied_gets_its_selections_again(open_project: OpenProject) -> None:
    """The record of the plan lies in the run folder and outlives the store."""
    project = open_project()
    before = plan_of(project).selection_keys
    rmtree(project.store_uri)
    assert plan_of(open_project()).selection_keys == before


# -- prompts that cannot be used ------------------------------------------------------------------
def test_bad_rows_of_all_splits_stop_the_plan_and_nothing_is_stored(
    open_project: OpenProject, write_prompts: WritePrompts
) -> None:
    write_prompts("train", ["w1", {"id": 1}])
    write_prompts("heldout", [{"prompt": ""}])
    project = open_project()
    with pytest.raises(InputError, match="2 unusable rows") as caught:
        plan_of(project)
    assert "train.jsonl:2: " in str(caught.value)
    assert "heldout.jsonl:1: " in str(caught.value)
    assert list(Path(project.store_uri).rglob("*.arrow")) == []


def test_bad_rows_can_be_skipped_and_are_listed(
    open_project: OpenProject, write_prompts: WritePrompts
) -> None:
    too_long = " ".join(["w1"] * 32)  # the context has 32 tokens: no room for an answer
    write_prompts("train", ["w1", {"id": 1}, too_long])
    project = open_project("data.on_bad_row=skip")
    found = forecast(project, plan_of(project))
    assert found["splits"]["train"]["samples"] == 1
    assert [row.split(": ")[0].rsplit("/", 1)[1] for row in found["skipped_rows"]] == [
        "train.jsonl:2",
        "train.jsonl:3",
    ]


@pytest.mark.parametrize("overrides", [(), ("data.on_bad_row=skip",)])
def test_train_files_without_a_usable_prompt_are_refused(
    open_project: OpenProject, write_prompts: WritePrompts, overrides: tuple[str, ...]
) -> None:
    write_prompts("train", [{"id": 1}] if overrides else [])
    with pytest.raises(InputError, match=r"data\.train hold no usable prompt"):
        plan_of(open_project(*overrides))


def test_a_missing_prompt_file_is_named(open_project: OpenProject) -> None:
    with pytest.raises(InputError, match=r"gone\.jsonl' does not exist"):
        plan_of(open_project("data.train=[{path: gone.jsonl}]"))


# -- teachers that cannot be used -----------------------------------------------------------------
def test_more_stored_tokens_than_the_vocabulary_has_are_refused(open_project: OpenProject) -> None:
    with pytest.raises(ConfigError, match=r"label\.kind\.k is 31, .* vocabulary has 30 tokens"):
        plan_of(open_project("label.kind.k=31"))


def test_a_teacher_directory_that_does_not_exist_is_named(open_project: OpenProject) -> None:
    with pytest.raises(ConfigError, match=r"model directory './gone' does not exist"):
        plan_of(open_project("teacher.model=./gone"))


def test_a_teacher_that_brings_code_is_refused_unless_it_is_trusted(
    open_project: OpenProject, teacher_directory: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "with-code"
    copy.mkdir()
    for file in teacher_directory.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace("{", '{"auto_map": {"AutoModel": "x.Y"}, ', 1))
    with pytest.raises(ConfigError, match=r"brings its own code; .*trust_remote_code: true"):
        plan_of(open_project(f"teacher.model={copy}"))
