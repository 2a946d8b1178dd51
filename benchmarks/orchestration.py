"""What running a project costs beside the work itself, and how far planning goes.

``--only dispatch``: plan and dispatch pre-tokenised prompts to simulated engines under real Ray.
``--only overhead``: CPU of ``distill label`` against the same labelling in one process.
``--only again``: the second run of a project that has everything.
``--only engines``: a thousand simulated engines that die, on a simulated clock.
``--only experiments``: E experiments on one label set against E times with the teacher in the loop.
"""

import harness

# isort: split
import argparse
import contextlib
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from benchmarks.orchestration_projects import (
    PROMPT_TOKENS,
    make_empty_model,
    make_prompts,
    make_small_project,
    write_project,
)

PROMISED = 10_000_000
SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER: what Ray leaves behind becomes ours, and so does its CPU time."""
LOOK_S = 2.0
HEAVY = ("ray", "vllm", "deepspeed", "torch", "transformers")


# -- measuring ------------------------------------------------------------------------------------
def run_here(*arguments: str) -> tuple[Any, float, float]:
    """What this script prints in a process of its own; its wall and CPU seconds with all below."""
    before, start = _cpu_of_children(), time.perf_counter()
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    seconds = time.perf_counter() - start
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)  # daemons of Ray that outlived their driver
    return json.loads(done.stdout.splitlines()[-1]), seconds, _cpu_of_children() - before


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Bytes that this process and all below hold alone, the most at any look."""
    peak, ended = [0], threading.Event()
    me = psutil.Process()

    def look() -> None:
        while not ended.wait(LOOK_S):
            total = 0
            for process in (me, *me.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total += process.memory_full_info().uss
            peak[0] = max(peak[0], total)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def open_project(folder: str) -> Any:
    """The project of a folder."""
    from rich.console import Console

    from pipeline.config import load_config
    from pipeline.project import Project

    return Project(load_config(Path(folder) / "run.yaml"), Console(quiet=True))


# -- in processes of their own --------------------------------------------------------------------
def dispatch_here(folder: str) -> dict[str, Any]:
    """Plan, and give every miss to an engine that says at once that it is labelled."""
    from pipeline.cluster import Cluster
    from pipeline.run import plan_project
    from pipeline.steps import label_job, label_worker
    from pipeline.steps.label import label_missing
    from teacher_server.label import LabelProgress

    class SimulatedWorker(label_worker.TeacherWorker):
        def start(self) -> label_worker.EngineFacts:
            import ray

            return label_worker.EngineFacts(ray.get_runtime_context().get_node_id(), 0.0)

        def label(self, number: int, requests: list[Any]) -> Iterator[LabelProgress]:
            yield LabelProgress(len(requests), len(requests), 0, len(requests), len(requests))

    vars(label_job)["TeacherWorker"] = SimulatedWorker  # no label is made
    project = open_project(folder)
    with peak_memory() as peak, project.running():
        start = time.perf_counter()
        teacher, plan = plan_project(project)
        planned = time.perf_counter()
        with Cluster(project.config.cluster) as cluster:
            done = label_missing(project, plan, teacher, cluster)
            seconds = time.perf_counter() - planned
    return {
        "plan_s": planned - start,
        "dispatch_s": seconds,
        "samples": done.num_labelled,
        "peak_bytes": peak[0],
    }


def bare_here(folder: str) -> dict[str, Any]:
    """Plan and label in this process, as ``distill label`` does in several."""
    from pipeline.run import plan_project
    from pipeline.steps.label import requested_label_set
    from storage.provenance import provenance
    from teacher_server.backends.base import TeacherJob, start_backend
    from teacher_server.label import label_samples

    project = open_project(folder)
    with project.running():
        teacher, plan = plan_project(project)
    job = TeacherJob(
        model=teacher.model.directory,
        backend=project.config.teacher.backend,
        spec=plan.spec,
        max_model_len=plan.max_model_len,
    )
    requests, label_set = list(plan.requests()), requested_label_set(project, plan, teacher)
    commit_samples = project.config.label.commit_samples
    backend = start_backend(job)
    start = time.process_time()
    *_, last = label_samples(
        backend, requests, label_set, commit_samples=commit_samples, provenance=provenance()
    )
    return {"samples": last.committed_samples, "label_cpu_s": time.process_time() - start}


def label_here(folder: str) -> dict[str, Any]:
    """``distill label``."""
    from pipeline.cluster import Cluster
    from pipeline.run import label_project

    project = open_project(folder)
    with project.running(), Cluster(project.config.cluster) as cluster:
        _, _, done = label_project(project, cluster)
    return {"samples": done.num_labelled}


def start_ray_here(folder: str) -> dict[str, Any]:
    """Import what ``distill label`` imports, start Ray and one process that does nothing."""
    import pipeline.run  # noqa: F401 - its imports are part of the start
    from pipeline.cluster import Cluster

    project = open_project(folder)
    with Cluster(project.config.cluster) as cluster:
        ray = cluster.ray
        ray.get(ray.remote(**cluster.options(threads=1))(lambda: None).remote())
    return {}


def run_project_here(folder: str) -> dict[str, Any]:
    """``distill run``; tells what it took beside imports, and what was loaded."""
    start = time.perf_counter()
    import pipeline.steps.report  # noqa: F401 - a step imports it when it is needed
    from pipeline.run import run_project

    project = open_project(folder)
    imports = time.perf_counter() - start
    start = time.perf_counter()
    with project.running():
        run_project(project)
    seconds = time.perf_counter() - start
    return {
        "import_s": imports,
        "seconds": seconds,
        "loaded": [name for name in HEAVY if name in sys.modules],
        "forward_tokens": sum(e.get("teacher_forward_tokens", 0) for e in project.events()),
    }


HERE = {
    "dispatch": dispatch_here,
    "bare": bare_here,
    "label": label_here,
    "start-ray": start_ray_here,
    "run": run_project_here,
}


# -- the lines ------------------------------------------------------------------------------------
def dispatch_goals(folder: Path, *, quick: bool) -> list[harness.Goal]:
    """Planning and dispatching, and how both grow."""
    goals, per_sample = [], []
    sizes = (50_000, 500_000) if quick else (1_000_000, PROMISED)
    for size in sizes:
        own = folder / f"dispatch-{size}"
        own.mkdir(parents=True)
        teacher = make_empty_model(own / "teacher")
        make_prompts(own / "train.jsonl", size)
        write_project(
            own,
            teacher,
            teacher={"backend": {"type": "fake", "replicas": 2}},
            label={"qa": {"enabled": False}},
            cluster={"cpus": 2},
        )
        found, _, cpu = run_here("--here", "dispatch", "--folder", str(own))
        assert found["samples"] == size
        promised = size == PROMISED
        seconds, peak = found["plan_s"] + found["dispatch_s"], found["peak_bytes"] / 2**30
        per_sample.append(1e6 * cpu / size)
        goals += [
            harness.Goal(
                f"plan and dispatch {size:,} prompts",
                "< 15 min" if promised else "",
                f"{seconds / 60:.1f} min",
                seconds < 900 if promised else None,
                f"{found['plan_s']:.0f} s to plan, {found['dispatch_s']:.0f} s to dispatch, Ray's "
                f"start included; {per_sample[-1]:.0f} us of CPU per prompt",
            ),
            harness.Goal(
                f"peak memory: {size:,} prompts",
                "< 4 GB" if promised else "",
                f"{peak:.2f} GB",
                peak < 4 if promised else None,
                "all processes, Ray's included, what each holds alone",
            ),
        ]
    ratio = per_sample[1] / per_sample[0]
    return [
        *goals,
        harness.Goal(
            f"CPU per prompt: {sizes[1]:,} against {sizes[0]:,}",
            "<= 1.2x",
            f"{ratio:.2f}x",
            ratio <= 1.2,
            "linear",
        ),
    ]


def engines_goals(folder: Path, *, quick: bool) -> list[harness.Goal]:
    """The scheduler with engines that die, hang, are slow, and nodes that join and go."""
    from pipeline.schedule import ScheduleLimits
    from tests.unit.pipeline.simulated_engines import Faults, Simulation

    samples, poisoned = 1_000_000, frozenset({0, 70_000, 70_001, 555_555, 999_999})
    limits = ScheduleLimits(engines=1000, commit_samples=64, in_flight=16, deadline_s=1800)
    faults = Faults(
        deaths_per_minute=0.01,
        hangs=0.001,
        failed_starts=0.02,
        slow=0.05,
        poisoned=poisoned,
        room=((0, 300), (300, 1000), (700, 600), (900, 1000)),
    )
    deaths = steals = lost = doubled = most_lost = 0
    start = time.process_time()
    seeds = range(1 if quick else 20)
    for seed in seeds:
        simulation = Simulation(samples, limits, faults, seed=seed)
        simulation.run()
        lost += int((simulation.commits == 0).sum()) - len(simulation.given_up)
        doubled += int((simulation.commits > 1).sum())
        assert set(simulation.given_up) == poisoned
        deaths, steals = deaths + simulation.schedule.deaths, steals + simulation.schedule.steals
        most_lost = max(most_lost, simulation.most_lost)
    seconds = (time.process_time() - start) / len(seeds)
    return [
        harness.Goal(
            f"1,000 engines, 1 % die per minute, 1 M samples, {len(seeds)} simulated jobs",
            "none lost or doubled",
            f"{lost} lost, {doubled} doubled",
            lost == doubled == 0,
            f"{deaths} deaths, {steals} steals; a death cost at most {most_lost} samples, a commit "
            f"has 64 and 16 are in flight; {seconds:.1f} s of CPU per job",
        )
    ]


def overhead_goals(folder: Path, *, quick: bool) -> list[harness.Goal]:
    """CPU of the orchestrated label job, beyond Ray's start."""
    rounds = 1 if quick else 3
    samples = 100 if quick else 1500
    shares = []
    for number in range(rounds):
        cpu = {}
        for how in ("bare", "label", "start-ray"):
            own = folder / f"overhead-{how}-{number}"
            make_small_project(own, prompts=samples, students=0)
            _, _, cpu[how] = run_here("--here", how, "--folder", str(own))
        shares.append(100 * ((cpu["label"] - cpu["start-ray"]) / cpu["bare"] - 1))
    figure = harness.Figure(statistics.median(shares), min(shares), max(shares))
    return [
        harness.Goal(
            f"CPU of `distill label` beyond one bare process: {samples} answers",
            "<= 5 %",
            figure.text(" %", digits=1),
            None if quick else figure.median <= 5,
            f"last round: {cpu['label']:.1f} s with {cpu['start-ray']:.1f} s of Ray's start, bare "
            f"{cpu['bare']:.1f} s; imports and model load are in both",
        )
    ]


def again_goals(folder: Path, *, quick: bool) -> list[harness.Goal]:
    """The second run of an unchanged project."""
    own = folder / "again"
    make_small_project(own, prompts=16 if quick else 200, students=1, layers=1)
    first, _, _ = run_here("--here", "run", "--folder", str(own))
    second, _, _ = run_here("--here", "run", "--folder", str(own))
    again = second["forward_tokens"] - first["forward_tokens"]
    return [
        harness.Goal(
            "second run of an unchanged project, beyond imports",
            "< 5 s",
            f"{second['seconds']:.2f} s",
            second["seconds"] < 5,
            f"imports {second['import_s']:.1f} s; the first run took {first['seconds']:.0f} s",
        ),
        harness.Goal(
            "Ray, engine, DeepSpeed or model loaded by it",
            "none",
            ", ".join(second["loaded"]) or "none",
            not second["loaded"] and again == 0,
            f"teacher forward tokens: {first['forward_tokens']} and then {again}",
        ),
    ]


def experiments_goals(folder: Path, *, quick: bool) -> list[harness.Goal]:
    """E students of one label set against E times with the teacher in the loop."""
    counts = (1, 2) if quick else (1, 2, 5, 10)
    samples = 32 if quick else 300
    cached, online = {}, []
    for count in counts:
        own = folder / f"experiments-{count}"
        make_small_project(own, prompts=samples, students=count)
        found, _, cpu = run_here("--here", "run", "--folder", str(own))
        cached[count] = (cpu, found["forward_tokens"])
    for number in range(counts[-1]):
        own = folder / f"online-{number}"
        make_small_project(own, prompts=samples, students=1)
        found, _, cpu = run_here("--here", "run", "--folder", str(own))
        online.append((cpu, found["forward_tokens"]))
    return [
        harness.Goal(
            f"teacher's tokens and CPU of {count} experiments, labels made once",
            "teacher paid once",
            f"{cached[count][1]} tokens, {cached[count][0]:.0f} s",
            cached[count][1] == cached[counts[0]][1],
            f"each with its own teacher run: {sum(t for _, t in online[:count])} tokens, "
            f"{sum(c for c, _ in online[:count]):.0f} s",
        )
        for count in counts
    ]


LINES = {
    "dispatch": dispatch_goals,
    "overhead": overhead_goals,
    "again": again_goals,
    "engines": engines_goals,
    "experiments": experiments_goals,
}


def main() -> int:
    """Measure, print the table and write the page."""
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--only", choices=LINES, action="append", help="these lines only")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where projects are made")
    parser.add_argument("--here", choices=HERE, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(HERE[arguments.here](str(arguments.folder))))
        return 0
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    goals = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name in arguments.only or LINES:
            print(f"{name} ...", flush=True)
            goals += LINES[name](Path(folder), quick=arguments.quick)
    notes = [
        "Every figure is of fresh processes; CPU is that of a process and all below it, Ray's "
        "daemons included. Wall seconds where the goal is one.",
        f"Dispatch: prompts of {PROMPT_TOKENS} token ids on average in a JSONL file, a new store, "
        "two engines under real Ray that answer at once and store nothing. Planning reads and "
        "checks every row, stores the selection and asks the store what is missing.",
        "Engines: besides random deaths, one commit in 1,000 hangs, 2 % of starts fail, 5 % of "
        "engines take ten times as long, nodes join and go, and five samples kill every engine; "
        "these five are set aside.",
        "Overhead: a random Llama of 4 layers and 256 units answers with 32 tokens each through "
        "transformers, one thread. Ray's start: the imports of the driver, Ray and one process.",
        "Experiments: students of one layer, each trained and evaluated. With its own teacher run: "
        "a project of one student in a store of its own, once per experiment.",
    ]
    return harness.report(goals, notes=notes)


if __name__ == "__main__":
    sys.exit(main())
