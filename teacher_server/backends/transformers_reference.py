"""The embedded reference: one sample at a time, every step written out. The oracle of the tests.

Logits are those of the model's own forward pass, whatever it does behind its output layer (bias,
soft caps, scales). Only the output layer itself is exchanged, for one in the dtype of the head.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import __version__ as transformers_version

from storage.fingerprint import TOKENIZER_FILES
from storage.keys import SamplingSpec, TeacherFingerprint, sampling_seed
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from teacher_server.adapters import Adapter
from teacher_server.backends.base import TeacherJob
from teacher_server.dense_rows import CHUNK_ROWS, RowLabels, joined, label_rows
from teacher_server.errors import TeacherError
from teacher_server.stop_strings import StopStrings


class TransformersBackend:
    """Labels through a plain transformers forward pass on CPU or GPU.

    Raises:
        TeacherError: for on-the-fly quantisation, for an adapter that does not fit, for stop
            strings without a tokenizer, and for a model that does not use its output layer.
    """

    def __init__(self, job: TeacherJob) -> None:
        generation = job.spec.generation
        _require_plain_weights(generation.teacher)
        adapter = job.lora()
        torch.set_num_threads(job.backend.threads)
        self.forward_tokens = 0
        self._job = job
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tokenizer = _load_tokenizer(job)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            job.model,
            dtype=getattr(torch, generation.compute_dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=generation.teacher.trust_remote_code,
        ).to(self._device)
        if adapter is not None:
            self._model = _with_adapter(self._model, adapter)
        self._model.eval()
        head_dtype = getattr(torch, generation.head_dtype)
        self._head = OutputLayer(self._model.get_output_embeddings(), head_dtype)
        self._model.set_output_embeddings(self._head)
        self._ends = _end_tokens(self._model, self._tokenizer)

    def describe(self) -> dict[str, str]:
        """Engine, version and device."""
        return {
            "backend": "transformers",
            "engine_version": transformers_version,
            "device": self._device,
        }

    def close(self) -> None:
        """Free the model."""
        del self._model, self._head

    @torch.inference_mode()
    def label(self, requests: Iterable[SampleRequest]) -> Iterator[LabelledSample]:
        """See the protocol."""
        for request in requests:
            if request.response_ids_R is not None:
                yield self._score(request, request.response_ids_R)
            else:
                sampling = self._job.spec.generation.sampling
                assert sampling is not None, "a request of score mode has a response"
                yield self._generate(request, sampling)

    # -- known responses --------------------------------------------------------------------------
    def _score(self, request: SampleRequest, response_R: npt.NDArray[np.int32]) -> LabelledSample:
        mask_R = request.label_mask_R
        positions_N = np.arange(len(response_R)) if mask_R is None else np.flatnonzero(mask_R)
        logits_NV = self.logits(request.prompt_ids_P, response_R, positions_N)
        parts = [
            self._label(
                request,
                logits_NV[start : start + CHUNK_ROWS].float().log_softmax(dim=-1),
                response_R,
                positions_N[start : start + CHUNK_ROWS],
            )
            # one empty part where nothing is labelled
            for start in range(0, max(1, len(positions_N)), CHUNK_ROWS)
        ]
        return self._sample(
            request,
            response_R,
            positions_N,
            joined(parts),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )

    def logits(
        self,
        prompt_ids_P: npt.NDArray[np.int32],
        response_ids_R: npt.NDArray[np.int32],
        positions_N: npt.NDArray[np.integer],
    ) -> Tensor:
        """What the model says where it predicts some tokens of a response.

        Args:
            prompt_ids_P: int32[P].
            response_ids_R: int32[R].
            positions_N: int[N], places in the response.

        Returns:
            Logits [N, V] in the dtype of the head, over all rows of the output layer.
        """
        tokens = np.concatenate([prompt_ids_P, response_ids_R])[:-1]
        # the row that predicts response token r is that of the token before it
        rows_N = torch.as_tensor(len(prompt_ids_P) - 1 + positions_N)
        found, _ = self._forward(torch.as_tensor(tokens, dtype=torch.long), rows_N)
        return found

    # -- answers ----------------------------------------------------------------------------------
    def _generate(self, request: SampleRequest, sampling: SamplingSpec) -> LabelledSample:
        generator = torch.Generator().manual_seed(sampling_seed(sampling.seed, request.key))
        limit = min(sampling.max_tokens, self._job.max_model_len - len(request.prompt_ids_P))
        stop_strings = None
        if sampling.stop:
            stop_strings = StopStrings(
                self._tokenizer, request.prompt_ids_P.tolist(), sampling.stop
            )
        fresh = torch.as_tensor(request.prompt_ids_P, dtype=torch.long)
        rows: list[Tensor] = []
        parts: list[RowLabels] = []
        response: list[int] = []
        cache, finish_reason, stop_reason = None, "length", None
        while len(response) < limit and finish_reason == "length":
            last = torch.tensor([len(fresh) - 1])
            logits_NV, cache = self._forward(fresh, last, cache)
            rows.append(logits_NV[0].float().log_softmax(dim=-1))
            live_V = rows[-1][: self._job.spec.vocab_size].cpu()
            response.append(draw(live_V, sampling, generator))
            if response[-1] in self._ends:
                finish_reason = "stop"
            elif stop_strings is not None:
                stop_reason = stop_strings.completed_by(response[-1])
                finish_reason = "length" if stop_reason is None else "stop"
            if len(rows) == CHUNK_ROWS:
                parts.append(self._label_last(request, rows, response))
                rows = []
            fresh = torch.tensor(response[-1:])
        if rows or not parts:
            parts.append(self._label_last(request, rows, response))
        return self._sample(
            request,
            np.array(response, dtype=np.int32),
            np.arange(len(response)),
            joined(parts),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )

    def _label_last(
        self, request: SampleRequest, rows: list[Tensor], response: list[int]
    ) -> RowLabels:
        """Labels of the last tokens, as many as there are rows."""
        logprobs_NV = torch.stack(rows) if rows else torch.zeros(0, len(self._head.weight))
        positions_N = np.arange(len(response) - len(rows), len(response))
        return self._label(request, logprobs_NV, np.array(response, np.int32), positions_N)

    # -- both -------------------------------------------------------------------------------------
    def _forward(self, tokens_T: Tensor, rows_N: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Logits [N, V] behind some of the tokens, and the key-value cache.

        V are all rows of the output layer, padding included.
        """
        self.forward_tokens += len(tokens_T)
        calls = self._head.calls
        output = self._model(
            input_ids=tokens_T[None].to(self._device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=rows_N.to(self._device),
        )
        if self._head.calls == calls:
            raise TeacherError(
                f"{type(self._model).__name__} makes its logits without its output layer, so "
                "head_dtype cannot be kept; use the vllm backend"
            )
        return output.logits[0], output.past_key_values

    def _label(
        self,
        request: SampleRequest,
        logprobs_NV: Tensor,
        response_R: npt.NDArray[np.int32],
        positions_N: npt.NDArray[np.int64],
    ) -> RowLabels:
        return label_rows(
            logprobs_NV, response_R[positions_N], positions_N, self._job.spec, request.key
        )

    def _sample(
        self,
        request: SampleRequest,
        response_R: npt.NDArray[np.int32],
        positions_N: npt.NDArray[np.int64],
        labels: RowLabels,
        *,
        finish_reason: str,
        stop_reason: str | None,
    ) -> LabelledSample:
        return LabelledSample(
            key=request.key,
            sample_index=request.sample_index,
            prompt_ids_P=request.prompt_ids_P,
            response_ids_R=response_R,
            positions_N=positions_N.astype(np.int32),
            token_logprob_N=labels.token_logprob_N,
            token_rank_N=labels.token_rank_N,
            log_tail_mass_N=labels.log_tail_mass_N,
            topk_ids_NK=labels.topk_ids_NK,
            topk_logprobs_NK=labels.topk_logprobs_NK,
            optional=labels.optional,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )


class OutputLayer(torch.nn.Module):
    """A model's own output layer, computed in the dtype of the head.

    Args:
        layer: Linear; it may have a bias.
        dtype: Of weights, bias and logits.
    """

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        bias = getattr(layer, "bias", None)
        self.weight: Tensor = layer.weight.detach().to(dtype)
        """[V, H]; shared with the layer where it has the dtype already."""
        self.bias: Tensor | None = None if bias is None else bias.detach().to(dtype)
        self.calls = 0
        """Times that the model used this layer."""

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Logits [..., V]."""
        self.calls += 1
        return torch.nn.functional.linear(hidden_NH.to(self.weight.dtype), self.weight, self.bias)


def _require_plain_weights(teacher: TeacherFingerprint) -> None:
    if teacher.quantization is not None:
        raise TeacherError(
            "the transformers backend loads weights as they are stored and knows no "
            f"{teacher.quantization} quantisation; use the vllm backend"
        )


def _with_adapter(model: Any, adapter: Adapter) -> Any:
    """The model with an adapter in its linear layers, in the model's dtype as in vLLM.

    Raises:
        TeacherError: if peft does not find all layers that the adapter changes.
    """
    from peft import PeftModel

    adapted: Any = PeftModel.from_pretrained(
        model, adapter.directory, autocast_adapter_dtype=False, local_files_only=True
    )
    found = [p for name, p in adapted.named_parameters() if ".lora_" in name]
    if len(found) != 2 * len(adapter.modules):
        raise TeacherError(
            f"of {len(adapter.modules)} layers that the adapter {adapter.directory!r} changes, "
            f"{type(model).__name__} has {len(found) // 2}; use the vllm backend, or merge the "
            "adapter into the model"
        )
    for parameter in found:
        parameter.data = parameter.data.to(device=model.device, dtype=model.dtype)
    return adapted.get_base_model()


def _load_tokenizer(job: TeacherJob) -> Any:
    """The tokenizer of the teacher, None if its directory has none and none is needed."""
    sampling = job.spec.generation.sampling
    if any((Path(job.model) / name).is_file() for name in TOKENIZER_FILES):
        return AutoTokenizer.from_pretrained(
            job.model,
            local_files_only=True,
            trust_remote_code=job.spec.generation.teacher.trust_remote_code,
        )
    if sampling is not None and sampling.stop:
        raise TeacherError(
            f"stop strings are searched in text, and {job.model!r} has no tokenizer; add its files "
            f"({', '.join(TOKENIZER_FILES)}) or remove label.sampling.stop"
        )
    return None


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end a response: those of the generation config, and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    found = set(ends) if isinstance(ends, list | tuple) else {ends}
    found.add(None if tokenizer is None else tokenizer.eos_token_id)
    return found - {None}


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
