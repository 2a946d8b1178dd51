"""Nothing is lost, doubled or wrong, whatever dies, fills up, breaks or competes.

After every fault the store is opened anew: what a writer reported as committed is there, once, as
it was written. Long versions: tests/soak/test_store_kills.py.
"""

import datetime
import os
import random
import resource
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

import storage.compact
import storage.garbage
import storage.merge
import storage.objects
import storage.writer
from storage.errors import LabelStoreError, NotLabelledError
from storage.garbage import collect, drop, find_garbage
from storage.label_set import LabelSet
from storage.objects import Objects
from storage.repair import repair
from storage.store import LabelStore
from tests.integration import store_faults as faults
from tests.integration.conftest import Network, make_bucket, running_s3, s3_environment
from tests.integration.store_faults import AT_ONCE, SPEC, Child, sample

pytestmark = pytest.mark.timeout(120)


def new_store(root: Path, commits: list[list[int]]) -> LabelSet:
    labels = LabelStore(str(root), create=True).create(SPEC, {})
    for numbers in commits:
        labels.append([sample(number) for number in numbers], {})
    return labels


# -- a writer dies --------------------------------------------------------------------------------
def test_a_writer_killed_at_any_system_call_of_a_publish_leaves_all_or_nothing(
    tmp_path: Path,
) -> None:
    if not faults.can_trace():
        pytest.skip("needs strace and the right to trace; the next tests kill without it")
    assert faults.kill_at_every_call(str(tmp_path)) > 30


def test_a_writer_killed_at_any_step_of_a_merging_commit_leaves_all_or_nothing(
    tmp_path: Path,
) -> None:
    """Of the 32nd commit: it writes a merged record too."""
    origin, copy = tmp_path / "origin", tmp_path / "copy"
    new_store(origin, [[number] for number in range(31)])

    def check() -> None:
        stored = faults.assert_intact(str(copy), range(31), range(34))
        assert stored in (set(range(31)), set(range(34)))
        shutil.rmtree(copy)
        shutil.copytree(origin, copy)

    shutil.copytree(origin, copy)
    steps = faults.kill_at_every_step(faults.commit, str(copy), [31, 32, 33], check=check, stride=3)
    assert steps > 40
    assert list((copy / "label_sets" / SPEC.key / "merged").iterdir())


def test_writers_killed_at_random_moments_lose_and_double_nothing(tmp_path: Path) -> None:
    assert len(faults.kill_randomly(str(tmp_path), kills=40, seed=1)) > 15


def test_a_compaction_and_a_collection_killed_at_any_step_lose_nothing(tmp_path: Path) -> None:
    origin, copy = tmp_path / "origin", tmp_path / "copy"
    new_store(origin, [[1, 2], [3], [4, 5], [6]])

    def check() -> None:
        everything = range(1, 7)
        faults.assert_intact(str(copy), everything, everything)
        faults.compact_and_collect(str(copy))  # a second run finishes what the first one left
        faults.assert_intact(str(copy), everything, everything)
        assert [path for path in copy.rglob("*#*") if path.is_file()] == []
        shutil.rmtree(copy)
        shutil.copytree(origin, copy)

    shutil.copytree(origin, copy)
    steps = faults.kill_at_every_step(faults.compact_and_collect, str(copy), check=check)
    assert steps > 30


def test_a_collection_removes_what_a_killed_writer_left(tmp_path: Path) -> None:
    labels = new_store(tmp_path, [[1, 2]])
    half = tmp_path / labels.prefix / "shards" / "0123-4567.labels.arrow#12"
    half.write_bytes(b"ARROW1")
    os.utime(half, (0, 0))
    collect(labels.objects, find_garbage(labels.objects, labels.key, AT_ONCE), {})
    assert not half.exists()
    faults.assert_intact(str(tmp_path), [1, 2], [1, 2])


def test_packing_killed_at_any_step_leaves_no_archive_or_a_whole_one(tmp_path: Path) -> None:
    uri, archive = str(tmp_path / "store"), tmp_path / "labels.tar.zst"
    new_store(tmp_path / "store", [[1, 2], [3]])
    steps = faults.kill_at_every_step(
        faults.pack_to, uri, str(archive), check=lambda: check_archive(archive)
    )
    assert steps > 2
    check_archive(archive, must_exist=True)


