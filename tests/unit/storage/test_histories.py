"""Whatever is done to a store, in any order: a dictionary of first samples predicts what it serves.

And whenever a process dies: what is served is the state before its step or the one after it.
"""

import datetime
import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.compact import compact
from storage.garbage import collect, drop, find_garbage
from storage.label_set import LabelSet
from storage.pack import pack, unpack
from storage.repair import repair
from storage.samples import LabelledSample
from storage.store import LabelStore
from storage.testing import make_sample, make_spec
from storage.verify import verify

SPEC = make_spec()
SAMPLES = [make_sample(number, SPEC, num_tokens=3) for number in range(12)]
AT_ONCE = datetime.timedelta(0)

NUMBERS = st.lists(st.integers(0, 11), min_size=1, max_size=4)
STEPS = st.lists(
    st.tuples(st.just("append"), NUMBERS)
    | st.tuples(st.sampled_from(["compact", "gc", "repair", "drop"]), st.just([]))
    | st.tuples(st.just("damage"), st.lists(st.integers(0, 20), min_size=1, max_size=1)),
    min_size=2,
    max_size=8,
)


def collect_now(label_set: LabelSet) -> None:
    garbage = find_garbage(label_set.objects, label_set.key, AT_ONCE)
    collect(label_set.objects, garbage, {})


def spoil_a_shard(bench, number: int) -> set[str]:
    """Damage one of the shards that are served; returns the keys of its samples."""
    label_set = bench.fresh()
    shards = label_set.index.live_shards if label_set.contains([]).size == 0 else []
    if not shards:
        return set()
    shard = shards[number % len(shards)]
    table = label_set.open_table(shard, "samples").table(["sample_key"])
    path = bench.root / label_set.shard_path(shard.name, ("labels", "samples")[number % 2])
    path.write_bytes(path.read_bytes()[: number % 3 - 3])
    return set(table["sample_key"].to_pylist())


@settings(max_examples=20)
@given(STEPS, st.booleans())
def test_a_dictionary_predicts_what_a_store_serves(benches, steps, reopen: bool) -> None:
    """One process that stays, or a new one for every step; records are merged in threes."""
    bench = benches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("storage.log.MERGE_FACTOR", 3)
        model: dict[str, LabelledSample] = {}
        label_set, reader = bench.create(), bench.fresh()
        for step, (action, numbers) in enumerate(steps):
            label_set = bench.create() if reopen else label_set
            if action == "append":
                # every step would store another content: only the first may stay
                new = [replace(SAMPLES[n], finish_reason=f"step {step}") for n in numbers]
                label_set.append(new, {})
                model = {sample.key: sample for sample in reversed(new)} | model
            elif action == "compact":
                compact(label_set, {})
            elif action == "gc":
                collect_now(label_set)
            elif action == "damage":
                lost = spoil_a_shard(bench, *numbers) if bench.store.keys() else set()
                fresh = bench.create()
                repair(fresh, list(verify(fresh)), {})
                model = {key: sample for key, sample in model.items() if key not in lost}
            elif action == "repair":
                assert list(verify(label_set)) == []
            else:
                drop(label_set, {})
                model = {}
                if reopen:
                    bench.create()
            if bench.store.keys():
                bench.assert_serves(model.values(), SAMPLES)
                assert bench.fresh().totals().num_samples == len(model)
                assert set(reader.missing([s.key for s in SAMPLES])).isdisjoint(model)
                for found in reader.read(list(model)):
                    bench.assert_same(found, model[found.key])
            else:
                assert model == {}


# -- death at every step ---------------------------------------------------------------------------
def state(bench) -> list[str] | None:
    """Everything that a new process is served; None if something is damaged."""
    label_set = bench.fresh()
    if list(label_set.verify()):
        return None
    absent = set(label_set.missing([sample.key for sample in SAMPLES]))
    stored = [sample.key for sample in SAMPLES if sample.key not in absent]
    return [repr(sample) for sample in label_set.read(stored)]


def append_some(label_set: LabelSet, archive: str) -> None:
    label_set.append(SAMPLES[4:10], {})


def compact_all(label_set: LabelSet, archive: str) -> None:
    compact(label_set, {})


def collect_all(label_set: LabelSet, archive: str) -> None:
    collect_now(label_set)


def repair_all(label_set: LabelSet, archive: str) -> None:
    repair(label_set, list(verify(label_set)), {})


def unpack_all(label_set: LabelSet, archive: str) -> None:
    store = LabelStore(label_set.objects.uri)
    store.objects = label_set.objects  # those that die
    unpack(archive, store, {})


def prepared(bench, what: str):
    """Three commits, and what the step is for."""
    label_set = bench.filled(SAMPLES[:1], SAMPLES[1:2], SAMPLES[2:4])
    if what == "collect":
        compact(label_set, {})
    if what == "repair":
        index = label_set.log.single(3).index
        (bench.root / label_set.index_path(index.name)).write_bytes(b"")
    return bench


STEPS_THAT_DIE: dict[str, Callable[[LabelSet, str], None]] = {
    "append": append_some,
    "compact": compact_all,
    "collect": collect_all,
    "repair": repair_all,
    "unpack": unpack_all,
}


@pytest.mark.parametrize("what", STEPS_THAT_DIE)
def test_a_death_at_any_change_leaves_the_old_state_or_the_new_one(
    benches, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next process that does the same is not disturbed by what was left."""
    monkeypatch.setattr("storage.log.MERGE_FACTOR", 2)
    step = STEPS_THAT_DIE[what]
    source = benches()
    archive = str(source.root / "labels.tar.zst")
    pack(source.filled(SAMPLES[3:8]), archive, {})
    template = prepared(benches(), what)
    before = state(template)

    def copied():
        bench = benches()
        shutil.copytree(template.root, bench.root, dirs_exist_ok=True)
        return bench

    bench = copied()
    step(bench.fresh(), archive)
    after = state(bench)
    assert after is not None
    seen, deaths, alive = [], 0, False
    while not alive:
        bench = copied()
        try:
            step(bench.dying(deaths), archive)
            alive = True
        except bench.killed:
            deaths += 1
        seen.append(state(bench))
        assert seen[-1] in (before, after)
        step(bench.fresh(), archive)
        collect_now(bench.fresh())
        assert state(bench) == after
    assert deaths >= 3
    assert (seen[0], seen[-1]) == (before, after)
