"""The embedded reference: one sample at a time, every step written out. The oracle of the tests."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers import __version__ as transformers_version

from storage.keys import SamplingSpec, sampling_seed
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from teacher_server.backends.base import TeacherJob
from teacher_server.errors import TeacherError

LOG_ZERO = -100.0
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class TransformersBackend:
    """Labels through a plain transformers forward pass on CPU or GPU.

    Raises:
        TeacherError: for stop strings, and for a model whose head is not a plain linear map.
    """

    def __init__(self, job: TeacherJob) -> None:
        generation = job.spec.generation
        if generation.sampling is not None and generation.sampling.stop:
            raise TeacherError("the transformers backend knows no stop strings; use vllm")
        torch.set_num_threads(job.backend.threads)
        self.forward_tokens = 0
        self._job = job
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            job.model,
            dtype=getattr(torch, generation.compute_dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=generation.teacher.trust_remote_code,
        ).to(self._device)
        self._model.eval()
        _require_plain_head(self._model)
        self._head_dtype = getattr(torch, generation.head_dtype)
        self._head_weight = self._model.get_output_embeddings().weight.to(self._head_dtype)
        ends = self._model.generation_config.eos_token_id
        self._ends = set(ends) if isinstance(ends, list) else {ends}

    def describe(self) -> dict[str, str]:
        """Engine, version and device."""
        return {
            "backend": "transformers",
            "engine_version": transformers_version,
            "device": self._device,
        }

    def close(self) -> None:
        """Free the model."""
        del self._model

    @torch.inference_mode()
    def label(self, requests: Iterable[SampleRequest]) -> Iterator[LabelledSample]:
        """See the protocol."""
        for request in requests:
            sampling = self._job.spec.generation.sampling
            if request.response_ids_R is not None or sampling is None:
                yield self._score(request)
            else:
                yield self._generate(request, sampling)

    def _score(self, request: SampleRequest) -> LabelledSample:
        assert request.response_ids_R is not None
        tokens = np.concatenate([request.prompt_ids_P, request.response_ids_R])
        logprobs_TV, _ = self._forward(torch.tensor(tokens[:-1], dtype=torch.long), None)
        rows_RV = logprobs_TV[len(request.prompt_ids_P) - 1 :]
        return self._sample(request, request.response_ids_R, rows_RV, "given", None)

    def _generate(self, request: SampleRequest, sampling: SamplingSpec) -> LabelledSample:
        generator = torch.Generator().manual_seed(sampling_seed(sampling.seed, request.key))
        room = self._job.max_model_len - len(request.prompt_ids_P)
        fresh = torch.tensor(request.prompt_ids_P, dtype=torch.long)
        rows: list[Tensor] = []
        response: list[int] = []
        cache = None
        finish_reason = "length"
        while len(response) < min(sampling.max_tokens, room):
            logprobs_TV, cache = self._forward(fresh, cache)
            rows.append(logprobs_TV[-1])
            live_V = logprobs_TV[-1, : self._job.spec.vocab_size]
            response.append(draw(live_V, sampling, generator))
            if response[-1] in self._ends:
                finish_reason = "stop"
                break
            fresh = torch.tensor(response[-1:])
        ids = np.array(response, dtype=np.int32)
        return self._sample(request, ids, torch.stack(rows), finish_reason, None)

    def _forward(self, tokens_T: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Log-probs float32[T, V] over the full (padded) vocabulary, and the key-value cache."""
        self.forward_tokens += len(tokens_T)
        output = self._model.base_model(
            input_ids=tokens_T[None].to(self._device), past_key_values=cache, use_cache=True
        )
        hidden_TH = output.last_hidden_state[0].to(self._head_dtype)
        logprobs_TV = (hidden_TH @ self._head_weight.t()).float().log_softmax(dim=-1)
        return logprobs_TV.cpu(), output.past_key_values

    def _sample(
        self,
        request: SampleRequest,
        response_R: np.ndarray,
        logprobs_RV: Tensor,
        finish_reason: str,
        stop_reason: str | None,
    ) -> LabelledSample:
        live_RV = logprobs_RV[:, : self._job.spec.vocab_size]
        topk = live_RV.topk(self._job.spec.kind.width, dim=-1)
        token_R1 = live_RV.gather(1, torch.tensor(response_R, dtype=torch.long)[:, None])
        probabilities_RV = logprobs_RV.double().exp()
        tail_R = probabilities_RV.scatter(1, topk.indices, 0.0).sum(dim=-1).log()
        terms = torch.where(probabilities_RV > 0, probabilities_RV * logprobs_RV, 0.0)
        wants_entropy = "entropy" in self._job.spec.columns
        return LabelledSample(
            key=request.key,
            sample_index=request.sample_index,
            prompt_ids_P=request.prompt_ids_P,
            response_ids_R=response_R,
            positions_N=np.arange(len(response_R), dtype=np.int32),
            token_logprob_N=token_R1[:, 0].numpy(),
            token_rank_N=(1 + (live_RV > token_R1).sum(dim=-1)).int().numpy(),
            log_tail_mass_N=tail_R.clamp_min(LOG_ZERO).float().numpy(),
            topk_ids_NK=topk.indices.int().numpy(),
            topk_logprobs_NK=topk.values.numpy(),
            entropy_N=-terms.sum(dim=-1).float().numpy() if wants_entropy else None,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )


def _require_plain_head(model: Any) -> None:
    found = [n for n in LOGIT_TRANSFORMS if getattr(model.config, n, None) not in (None, 1, 1.0)]
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        found.append("lm_head.bias")
    if found:
        raise TeacherError(
            f"the transformers backend multiplies hidden states by lm_head and nothing else, this "
            f"teacher also has {', '.join(found)}; use the vllm backend"
        )


def draw(logprobs_V: Tensor, sampling: SamplingSpec, generator: torch.Generator) -> int:
    """Sample one token as vLLM defines its parameters: temperature, then min_p, top_k, top_p."""
    if sampling.temperature == 0:
        return int(logprobs_V.argmax())
    probabilities_V = (logprobs_V.double() / sampling.temperature).softmax(dim=-1)
    if sampling.min_p > 0:
        probabilities_V[probabilities_V < sampling.min_p * probabilities_V.max()] = 0.0
    if sampling.top_k > 0:
        keep = probabilities_V.topk(min(sampling.top_k, len(probabilities_V))).indices
        probabilities_V = torch.zeros_like(probabilities_V).scatter(0, keep, probabilities_V[keep])
    if sampling.top_p < 1:
        ordered, order = (probabilities_V / probabilities_V.sum()).sort(descending=True)
        before = ordered.cumsum(dim=0) - ordered
        probabilities_V[order[before >= sampling.top_p]] = 0.0
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