def check_archive(archive: Path, *, must_exist: bool = False) -> None:
    assert archive.exists() or not must_exist
    if archive.exists():
        target = archive.parent / "unpacked"
        faults.unpack_to(str(archive), str(target))
        faults.assert_intact(str(target), [1, 2, 3], [1, 2, 3])
        shutil.rmtree(target)
        archive.unlink(missing_ok=not must_exist)


def test_unpacking_killed_at_any_step_shows_all_samples_or_none(tmp_path: Path) -> None:
    archive, target = str(tmp_path / "labels.tar.zst"), str(tmp_path / "target")
    new_store(tmp_path / "store", [[1, 2], [3], [4]])
    faults.pack_to(str(tmp_path / "store"), archive)

    def check() -> None:
        store = LabelStore(target)
        if store.keys():
            stored = faults.assert_intact(target, [], range(1, 5))
            assert stored in (set(), {1, 2, 3, 4})
        shutil.rmtree(target, ignore_errors=True)

    steps = faults.kill_at_every_step(faults.unpack_to, archive, target, check=check, stride=3)
    assert steps > 40
    faults.assert_intact(target, range(1, 5), range(1, 5))


# -- many writers ---------------------------------------------------------------------------------
def overlapping(seed: int, *, total: int) -> list[list[int]]:
    """Commits of 1 to 7 samples that cover two thirds of all."""
    draw = random.Random(seed)
    left = draw.sample(range(total), 2 * total // 3)
    commits = []
    while left:
        count = draw.randint(1, 7)
        commits.append(left[:count])
        left = left[count:]
    return commits


def write_at_once(uri: str, *, writers: int, total: int) -> None:
    LabelStore(uri, create=True).create(SPEC, {})
    work = [overlapping(seed, total=total) for seed in range(writers)]
    children = [faults.started_writer(uri, commits) for commits in work]
    for child in children:
        child.connection.send("go")
    for child, commits in zip(children, work, strict=True):
        assert child.messages() == commits
    wanted = {number for commits in work for numbers in commits for number in numbers}
    assert faults.assert_intact(uri, wanted, range(total)) == wanted


def test_eight_writers_of_overlapping_samples_store_each_once(tmp_path: Path) -> None:
    write_at_once(str(tmp_path), writers=8, total=60)


def test_three_writers_of_overlapping_samples_store_each_once_on_s3(bucket: str) -> None:
    write_at_once(f"s3://{bucket}/labels", writers=3, total=12)


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_reader_never_fails_while_shards_are_compacted_and_collected(
    where: str, tmp_path: Path, bucket: str
) -> None:
    uri = str(tmp_path) if where == "local" else f"s3://{bucket}/labels"
    faults.read_beside_writer_and_janitor(uri, seconds=6)


def test_a_collection_without_grace_spares_a_merged_record_in_the_making(tmp_path: Path) -> None:
    """The index of a merged record is written before the record that names it."""
    labels = new_store(tmp_path, [[number] for number in range(31)])

    class Raced(Objects):
        def create(self, path: str, data: bytes) -> bool:
            if "/merged/" in path:
                time.sleep(0.02)
                found = find_garbage(Objects(self.uri), labels.key, AT_ONCE)
                collect(Objects(self.uri), found, {})
            return super().create(path, data)

    LabelSet(Raced(str(tmp_path)), labels.document).append([sample(31)], {})
    faults.assert_intact(str(tmp_path), range(32), range(32))


def test_a_collection_does_not_mind_a_commit_while_it_looks(tmp_path: Path) -> None:
    labels = new_store(tmp_path, [[1], [2]])

    class Raced(Objects):
        def entries(
            self, prefix: str, *, after: str | None = None
        ) -> Iterator[tuple[str, int, datetime.datetime]]:
            found = list(super().entries(prefix, after=after))
            if prefix.endswith("/commits"):
                labels.append([sample(3)], {})
            return iter(found)

    collect(labels.objects, find_garbage(Raced(str(tmp_path)), labels.key, AT_ONCE), {})
    faults.assert_intact(str(tmp_path), [1, 2, 3], [1, 2, 3])


def test_a_commit_while_the_set_is_dropped_goes_with_it_and_later_ones_stay(tmp_path: Path) -> None:
    labels = new_store(tmp_path, [[1]])
    other = LabelStore(str(tmp_path)).open(SPEC.key)

    class Raced(Objects):
        def delete(self, path: str) -> None:
            if path.endswith("/spec.json"):
                other.append([sample(2)], {})
            super().delete(path)

    drop(LabelSet(Raced(str(tmp_path)), labels.document), {})
    assert LabelStore(str(tmp_path)).keys() == []
    other.append([sample(3)], {})
    faults.assert_intact(str(tmp_path), [3], [1, 2, 3])


def test_two_reads_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    """The second one finds its index files merged and collected, and starts over."""
    numbers = range(31)
    new_store(tmp_path, [[number] for number in numbers])
    labels = LabelStore(str(tmp_path)).open(SPEC.key)
    first = labels.read(faults.keys_of(numbers))
    faults.assert_same(next(first), sample(0))
    faults.compact_and_collect(str(tmp_path))
    LabelStore(str(tmp_path)).open(SPEC.key).append([sample(31)], {})
    faults.compact_and_collect(str(tmp_path))
    assert labels.contains(faults.keys_of([40, 41])).tolist() == [False, False]
    for number, found in zip(numbers[1:], first, strict=True):
        faults.assert_same(found, sample(number))


def test_a_compaction_goes_on_when_its_index_was_merged_and_collected(tmp_path: Path) -> None:
    new_store(tmp_path, [[number] for number in range(20)])
    labels = LabelStore(str(tmp_path)).open(SPEC.key)
    labels.refresh()
    new_store(tmp_path, [[number] for number in range(20, 40)])
    collect(labels.objects, find_garbage(labels.objects, labels.key, AT_ONCE), {})
    storage.compact.compact(labels, {})
    faults.assert_intact(str(tmp_path), range(40), range(40))


# -- damage ---------------------------------------------------------------------------------------
def damaged_copies(root: Path) -> Iterator[tuple[Path, Path]]:
    """Files of a store and, for each, a fresh copy of the store where it can be damaged.

    Of the files of a folder the first and the last ones are taken: some records are merged.
    """
    copy = root.with_name("damaged")
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    for folder in folders:
        found = sorted(path for path in folder.iterdir() if path.is_file())
        for file in dict.fromkeys(found[:2] + found[-3:]):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(root, copy)
            yield copy, copy / file.relative_to(root)


@pytest.fixture
def varied(tmp_path: Path) -> Path:
    """A store with every kind of file: merged and single records, several shards."""
    new_store(tmp_path / "store", [[number] for number in range(32)] + [[32, 33], [34]])
    return tmp_path / "store"


def test_a_thousand_flipped_bits_never_crash_and_never_serve_a_wrong_value(varied: Path) -> None:
    faults.compact_and_collect(str(varied))
    new_store(varied, [[35], [36, 37]])
    faults.assert_flips_are_noticed(str(varied), range(38), flips=1000, seed=0)


def test_a_truncated_lengthened_or_missing_file_is_refused(varied: Path) -> None:
    for copy, file in damaged_copies(varied):
        data = file.read_bytes()
        for length in (0, 1, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:length])
            assert_refused_or_right(copy, f"{file} with {length} bytes")
        file.write_bytes(data + b"\0")
        assert_refused_or_right(copy, f"{file} with a byte more")
        file.unlink()
        assert_refused_or_right(copy, f"{file} missing")


