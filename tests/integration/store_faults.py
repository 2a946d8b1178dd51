"""What the tests of faults share: processes that die, and what must hold of a store afterwards.

Children are forked by a server that has imported everything, so that one lives for milliseconds.
"""

import ctypes
import datetime
import functools
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import obstore

from storage.compact import compact
from storage.errors import LabelStoreError
from storage.garbage import collect, find_garbage
from storage.pack import pack, unpack
from storage.samples import LabelledSample
from storage.store import LabelStore
from storage.testing import make_sample, make_spec

SPEC = make_spec()
AT_ONCE = datetime.timedelta(0)
"""A grace period."""
PATIENCE_S = 60
"""For what takes milliseconds."""

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "pytest", "pandas", "storage.pack"])


@functools.cache
def sample(number: int) -> LabelledSample:
    """Sample ``number``: the same in every process."""
    return make_sample(number, SPEC, num_tokens=3)


def keys_of(numbers: Iterable[int]) -> list[str]:
    return [sample(number).key for number in numbers]


# -- what must hold -------------------------------------------------------------------------------
def assert_same(found: LabelledSample, expected: LabelledSample) -> None:
    """All fields are equal but the top-k log-probs, which are within 1/512 nat."""
    for name in LabelledSample.__dataclass_fields__:
        one, other = getattr(found, name), getattr(expected, name)
        if name == "topk_logprobs_NK":
            assert np.abs(one - other).max() <= 1 / 512
        elif isinstance(other, np.ndarray | dict):
            np.testing.assert_equal(one, other)
        else:
            assert one == other, name


def assert_serves(uri: str, reported: Iterable[int], asked: Iterable[int]) -> set[int]:
    """What was reported is there, what is there is right, and nothing is there twice.

    Args:
        uri: The store.
        reported: Numbers of samples that a writer said were committed.
        asked: Numbers of all samples that some writer may have committed.

    Returns:
        Numbers of the samples that are stored.
    """
    numbers = sorted({*asked, *reported})
    labels = LabelStore(uri).open(SPEC.key)
    stored = [
        n for n, there in zip(numbers, labels.contains(keys_of(numbers)), strict=True) if there
    ]
    assert set(reported) <= set(stored)
    for number, found in zip(stored, labels.read(keys_of(stored)), strict=True):
        assert_same(found, sample(number))
    assert labels.totals().num_samples == len(stored)
    return set(stored)


def assert_intact(uri: str, reported: Iterable[int], asked: Iterable[int]) -> set[int]:
    """As :func:`assert_serves`, and every byte of the store is what it should be."""
    stored = assert_serves(uri, reported, asked)
    assert list(LabelStore(uri).open(SPEC.key).verify()) == []
    return stored


# -- children -------------------------------------------------------------------------------------
class Child:
    """A forked process that runs ``target(connection, *arguments)``.

    Args:
        target: A function of this module: it is found by name.
        arguments: More arguments.
    """

    def __init__(self, target: Callable[..., None], *arguments: object) -> None:
        self.connection, theirs = FORKS.Pipe()
        settings = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        self.process = FORKS.Process(target=_main, args=(theirs, settings, target, arguments))
        self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def receive(self) -> Any:
        """The next message.

        Raises:
            EOFError: if the child died before it sent one.
        """
        if not self.connection.poll(PATIENCE_S):
            self.kill()
            raise TimeoutError("a child hangs")
        return self.connection.recv()

    def messages(self) -> list[Any]:
        """All messages until the child ends, however it ends."""
        found = []
        try:
            while True:
                found.append(self.receive())
        except (EOFError, ConnectionResetError):
            self.process.join()
        return found

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    @property
    def was_killed(self) -> bool:
        self.process.join()
        return self.process.exitcode == -signal.SIGKILL


def _main(
    connection: Connection,
    settings: dict[str, str],
    target: Callable[..., None],
    arguments: Sequence[object],
) -> None:
    os.environ.update(settings)
    target(connection, *arguments)


def append_each(
    connection: Connection, uri: str, commits: Sequence[Sequence[int]], *, warm: bool = False
) -> None:
    """Commit groups of samples, and report each group when ``append`` has returned."""
    labels = LabelStore(uri).create(SPEC, {})
    every = [[sample(number) for number in numbers] for numbers in commits]
    if warm:
        labels.append(every.pop(0), {})
    connection.send("ready")
    connection.recv()
    for numbers, group in zip(commits[int(warm) :], every, strict=True):
        labels.append(group, {"pid": str(os.getpid())})
        connection.send(list(numbers))


