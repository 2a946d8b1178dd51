"""The slow, obvious form of every loss: dense logits and autograd. The oracle of the tests."""

from typing import cast

import torch
from torch import Tensor

from student_train.losses import DIVERGENCES
from student_train.losses.base import PADDING_ID, Divergence, TeacherRows, load


def student_categories(logits_MV: Tensor, rows: TeacherRows) -> Tensor:
    """Log-probs of the student's k+1 categories, [M, C], by a full softmax and a masked sum."""
    logprobs_MV = logits_MV.log_softmax(dim=-1)
    out = []
    for logprobs_V, ids_K in zip(logprobs_MV, rows.topk_ids_MK, strict=True):
        used = ids_K != PADDING_ID
        rest = torch.ones_like(logprobs_V, dtype=torch.bool)
        rest[ids_K[used]] = False
        stored = torch.full_like(ids_K, float("-inf"), dtype=logprobs_V.dtype)
        stored = stored.masked_scatter(used, logprobs_V[ids_K[used]])
        tail = logprobs_V[rest].logsumexp(dim=0) if bool(rest.any()) else torch.tensor(-torch.inf)
        out.append(torch.cat([stored, tail.to(stored).reshape(1)]))
    return torch.stack(out)


def reference_loss(
    logits_MV: Tensor,
    rows: TeacherRows,
    *,
    divergence: str,
    soft_weight_M: Tensor,
    hard_weight_M: Tensor,
) -> Tensor:
    """Sum over rows of ``soft_weight * divergence + hard_weight * cross_entropy``, in nats.

    Written from the definitions; its gradient comes from autograd through the *value* of the
    divergence, so it checks the written-out gradient of the fast path.
    """
    student_MC = student_categories(logits_MV, rows)
    compare = cast(Divergence, load(DIVERGENCES[divergence]))
    soft_M, _ = compare(rows.categories(logits_MV.dtype), student_MC)
    hard_M = torch.nn.functional.cross_entropy(logits_MV, rows.hard_M, reduction="none")
    return (soft_weight_M * soft_M + hard_weight_M * hard_M).sum()
