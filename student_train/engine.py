"""DeepSpeed set-up; the only module that imports deepspeed."""

import os
import socket
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from student_train.config import TrainConfig

Value = TypeVar("Value")


def prepare_process(threads: int) -> None:
    """Fix threads, and make a bare process a group of one. Call before DeepSpeed is imported.

    Launchers announce the group in five environment variables; DeepSpeed looks for MPI when one
    is missing.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    if "WORLD_SIZE" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(_free_port()))
    torch.set_num_threads(threads)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def deepspeed_config(train: TrainConfig) -> dict[str, Any]:
    """The DeepSpeed configuration of a training.

    Accumulation is driven by the trainer (a step has as many micro-batches as its samples need),
    so DeepSpeed itself sees one micro-batch per boundary and scales nothing.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.optimizer.max_grad_norm,
        "zero_optimization": {"stage": train.deepspeed.stage},
        "bf16": {"enabled": train.dtype == "bfloat16"},
        # the optimiser object is ours: naming one by string would compile it at start-up
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def initialize(model: torch.nn.Module, train: TrainConfig) -> Any:
    """A DeepSpeed engine around ``model`` with AdamW.

    Gradients are averaged over ranks by DeepSpeed; the trainer multiplies by the world size, so
    that together they are a sum.
    """
    import deepspeed
    import deepspeed.ops

    if os.environ["DS_ACCELERATOR"] == "cpu":
        # a shared-memory all-reduce that is compiled at every first start, needs a compiler and
        # is used by one launcher only
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        backend = "gloo" if os.environ["DS_ACCELERATOR"] == "cpu" else "nccl"
        deepspeed.init_distributed(backend, verbose=False)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=train.optimizer.lr,
        betas=train.optimizer.betas,
        weight_decay=train.optimizer.weight_decay,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(train)
    )
    return engine


def world() -> tuple[int, int]:
    """(rank, world size) of this process."""
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def sum_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Add numbers over all ranks in float64; every rank gets the same result."""
    tensor = torch.tensor(list(values.values()), dtype=torch.float64)
    if os.environ["DS_ACCELERATOR"] != "cpu":
        tensor = tensor.cuda()
    torch.distributed.all_reduce(tensor)
    return dict(zip(values, tensor.tolist(), strict=True))


def gather_over_ranks(value: Value) -> list[Value]:
    """Every rank's value, by rank; every rank gets the same list."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