def started_writer(uri: str, commits: Sequence[Sequence[int]], *, warm: bool = False) -> Child:
    """A child that is about to commit; any message makes it go on."""
    child = Child(functools.partial(append_each, warm=warm), uri, commits)
    assert child.receive() == "ready"
    return child


# -- deaths ---------------------------------------------------------------------------------------
def kill_randomly(uri: str, *, kills: int, seed: int) -> list[int]:
    """Kill writers from outside at random moments; returns the samples they reported.

    Every writer commits samples that the one before it may have left undone, and new ones.
    """
    moments = random.Random(seed)
    LabelStore(uri, create=True).create(SPEC, {})
    duration_s = _seconds_of_a_writer(uri)
    reported: list[int] = [0, 1]
    num_killed, first = 0, 2
    for trial in itertools.count():
        commits = [[first - 2, first], [first + 1, first + 2], [first + 3]]
        child = started_writer(uri, commits)
        child.connection.send("go")
        time.sleep(moments.uniform(0, duration_s))
        child.process.kill()
        messages = child.messages()
        num_killed += child.was_killed
        reported += [number for numbers in messages for number in numbers]
        first += 4
        if trial % 50 == 0:
            assert_serves(uri, reported, range(first + 1))
        if num_killed >= kills:
            break
        assert trial < 5 * kills, "almost no writer was killed"
    stored = assert_intact(uri, reported, range(first + 1))
    assert stored
    LabelStore(uri).open(SPEC.key).append([sample(number) for number in range(first + 1)], {})
    assert_intact(uri, range(first + 1), range(first + 1))
    return reported


def _seconds_of_a_writer(uri: str) -> float:
    child = started_writer(uri, [[0], [1], [0, 1]])
    started = time.monotonic()
    child.connection.send("go")
    child.messages()
    return time.monotonic() - started


CHANGING_CALLS = (
    *("openat", "creat", "write", "pwrite64", "writev", "ftruncate", "fsync", "fdatasync", "close"),
    *("link", "linkat", "unlink", "unlinkat", "rename", "renameat", "renameat2", "mkdir", "rmdir"),
)
"""System calls that change files, or end a change."""


def can_trace() -> bool:
    """Whether strace is there and may look into other processes."""
    if shutil.which("strace") is None:
        return False
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        with killed_at_call(sleeper.pid, "openat", 60_000):
            return True
    except PermissionError:
        return False
    finally:
        sleeper.kill()
        sleeper.wait()


