"""The linear map from hidden states to logits, and what a model does to its logits afterwards."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LinearHead:
    r"""Logits of a causal model: ``cap(scale * (hidden @ weight.T + bias))``.

    .. math:: z = c \tanh(a / c), \quad a = \text{scale} \, (W h + b)

    Rows of the weight at the effective vocabulary and beyond are padding; whoever uses a head
    says how large that vocabulary is.
    """

    weight_VH: Tensor
    """float[V, H]: output embedding, tied or not. It may be the result of a computation, such as
    a base weight plus low-rank factors: gradients flow on."""
    bias_V: Tensor | None = None
    """float[V]: added to the logits."""
    softcap: float | None = None
    """c: logits are squeezed into (-c, c), as in Gemma 2. None leaves them alone."""
    scale: float = 1.0
    """Factor on the logits, as in Cohere (``logit_scale``) and, inverted, in Granite."""

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """All logits of some hidden states, float32[N, V]; what the fused loss never holds."""
        logits_NV = torch.nn.functional.linear(
            hidden_NH * self.scale,
            self.weight_VH,
            None if self.bias_V is None else self.bias_V * self.scale,
        )
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        if self.softcap is None:
            return logits_NV
        return self.softcap * torch.tanh(logits_NV / self.softcap)