def assert_refused_or_right(root: Path, what: str) -> None:
    found = faults.read_or_refuse(str(root), range(35))
    assert found is None or not found.startswith("WRONG"), f"{what}: {found}"


def test_repairing_and_labelling_again_heals_any_one_file(varied: Path) -> None:
    everything = range(35)
    for number, (copy, file) in enumerate(damaged_copies(varied)):
        if file.name == "spec.json":
            continue  # nothing can be opened; `restore_spec` writes it anew
        if number % 2:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-1] + b"?")
        labels = LabelStore(str(copy)).open(SPEC.key)
        repair(labels, list(labels.verify()), {})
        again = LabelStore(str(copy)).open(SPEC.key)
        again.append([sample(n) for n in everything], {})
        faults.assert_intact(str(copy), everything, everything)
        faults.compact_and_collect(str(copy))
        faults.assert_intact(str(copy), everything, everything)


# -- no room, no permission -----------------------------------------------------------------------
def append_below(connection: Connection, uri: str, limit: int) -> None:
    """Append while no file may be larger than ``limit``, and then again."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    labels = LabelStore(uri).open(SPEC.key)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        labels.append([sample(2), sample(3)], {})
        connection.send("committed")
    except LabelStoreError as error:
        connection.send(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    labels.append([sample(2), sample(3)], {})
    connection.send("committed")


def test_a_file_that_cannot_be_written_whole_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    new_store(tmp_path / "0", [[1]])
    outcomes = []
    for limit in (0, 100, 800, 1500, 4000, 5100, 5250, 20_000):
        root = shutil.copytree(tmp_path / "0", tmp_path / f"limit-{limit}")
        first, second = Child(append_below, str(root), limit).messages()
        assert second == "committed"
        if first != "committed":
            assert "cannot write" in first
            assert "what was committed before is intact" in first
        assert [path for path in root.rglob("*#*") if path.is_file()] == []
        faults.assert_intact(str(root), [1, 2, 3], [1, 2, 3])
        outcomes.append(first == "committed")
    assert outcomes[0] is False
    assert outcomes[-1] is True


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount; a file size limit stands in for it, above")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_is_an_error_and_a_freed_one_goes_on(small_disk: Path) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes(600_000))
    labels = new_store(small_disk, [])
    committed: list[int] = []

    def fill_the_disk() -> None:
        for number in range(1000):
            labels.append([sample(number)], {})
            committed.append(number)

    with pytest.raises(LabelStoreError, match=r"cannot write .* committed before is intact"):
        fill_the_disk()
    assert len(committed) > 3
    faults.assert_intact(str(small_disk), committed, range(len(committed) + 1))
    filler.unlink()
    labels.append([sample(number) for number in range(len(committed) + 2)], {})
    everything = range(len(committed) + 2)
    faults.assert_intact(str(small_disk), everything, everything)


def append_unprivileged(connection: Connection, uri: str) -> None:
    faults.without_privileges()
    labels = LabelStore(uri).open(SPEC.key)
    assert [found.key for found in labels.read([sample(1).key])]
    try:
        labels.append([sample(2)], {})
    except LabelStoreError as error:
        connection.send(str(error))


def test_a_store_that_may_only_be_read_is_read_and_refuses_writes(tmp_path: Path) -> None:
    new_store(tmp_path, [[1]])
    directories = [path for path in (tmp_path, *tmp_path.rglob("*")) if path.is_dir()]
    for path in directories:
        path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    (found,) = Child(append_unprivileged, str(tmp_path)).messages()
    for path in directories:
        path.chmod(stat.S_IRWXU)
    assert "cannot write" in found
    assert "Permission denied" in found
    faults.assert_intact(str(tmp_path), [1], [1, 2])


@pytest.mark.parametrize("folder", ["shards", "index", "commits"])
def test_a_file_where_a_folder_should_be_is_an_error(tmp_path: Path, folder: str) -> None:
    labels = new_store(tmp_path, [])
    (tmp_path / labels.prefix / folder).write_text("")
    with pytest.raises(LabelStoreError, match=f"/{folder}"):
        labels.append([sample(1)], {})
    (tmp_path / labels.prefix / folder).unlink()
    labels.append([sample(1)], {})
    faults.assert_intact(str(tmp_path), [1], [1])


# -- a lost network -------------------------------------------------------------------------------
@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up a lost network after seconds; tests/soak waits for as long as users do."""
    retry = {"max_retries": 2, "retry_timeout": datetime.timedelta(seconds=3)}
    monkeypatch.setattr(storage.objects, "REMOTE_RETRY", retry)


