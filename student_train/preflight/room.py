"""Room for what is to be trained: positions of the context, and bytes of memory."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from student_train.config import TrainConfig
from student_train.models.memory import ModelShape, estimate_memory, training_shape
from student_train.preflight.findings import Finding
from student_train.preflight.subject import Subject

FULL = 0.9
"""Share of the memory above which an estimate is a warning."""

STRETCHED = ("yarn", "linear", "dynamic", "longrope")
"""Kinds of rotary positions that reach ``factor`` times beyond the original context."""

CGROUP_FILES = ("memory.max", "memory.current")
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Memory:
    """What a rank may use."""

    num_bytes: int
    on_host: bool
    """Whether it is the memory of the host, because the model is trained on CPU."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Who trains a student."""

    world_size: int
    memory: Memory | None
    """What each may use; None where that is not known here."""


def vocabulary_of(directory: Path) -> int:
    """Rows of a model's embedding, as its config says."""
    config: Any = AutoConfig.from_pretrained(directory, local_files_only=True)
    return int(config.get_text_config().vocab_size)


def context_of(directory: Path) -> int | None:
    """Positions that a model knows; None where it has no limit.

    A sliding window is none: what is outside is not attended to.
    """
    config: Any = AutoConfig.from_pretrained(directory, local_files_only=True)
    config = config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    original = rope.get("original_max_position_embeddings")
    if context is not None and original and rope.get("rope_type", rope.get("type")) in STRETCHED:
        context = max(context, int(original * rope.get("factor", 1.0)))
    return context


def check_context(subject: Subject, longest: int, *, is_certain: bool) -> Finding:
    """The longest sample fits the student.

    Args:
        subject: The student.
        longest: Tokens of the longest sample.
        is_certain: Whether there is such a sample; else it is what labelling may make.
    """
    context = context_of(subject.student)
    what = (
        "the longest sample has" if is_certain else "with label.sampling.max_tokens samples reach"
    )
    if context is None:
        return Finding(
            "context", "ok", f"{what} {longest} tokens, the student's context has no limit"
        )
    if longest <= context:
        sentence = f"{what} {longest} tokens, the student's context is {context}"
        return Finding("context", "ok", sentence)
    return Finding(
        "context",
        "refused",
        f"{what} {longest} tokens, the student's context is {context}; "
        "lower label.sampling.max_tokens, leave longer samples out with "
        "train.data.filter.max_tokens, or choose a student with a longer context",
    )


def check_memory(model: ModelShape, train: TrainConfig, ranks: Ranks) -> Finding:
    """The training state fits a rank, and so does everything, by estimate.

    Args:
        model: The student.
        train: Settings.
        ranks: Who trains it.
    """
    memory = ranks.memory
    estimate = estimate_memory(model, training_shape(train, model, ranks.world_size))
    on_host = memory is not None and memory.on_host
    total, fixed = estimate.total(on_host=on_host), estimate.fixed(on_host=on_host)
    parts = ", ".join(
        f"{name} {_size(size)}"
        for name, size in {**estimate.device, **estimate.host}.items()
        if size
    )
    about = f"about {_size(total)} per rank ({parts})"
    if memory is None:
        return Finding("memory", "unknown", f"{about}; ranks are on other machines")
    have = f"of {_size(memory.num_bytes)}"
    if fixed > memory.num_bytes:
        return Finding(
            "memory",
            "refused",
            f"weights, gradients and optimiser states take {_size(fixed)} per rank {have} that it "
            "has; raise train.deepspeed.stage with more ranks, train adapters (train.lora), or "
            "choose a smaller student",
        )
    if total > FULL * memory.num_bytes:
        sentence = f"{about} {have}; lower train.batch.micro_tokens if it runs out"
        return Finding("memory", "warning", sentence)
    return Finding("memory", "ok", f"{about} {have}")


def memory_here(ranks_here: int, *, use_gpu: bool) -> Memory:
    """What every rank of this machine may use: its GPU, or its share of the free memory.

    Args:
        ranks_here: Ranks on this machine.
        use_gpu: Whether each has a GPU, if there are any.
    """
    if use_gpu and torch.cuda.is_available():
        device = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        free, _ = torch.cuda.mem_get_info(device)
        return Memory(int(free), on_host=False)
    return Memory(free_host_bytes() // ranks_here, on_host=True)


def free_host_bytes() -> int:
    """Memory that this machine, or the container that this process is in, has left."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # memory that caches give back counts as free
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / name for name in CGROUP_FILES)
    if limit.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def _size(num_bytes: int) -> str:
    if num_bytes >= 1024 * MIB:
        return f"{num_bytes / (1024 * MIB):.1f} GiB"
    return f"{num_bytes / MIB:.1f} MiB"
