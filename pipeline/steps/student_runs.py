"""Students at work: Ray Train runs, side by side, each training one student after the other.

A slot is one Ray Train run with one group of processes, whose start costs more than a small
student. What slots do is decided by the :class:`~pipeline.steps.student_queue.StudentQueue`.
"""

import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.cluster import Cluster, unwrapped
from pipeline.logs import RunLog, log_context
from pipeline.project import Project
from pipeline.steps.student_queue import StudentQueue, StudentTraining, unfinished
from pipeline.stopping import StopRequest, stop_on_signals
from pipeline.text import error_text
from storage.errors import DistillError, StoreAccessError
from student_train.config import TrainJob

log = logging.getLogger(__name__)

RAY_TRAIN_RESOURCES = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
"""Ray Train's names of the shares that Ray's own options call otherwise."""
POLL_S = 0.5
ASK_S = 2.0
"""A training asks about so often whether it is to stop."""
LEAVE_S = 60.0
"""How long slots may take to end when somebody waits, or their processes only ever die."""
FAILED_STARTS = 1
"""How often a group of processes may fail to start in time."""
FAILED_STARTS_ELASTIC = 10
"""The same where machines come and go."""
WHY_DEAD = "The actor is dead because "
"""Behind these words Ray says how a process ended."""
ELASTIC_LOOK_S = 60.0
"""Seconds between two looks at whether a training can grow."""


@dataclass(frozen=True, slots=True)
class SlotWork:
    """What the processes of a slot are told."""

    slot: int
    names: list[str]
    jobs: list[str]
    """As JSON, one per name."""
    log: RunLog


