"""Divergences as autograd functions, for gradcheck."""

from typing import Any

import torch
from torch import Tensor

from student_train.losses.base import Divergence


class Written(torch.autograd.Function):
    """Puts a divergence's written gradient in the place of autograd's."""

    @staticmethod
    def forward(ctx: Any, teacher: Tensor, student: Tensor, divergence: Divergence) -> Tensor:
        value, gradient = divergence(teacher, student)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        return None, ctx.saved_tensors[0] * grad.unsqueeze(-1), None
