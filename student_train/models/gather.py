"""Whole weights of a model that DeepSpeed may have spread over ranks.

ZeRO stage 3 marks the parameters that it partitions. Where weights are bfloat16, stages 1 to 3 link
parameters to the parts of their float32 masters; stage 0 has them in lists of its optimiser.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO stage 3 has spread a parameter over ranks."""
    return hasattr(parameter, "ds_id")


def num_elements(parameter: Tensor) -> int:
    """Elements of a parameter, on all ranks together."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def whole(parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
    """A block in which partitioned parameters are whole on every rank; enter it on every rank.

    They are all in memory at once. Changes that are made inside are lost.
    """
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return cast(AbstractContextManager[None], deepspeed.zero.GatheredParameters(partitioned))


def gather_weights(
    module: nn.Module,
    optimizer: Any = None,
    *,
    dtype: torch.dtype,
    keep: bool,
    only_trained: bool = False,
) -> dict[str, Tensor]:
    """The state dict of a module, whole, on the CPU; call it on every rank.

    Tensors are gathered one by one, so that no more than one is held beside the result. Tied
    weights are one tensor under several names. Buffers keep their dtype.

    Args:
        module: Before or after ``deepspeed.initialize``, at any ZeRO stage.
        optimizer: That of the DeepSpeed engine; None before.
        dtype: Of the parameters in the result. For float32 the masters are taken where there are
            some.
        keep: False on ranks that only take part; they get an empty dict.
        only_trained: Leave out what is not trained.
    """
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.requires_grad or not only_trained:
            names.setdefault(id(tensor), []).append(name)
            tensors[id(tensor)] = tensor
    masters = _masters_of_stage_0(optimizer) if dtype == torch.float32 else {}
    weights: dict[str, Tensor] = {}
    for identity, tensor in tensors.items():
        found = _gathered(masters.get(identity, tensor), dtype, keep=keep)
        if found is not None:
            weights.update(dict.fromkeys(names[identity], found))
    return weights


def _masters_of_stage_0(optimizer: Any) -> dict[int, Tensor]:
    """Float32 masters by the identity of their parameters."""
    groups = zip(
        getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=False
    )
    pairs = (zip(weights, masters, strict=True) for weights, masters in groups)
    return {id(weight): master for pair in pairs for weight, master in pair}


@torch.no_grad()
def _gathered(tensor: Tensor, dtype: torch.dtype, *, keep: bool) -> Tensor | None:
    """A copy of one whole tensor; None where it is not kept."""
    if dtype == torch.float32 != tensor.dtype and tensor.requires_grad:
        from deepspeed.utils import safe_get_full_fp32_param

        master = safe_get_full_fp32_param(tensor)
        if master is not None:
            return master.to("cpu", copy=True) if keep else None
    with whole([tensor]):
        if not keep:
            return None
        kept = dtype if isinstance(tensor, nn.Parameter) else tensor.dtype
        return tensor.detach().to("cpu", kept, copy=True)
