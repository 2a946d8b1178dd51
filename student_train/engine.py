"""DeepSpeed set-up."""

import math
import os
import socket
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch

from storage.errors import DistillError
from student_train.config import TrainConfig
from student_train.cpu_adam import cpu_adam_class
from student_train.errors import NonFiniteLossError, PreflightError

Value = TypeVar("Value")

PATIENCE = timedelta(hours=1)
"""How long ranks wait for one that works alone: it compiles, or converts a checkpoint. A rank that
died is noticed by its launcher, not by this."""


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
    # DeepSpeed calls what torch renames, on every rank, several times
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def deepspeed_config(train: TrainConfig, *, universal: bool = False) -> dict[str, Any]:
    """The DeepSpeed configuration of a training.

    Accumulation is driven by the trainer (a step has as many micro-batches as its samples need),
    so DeepSpeed itself sees one micro-batch per boundary and scales nothing.

    Gradients are added up in float32, over micro-batches and over ranks, at every stage: in
    bfloat16 a sum forgets what is smaller than a 256th of it, and its order would show.

    Args:
        train: Settings.
        universal: Whether the checkpoint that is loaded is one for any number of ranks.
    """
    settings = train.deepspeed
    bfloat16 = train.dtype == "bfloat16"
    zero: dict[str, Any] = {"stage": settings.stage}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": _on_gpu()}
    if settings.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": _on_gpu()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.optimizer.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": bfloat16},
        # stage 0 has no such setting: see _sum_in_float32
        "data_types": {"grad_accum_dtype": "fp32"} if bfloat16 and settings.stage > 0 else {},
        "communication_data_type": "fp32",
        "checkpoint": {"load_universal": universal},
        # the optimiser object is ours: naming one by string would compile it at start-up
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def start_process_group() -> None:
    """Connect this process with the others of its training, unless a launcher did."""
    import deepspeed
    import deepspeed.ops

    if not _on_gpu():
        # a shared-memory all-reduce that is compiled at every first start, needs a compiler and
        # is used by one launcher only
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        backend = "nccl" if _on_gpu() else "gloo"
        deepspeed.init_distributed(backend, verbose=False, timeout=PATIENCE)


def initialize(model: torch.nn.Module, train: TrainConfig, *, universal: bool = False) -> Any:
    """A DeepSpeed engine around ``model`` with AdamW.

    Gradients are averaged over ranks by DeepSpeed; the trainer multiplies by the world size, so
    that together they are a sum.

    Args:
        model: The student; frozen parameters stay as they are.
        train: Settings.
        universal: Whether it will load a checkpoint for any number of ranks.

    Raises:
        PreflightError: if ``cpu_adam`` is asked for and cannot be compiled or used here.
    """
    start_process_group()
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=_optimizer(model, train),
        config=deepspeed_config(train, universal=universal),
    )
    if train.deepspeed.stage == 0:
        if train.dtype == "bfloat16":
            _sum_in_float32(engine)
        else:
            _remember_norm(engine)
    return engine


def _on_gpu() -> bool:
    return os.environ["DS_ACCELERATOR"] != "cpu"


def _optimizer(model: torch.nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    settings = train.optimizer
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options: dict[str, Any] = {
        "lr": settings.lr,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    if settings.type == "adamw":
        return torch.optim.AdamW(trained, fused=True, **options)
    if _on_gpu() and not train.deepspeed.offload_optimizer:
        raise PreflightError(
            "optimizer.type: cpu_adam updates weights in host memory, and here they are on a GPU; "
            "set deepspeed.offload_optimizer: true, or optimizer.type: adamw"
        )
    adam: torch.optim.Optimizer = cpu_adam_class()(trained, adamw_mode=True, **options)
    return adam


def _sum_in_float32(engine: Any) -> None:
    """Stage 0 in bfloat16: let gradients be float32, and let the first update be the first.

    DeepSpeed's optimiser for it would add gradients in bfloat16, and makes an update with
    gradients of zero when it is built, after which Adam's bias correction takes the first real
    update for the second one.
    """
    engine.optimizer.optimizer.state.clear()
    for parameter in engine.module.parameters():
        parameter.grad = None
        if parameter.requires_grad:
            parameter.grad_dtype = torch.float32


def _remember_norm(engine: Any) -> None:
    """Stage 0 in float32: DeepSpeed clips there too, and does not keep the norm."""
    parameters = [p for p in engine.module.parameters() if p.requires_grad]

    def clip() -> None:
        norm = torch.nn.utils.clip_grad_norm_(parameters, engine.gradient_clipping())
        engine._global_grad_norm = float(norm)

    engine.clip_fp32_gradients = clip


def grad_norm(engine: Any) -> float:
    """Norm of the gradient of the last optimiser step before it was clipped, at every stage.

    Raises:
        NonFiniteLossError: if it is not finite. Most of DeepSpeed's optimisers leave such a step
            out without a word, and mark its norm as infinite or as negative.
    """
    norm = float(engine.get_global_grad_norm())
    if not 0 <= norm < math.inf:
        raise NonFiniteLossError(
            "the gradient of an optimiser step is not finite, though its loss is; lower "
            "optimizer.lr, or set dtype: float32, and go on from the last checkpoint"
        )
    return norm


def world() -> tuple[int, int]:
    """(rank, world size) of this process."""
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def sum_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Add numbers over all ranks in float64; every rank gets the same result."""
    tensor = torch.tensor(list(values.values()), dtype=torch.float64)
    if _on_gpu():
        tensor = tensor.cuda()
    torch.distributed.all_reduce(tensor)
    return dict(zip(values, tensor.tolist(), strict=True))


def gather_over_ranks(value: Value) -> list[Value]:
    """Every rank's value, by rank; every rank gets the same list."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def from_rank_0(action: Callable[[], Value]) -> Value:
    """Do something on rank 0 alone; every rank gets its result, or its error.

    Raises:
        DistillError: if the action raised it; no rank is left waiting for another.
    """
    outcome: tuple[Any, DistillError | None] = (None, None)
    if torch.distributed.get_rank() == 0:
        try:
            outcome = (action(), None)
        except DistillError as error:
            outcome = (None, error)
    result, problem = gather_over_ranks(outcome)[0]
    if problem is not None:
        raise problem
    return cast(Value, result)
