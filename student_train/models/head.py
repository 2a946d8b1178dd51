"""The output embedding of a language model as a :class:`LinearHead`, checked against the model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from student_train.errors import PreflightError
from student_train.losses.linear_head import LinearHead

PROBE_TOKENS = 4

PROBE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest difference of two ways to the same logits, relative to the largest logit: a model may
cap or scale in its own dtype, where we use float32."""


def head_of(language_model: Any) -> LinearHead:
    """What turns the last hidden states of a model into its logits.

    Low-rank adapters of the output embedding (``base_layer``, ``lora_A``, ``lora_B``, as peft
    injects them) are merged into one weight through which gradients reach them.

    Raises:
        PreflightError: if the model has no linear output embedding, or an adapter of it is more
            than a low-rank product.
    """
    output = language_model.get_output_embeddings()
    base = getattr(output, "base_layer", output)
    if getattr(base, "weight", None) is None:
        raise PreflightError(
            f"{type(language_model).__name__} has no linear output embedding: its head is "
            f"{type(output).__name__}; choose a causal language model"
        )
    config = language_model.config.get_text_config()
    scale = _factor(config, "logit_scale") * _factor(config, "lm_head_multiplier")
    return LinearHead(
        weight_VH=_merged(base.weight, output),
        bias_V=getattr(base, "bias", None),
        softcap=getattr(config, "final_logit_softcapping", None),
        scale=scale / _factor(config, "logits_scaling"),
    )


def _factor(config: Any, name: str) -> float:
    value = getattr(config, name, None)
    return 1.0 if value is None else float(value)


def _merged(weight_VH: Tensor, output: Any) -> Tensor:
    """The weight plus its active low-rank adapters."""
    if not hasattr(output, "base_layer") or output.disable_adapters or output.merged:
        return weight_VH
    for name in output.active_adapters:
        if name in output.lora_A:
            _check_adapter(output, name)
            update_VH = output.lora_B[name].weight @ output.lora_A[name].weight
            weight_VH = weight_VH + (output.scaling[name] * update_VH).to(weight_VH.dtype)
    return weight_VH


def _check_adapter(output: Any, name: str) -> None:
    """What an adapter does besides a low-rank product may show only after the first step."""
    dropouts = getattr(output, "lora_dropout", {})
    dropout = dropouts[name] if name in dropouts else None  # noqa: SIM401 - ModuleDict has no get
    extras = {
        "a variant such as DoRA": name in getattr(output, "lora_variant", {}),
        "a bias": getattr(output.lora_B[name], "bias", None) is not None,
        "dropout": getattr(dropout, "p", 0.0) > 0.0,
    }
    found = [extra for extra, there in extras.items() if there]
    if found:
        raise PreflightError(
            f"adapter {name!r} of the output embedding has {' and '.join(found)}; there it can "
            "only be a plain low-rank product, so leave that off or adapt other layers"
        )


@torch.no_grad()
def check_head(language_model: Any) -> None:
    """Compare the model's own logits of a few tokens with those of :func:`head_of`.

    Models transform their logits in ways that no config tells in general; a loss on other logits
    than the model has at inference would train another model.

    Raises:
        PreflightError: if they differ.
    """
    was_training = language_model.training
    language_model.eval()
    device = next(language_model.parameters()).device
    ids = torch.arange(PROBE_TOKENS, device=device).unsqueeze(0)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    expected = language_model(**inputs).logits[0]
    hidden = language_model.base_model(**inputs).last_hidden_state[0]
    language_model.train(was_training)
    found = head_of(language_model).logits(hidden)
    size = float(expected.abs().max().clamp_min(1e-30))
    difference = float((found - expected).abs().max()) / size
    if not difference <= PROBE_TOLERANCE[hidden.dtype]:  # also where it is NaN
        raise PreflightError(
            f"{type(language_model).__name__} transforms its logits in a way that is not "
            f"supported: they differ from its output embedding's by {difference:.1e} of the "
            "largest; supported are a bias, final_logit_softcapping, logit_scale, "
            "logits_scaling, lm_head_multiplier and low-rank adapters"
        )


class HeadScope(nn.Module):
    """A module around the use of the output embedding, which is also its own.

    ZeRO stage 3 spreads parameters over ranks and holds them whole while a module that has them
    goes forward or back; the fused loss reads the output embedding without calling it. This
    module shares its parameters, so they are whole inside, and adds nothing to a state dict.

    Args:
        output_embedding: The module whose parameters are used.
    """

    def __init__(self, output_embedding: nn.Module) -> None:
        super().__init__()
        for number, parameter in enumerate(output_embedding.parameters()):
            self.register_parameter(f"shared_{number}", parameter)

    def forward(self, hidden_MH: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Whatever ``compute`` makes of the hidden states; one tensor, with a gradient."""
        return compute(hidden_MH)

    def _save_to_state_dict(self, *_: Any) -> None:
        pass

    def _load_from_state_dict(self, *_: Any) -> None:
        pass
