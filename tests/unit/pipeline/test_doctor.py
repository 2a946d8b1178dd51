"""The checks of the doctor that need nothing heavy."""

from pathlib import Path

from pipeline.commands.doctor import check_compiler, check_python, check_store


def test_the_interpreter_and_the_machine_are_described() -> None:
    python, machine = check_python()
    assert (python.what, python.verdict) == ("python", "ok")
    assert "CPUs" in machine.found


def test_a_compiler_is_found_or_its_absence_explained() -> None:
    (finding,) = check_compiler()
    assert finding.verdict == "ok" or finding.fix


def test_a_store_that_works_is_left_as_it_was(tmp_path: Path) -> None:
    (finding,) = check_store(str(tmp_path))
    assert finding.verdict == "ok"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_store_that_is_not_there_yet_is_a_note(tmp_path: Path) -> None:
    assert check_store(str(tmp_path / "none"))[0].verdict == "note"


def test_an_unknown_kind_of_store_is_broken() -> None:
    (finding,) = check_store("ftp://host/labels")
    assert finding.verdict == "broken"
    assert "unknown scheme" in finding.found
    assert finding.fix