@contextmanager
def killed_at_call(pid: int, call: str, number: int) -> Iterator[None]:
    """The main thread is killed as it enters a system call for the n-th time.

    Raises:
        PermissionError: if this process may not be traced.
    """
    tracer = subprocess.Popen(
        [
            *("strace", "-q", "-p", str(pid), "-o", "/dev/null"),
            *("-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={number}"),
        ],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + PATIENCE_S
    while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text():
        if tracer.poll() is not None or time.monotonic() > deadline:
            raise PermissionError(f"strace cannot trace process {pid}")
        time.sleep(0.001)
    yield
    tracer.terminate()
    tracer.wait()


def kill_at_every_call(uri: str) -> int:
    """Kill writers at each system call of a publish; returns how many were killed."""
    LabelStore(uri, create=True).create(SPEC, {})
    reported: list[int] = []
    first = num_killed = 0
    for call in CHANGING_CALLS:
        for number in itertools.count(1):
            child = started_writer(uri, [[first], [first + 1, first + 2, first]], warm=True)
            reported.append(first)
            with killed_at_call(child.pid, call, number):
                child.connection.send("go")
                messages = child.messages()
            if messages == [[first + 1, first + 2, first]]:
                reported += messages[0]
            first += 3
            labels = LabelStore(uri).open(SPEC.key)
            half = labels.contains(keys_of([first - 2, first - 1]))
            assert half[0] == half[1], "half a commit is visible"
            if not child.was_killed:
                break
            num_killed += 1
    assert_intact(uri, reported, range(first))
    return num_killed


def die_at_step(
    connection: Connection, work: Callable[..., None], number: int, *arguments: object
) -> None:
    """Run some work, and die before or after one of the calls that change a store."""
    steps = itertools.count()

    def step() -> None:
        if next(steps) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def doomed(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            step()
            found = original(*arguments, **options)
            step()
            return found

        return call

    for module, names in (
        (obstore, ("put", "delete")),
        (os, ("fsync", "link", "unlink", "replace", "rename")),
        (shutil, ("copyfileobj",)),
    ):
        for name in names:
            setattr(module, name, doomed(getattr(module, name)))
    work(*arguments)
    connection.send("done")


def kill_at_every_step(
    work: Callable[..., None],
    *arguments: object,
    check: Callable[[], object],
    first: int = 0,
    stride: int = 1,
) -> int:
    """Run some work again and again, killed at every step; returns the number of steps."""
    for number in itertools.count(first, stride):
        child = Child(die_at_step, work, number, *arguments)
        if child.messages() == ["done"]:
            return number
        assert child.was_killed
        check()
    raise AssertionError("unreachable")


def commit(uri: str, numbers: Sequence[int]) -> None:
    """Work: one commit."""
    LabelStore(uri).create(SPEC, {}).append([sample(number) for number in numbers], {})


def pack_to(uri: str, target: str) -> None:
    """Work: pack the set."""
    pack(LabelStore(uri).open(SPEC.key), target, {})


def unpack_to(source: str, uri: str) -> None:
    """Work: unpack an archive."""
    unpack(source, LabelStore(uri, create=True), {})


def compact_and_collect(uri: str) -> None:
    """What a janitor does, without any grace."""
    labels = LabelStore(uri).open(SPEC.key)
    compact(labels, {})
    collect(labels.objects, find_garbage(labels.objects, labels.key, AT_ONCE), {})


# -- a reader between others ----------------------------------------------------------------------
def write_for(connection: Connection, uri: str, seconds: float) -> None:
    """Commit sample 1, 2, 3, ...; reports the last one."""
    labels = LabelStore(uri).open(SPEC.key)
    deadline, number = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        number += 1
        labels.append([sample(number)], {})
    connection.send(number)


def compact_for(connection: Connection, uri: str, seconds: float) -> None:
    """Compact and collect without end; reports how often."""
    deadline, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        compact_and_collect(uri)
        rounds += 1
    connection.send(rounds)


def read_beside_writer_and_janitor(uri: str, *, seconds: float) -> None:
    """Read all samples again and again while another process adds some, and one compacts."""
    LabelStore(uri, create=True).create(SPEC, {}).append([sample(0)], {})
    writer, janitor = Child(write_for, uri, seconds), Child(compact_for, uri, seconds)
    labels = LabelStore(uri).open(SPEC.key)
    seen = 0
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        there = labels.contains(keys_of(range(seen + 50))).tolist()
        assert all(there[:seen])
        stored = [number for number, found in enumerate(there) if found]
        seen = len(stored)
        for number, found in zip(stored, labels.read(keys_of(stored)), strict=True):
            assert_same(found, sample(number))
    (last,), (rounds,) = writer.messages(), janitor.messages()
    assert last > 2
    assert rounds > 0
    assert_intact(uri, range(last + 1), range(last + 1))


# -- damage ---------------------------------------------------------------------------------------
def read_or_refuse(uri: str, numbers: Sequence[int]) -> str | None:
    """Read all samples: None if every one is right, the refusal if there is one, or WRONG."""
    try:
        labels = LabelStore(uri).open(SPEC.key)
        for number, found in zip(numbers, labels.read(keys_of(numbers)), strict=True):
            assert_same(found, sample(number))
    except LabelStoreError as error:
        return type(error).__name__
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        return f"WRONG {type(error).__name__}: {error}"
    return None


def flip_bits(
    connection: Connection, root: str, numbers: Sequence[int], flips: int, seed: int
) -> None:
    """Flip a bit, read everything, flip it back; again and again."""
    moments = random.Random(seed)
    files = sorted(path for path in Path(root).rglob("*") if path.is_file())
    for _ in range(flips):
        path = moments.choice(files)
        data = path.read_bytes()
        place, bit = moments.randrange(len(data)), moments.randrange(8)
        where = f"{path.relative_to(root)} byte {place} bit {bit}"
        connection.send((where, "crash"))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        connection.send((where, read_or_refuse(root, numbers)))
        path.write_bytes(data)


def assert_flips_are_noticed(root: str, numbers: Sequence[int], *, flips: int, seed: int) -> None:
    """Every flipped bit is refused or harmless: never a crash, never a wrong value."""
    messages = Child(flip_bits, root, numbers, flips, seed).messages()
    assert messages
    assert messages[-1][1] != "crash", f"{messages[-1][0]} ends the process"
    outcomes = dict(messages)
    bad = {where: found for where, found in outcomes.items() if found and found.startswith("WRONG")}
    assert bad == {}
    assert len(messages) == 2 * flips
    refused = sum(found is not None for found in outcomes.values())
    assert refused > flips / 10


def without_privileges() -> None:
    """Root may write what nobody may write; not any more."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        if libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:
            raise OSError(ctypes.get_errno(), "capset")
