"""One optimiser step over all ranks, and its metrics."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from student_train.config import TrainConfig
from student_train.engine import grad_norm, world
from student_train.losses.base import LossTerms, TeacherRows
from student_train.losses.measures import step_measures
from student_train.models.flops import ModelFlops, peak_tflops
from student_train.schedules import learning_rate
from student_train.step_clock import StepClock
from student_train.stopping import StopRequest
from student_train.streaming.reader import LabelReader
from student_train.streaming.step_plan import TrainingPlan
from student_train.streaming.stream import BatchStream


class OptimizerStep:
    """Everything that an optimiser step needs.

    Args:
        train: Settings.
        plan: All steps.
        reader: The labels that the plan is made for.
        engine: DeepSpeed's, around the student.
        clock: What moves with the steps.
        flops: Of the student.
        stop: Whether this process was asked to stop.
    """

    def __init__(
        self,
        train: TrainConfig,
        plan: TrainingPlan,
        reader: LabelReader,
        *,
        engine: Any,
        clock: StepClock,
        flops: ModelFlops,
        stop: StopRequest,
    ) -> None:
        self._stop = stop
        self.stops = False
        """Whether any rank had been asked to stop when the last step ended."""
        self._train, self._plan, self._engine, self._clock = train, plan, engine, clock
        self._num_tokens_S, self._flops = reader.num_tokens, flops
        if engine.device.type == "cuda":  # what a training before this one held does not count
            torch.cuda.reset_peak_memory_stats(engine.device)
        self._peak_tflops = train.watch.peak_tflops or peak_tflops(engine.device, train.dtype)

    def __call__(self, number: int, stream: BatchStream) -> dict[str, float]:
        """Make step ``number``, from 0; returns its metrics, equal on all ranks but for times.

        They are sums over all ranks, divided by the global number of supervised tokens.
        """
        started = time.perf_counter()
        plan = self._plan.step(number)
        rank, world_size = world()
        lr = learning_rate(self._train.optimizer, number, len(self._plan))
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        # DeepSpeed averages over ranks; times the world size over the global count is the mean
        scale = world_size / plan.num_supervised
        at_start = self._clock.measures()
        sums = Sums(self._engine.device)
        num_rounds = len(self._plan.rounds(number, rank, world_size))
        waited_before_s = stream.waited_s
        for round_number in range(num_rounds):
            self._engine.set_gradient_accumulation_boundary(round_number == num_rounds - 1)
            batch = stream.next().to(self._engine.device)
            terms = self._engine(batch, self._clock.now(number))
            self._engine.backward(terms.total * (scale if batch.counts else 0.0))
            sums.add(terms, batch.labels, counts=batch.counts)
            if batch.counts:
                soft = float(terms.soft_M.sum(dtype=torch.float64))
                self._clock.after_micro_batch(soft, len(batch.labels), step=number)
            self._engine.step()
        waited_s = stream.waited_s - waited_before_s
        totals = sums.over_ranks(data_wait_s=waited_s, stop=float(self._stop.asked))
        self.stops = totals.pop("stop") > 0
        data_wait_s = totals.pop("data_wait_s") / world_size
        self._clock.after_step(totals["soft"], plan.num_supervised, step=number)
        memory_gib = largest_over_ranks(peak_memory_gib(self._engine.device), self._engine.device)
        seconds = time.perf_counter() - started
        return {
            "step": number + 1,
            "total_steps": len(self._plan),
            "lr": lr,
            **at_start,
            **{name: total / plan.num_supervised for name, total in totals.items()},
            "grad_norm": grad_norm(self._engine),
            "supervised_tokens": plan.num_supervised,
            "tokens": plan.num_tokens,
            "seconds": seconds,
            "tokens_per_s": plan.num_tokens / seconds,
            "data_wait_s": data_wait_s,
            "data_wait_share": data_wait_s / seconds,
            "memory_gib": memory_gib,
            **self._utilisation(plan.samples, plan.num_supervised, seconds * world_size),
        }

    def _utilisation(
        self, samples: list[int], num_supervised: int, device_s: float
    ) -> dict[str, float]:
        """Model TFLOP/s of a device, and their share of its peak where that is known."""
        operations = self._flops.of_step(np.asarray(self._num_tokens_S)[samples], num_supervised)
        tflops = operations / device_s / 1e12
        if self._peak_tflops is None:
            return {"model_tflops": tflops}
        return {"model_tflops": tflops, "mfu": tflops / self._peak_tflops}


class Sums:
    """Metrics of micro-batches, summed over their rows in float64 on the device.

    They leave it once per step: every number that is read by the host waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[str] = []
        self._totals = torch.zeros(0, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, terms: LossTerms, labels: TeacherRows, *, counts: bool = True) -> None:
        """Take in a micro-batch; one that does not count only tells the names."""
        found = {name: values_M.sum(dtype=torch.float64) for name, values_M in _rows(terms, labels)}
        found["loss"] = terms.total.double()
        if not self._names:
            self._names = list(found)
            self._totals = self._totals.new_zeros(len(found))
        if counts:
            self._totals += torch.stack([found[name] for name in self._names])

    def over_ranks(self, **others: float) -> dict[str, float]:
        """The sums over all ranks, ``others`` included; every rank gets the same."""
        more = self._totals.new_tensor(list(others.values()))
        everything = torch.cat([self._totals, more])
        torch.distributed.all_reduce(everything)
        return dict(zip([*self._names, *others], everything.tolist(), strict=True))


def _rows(terms: LossTerms, labels: TeacherRows) -> list[tuple[str, Tensor]]:
    """Every metric of a micro-batch, row by row."""
    rows: Mapping[str, Tensor] = {
        "soft": terms.soft_M,
        "hard": terms.hard_M,
        "soft_weight": terms.soft_weight_M,
        "agreement": terms.student_argmax_M == labels.topk_ids_MK[:, 0],
        **terms.metrics,
        **step_measures(labels, terms.student_MC),
    }
    return list(rows.items())


def peak_memory_gib(device: torch.device) -> float:
    """The most that this process has held: of the device's memory, on CPU of the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status").read_text()  # ru_maxrss counts the parent's memory too
    (peak_kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(peak_kib) / 2**20


def largest_over_ranks(value: float, device: torch.device) -> float:
    """The largest of all ranks' numbers."""
    found = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return float(found)