class StudentRuns:
    """Trains students, as many at once as there is room for.

    Args:
        project: The project.
        cluster: Where.
        jobs: By name of the student.
        at_once: Slots.
    """

    def __init__(
        self, project: Project, cluster: Cluster, jobs: Mapping[str, TrainJob], *, at_once: int
    ) -> None:
        self._project, self._cluster = project, cluster
        self._names = list(jobs)
        self._jobs = [job.model_dump_json() for job in jobs.values()]
        self._at_once = at_once
        self._ended: dict[int, str] = {}
        # our checkpoints are in the run folder; Ray keeps its own bookkeeping here until it is done
        self._bookkeeping = project.directory / ".ray"

    def run(
        self,
        *,
        trained: Callable[[str], None],
        steps_done: Callable[[str], int],
    ) -> dict[str, StudentTraining]:
        """Train all; a student that fails or is stopped holds up no other.

        Args:
            trained: Told the name of each student as soon as it is trained.
            steps_done: How many steps of a student were seen so far.
        """
        ray = self._cluster.ray  # connected before, it would take the signals from us
        import ray.train.torch  # noqa: F811 - a part of ray from here on

        restarts = self._project.config.cluster.student_restarts
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        actor = ray.remote(StudentQueue).options(num_cpus=0, scheduling_strategy=here)
        queue = actor.remote(len(self._names), restarts=restarts)
        threads = [
            threading.Thread(target=self._fit, args=(slot, queue), daemon=True)
            for slot in range(self._at_once)
        ]
        for thread in threads:
            thread.start()
        try:
            with stop_on_signals() as stop:
                self._watch(queue, threads, stop, trained=trained, steps_done=steps_done)
            self._leave(threads, hurry=stop.requested or bool(ray.get(queue.broken.remote())))
            students: list[StudentTraining] = ray.get(queue.students.remote())
        finally:
            ray.kill(queue)
            shutil.rmtree(self._bookkeeping, ignore_errors=True)
        return dict(zip(self._names, students, strict=True))

    def _leave(self, threads: list[threading.Thread], *, hurry: bool) -> None:
        """Wait for slots to end: what they hold, the next step needs, and Ray cannot be shut down.

        They end as soon as nothing is left for them; one whose processes never started, when Ray
        Train gives it up.
        """
        deadline = time.monotonic() + LEAVE_S
        for thread in threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()) if hurry else None)

    def _watch(
        self,
        queue: Any,
        threads: list[threading.Thread],
        stop: StopRequest,
        *,
        trained: Callable[[str], None],
        steps_done: Callable[[str], int],
    ) -> None:
        """Until every student is trained, failed or stopped."""
        ray = self._cluster.ray
        told: dict[str, tuple[str, int]] = {}
        asked = False
        while True:
            if stop.requested and not asked:
                asked = True
                self._project.say("stopping: trainings end their step and write a checkpoint")
                ray.get(queue.stop.remote())
            alive = [slot for slot, thread in enumerate(threads) if thread.is_alive()]
            for slot, why in list(self._ended.items()):
                ray.get(queue.gone.remote(slot, why))
            for number, name in enumerate(self._names):
                ray.get(queue.reached.remote(number, steps_done(name)))
            students: list[StudentTraining] = ray.get(queue.students.remote())
            for name, student in zip(self._names, students, strict=True):
                before = told.get(name, ("waiting", 0))
                told[name] = (student.state, student.deaths)
                self._tell(name, student, before, trained)
            if not unfinished(students) or (
                asked and all(student.state != "training" for student in students)
            ):
                return
            if set(alive) <= set(ray.get(queue.broken.remote())):
                why = next(iter(self._ended.values()), "its processes died when they started")
                ray.get(queue.give_up.remote(why))
                return
            time.sleep(POLL_S)

    def _tell(
        self,
        name: str,
        student: StudentTraining,
        before: tuple[str, int],
        trained: Callable[[str], None],
    ) -> None:
        """Note what has changed about a student."""
        state, deaths = before
        if student.deaths > deaths:
            self._project.note("training died", student=name, why=student.why)
            self._project.metrics.add(
                "training_deaths_total", student.deaths - deaths, student=name
            )
        if student.state != state:
            self._project.note(f"student {student.state}", student=name, why=student.why)
            if student.state == "trained":
                trained(name)
            if student.state == "failed":
                self._project.say(f"student {name} failed: {student.why}")

    # -- one slot ---------------------------------------------------------------------------------
    def _fit(self, slot: int, queue: Any) -> None:
        """Run a slot to its end, in a thread of its own: Ray Train waits for it."""
        ray = self._cluster.ray
        config = self._project.config.cluster
        threads, gpus = self._cluster.student_threads, config.gpus_per_worker
        share = self._cluster.options(threads=threads, gpus=gpus)
        fewest, most = config.worker_bounds
        work = SlotWork(slot, self._names, self._jobs, self._project.log_for("train"))
        train = ray.train
        trainer = train.torch.TorchTrainer(
            train_in_slot,
            train_loop_config={"work": work, "queue": queue},
            torch_config=train.torch.TorchConfig(backend="nccl" if gpus > 0 else "gloo"),
            scaling_config=train.ScalingConfig(
                num_workers=(fewest, most) if config.is_elastic else most,
                elastic_resize_monitor_interval_s=ELASTIC_LOOK_S,
                use_gpu=gpus > 0,
                resources_per_worker={
                    name: share[option]
                    for name, option in RAY_TRAIN_RESOURCES.items()
                    if share.get(option)
                },
            ),
            run_config=train.RunConfig(
                name=uuid.uuid4().hex[:12],
                storage_path=str(self._bookkeeping),
                failure_config=train.FailureConfig(
                    max_failures=-1,  # the queue counts, for every student by itself
                    controller_failure_limit=(
                        FAILED_STARTS_ELASTIC if config.is_elastic else FAILED_STARTS
                    ),
                ),
                callbacks=[_death_listener(train.UserCallback, queue, slot)],
                worker_runtime_env=share["runtime_env"],
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            self._ended[slot] = _reason(unwrapped(error))
            log.warning("slot %d ended", slot, exc_info=error)


def train_in_slot(config: dict[str, Any]) -> None:
    """What every process of a slot runs; Ray has set the ranks."""
    import ray
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    work: SlotWork = config["work"]
    queue = config["queue"]
    work.log.start("trainer", slot=work.slot)
    first = get_context().get_world_rank() == 0
    while True:
        mine = ray.get(queue.take.remote(work.slot)) if first else None
        number: int = broadcast_from_rank_zero(mine)
        if number < 0:
            return
        with log_context(student=work.names[number]):
            stopped = _train_one(work, number, queue)
        if first and stopped is None:
            ray.get(queue.done.remote(work.slot))
        elif first:
            ray.get(queue.stopped.remote(work.slot, stopped))


def _train_one(work: SlotWork, number: int, queue: Any) -> str | None:
    """Train one student, and log how it ended; where it stopped, if it was asked to."""
    import ray

    from student_train.errors import TrainingStoppedError
    from student_train.trainer import train_student

    asked_at, answer = 0.0, False

    def should_stop() -> bool:
        nonlocal asked_at, answer
        if not answer and time.monotonic() - asked_at > ASK_S:
            asked_at = time.monotonic()
            answer = ray.get(queue.stopping.remote())
        return answer

    log.info("training begins")
    try:
        train_student(TrainJob.model_validate_json(work.jobs[number]), should_stop=should_stop)
    except TrainingStoppedError as error:
        log.info("%s", error)
        return f"is at step {error.step} of {error.total_steps}"
    except BaseException:
        log.exception("training failed")
        raise
    log.info("training ended")
    return None


def _death_listener(base: Any, queue: Any, slot: int) -> Any:
    """Tells the queue of errors of a slot's processes; Ray Train calls it in its controller."""

    class DeathListener(base):  # type: ignore[misc]
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Any]) -> None:
            import ray

            why, final = judge(list(worker_exceptions.values()))
            ray.get(queue.died.remote(slot, why, final=final))
            if slot in ray.get(queue.broken.remote()):  # or Ray Train would try for ever
                ray.kill(ray.get_runtime_context().current_actor)

    return DeathListener()


def judge(errors: list[BaseException]) -> tuple[str, bool]:
    """Why a group of processes died, and whether the same would happen again.

    One process's own failure makes the others fail in their collective operations, so what a user
    can fix is looked for first.
    """
    causes = [unwrapped(error) for error in errors]
    for cause in causes:
        if isinstance(cause, DistillError):
            return _reason(cause), not isinstance(cause, StoreAccessError)
    return (_reason(causes[0]) if causes else "no reason was given"), False


def _reason(error: BaseException) -> str:
    """An error in words that stand behind the name of a student."""
    died = getattr(error, "health_check_failure", None)
    if died is not None:  # Ray Train says much about the process before it says how it ended
        text = str(died)
        return f"a process died: {text.partition(WHY_DEAD)[2] or text}"
    return str(error) if isinstance(error, DistillError) else error_text(error)
