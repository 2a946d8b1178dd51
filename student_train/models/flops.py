"""How much arithmetic an optimiser step asks for, and how much of the device's peak that is.

Model FLOPs, as in PaLM (Chowdhery et al. 2022, appendix B): what forward and backward pass need,
without padding, and without what activation checkpointing computes again.

* A matrix of n weights takes 2n per token forward, 2n for the gradient of its input and 2n for its
  own; frozen weights, as under LoRA, save the last.
* The output embedding sees the labelled positions only. The input embedding is a look-up.
* Causal attention of a document of n tokens takes 2 n^2 w per layer forward, w the width of all
  heads, and twice that back. In a layer with a window of s, n^2 becomes 2ns - s^2 for n > s.
* Of a mixture of experts the chosen ones count.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from student_train.models.gather import num_elements

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "A10G": 70.0,
    "A10": 125.0,
    "A40": 149.7,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
"""Dense bfloat16 peaks from the vendor's data sheets, by a part of the device's name; the first
that fits counts."""


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """Sizes of a student that its arithmetic follows from."""

    weights: int
    """Weights that every token goes through, without embeddings."""
    trained_weights: int
    """Those of them that have a gradient."""
    head_weights: int
    """Of the output embedding, or of the input embedding that it shares."""
    head_is_trained: bool
    attention_width: int
    """Heads times their size, of one layer."""
    windows: tuple[int | None, ...]
    """Tokens that each attention layer sees; None for all before it."""

    def of_step(self, num_tokens_D: npt.NDArray[np.int64], num_supervised: int) -> float:
        """Floating-point operations of one step over all ranks.

        Args:
            num_tokens_D: int64[D], tokens of every document.
            num_supervised: Labelled positions.
        """
        tokens = float(num_tokens_D.sum())
        body = (4 * self.weights + 2 * self.trained_weights) * tokens
        head = (6 if self.head_is_trained else 4) * self.head_weights * num_supervised
        lengths_D = num_tokens_D.astype(np.float64)
        pairs = 0.0
        for window in self.windows:
            seen_D = lengths_D if window is None else np.minimum(lengths_D, window)
            pairs += float((2 * lengths_D * seen_D - seen_D**2).sum())
        return body + head + 6 * self.attention_width * pairs


def model_flops(language_model: Any) -> ModelFlops:
    """Sizes of a model of transformers; also where ZeRO has spread its parameters."""
    config = language_model.config.get_text_config()
    look_ups = {
        id(parameter)
        for module in language_model.modules()
        if isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters()
    }
    output = language_model.get_output_embeddings()
    head = next(p for name, p in output.named_parameters() if name.endswith("weight"))
    share = _expert_share(config)
    weights = trained = 0
    for name, parameter in language_model.named_parameters():
        is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        if is_matrix and id(parameter) not in look_ups and parameter is not head:
            size = round(num_elements(parameter) * (share if ".experts." in name else 1.0))
            weights += size
            trained += size if parameter.requires_grad else 0
    heads = getattr(config, "num_attention_heads", 0) or 0
    hidden = getattr(config, "hidden_size", 0) or 0
    head_size = getattr(config, "head_dim", None) or (hidden // heads if heads else 0)
    return ModelFlops(
        weights=weights,
        trained_weights=trained,
        head_weights=num_elements(head),
        head_is_trained=head.requires_grad,
        attention_width=heads * head_size,
        windows=_windows(config),
    )


def _expert_share(config: Any) -> float:
    """Share of the experts that a token goes through."""
    chosen = getattr(config, "num_experts_per_tok", None)
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        number = getattr(config, name, None)
        if chosen and number:
            return float(chosen) / float(number)
    return 1.0


def _windows(config: Any) -> tuple[int | None, ...]:
    """What every attention layer sees; layers of other kinds are left out."""
    layers = getattr(config, "num_hidden_layers", 0) or 0
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * layers
    known = {"full_attention": None, "sliding_attention": window}
    return tuple(known[kind] for kind in kinds if kind in known)


def peak_tflops(device: torch.device, dtype: str) -> float | None:
    """Peak of a known GPU in bfloat16; None of others, and in float32."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
