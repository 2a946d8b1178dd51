"""An archive carries a label set whole, or is refused and leaves no trace."""

import contextlib
import io
import random
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from storage.compact import compact
from storage.errors import (
    EditedSpecError,
    FormatError,
    LabelStoreError,
    OversizedError,
    ShardCorruptError,
    UnsafePathError,
    WrongMagicError,
)
from storage.pack import pack, unpack
from storage.repair import repair
from storage.testing import make_sample, make_spec
from storage.writer import NewShard, publish, write_shard

SPEC = make_spec()
SAMPLES = [make_sample(number, SPEC, num_tokens=3) for number in range(8)]


@pytest.fixture
def archive(benches, tmp_path: Path) -> Path:
    """Two shards of four samples each."""
    path = tmp_path / "labels.tar.zst"
    pack(benches().filled(SAMPLES[:4], SAMPLES[4:]), str(path), {"host": "h"}, licence="CC0-1.0")
    return path


@pytest.fixture
def target(benches):
    """Another, empty store."""
    return benches()


# -- round trips -----------------------------------------------------------------------------------
def test_what_was_packed_is_unpacked(archive: Path, target) -> None:
    done = unpack(str(archive), target.store, {"host": "there"})
    assert (done.key, done.num_samples, done.num_new) == (SPEC.key, 8, 8)
    target.assert_serves(SAMPLES)
    (record,) = target.fresh().log.singles()
    assert len(record.shards) == 2
    assert record.provenance == {"host": "there"}


def test_what_was_written_is_reported(benches, tmp_path: Path) -> None:
    label_set, seen = benches().filled(SAMPLES[:4], SAMPLES[4:]), []
    path = tmp_path / "labels.tar.zst"
    done = pack(label_set, str(path), {}, advance=seen.append)
    assert (done.key, done.num_samples, done.num_tokens) == (SPEC.key, 8, 24)
    assert done.num_bytes == path.stat().st_size
    assert sum(seen) == label_set.totals().num_bytes
    assert list(tmp_path.iterdir()) == [path]


def test_shards_are_copied_byte_for_byte(archive: Path, target, benches) -> None:
    source = benches()
    source.filled(SAMPLES[:4], SAMPLES[4:])
    unpack(str(archive), target.store, {})
    for table in ("labels", "samples"):
        pattern = f"shards/*.{table}.arrow"
        packed = sorted(path.read_bytes() for path in source.files(pattern))
        assert sorted(path.read_bytes() for path in target.files(pattern)) == packed


