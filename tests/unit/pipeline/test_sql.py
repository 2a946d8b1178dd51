"""``distill sql``: questions on the command line, and what is written of the answers."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from pipeline.cli import main
from pipeline.commands.sql import parse_value
from pipeline.run_tables import model_directories, run_tables
from storage.errors import ConfigError
from storage.keys import TopKSpec
from storage.store import LabelStore
from storage.testing import make_sample, make_spec

SPEC = make_spec()
SAMPLES = [make_sample(number, SPEC, num_tokens=5 if number < 3 else 4) for number in range(5)]
Capture = pytest.CaptureFixture[str]
AsJson = Callable[..., Any]


@pytest.fixture
def ask(store: Path, tmp_path: Path, as_json: AsJson) -> Callable[..., Any]:
    """Ask with --json about the store of two commits and no runs."""

    def run(sql: str, *words: str, code: int = 0) -> Any:
        where = ("--store", str(store), "--runs", str(tmp_path / "none"))
        return as_json("sql", sql, *where, *words, code=code)

    return run


def refused(capsys: Capture, *words: str) -> str:
    capsys.readouterr()
    assert main(["sql", *words]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    return shown.err


def test_the_answer_as_json_has_columns_and_rows(ask: Callable[..., Any]) -> None:
    found = ask(
        "select position, count(*) as n, avg(entropy) as e from labels group by 1 order by 1"
    )
    assert [column["name"] for column in found["columns"]] == ["position", "n", "e"]
    assert [row[:2] for row in found["rows"]] == [[0, 5], [1, 5], [2, 5], [3, 5], [4, 3]]
    expected = sum(float(sample.entropy_N[0]) for sample in SAMPLES) / 5
    assert found["rows"][0][2] == pytest.approx(expected)
    assert found["notes"] == []


def test_json_holds_every_kind_of_value(ask: Callable[..., Any]) -> None:
    found = ask(
        "select sum(1), 'nan'::float, '-inf'::float, 1.5::decimal(4, 2), [1, null], {'a': true}, "
        "null, date '2026-01-02', true, 2::hugeint"
    )
    assert found["rows"] == [
        [1, None, None, 1.5, [1, None], {"a": True}, None, "2026-01-02", True, 2]
    ]


def test_a_table_for_people_shows_so_many_rows(store: Path, capsys: Capture) -> None:
    words = ["--store", str(store), "--limit", "3"]
    assert main(["sql", "select position, 'a\tb' as text, null as x from labels", *words]) == 0
    shown = capsys.readouterr().out
    assert shown.count("a\\tb") == 3
    assert shown.count("NULL") == 3
    assert "the first 3 rows" in shown
    assert main(["sql", "select 1 as one", "--store", str(store)]) == 0
    assert "the first" not in capsys.readouterr().out


def test_rows_that_are_wider_than_the_screen_are_shown_one_below_the_other(
    store: Path, capsys: Capture
) -> None:
    assert main(["sql", "select * from labels", "--store", str(store), "--limit", "2"]) == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    keys = [words[1] for words in lines if words[:1] == ["sample_key"]]
    assert len(keys) == 2
    assert set(keys) <= {sample.key for sample in SAMPLES}
    assert "row 2" in shown
    assert "the first 2 rows" in shown


def test_sets_have_names_and_parameters_values(store: Path, ask: Callable[..., Any]) -> None:
    other = make_spec(k=4)
    label_set = LabelStore(str(store)).create(other, {})
    label_set.append([make_sample(number, other) for number in range(2)], {})
    found = ask(
        "select set_name, count(*) from labels where position < $n and finish_reason = $why "
        "group by 1 order by 1",
        *("--set", f"a={SPEC.key[:8]}", "--set", f"b={other.key}"),
        *("--param", "n=2", "--param", "why=length"),
    )
    assert found["rows"] == [["a", 10], ["b", 4]]
    assert ask("select count(*) from b.topk", "--set", f"b={other.key}")["rows"] == [[40]]
    assert ask("select count(*) from samples")["rows"] == [[7]]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-2.5e3", -2500.0),
        ("true", True),
        ("null", None),
        ('"1"', "1"),
        ("length", "length"),
        ("a b=c", "a b=c"),
        ("[1]", "[1]"),
        ("007", "007"),
        ("", ""),
    ],
)
def test_a_parameter_is_a_number_a_word_of_json_or_text(text: str, value: Any) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


# -- files -----------------------------------------------------------------------------------------
ALL = "select sample_key, position, entropy, [position, 7] as pair from labels order by 1, 2"


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return sorted(
        (
            {
                "sample_key": sample.key,
                "position": n,
                "entropy": float(sample.entropy_N[n]),
                "pair": [n, 7],
            }
            for sample in SAMPLES
            for n in range(len(sample.positions_N))
        ),
        key=lambda row: (row["sample_key"], row["position"]),
    )


def test_parquet_and_arrow_hold_all_rows(
    tmp_path: Path, ask: Callable[..., Any], rows: list[dict[str, Any]]
) -> None:
    for name in ("a.parquet", "a.arrow", "b.PARQUET"):
        found = ask(ALL, "--out", str(tmp_path / name))
        assert (found["rows"], found["out"]) == (23, str(tmp_path / name))
    assert pl.read_parquet(tmp_path / "a.parquet").to_dicts() == rows
    with pa.ipc.open_file(str(tmp_path / "a.arrow")) as file:
        assert file.read_all().to_pylist() == rows


def test_csv_holds_lists_as_json(
    tmp_path: Path, ask: Callable[..., Any], rows: list[dict[str, Any]]
) -> None:
    file = tmp_path / "answer.txt"
    assert ask(ALL, "--out", str(file), "--format", "csv")["format"] == "csv"
    with file.open(newline="") as stream:
        found = list(csv.DictReader(stream))
    assert [(row["sample_key"], int(row["position"])) for row in found] == [
        (row["sample_key"], row["position"]) for row in rows
    ]
    assert [json.loads(row["pair"]) for row in found] == [row["pair"] for row in rows]
    assert [float(r["entropy"]) for r in found] == pytest.approx([r["entropy"] for r in rows])


def test_a_query_that_fails_leaves_the_file_as_it_was(
    store: Path, tmp_path: Path, capsys: Capture, flip_a_bit: Callable[[Path], None]
) -> None:
    file = tmp_path / "answer.parquet"
    file.write_text("before")
    for path in store.rglob("*.labels.arrow"):
        flip_a_bit(path)
    words = ["--store", str(store), "--out", str(file)]
    assert "distill verify" in refused(capsys, "select * from topk, labels", *words)
    assert file.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answer.parquet", "store"]


# -- what is refused -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["selec 1"], "syntax error"),
        (["select * from label_rows"], "Views: labels, runs, samples, steps, topk"),
        (["select entropi from labels"], "entropy"),
        (["select 1", "--set", "a=zz"], "no label set"),
        (["select 1", "--set", "a"], "--set takes NAME=VALUE"),
        (["select 1", "--set", "labels=a"], "cannot be the name"),
        (["select 1", "--param", "=1"], "--param takes NAME=VALUE"),
        (["select 1", "--param", "a=1", "--param", "a=2"], "names 'a' twice"),
        (["select 1", "--out", "answer.xls"], "none of parquet, csv, arrow"),
        (["select 1", "--out", "no/such/answer.csv"], "does not exist"),
        (["select 1", "--format", "csv"], "--out"),
        (["select 1", "--out", "a.csv", "--format", "json"], "none of parquet, csv, arrow"),
        (["select 1", "--tokenizer", "nowhere"], "has no tokenizer.json"),
        (["drop view labels"], "only questions"),
        (["select * from read_text('/etc/hostname')"], "read_text"),
        (["select 1", "--store", "nowhere"], "does not exist"),
    ],
)
def test_what_cannot_be_answered_is_said_in_one_message(
    store: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    where = [] if "--store" in words else ["--store", str(store)]
    assert said in refused(capsys, *words, *where)


def test_an_ambiguous_beginning_lists_the_sets(store: Path, capsys: Capture) -> None:
    keys: dict[str, str] = {SPEC.key[0]: SPEC.key}
    for k in range(9, 40):  # until two keys begin alike
        spec = SPEC.model_copy(update={"kind": TopKSpec(k=k)})
        LabelStore(str(store)).create(spec, {})
        first = spec.key[0]
        if first in keys:
            break
        keys[first] = spec.key
    shown = refused(capsys, "select 1", "--store", str(store), "--set", f"a={first}")
    assert "several label sets" in shown
    assert keys[first] in shown


def test_a_text_that_is_not_known_leaves_a_note(store: Path, ask: Callable[..., Any]) -> None:
    found = ask("select count(token) from labels")
    assert found["rows"] == [[0]]
    assert "--tokenizer" in found["notes"][0]


# -- runs ------------------------------------------------------------------------------------------
def write(path: Path, *documents: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "tiny"
    write(folder / "config.json", {"name": "tiny"})
    write(
        folder / "events.jsonl",
        {"event": "finished", "step": "label", "seconds": 2.5, "teacher_forward_tokens": 9},
        {"event": "finished", "step": "label", "seconds": 1.5, "response_tokens": 4},
        {"event": "failed", "step": "label"},
    )
    metrics = {"kl": 0.5, "cross_entropy": 1.5, "agreement": 0.25}
    write(folder / "untrained/0/evaluation-e.json", {"metrics": metrics, "num_tokens": 3})
    student = {
        "name": "my-student",
        "key": "abc",
        "train": {"loss": {"type": "taid"}},
        "label_set": SPEC.key,
        "selection": "s",
        "steps": 2,
        "trained_tokens": 70,
        "seconds": 5.0,
        "final": {"loss": 1.25},
    }
    write(folder / "students/my-student-abc/student.json", student)
    steps = [{"step": 1, "loss": 2.0, "tokens": 35}, {"step": 2, "loss": 1.25, "other": 1}]
    curve = folder / "students/my-student-abc/metrics.jsonl"
    write(curve, *steps)
    with curve.open("a") as stream:
        stream.write('{"step": 3, "lo')  # is being written
    write(folder / "models/one/tokenizer.json", {})
    return tmp_path / "runs"


def test_runs_hold_students_settings_evaluations_and_costs(runs: Path) -> None:
    untrained, student = run_tables(runs)["runs"].to_pylist()
    assert (untrained["student"], untrained["kl"], untrained["steps"]) == ("untrained", 0.5, None)
    assert (student["run"], student["student"], student["student_key"]) == (
        "tiny",
        "my-student",
        "abc",
    )
    assert (student["loss"], student["label_set"], student["kl"]) == ("taid", SPEC.key, None)
    assert (student["final_loss"], student["train_s"], student["trained_tokens"]) == (1.25, 5.0, 70)
    assert json.loads(student["settings"]) == {"loss": {"type": "taid"}}
    for row in (untrained, student):
        assert (row["label_s"], row["teacher_forward_tokens"], row["response_tokens"]) == (
            4.0,
            9,
            4,
        )


def test_steps_hold_the_curve_of_every_student(runs: Path) -> None:
    rows = run_tables(runs)["steps"].to_pylist()
    assert [(row["student"], row["step"], row["loss"], row["tokens"]) for row in rows] == [
        ("my-student", 1, 2.0, 35),
        ("my-student", 2, 1.25, None),
    ]


def test_runs_join_with_labels(store: Path, runs: Path, as_json: AsJson) -> None:
    found = as_json(
        "sql",
        "select student, count(*) from runs join labels using (label_set) group by 1",
        *("--store", str(store), "--runs", str(runs)),
    )
    assert found["rows"] == [["my-student", 23]]


def test_a_damaged_run_is_named(runs: Path) -> None:
    (runs / "tiny/students/my-student-abc/student.json").write_text("{")
    with pytest.raises(ConfigError, match=r"student\.json' is damaged"):
        run_tables(runs)


def test_models_of_runs_may_hold_a_tokenizer(runs: Path) -> None:
    assert model_directories(runs) == [runs / "tiny/models/one"]
    assert model_directories(runs / "none") == []
