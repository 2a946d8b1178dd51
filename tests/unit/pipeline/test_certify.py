"""Certificates on the command line: shown, made once, never for nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.cluster import Cluster
from pipeline.project import Project
from pipeline.run import plan_project
from pipeline.steps.certify import certify_labels, in_words, valid_certificate
from pipeline.steps.plan import Plan
from storage.agreement import DenseRows
from storage.certificate import Certificate
from storage.label_set import LabelSet
from storage.qa import QaConfig
from storage.samples import LabelledSample
from storage.store import LabelStore
from storage.testing import label_sample_densely, make_sample, make_spec
from teacher_server.certify import certify

SPEC = make_spec()
AsJson = Callable[..., Any]
Capture = pytest.CaptureFixture[str]


class PerfectRescorer:
    """Finds exactly what is stored, off by ``nats``."""

    def __init__(self, nats: float) -> None:
        self._nats = nats

    def describe(self) -> dict[str, str]:
        return {"backend": "perfect"}

    def close(self) -> None:
        """Nothing to free."""

    def score(self, sample: LabelledSample, heads: Any = ()) -> DenseRows:
        zeros_N = np.zeros(len(sample.positions_N))
        return DenseRows(
            logprobs_NK=sample.topk_logprobs_NK.astype(np.float64),
            log_tail_mass_N=sample.log_tail_mass_N.astype(np.float64),
            token_logprob_N=sample.token_logprob_N + self._nats,
            scalars={"entropy": sample.optional["entropy"].astype(np.float64)},
            top_ids_NK=sample.topk_ids_NK,
            rank_gap_N=zeros_N,
            head_gaps=(zeros_N,),
            padding_mass_N=zeros_N,
        )


def certified(store: Path, *, nats: float = 0.0, **settings: Any) -> Certificate:
    label_set = LabelStore(str(store)).open(SPEC.key)
    return certify(
        label_set, "unused", QaConfig(**settings), start=lambda *_: PerfectRescorer(nats)
    )


@pytest.fixture
def words(store: Path, tmp_path: Path) -> list[str]:
    """Arguments that name the store."""
    return ["--store", str(store), "--runs", str(tmp_path / "none")]


# -- show -----------------------------------------------------------------------------------------
def test_show_says_that_there_is_no_certificate(
    words: list[str], as_json: AsJson, capsys: Capture
) -> None:
    assert as_json("show", SPEC.key, *words)["certificate"] is None
    assert main(["show", SPEC.key, *words]) == 0
    assert "certificate: none, make one with `distill certify`" in capsys.readouterr().out


def test_show_prints_the_newest_certificate(
    store: Path, words: list[str], as_json: AsJson, capsys: Capture
) -> None:
    certified(store, nats=1.0)
    newest = certified(store)
    shown = as_json("show", SPEC.key, *words)["certificate"]
    assert shown.pop("current") is True
    assert (
        Certificate.model_validate_json(newest.model_dump_json()).model_dump(mode="json") == shown
    )
    assert (shown["number"], shown["verdict"]) == (2, "fit")
    capsys.readouterr()
    assert main(["show", SPEC.key, *words]) == 0
    text = capsys.readouterr().out
    assert f"certificate 2 of label set {SPEC.key}: fit" in text
    for name in ("logprob", "entropy", "log_tail_mass", "kl"):
        assert name in text
    assert "5 samples, 23 rows scored again with perfect" in " ".join(text.split())
    assert "sampled tokens: chi-square over 23 rows: too few rows" in text
    assert "responses: 100% length" in text


def test_show_says_why_labels_are_unfit(store: Path, words: list[str], capsys: Capture) -> None:
    certified(store, nats=0.01)
    assert main(["show", SPEC.key, *words]) == 0
    text = capsys.readouterr().out
    assert f"certificate 1 of label set {SPEC.key}: unfit" in text
    assert "unfit: token_logprob differs from the teacher's: 0.00" in text
    assert "occurs, allowed is 0.0001" in text


def test_show_says_that_samples_were_added_since(
    store: Path, words: list[str], as_json: AsJson, capsys: Capture
) -> None:
    certified(store)
    LabelStore(str(store)).open(SPEC.key).append([make_sample(77, SPEC)], {})
    assert as_json("show", SPEC.key, *words)["certificate"]["current"] is False
    assert main(["show", SPEC.key, *words]) == 0
    assert "samples were added since commit 2" in capsys.readouterr().out


def test_show_of_a_damaged_certificate_goes_on(
    store: Path, words: list[str], as_json: AsJson, flip_a_bit: Callable[[Path], None]
) -> None:
    certified(store)
    flip_a_bit(next(store.rglob("certificates/*.json")))
    found = as_json("show", SPEC.key, *words)
    assert "00000001.json" in found["certificate"]["error"]
    assert found["totals"]["num_samples"] == 5


def test_show_lists_what_is_in_quarantine(store: Path, words: list[str], as_json: AsJson) -> None:
    from storage.quarantine import Quarantine

    label_set = LabelStore(str(store)).open(SPEC.key)
    key = make_sample(50, SPEC).key
    Quarantine(label_set).add(key, "engine died", "three times", {})
    (entry,) = as_json("show", SPEC.key, *words)["quarantined"]
    assert (entry["sample"], entry["reason"], entry["detail"]) == (
        key,
        "engine died",
        "three times",
    )


# -- certify KEY ----------------------------------------------------------------------------------
def test_what_is_certified_is_not_certified_again(
    store: Path, as_json: AsJson, capsys: Capture
) -> None:
    """There is no teacher: a second look would fail."""
    certified(store)
    (found,) = as_json("certify", SPEC.key[:8], "--store", str(store))
    assert (found["number"], found["verdict"]) == (1, "fit")
    assert main(["certify", SPEC.key, "--store", str(store)]) == 0
    assert "certificate 1 of label set" in capsys.readouterr().out


def test_unfit_labels_are_exit_code_two(store: Path, as_json: AsJson, capsys: Capture) -> None:
    certified(store, nats=0.01)
    (found,) = as_json("certify", SPEC.key, "--store", str(store), code=2)
    assert found["verdict"] == "unfit"
    assert main(["certify", SPEC.key, "--store", str(store)]) == 2
    error = capsys.readouterr().err
    assert f"error: the labels of {SPEC.key} are unfit: token_logprob differs" in error


@pytest.mark.parametrize("why", [["--force"], ["--samples", "3"]])
def test_a_teacher_that_is_gone_is_asked_for(store: Path, capsys: Capture, why: list[str]) -> None:
    certified(store)
    assert main(["certify", SPEC.key, "--store", str(store), *why]) == 2
    error = capsys.readouterr().err
    assert "is not at 'a-teacher' any more; give its directory with --teacher" in error


def test_another_teacher_is_refused(store: Path, teacher_directory: Path, capsys: Capture) -> None:
    words = ["certify", SPEC.key, "--store", str(store), "--teacher", str(teacher_directory)]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "is not the teacher of label set" in error
    assert "its weights and config differ" in error


# -- the step -------------------------------------------------------------------------------------
def labelled_project(
    open_project: Callable[..., Project], *overrides: str
) -> tuple[Project, Any, Any, LabelSet]:
    """A project whose samples are all stored: project, teacher, plan and label set."""
    project = open_project(*overrides)
    with project.running():
        teacher, plan = plan_project(project)
    label_set = project.store.create(plan.spec, {})
    random = np.random.default_rng(0)
    samples = []
    for request in plan.requests():
        logits_RV = random.normal(size=(3, plan.spec.vocab_size))
        rows_RV = logits_RV - np.log(np.exp(logits_RV).sum(axis=1, keepdims=True))
        samples.append(label_sample_densely(request, rows_RV.argmax(axis=1), rows_RV, plan.spec))
    label_set.append(samples, {})
    return project, teacher, plan, label_set


def test_a_run_does_not_certify_again(open_project: Callable[..., Project]) -> None:
    """Nothing is started: Ray alone would take seconds."""
    project, teacher, plan, label_set = labelled_project(open_project)
    made = certify(label_set, "unused", QaConfig(), start=lambda *_: PerfectRescorer(0))
    with Cluster(project.config.cluster) as cluster:
        found = certify_labels(project, plan, teacher, cluster, QaConfig())
        assert not cluster.started
    assert found == [made]
    assert in_words(made).startswith(f"certificate 1 of {label_set.key[:12]}: fit (6 samples")


def test_made_up_labels_are_not_certified(open_project: Callable[..., Project]) -> None:
    project, teacher, plan, _ = labelled_project(open_project, "teacher.backend.type=fake")
    with Cluster(project.config.cluster) as cluster:
        assert certify_labels(project, plan, teacher, cluster, QaConfig()) == []
        assert not cluster.started


def test_other_settings_or_more_samples_need_another_certificate(store: Path) -> None:
    made = certified(store)
    label_set = LabelStore(str(store)).open(SPEC.key)
    assert valid_certificate(label_set, QaConfig()) == made
    assert valid_certificate(label_set, QaConfig(enabled=False)) == made
    assert valid_certificate(label_set, QaConfig(samples=64)) is None
    label_set.append([make_sample(77, SPEC)], {})
    assert valid_certificate(label_set, QaConfig()) is None


def test_a_damaged_certificate_is_as_good_as_none(
    store: Path, flip_a_bit: Callable[[Path], None]
) -> None:
    certified(store)
    flip_a_bit(next(store.rglob("certificates/*.json")))
    label_set = LabelStore(str(store)).open(SPEC.key)
    assert valid_certificate(label_set, QaConfig()) is None
    assert certified(store).number == 2


def test_every_set_that_serves_samples_is_certified(open_project: Callable[..., Project]) -> None:
    """A set with a larger k serves some of them; a set that serves none is left alone."""
    project, _, plan, own = labelled_project(open_project)
    narrower = open_project("label.kind.k=2")
    with narrower.running():
        _, wanted = plan_project(narrower)
    assert serving_sets(narrower, wanted) == [own.key]
    narrower.store.create(wanted.spec, {})
    assert serving_sets(narrower, wanted) == [own.key]
    assert serving_sets(project, plan) == [own.key]


def serving_sets(project: Project, plan: Plan) -> list[str]:
    keys = [request.key for request in plan.requests()]
    return [found.key for found in project.store.view(plan.spec).serving(keys)]