def test_a_network_lost_at_any_request_of_a_commit_is_an_error_and_loses_nothing(
    bucket: str, network: Network, impatient: None
) -> None:
    uri = f"s3://{bucket}/labels"
    LabelStore(uri).create(SPEC, {}).append([sample(0)], {})
    committed, last = [0], 0
    for number in range(1, 30):
        labels = LabelStore(uri).open(SPEC.key)
        labels.refresh()
        network.cut_after_requests = network.requests + number
        try:
            labels.append([sample(number), sample(number + 1)], {})
        except LabelStoreError:
            network.mend()
        else:
            network.cut_after_requests = None
            committed += [number, number + 1]
            last = number
        faults.assert_intact(uri, committed, range(number + 2))
        if last:
            break
    assert last > 4  # two tables, an index and a record at least


def test_a_network_that_comes_back_soon_is_not_noticed(bucket: str, network: Network) -> None:
    uri = f"s3://{bucket}/labels"
    labels = LabelStore(uri).create(SPEC, {})
    child = faults.started_writer(uri, [[number] for number in range(12)])
    child.connection.send("go")
    assert child.receive() == [0]
    network.cut()
    time.sleep(1)
    network.mend()
    assert child.messages() == [[number] for number in range(1, 12)]
    faults.assert_intact(uri, range(12), range(12))
    assert labels.totals().num_samples == 12


