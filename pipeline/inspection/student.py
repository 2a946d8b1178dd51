"""What a student says of the tokens of a sample. Imports torch: import it inside functions.

Shape legend: N labelled positions, K stored tokens, V vocabulary, H hidden size, T tokens.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.inspection.compare import divergence
from pipeline.inspection.record import Prediction, bridge_scores
from storage.errors import ConfigError
from storage.labels.base import UNUSED_ID
from storage.samples import LabelledSample
from storage.tail import LOG_ZERO
from student_train.errors import PreflightError
from student_train.models.head import check_head, head_of
from student_train.models.student import load_causal_lm

CHUNK_ROWS = 128
"""Positions whose logits over the whole vocabulary are in memory at a time."""


class StudentModel:
    """A trained student, or any causal model with the labels' vocabulary.

    It is loaded in bfloat16, as evaluation does, so that its numbers are those of the report.

    Args:
        directory: Exported model, or the folder of a student, which has it in ``model``.
        vocab_size: Effective vocabulary of the labels.
        name: What to call it.

    Raises:
        ConfigError: if there is no model.
        PreflightError: if its vocabulary is smaller, or its head is not supported.
    """

    def __init__(self, directory: Path, vocab_size: int, *, name: str) -> None:
        inner = directory / "model"
        model = inner if (inner / "config.json").is_file() else directory
        if not (model / "config.json").is_file():
            raise ConfigError(
                f"{str(directory)!r} holds no model (no config.json, nor model/config.json); name "
                "the folder of a trained student"
            )
        self.name = name
        self._vocab_size = vocab_size
        try:
            language_model: Any = load_causal_lm(str(model), "bfloat16")
        except (OSError, ValueError) as error:
            raise ConfigError(f"the model in {str(model)!r} cannot be loaded: {error}") from error
        self._model = language_model.eval()
        check_head(self._model)
        self._head = head_of(self._model)
        num_tokens = self._head.weight_VH.shape[0]
        if num_tokens < vocab_size:
            raise PreflightError(
                f"student {self.name!r} has {num_tokens} tokens, the labels use {vocab_size}; "
                "inspect a student with the teacher's tokenizer"
            )

    @torch.inference_mode()
    def predict(self, sample: LabelledSample) -> Prediction:
        """Score the sample's own tokens; one forward pass without generation."""
        ids_T = np.concatenate([sample.prompt_ids_P, sample.response_ids_R]).astype(np.int64)
        hidden_TH = self._model.base_model(
            input_ids=torch.from_numpy(ids_T)[None], use_cache=False
        ).last_hidden_state[0]
        # the state before a token predicts it
        rows_N = len(sample.prompt_ids_P) + sample.positions_N.astype(np.int64) - 1
        chunks = [
            self._chunk(hidden_TH[torch.from_numpy(rows_N[part])], sample, part)
            for start in range(0, len(rows_N), CHUNK_ROWS)
            for part in [slice(start, start + CHUNK_ROWS)]
        ]
        names = ("entropy", "tail", "surprise", "rank", "kl")
        joined = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
        values = {name: joined[name].astype(np.float64) for name in names}
        values["bridge"] = bridge_scores(joined["topk_logprobs"])
        return Prediction(self.name, "student", values, joined["topk_ids"], joined["topk_logprobs"])

    def _chunk(
        self, hidden_NH: Tensor, sample: LabelledSample, part: slice
    ) -> dict[str, np.ndarray]:
        logits_NV = self._head.logits(hidden_NH)[:, : self._vocab_size].float()
        logprobs_NV = logits_NV.log_softmax(dim=-1)
        width = min(sample.topk_ids_NK.shape[1], self._vocab_size)
        ids_NK = _likeliest(logprobs_NV, width)
        token_ids_N = torch.from_numpy(sample.token_ids_N[part].astype(np.int64))
        token_N = logprobs_NV.gather(1, token_ids_N[:, None])
        return {
            "entropy": -(logprobs_NV.exp() * logprobs_NV).sum(dim=-1).numpy(),
            "tail": _outside(logprobs_NV, ids_NK).exp().numpy(),
            "surprise": -token_N[:, 0].numpy(),
            "rank": (1 + (logprobs_NV > token_N).sum(dim=-1)).numpy(),
            "kl": _kl(logprobs_NV, sample, part),
            "topk_ids": ids_NK.to(torch.int32).numpy(),
            "topk_logprobs": logprobs_NV.gather(1, ids_NK).double().numpy(),
        }


def _likeliest(logprobs_NV: Tensor, width: int) -> Tensor:
    """The likeliest ids, int64[N, K]; of equal ones the smaller first."""
    ids_NK = logprobs_NV.topk(width, dim=-1).indices.sort(dim=-1).values
    order_NK = logprobs_NV.gather(1, ids_NK).argsort(dim=-1, descending=True, stable=True)
    return ids_NK.gather(1, order_NK)


def _outside(logprobs_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Log mass of all other tokens, float[N]; -inf where there is none."""
    return logprobs_NV.scatter(1, ids_NK, -torch.inf).logsumexp(dim=-1)


def _kl(logprobs_NV: Tensor, sample: LabelledSample, part: slice) -> np.ndarray:
    """KL of the labels' K+1 categories from the student's, as evaluation measures it."""
    ids_NK = sample.topk_ids_NK[part].astype(np.int64)
    used_NK = ids_NK != UNUSED_ID
    first_NK = np.where(used_NK, ids_NK, ids_NK[:, :1])  # an id that is taken out anyway
    ids = torch.from_numpy(first_NK)
    q_NK = np.where(used_NK, logprobs_NV.gather(1, ids).double().numpy(), -np.inf)
    q_tail_N1 = _outside(logprobs_NV, ids).double().numpy()[:, None]
    log_tail_N = sample.log_tail_mass_N[part].astype(np.float64)
    p_tail_N1 = np.where(log_tail_N <= LOG_ZERO, -np.inf, log_tail_N)[:, None]
    p_NK = sample.topk_logprobs_NK[part].astype(np.float64)
    return divergence(
        np.concatenate([p_NK, p_tail_N1], axis=1), np.concatenate([q_NK, q_tail_N1], axis=1)
    )
