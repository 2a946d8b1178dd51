"""The faults of tests/integration/test_store_faults.py for longer, and with the waits of users.

``DISTILL_SOAK_KILLS`` (default 400): writers that are killed, on local disk; a tenth on S3.
"""

import os
import shutil
import time
from pathlib import Path

import pytest

from storage.errors import LabelStoreError
from storage.store import LabelStore
from tests.integration import store_faults as faults
from tests.integration.conftest import Network
from tests.integration.conftest import bucket as bucket
from tests.integration.conftest import network as network
from tests.integration.conftest import s3_port as s3_port
from tests.integration.store_faults import SPEC, sample

KILLS = int(os.environ.get("DISTILL_SOAK_KILLS", "400"))
FLIPS = 20_000
REPORTED_WITHIN_S = 90
"""A network that is gone."""


def test_writers_killed_at_random_moments_lose_and_double_nothing(tmp_path: Path) -> None:
    assert faults.kill_randomly(str(tmp_path), kills=KILLS, seed=2)


def test_writers_on_s3_killed_at_random_moments_lose_and_double_nothing(bucket: str) -> None:
    assert faults.kill_randomly(f"s3://{bucket}/labels", kills=KILLS // 10, seed=3)


def test_a_commit_that_merges_killed_at_every_step_leaves_all_or_nothing(tmp_path: Path) -> None:
    origin, copy = tmp_path / "origin", tmp_path / "copy"
    for number in range(31):
        faults.commit(str(LabelStore(str(origin), create=True).uri), [number])

    def check() -> None:
        stored = faults.assert_intact(str(copy), range(31), range(34))
        assert stored in (set(range(31)), set(range(34)))
        shutil.rmtree(copy)
        shutil.copytree(origin, copy)

    shutil.copytree(origin, copy)
    assert faults.kill_at_every_step(faults.commit, str(copy), [31, 32, 33], check=check) > 40


def test_flipped_bits_never_crash_and_never_serve_a_wrong_value(tmp_path: Path) -> None:
    uri = str(LabelStore(str(tmp_path), create=True).uri)
    for number in range(40):
        faults.commit(uri, [2 * number, 2 * number + 1])
        if number == 33:
            faults.compact_and_collect(uri)
    faults.assert_flips_are_noticed(uri, range(80), flips=FLIPS, seed=4)


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_reader_never_fails_while_shards_are_compacted_and_collected(
    where: str, tmp_path: Path, bucket: str
) -> None:
    uri = str(tmp_path) if where == "local" else f"s3://{bucket}/labels"
    faults.read_beside_writer_and_janitor(uri, seconds=120)


def test_a_network_that_is_gone_is_reported_within_a_minute_and_a_half(
    bucket: str, network: Network
) -> None:
    uri = f"s3://{bucket}/labels"
    labels = LabelStore(uri).create(SPEC, {})
    labels.append([sample(0)], {})
    for lose in (network.cut, network.swallow):
        lose()
        started = time.monotonic()
        with pytest.raises(LabelStoreError, match="s3://"):
            labels.append([sample(1)], {})
        assert time.monotonic() - started < REPORTED_WITHIN_S
        network.mend()
        faults.assert_intact(uri, [0], [0, 1])
    labels.append([sample(1)], {})
    faults.assert_intact(uri, [0, 1], [0, 1])