def test_a_server_that_dies_is_an_error_that_names_the_object(
    monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    with running_s3() as (server, port):
        for name, value in s3_environment(port).items():
            monkeypatch.setenv(name, value)
        make_bucket(port, "gone")
        labels = LabelStore("s3://gone/labels").create(SPEC, {})
        labels.append([sample(0)], {})
        server.kill()
        server.wait()
        with pytest.raises(LabelStoreError, match=r"cannot .* s3://gone/labels/label_sets/"):
            labels.append([sample(1)], {})
        with pytest.raises(LabelStoreError, match=r"cannot .* s3://gone/labels"):
            LabelStore("s3://gone/labels").open(SPEC.key)


# -- clocks ---------------------------------------------------------------------------------------
def append_in_year(connection: Connection, uri: str, year: int, commits: list[list[int]]) -> None:
    """A host whose clock is years off."""

    def wrong() -> str:
        return datetime.datetime(year, 1, 1, tzinfo=datetime.UTC).isoformat(timespec="seconds")

    for module in (storage.writer, storage.merge, storage.garbage):
        module.utc_now = wrong
    labels = LabelStore(uri).open(SPEC.key)
    for numbers in commits:
        labels.append([sample(number) for number in numbers], {})
    connection.send("done")


def test_clocks_that_are_years_off_change_nothing(tmp_path: Path) -> None:
    uri = str(tmp_path)
    labels = new_store(tmp_path, [[0]])
    for year, commits in ((1999, [[1], [2, 3]]), (2090, [[3, 4]]), (2001, [[4, 5], [0, 6]])):
        assert Child(append_in_year, uri, year, commits).messages() == ["done"]
    faults.assert_intact(uri, range(7), range(7))
    records = list(labels.log.singles())
    assert [record.first for record in records] == list(range(1, 7))
    assert [record.num_samples for record in records] == [1, 1, 2, 1, 1, 1]


def test_a_collection_asks_the_clock_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = new_store(tmp_path, [[0], [1]])
    storage.compact.compact(labels, {})
    hour = datetime.timedelta(hours=1)
    for year in (1999, 2090):
        late = datetime.datetime(year, 1, 1, tzinfo=datetime.UTC)
        monkeypatch.setattr(storage.garbage, "utc_now", late.isoformat)
        monkeypatch.setattr(time, "time", late.timestamp)
        assert find_garbage(labels.objects, labels.key, hour).paths == {}
    now = labels.objects.now()
    monkeypatch.setattr(Objects, "now", lambda self: now + 2 * hour)
    garbage = find_garbage(labels.objects, labels.key, hour)
    assert {path.rpartition("/")[2].partition(".")[2] for path in garbage.paths} == {
        "labels.arrow",
        "samples.arrow",
    }
    assert len(garbage.paths) == 4
    collect(labels.objects, garbage, {})
    faults.assert_intact(str(tmp_path), [0, 1], [0, 1])


def test_a_lost_sample_is_asked_for_and_not_made_up(tmp_path: Path) -> None:
    labels = new_store(tmp_path, [[0]])
    with pytest.raises(NotLabelledError, match="lacks 1 of 2 samples"):
        list(labels.read(faults.keys_of([0, 1])))
