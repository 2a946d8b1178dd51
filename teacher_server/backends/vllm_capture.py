"""Exact tail mass and entropy out of vLLM's sampler, whose private parts only this module touches.

vLLM reports the top-k log-probs of a position and the rank of the sampled token. This extension of
its worker asks for two candidates more than k and replaces their columns by the log tail mass and
the entropy, both summed over the full vocabulary beside the top-k, where the log-probs are at
hand. The shapes stay what vLLM expects, so the two numbers travel its ordinary path, through
chunked prefill, preemption and tensor parallelism, for sampled and for prompt positions alike.
"""

from typing import Any

EXTRA_COLUMNS = 2
"""Columns behind the top-k: log tail mass and entropy, nats."""

EXTENSION = f"{__name__}.LabelCapture"

SUPPORTED_VERSIONS = ("0.32.",)
"""vLLM releases whose sampler this module was tested against."""

LOG_ZERO = -100.0


class LabelCapture:
    """Mixed into vLLM's worker by ``worker_extension_cls``; methods run in every worker."""

    def install_label_capture(self, k: int, vocab_size: int) -> str:
        """Replace the sampler's gathering of log-probs.

        Args:
            k: Tokens per position.
            vocab_size: Effective vocabulary; padded ids beyond it are never in the top-k, their
                mass is part of the tail.

        Returns:
            Name of the model runner, for the self-test and the provenance.
        """
        runner = self.model_runner  # type: ignore[attr-defined]  # of vLLM's worker
        runner.sampler.gather_logprobs = _Gather(runner.sampler.gather_logprobs, k, vocab_size)
        return type(runner).__name__


class _Gather:
    def __init__(self, original: Any, k: int, vocab_size: int) -> None:
        self._original = original
        self._k = k
        self._vocab_size = vocab_size

    def __call__(self, logprobs_NV: Any, num_logprobs: int, token_ids: Any) -> Any:
        if num_logprobs != self._k + EXTRA_COLUMNS:  # a request that is not ours
            return self._original(logprobs_NV, num_logprobs, token_ids)
        import torch

        live_NV = logprobs_NV[:, : self._vocab_size]
        # rank and top-k come from vLLM itself, over the live vocabulary
        gathered = self._original(live_NV, self._k, token_ids)
        probabilities_NV = logprobs_NV.exp()
        # 0 * -inf is nan, which nansum leaves out; few passes, for this runs at every step
        entropy_N1 = -(probabilities_NV * logprobs_NV).nansum(dim=-1, keepdim=True)
        # the tail is summed, not subtracted from one: no cancellation when it is small
        probabilities_NV.scatter_(1, gathered.logprob_token_ids[:, 1:].long(), 0.0)
        tail_N1 = probabilities_NV.sum(dim=-1, keepdim=True).log().clamp_min(LOG_ZERO)
        return type(gathered)(
            torch.nn.functional.pad(gathered.logprob_token_ids, (0, EXTRA_COLUMNS), value=-1),
            torch.cat([gathered.logprobs, tail_N1, entropy_N1], dim=1),
            gathered.selected_token_ranks,
        )