def test_the_standard_streams_carry_an_archive(
    benches, target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither can seek."""

    class Stream(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: object) -> int:
            raise io.UnsupportedOperation

    out = Stream()
    monkeypatch.setattr(sys, "stdout", type("Out", (), {"buffer": out}))
    pack(benches().filled(SAMPLES), "-", {})
    monkeypatch.setattr(sys, "stdin", type("In", (), {"buffer": Stream(out.getvalue())}))
    assert unpack("-", target.store, {}).num_new == 8
    monkeypatch.undo()
    target.assert_serves(SAMPLES)


@pytest.mark.parametrize("numbers", [[], [0, 1, 2, 3], [1, 5], range(8)], ids=str)
def test_samples_that_are_stored_already_stay_as_they_are(archive: Path, target, numbers) -> None:
    mine = [replace(SAMPLES[number], finish_reason="stop") for number in numbers]
    target.create().append(mine, {})
    done = unpack(str(archive), target.store, {})
    assert (done.num_samples, done.num_new) == (8, 8 - len(mine))
    kept = {sample.key: sample for sample in mine}
    target.assert_serves([kept.get(sample.key, sample) for sample in SAMPLES])
    assert target.fresh().totals().num_samples == 8


def test_unpacking_twice_changes_nothing(archive: Path, target) -> None:
    unpack(str(archive), target.store, {})
    before = target.contents()
    assert unpack(str(archive), target.store, {}).num_new == 0
    assert target.contents() == before


def test_a_commit_that_comes_between_keeps_its_samples(archive: Path, target) -> None:
    other = target.create()
    mine = [replace(sample, finish_reason="stop") for sample in SAMPLES[:2]]
    store = target.store
    store.objects = target.raced(lambda: other.append(mine, {})).objects
    assert unpack(str(archive), store, {}).num_new == 6
    target.assert_serves([*mine, *SAMPLES[2:]])


def test_an_empty_set_makes_an_empty_set(benches, target, tmp_path: Path) -> None:
    pack(benches().create(), str(tmp_path / "empty"), {})
    done = unpack(str(tmp_path / "empty"), target.store, {})
    assert (done.num_samples, done.num_new) == (0, 0)
    assert target.store.keys() == [SPEC.key]


def test_partitions_are_those_of_the_new_store(
    archive: Path, target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.partitions.PARTITION_TOKENS", 12)  # 24 tokens: 2
    unpack(str(archive), target.store, {})
    assert target.fresh().totals().num_partitions == 2
    target.assert_serves(SAMPLES)


def test_of_copies_the_one_that_is_served_is_served_after_unpacking(
    benches, target, tmp_path: Path
) -> None:
    """A repaired index puts an older shard behind a newer one; ``since`` tells them apart."""
    source = benches()
    label_set = source.filled(SAMPLES[:1])
    copy = replace(SAMPLES[0], finish_reason="stop")
    publish(label_set, [write_shard(label_set, [copy])], provenance={})
    first = label_set.index.live_shards[0]
    entries = next(label_set.index.live_entries())
    publish(
        label_set,
        [NewShard(first, replace(entries, shard=entries.shard * 0))],
        removed=[first.name],
        provenance={},
    )
    source.assert_serves(SAMPLES[:1])
    pack(source.fresh(), str(tmp_path / "labels"), {})
    unpack(str(tmp_path / "labels"), target.store, {})
    target.assert_serves(SAMPLES[:1])


def test_the_data_card_tells_what_is_in_the_archive(archive: Path) -> None:
    card = contents(archive)["README.md"].decode()
    for fact in (SPEC.key, SPEC.generation.key, "CC0-1.0", "topk, k = 8", "| samples | 8 |"):
        assert fact in card
    listed = [name for name in contents(archive) if name.startswith("shards/")]
    assert len(listed) == 4
    assert all(f"`{name}`" in card for name in listed)


def test_a_damaged_shard_is_not_packed(benches, tmp_path: Path) -> None:
    source = benches()
    label_set = source.filled(SAMPLES[:4], SAMPLES[4:])
    source.damage(source.files("shards/*.labels.arrow")[0])
    with pytest.raises(ShardCorruptError, match="run `distill repair`"):
        pack(label_set, str(tmp_path / "labels.tar.zst"), {})
    assert list(tmp_path.iterdir()) == []
    repair(label_set, list(label_set.verify()), {})
    assert pack(source.fresh(), str(tmp_path / "labels.tar.zst"), {}).num_samples == 4


def test_a_missing_shard_is_not_packed(benches, tmp_path: Path) -> None:
    source = benches()
    label_set = source.filled(SAMPLES[:4], SAMPLES[4:])
    source.files("shards/*.samples.arrow")[1].unlink()
    with pytest.raises(ShardCorruptError, match="replaced while the set was packed, or it is lost"):
        pack(label_set, str(tmp_path / "labels.tar.zst"), {})
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_written_is_named(benches, tmp_path: Path) -> None:
    label_set = benches().filled(SAMPLES)
    with pytest.raises(LabelStoreError, match=r"cannot write .*nowhere"):
        pack(label_set, str(tmp_path / "nowhere" / "labels.tar.zst"), {})


def test_a_source_that_does_not_exist_is_named(target, tmp_path: Path) -> None:
    with pytest.raises(LabelStoreError, match=r"cannot read .*nowhere"):
        unpack(str(tmp_path / "nowhere"), target.store, {})


def test_a_compacted_set_is_packed_as_it_is_served(benches, target, tmp_path: Path) -> None:
    label_set = benches().filled(SAMPLES[:4], SAMPLES[4:])
    compact(label_set, {})
    pack(label_set, str(tmp_path / "labels"), {})
    unpack(str(tmp_path / "labels"), target.store, {})
    assert target.fresh().totals().num_shards == 1
    target.assert_serves(SAMPLES)


# -- refusals --------------------------------------------------------------------------------------
def contents(archive: Path) -> dict[str, bytes]:
    """The members of an archive."""
    data = zstandard.ZstdDecompressor().decompressobj().decompress(archive.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def write(archive: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    """An archive of given members, forged but well compressed."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))
    archive.write_bytes(zstandard.ZstdCompressor(1).compress(data.getvalue()))


def members_of(archive: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    found = []
    for name, content in contents(archive).items():
        member = tarfile.TarInfo(name)
        member.size = len(content)
        found.append((member, content))
    return found


def assert_refused(archive: Path, target, *errors: type[Exception]) -> None:
    """The archive is refused and nothing of it is in the store, nor in the temporary folder."""
    before = target.contents()
    with pytest.raises(errors or LabelStoreError):
        unpack(str(archive), target.store, {})
    assert target.contents() == before
    assert target.store.keys() == []


@pytest.fixture(autouse=True)
def nothing_stays_in_the_temporary_folder(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path_factory.mktemp("unpacking")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


def test_an_archive_that_is_cut_short_is_refused(archive: Path, target) -> None:
    whole = archive.read_bytes()
    lengths = [*range(0, len(whole), len(whole) // 40), *range(len(whole) - 20, len(whole))]
    for length in lengths:
        archive.write_bytes(whole[:length])
        error = WrongMagicError if length < 4 else ShardCorruptError
        assert_refused(archive, target, error)


def test_no_flipped_bit_changes_a_sample_that_is_unpacked(archive: Path, target, benches) -> None:
    """100 bits at random; one in the window size of the stream, for instance, is harmless."""
    whole, generator, refused = archive.read_bytes(), random.Random(0), 0
    for _ in range(100):
        bit = generator.randrange(len(whole) * 8)
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        archive.write_bytes(damaged)
        try:
            unpack(str(archive), target.store, {})
        except LabelStoreError:
            refused += 1
            assert target.contents() == {}
        else:
            target.assert_serves(SAMPLES)
            target = benches()
    assert refused > 90


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", WrongMagicError),
        (b"PK\3\4zip", WrongMagicError),
        (b"\x28\xb5\x2f\xfd", ShardCorruptError),
    ],
    ids=["empty", "zip", "nothing but magic"],
)
def test_what_is_no_archive_is_refused(
    archive: Path, target, content: bytes, error: type[Exception]
) -> None:
    archive.write_bytes(content)
    assert_refused(archive, target, error)


def test_two_archives_in_one_stream_are_refused(archive: Path, target) -> None:
    archive.write_bytes(2 * archive.read_bytes())
    assert_refused(archive, target, UnsafePathError)


def test_a_zstd_stream_that_is_no_archive_is_refused(archive: Path, target) -> None:
    archive.write_bytes(zstandard.ZstdCompressor().compress(b"x" * 10_000))
    assert_refused(archive, target, ShardCorruptError)


def renamed(member: tarfile.TarInfo, **changes: object) -> tarfile.TarInfo:
    for name, value in changes.items():
        setattr(member, name, value)
    return member


Members = list[tuple[tarfile.TarInfo, bytes]]


def extra(members: Members) -> Members:
    return [*members, (renamed(tarfile.TarInfo("extra"), size=1), b"x")]


def extra_between(members: Members) -> Members:
    return [*members[:3], (renamed(tarfile.TarInfo("extra"), size=1), b"x"), *members[3:]]


def with_member(number: int, **changes: object) -> Callable[[Members], Members]:
    def change(members: Members) -> Members:
        member, content = members[number]
        changed = renamed(member, **changes)
        return [*members[:number], (changed, content), *members[number + 1 :]]

    return change


HOSTILE: dict[str, tuple[Callable[[Members], Members], type[Exception]]] = {
    "one member more at the end": (extra, UnsafePathError),
    "one member more in between": (extra_between, UnsafePathError),
    "one member less": (lambda members: members[:-1], ShardCorruptError),
    "no member": (lambda members: [], ShardCorruptError),
    "another order": (lambda m: [*m[:2], m[3], m[2], *m[4:]], UnsafePathError),
    "a member twice": (lambda m: [*m, m[-1]], UnsafePathError),
    "a renamed member": (with_member(2, name="shards/other.labels.arrow"), UnsafePathError),
    "a member outside": (with_member(2, name="../x"), UnsafePathError),
    "an absolute member": (with_member(2, name="/tmp/x"), UnsafePathError),
    "a symbolic link": (
        with_member(2, type=tarfile.SYMTYPE, linkname="/etc/passwd", size=0),
        UnsafePathError,
    ),
    "a hard link": (
        with_member(3, type=tarfile.LNKTYPE, linkname="manifest.json", size=0),
        UnsafePathError,
    ),
    "a device": (with_member(2, type=tarfile.CHRTYPE, size=0), UnsafePathError),
    "a folder": (with_member(2, type=tarfile.DIRTYPE, size=0), UnsafePathError),
    "the manifest as a link": (
        with_member(0, type=tarfile.SYMTYPE, linkname="x", size=0),
        UnsafePathError,
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_members_other_than_listed_are_refused(archive: Path, target, what: str) -> None:
    change, error = HOSTILE[what]
    write(archive, change(members_of(archive)))
    assert_refused(archive, target, error)


def test_a_shorter_or_longer_member_than_listed_is_refused(archive: Path, target) -> None:
    members = members_of(archive)
    member, content = members[2]
    for changed in (content[:-1], content + b"\0"):
        write(archive, [*members[:2], (renamed(member, size=len(changed)), changed), *members[3:]])
        assert_refused(archive, target, OversizedError)


def test_another_content_of_the_same_length_is_refused(archive: Path, target) -> None:
    members = members_of(archive)
    for number in range(2, 6):
        member, content = members[number]
        swapped = bytes([content[0] ^ 1]) + content[1:]
        write(archive, [*members[:number], (member, swapped), *members[number + 1 :]])
        assert_refused(archive, target, ShardCorruptError)


def with_manifest(bench, archive: Path, change: Callable[[dict], object], *, sign: bool) -> None:
    """Edit the manifest; ``sign`` makes its checksum fit."""
    members = members_of(archive)
    scratch = archive.with_name("manifest")
    scratch.write_bytes(members[0][1])
    bench.edit(scratch, change, sign=sign)
    content = scratch.read_bytes()
    write(archive, [(renamed(members[0][0], size=len(content)), content), *members[1:]])


MANIFESTS: dict[str, tuple[Callable[[dict], object], type[Exception]]] = {
    "a name outside": (lambda m: m["shards"][0].update(name="../x"), UnsafePathError),
    "an absolute name": (lambda m: m["shards"][0].update(name="/etc/passwd"), UnsafePathError),
    "an edited spec": (lambda m: m["document"]["spec"].update(vocab_size=99), EditedSpecError),
    "the key of another set": (lambda m: m["document"].update(key="f" * 32), EditedSpecError),
    "another format": (lambda m: m.update(format=2), FormatError),
    "one member more": (lambda m: m.update(extra=1), FormatError),
    "a huge file": (lambda m: m["shards"][0]["labels"].update(num_bytes=2**60), OversizedError),
    "a larger file": (
        lambda m: m["shards"][0]["labels"].update(
            num_bytes=m["shards"][0]["labels"]["num_bytes"] + 1
        ),
        OversizedError,
    ),
    "another checksum": (
        lambda m: m["shards"][0]["labels"].update(xxh3_128="0" * 32),
        ShardCorruptError,
    ),
    "more samples": (lambda m: m["shards"][0].update(num_samples=5), ShardCorruptError),
    "more tokens": (lambda m: m["shards"][0].update(num_tokens=13), ShardCorruptError),
    "other batches": (lambda m: m["shards"][0].update(batch_rows=[3, 9]), ShardCorruptError),
    "a shard less": (lambda m: m["shards"].pop(), UnsafePathError),
    "a shard twice": (lambda m: m["shards"].append(m["shards"][0]), LabelStoreError),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_an_edited_manifest_is_refused(archive: Path, target, what: str) -> None:
    """With the right checksum: whoever edits can compute it."""
    change, error = MANIFESTS[what]
    with_manifest(target, archive, change, sign=True)
    assert_refused(archive, target, error)


def test_a_manifest_without_its_checksum_is_refused(archive: Path, target) -> None:
    with_manifest(target, archive, lambda m: m.update(licence="mine"), sign=False)
    assert_refused(archive, target, ShardCorruptError)


def test_a_shard_that_the_same_archive_holds_twice_is_stored_once(archive: Path, target) -> None:
    """All four files twice, the second time under another name: every sample occurs twice."""
    members = members_of(archive)
    names = []

    def double(manifest: dict) -> None:
        for shard in list(manifest["shards"]):
            names.append(shard["name"])
            manifest["shards"].append({**shard, "name": f"{shard['name']}-x"})

    with_manifest(target, archive, double, sign=True)
    copies = [
        (renamed(tarfile.TarInfo(member.name.replace(".", "-x.", 1)), size=member.size), content)
        for member, content in members[2:]
    ]
    write(archive, [*members_of(archive), *copies])
    unpack(str(archive), target.store, {})
    target.assert_serves(SAMPLES)
    assert target.fresh().totals().num_samples == 8


def test_a_bomb_in_the_place_of_a_manifest_takes_no_memory(
    archive: Path, target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 MiB of zeros compress to 6 KiB; the manifest may have 1 MiB here."""
    # the package's function `unpack` hides its module of the same name
    monkeypatch.setattr(sys.modules["storage.pack.unpack"], "MAX_MANIFEST_BYTES", 2**20)
    zeros = bytes(2**26)
    write(archive, [(renamed(tarfile.TarInfo("manifest.json"), size=len(zeros)), zeros)])
    assert peak_bytes(lambda: assert_refused(archive, target, OversizedError)) < 2**24


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_bomb_in_a_header_takes_no_memory(archive: Path, target, kind: bytes) -> None:
    """Extended headers are read by the tar library itself, before we see a member."""
    zeros = bytes(2**26)
    header = renamed(tarfile.TarInfo("header"), size=len(zeros), type=kind)
    members = members_of(archive)
    data = io.BytesIO()
    data.write(header.tobuf(tarfile.USTAR_FORMAT))
    data.write(zeros)
    with tarfile.open(fileobj=data, mode="w") as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))
    archive.write_bytes(zstandard.ZstdCompressor(1).compress(data.getvalue()))
    del data, zeros

    def attempt() -> None:
        with contextlib.suppress(LabelStoreError):
            unpack(str(archive), target.store, {})

    assert peak_bytes(attempt) < 2**24


def test_a_window_of_gigabytes_is_refused(archive: Path, target) -> None:
    """The frame asks for a window of 2 GiB."""
    parameters = zstandard.ZstdCompressionParameters(window_log=31, write_content_size=0)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    archive.write_bytes(compressor.compress(b"x" * 1000) + compressor.flush())
    assert_refused(archive, target, ShardCorruptError, OversizedError)


def peak_bytes(act: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
