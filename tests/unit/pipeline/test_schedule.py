"""Who labels what when engines come, go, die, hang and are slow; time is simulated."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.schedule import ALONE, LEASE_COMMITS, START_FAILURES, TOGETHER, ScheduleLimits
from pipeline.schedule import Schedule as ScheduleOf
from pipeline.schedule_events import (
    Ask,
    Decision,
    Died,
    Fail,
    Finished,
    Give,
    GiveUp,
    Hire,
    Kill,
    Progress,
    Released,
    Started,
    StartFailed,
    Stop,
    Tick,
)
from tests.unit.pipeline.simulated_engines import Faults, Simulation

LIMITS = ScheduleLimits(engines=2, commit_samples=4, in_flight=2, deadline_s=60)
POISONED = frozenset({0, 70_000, 70_001, 555_555, 999_999})


def started(num_samples: int, limits: ScheduleLimits = LIMITS, engines: int = 1) -> ScheduleOf:
    """A schedule whose first engines are ready, and hold their first leases."""
    schedule = ScheduleOf(num_samples, limits)
    schedule.on(Tick(0.0))
    for engine in range(engines):
        schedule.on(Started(engine))
    return schedule


def given_to(decisions: list[Decision]) -> dict[int, list[int]]:
    return {d.engine: list(d.samples) for d in decisions if isinstance(d, Give)}


# -- the whole cluster ----------------------------------------------------------------------------
def test_a_thousand_engines_with_deaths_lose_and_double_nothing() -> None:
    """A million samples; besides deaths: hangs, slow engines, poison, nodes that join and go."""
    faults = Faults(
        deaths_per_minute=0.01,
        hangs=0.001,
        failed_starts=0.02,
        slow=0.05,
        poisoned=POISONED,
        room=((0, 300), (300, 1000), (700, 600), (900, 1000)),
    )
    limits = ScheduleLimits(engines=1000, commit_samples=64, in_flight=16, deadline_s=1800)
    simulation = Simulation(1_000_000, limits, faults, seed=1)
    simulation.run()
    assert sorted(simulation.given_up) == sorted(POISONED)
    once = np.ones(1_000_000, np.uint8)
    once[sorted(POISONED)] = 0
    np.testing.assert_array_equal(simulation.commits, once)
    assert simulation.most_engines == 1000
    assert simulation.schedule.deaths > 200
    assert simulation.schedule.steals > 100
    # what a death costs: the commit that was not finished, and what was in flight
    assert 0 < simulation.most_lost <= 64 + 16


def outcome(seed: int) -> tuple[float, int, int, list[int]]:
    faults = Faults(deaths_per_minute=0.5, hangs=0.02, slow=0.2, poisoned=frozenset({7, 40}))
    limits = ScheduleLimits(engines=9, commit_samples=4, in_flight=3, deadline_s=100)
    simulation = Simulation(500, limits, faults, seed=seed)
    simulation.run()
    return simulation.now, simulation.num_decisions, simulation.schedule.steals, simulation.given_up


def test_a_seed_decides_everything() -> None:
    assert outcome(3) == outcome(3)
    assert outcome(3) != outcome(4)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_samples=st.integers(0, 200),
    limits=st.builds(
        ScheduleLimits,
        engines=st.integers(1, 6),
        commit_samples=st.integers(1, 9),
        in_flight=st.integers(1, 9),
        deadline_s=st.just(500.0),
    ),
    faults=st.builds(
        Faults,
        hangs=st.sampled_from([0.0, 0.05]),
        failed_starts=st.sampled_from([0.0, 0.1]),
        slow=st.sampled_from([0.0, 0.3]),
        poisoned=st.frozensets(st.integers(0, 199), max_size=3),
        room=st.sampled_from([((0, 9),), ((0, 1), (90, 4), (200, 2)), ((0, 5), (60, 0), (500, 3))]),
    ),
)
def test_every_sample_is_committed_once_or_given_up_for_a_reason(
    seed: int, num_samples: int, limits: ScheduleLimits, faults: Faults
) -> None:
    simulation = Simulation(num_samples, limits, faults, seed=seed)
    simulation.run()
    if simulation.failed:  # three starts in a row that failed, before anything worked
        assert faults.failed_starts
        return
    poisoned = {number for number in faults.poisoned if number < num_samples}
    # hangs may strike an innocent sample ALONE times in a row; nothing else can be given up
    if not faults.hangs:
        assert sorted(simulation.given_up) == sorted(poisoned)
    assert poisoned <= set(simulation.given_up)
    given_up = np.zeros(num_samples, np.uint8)
    given_up[simulation.given_up] = 1
    np.testing.assert_array_equal(simulation.commits + given_up, np.ones(num_samples))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), stop_at=st.floats(0, 200), num_engines=st.integers(1, 5))
def test_a_job_that_is_stopped_commits_what_was_begun_and_ends(
    seed: int, stop_at: float, num_engines: int
) -> None:
    limits = replace(LIMITS, engines=num_engines, deadline_s=500)
    simulation = Simulation(400, limits, Faults(slow=0.3, stop_at=stop_at), seed=seed)
    simulation.run()
    assert set(np.unique(simulation.commits)) <= {0, 1}
    if simulation.now >= stop_at:
        slowest, begun = 10.0, LIMITS.commit_samples + LIMITS.in_flight
        assert simulation.now <= stop_at + 1 + 2 * slowest * begun


@settings(max_examples=200, deadline=None)
@given(
    choices=st.lists(st.integers(0, 10**6), max_size=120),
    num_samples=st.integers(1, 40),
    engines=st.integers(1, 4),
)
def test_any_order_of_news_ends_with_every_sample_done_once(
    choices: list[int], num_samples: int, engines: int
) -> None:
    """News is chosen one by one among all that may come next; after that, only good news."""
    limits = ScheduleLimits(engines=engines, commit_samples=2, in_flight=1, deadline_s=10.0)
    schedule = ScheduleOf(num_samples, limits)
    starting: set[int] = set()
    begun: dict[int, list[int]] = {}
    unbegun: dict[int, list[int]] = {}
    asked: dict[int, int] = {}
    closed: set[int] = set()
    done: list[int] = []
    given_up: list[int] = []
    now = 0.0

    def obey(decisions: list[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Hire(engine):
                    starting.add(engine)
                case Give(engine, samples):
                    held = [n for lists in (begun, unbegun) for own in lists.values() for n in own]
                    assert not set(samples) & {*held, *done, *given_up}
                    begun[engine], unbegun[engine] = [], list(samples)
                case Ask(engine, count):
                    assert engine not in asked
                    asked[engine] = count
                case Kill(engine):
                    die(engine, accuses=True)
                case GiveUp(sample):
                    given_up.append(sample)
                case Fail():
                    pytest.fail("no start fails here")

    def die(engine: int, *, accuses: bool) -> None:
        starting.discard(engine)
        closed.discard(engine)
        asked.pop(engine, None)
        begun.pop(engine, None)
        unbegun.pop(engine, None)
        left = [n for n in schedule.lease(engine) if n not in done]
        obey(schedule.on(Died(engine, left, accuses)))

    def step(choice: int, *, good: bool) -> None:
        nonlocal now
        news = [("start", e) for e in sorted(starting)]
        news += [("work", e) for e in sorted(begun) if e not in closed]
        news += [("answer", e) for e in sorted(asked)]
        if not good:
            news += [("die", e) for e in sorted(begun)] + [("leave", e) for e in sorted(begun)]
        if not news:
            now += 5.0
            obey(schedule.on(Tick(now)))
            return
        what, engine = news[choice % len(news)]
        match what:
            case "start":
                starting.discard(engine)
                obey(schedule.on(Started(engine)))
            case "work" if unbegun[engine]:
                begun[engine].append(unbegun[engine].pop(0))
                done.append(begun[engine].pop())
                obey(schedule.on(Progress(engine, 1)))
            case "work":
                if engine in asked:
                    closed.add(engine)
                else:
                    del begun[engine], unbegun[engine]
                obey(schedule.on(Finished(engine)))
            case "answer":
                count = min(asked.pop(engine), len(unbegun[engine]))
                if count:
                    del unbegun[engine][-count:]
                if engine in closed:
                    closed.discard(engine)
                    del begun[engine], unbegun[engine]
                obey(schedule.on(Released(engine, count)))
            case "die" | "leave":
                die(engine, accuses=what == "die")

    obey(schedule.on(Tick(now)))
    for choice in choices:
        if not schedule.is_done:
            step(choice, good=False)
    order = random.Random(0)
    for _ in range(40 * num_samples + 400):
        if schedule.is_done:
            break
        step(order.randrange(10**6), good=True)
    assert schedule.is_done
    assert sorted([*done, *given_up]) == list(range(num_samples))


# -- one rule at a time ---------------------------------------------------------------------------
def test_ten_million_samples_are_one_range() -> None:
    schedule = ScheduleOf(10_000_000, LIMITS)
    assert schedule.on(Tick(0.0)) == [Hire(0), Hire(1)]
    (give,) = schedule.on(Started(1))
    assert give == Give(1, range(LIMITS.commit_samples * LEASE_COMMITS))
    assert schedule.num_waiting == 10_000_000 - len(range(64))


def test_engines_that_find_no_room_keep_nobody_waiting() -> None:
    schedule = ScheduleOf(8, replace(LIMITS, engines=50))
    assert schedule.on(Tick(0.0)) == [Hire(0), Hire(1)]
    assert given_to(schedule.on(Started(1))) == {1: [0, 1, 2, 3]}
    assert given_to(schedule.on(Finished(1))) == {1: [4, 5, 6, 7]}
    schedule.on(Finished(1))
    assert schedule.is_done
    assert schedule.num_starting == 1


def test_leases_shrink_towards_the_end_to_whole_commits() -> None:
    schedule = ScheduleOf(300, LIMITS)
    decisions = [*schedule.on(Tick(0.0)), *schedule.on(Started(0))]
    sizes = []
    while given := given_to(decisions):
        sizes.append(len(given[0]))
        decisions = schedule.on(Finished(0))
    assert sum(sizes) == 300
    assert sizes[0] == 64
    assert sizes == sorted(sizes, reverse=True)
    assert all(size % LIMITS.commit_samples == 0 for size in sizes)
    # a single engine has nobody to wait for
    alone = ScheduleOf(300, replace(LIMITS, engines=1))
    alone.on(Tick(0.0))
    (give,) = alone.on(Started(0))
    assert give == Give(0, range(64))


def test_an_idle_engine_gets_half_of_what_another_has_not_begun() -> None:
    schedule = started(64, replace(LIMITS, engines=1))
    schedule.limits = LIMITS
    schedule.on(Tick(1.0))
    schedule.on(Progress(0, 10))
    # 64 - 10 finished - 2 in flight = 52 are not begun
    assert schedule.on(Started(1)) == [Ask(0, 26)]
    assert schedule.on(Progress(0, 30)) == []  # asked once
    # it has begun more since: 20 are all that it can let go
    assert schedule.on(Released(0, 20)) == [Give(1, range(44, 64))]
    assert list(schedule.lease(0)) == list(range(44))
    assert schedule.steals == 1
    # it said that it has begun all others, so it is not asked again
    assert schedule.on(Finished(1)) == []
    assert schedule.on(Finished(0)) == []
    assert schedule.is_done


def test_what_was_let_go_is_not_lost_when_its_engine_ends_before_it_answered() -> None:
    schedule = started(64, replace(LIMITS, engines=1))
    schedule.limits = LIMITS
    assert schedule.on(Started(1)) == [Ask(0, 31)]
    assert schedule.on(Finished(0)) == []
    assert not schedule.is_done
    assert sorted(given_to(schedule.on(Released(0, 31))).values()) == [list(range(33, 64))]


def test_a_victim_that_dies_before_it_answered_takes_nothing_with_it() -> None:
    schedule = started(64, replace(LIMITS, engines=1))
    schedule.limits = LIMITS
    schedule.on(Started(1))
    decisions = schedule.on(Died(0, list(range(10, 64))))
    assert given_to(decisions) == {1: list(range(10, 16))}  # suspects: 2 in flight, 4 uncommitted
    assert given_to(schedule.on(Finished(1))) == {1: list(range(16, 64))}


def test_suspects_stay_together() -> None:
    limits = replace(LIMITS, commit_samples=8)
    schedule = started(8, replace(limits, engines=1))
    schedule.limits = limits
    schedule.on(Died(0, list(range(8))))
    assert given_to(schedule.on(Started(1))) == {1: list(range(8))}
    assert not [d for d in schedule.on(Started(2)) if isinstance(d, Ask)]


def test_a_node_that_goes_accuses_nobody() -> None:
    schedule = started(1, replace(LIMITS, engines=1))
    for engine in range(1, 2 * ALONE):
        decisions = schedule.on(Died(engine - 1, [0], accuses=False))
        assert decisions == [Hire(engine)]
        assert given_to(schedule.on(Started(engine))) == {engine: [0]}


@pytest.mark.parametrize("num_suspects", [1, 2, 6])
def test_the_sample_that_kills_engines_is_found(num_suspects: int) -> None:
    schedule = started(num_suspects, replace(LIMITS, engines=1))
    poisoned, deaths, engine, given_up = 0, 0, 0, []
    while not schedule.is_done:
        lease = list(schedule.lease(engine))
        if poisoned in lease:
            deaths += 1
            decisions = schedule.on(Died(engine, lease))
        else:
            decisions = schedule.on(Finished(engine))
        given_up += [d.sample for d in decisions if isinstance(d, GiveUp)]
        for hired in [d for d in decisions if isinstance(d, Hire)]:
            engine = hired.engine
            schedule.on(Started(engine))
    assert given_up == [poisoned]
    # tried together, halved down to one, tried alone
    assert deaths <= TOGETHER + ALONE + math.ceil(math.log2(num_suspects + 1))


def test_an_engine_that_is_silent_for_too_long_is_killed_once() -> None:
    schedule = started(100)
    schedule.on(Tick(50.0))
    schedule.on(Progress(0, 1))
    assert schedule.on(Tick(110.0)) == []
    assert schedule.on(Tick(111.0)) == [Kill(0, 61.0)]
    assert schedule.on(Tick(300.0)) == []


def test_engines_that_start_slowly_are_not_taken_for_hung() -> None:
    schedule = ScheduleOf(100, LIMITS)
    schedule.on(Tick(0.0))
    assert schedule.on(Tick(10_000.0)) == []


def test_a_failed_start_is_tried_again_after_a_while() -> None:
    schedule = ScheduleOf(1, LIMITS)
    schedule.on(Tick(0.0))
    assert schedule.on(StartFailed(0)) == []
    assert schedule.on(Tick(0.5)) == []
    assert schedule.on(Tick(1.0)) == [Hire(1)]


def test_starts_that_fail_one_after_the_other_fail_the_job() -> None:
    schedule = ScheduleOf(1, LIMITS)
    (hire,) = schedule.on(Tick(0.0))
    for number in range(1, START_FAILURES):
        assert schedule.on(StartFailed(hire.engine)) == []
        (hire,) = schedule.on(Tick(100.0 * number))
    assert schedule.on(StartFailed(hire.engine))[0] == Fail(START_FAILURES)


def test_starts_that_fail_while_another_engine_works_fail_nothing() -> None:
    schedule = started(1000)
    for number in range(1, 3 * START_FAILURES):
        assert schedule.on(StartFailed(number)) == []
        assert schedule.on(Tick(1000.0 * number))[-1] == Hire(number + 1)


def test_after_a_request_to_stop_nothing_is_begun() -> None:
    schedule = started(1000)
    assert schedule.on(Stop()) == [Ask(0, 64)]
    assert schedule.on(Started(1)) == []
    assert schedule.on(Released(0, 60)) == []
    assert not schedule.is_done
    assert schedule.on(Finished(0)) == []
    assert schedule.is_done
