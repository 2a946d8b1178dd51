"""Copies of checkpoints in an object store."""

from pathlib import Path

import pytest

from storage.errors import StoreAccessError
from student_train.checkpoints.copies import CheckpointCopies
from student_train.checkpoints.manifest import (
    MANIFEST_FILE,
    Manifest,
    damage,
    digest_file,
    files_in,
)
from tests.integration.conftest import Network

MIB = 2**20


def write_checkpoint(folder: Path, step: int) -> Path:
    """A checkpoint of a large file and a small one, the latter in a folder of its own."""
    directory = folder / f"step-{step:08d}"
    (directory / "more").mkdir(parents=True)
    (directory / "weights.pt").write_bytes(bytes([step]) * (20 * MIB + 1))
    (directory / "more" / "random-00000.json").write_text("{}")
    files = {name: digest_file(directory / name) for name in files_in(directory)}
    Manifest(step=step, world_size=1, settings={}, state={}, files=files).save(directory)
    return directory


def test_a_copy_comes_back_byte_by_byte(tmp_path: Path, bucket: str) -> None:
    copies = CheckpointCopies(f"s3://{bucket}/copies", "student-0123")
    for step in (1, 2, 3):
        directory = write_checkpoint(tmp_path / "run", step)
        copies.upload(directory, files_in(directory))
        assert directory.name not in copies.tags()  # not before its manifest is there
        copies.commit(directory)
        copies.keep(copies.tags()[-2:])
    assert copies.tags() == ["step-00000002", "step-00000003"]
    assert CheckpointCopies(f"s3://{bucket}/copies", "another").tags() == []
    back = tmp_path / "another-host" / "step-00000003"
    copies.fetch_manifest(back)
    manifest = Manifest.load(back)
    copies.fetch(back, manifest.files)
    assert damage(back, manifest, manifest.files) is None
    assert (back / MANIFEST_FILE).read_bytes() == (directory / MANIFEST_FILE).read_bytes()
    copies.keep([])
    assert copies.tags() == []


def test_a_store_out_of_reach_is_an_expected_failure(
    tmp_path: Path, bucket: str, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the training reports and survives."""
    monkeypatch.setattr("storage.objects.REMOTE_RETRY", {"max_retries": 0})
    copies = CheckpointCopies(f"s3://{bucket}/copies", "student-0123")
    directory = write_checkpoint(tmp_path, 1)
    network.cut()
    with pytest.raises(StoreAccessError, match="cannot write"):
        copies.upload(directory, files_in(directory))
