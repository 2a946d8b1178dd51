"""vLLM inside the labelling process: the real teacher."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from storage.keys import SamplingSpec, sampling_seed
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from teacher_server.adapters import Adapter
from teacher_server.backends import vllm_capture, vllm_self_test
from teacher_server.backends.base import TeacherJob
from teacher_server.backends.vllm_rows import RowLayout, captured_layout
from teacher_server.backends.vllm_samples import (
    EngineRows,
    engine_rows,
    joined,
    labelled_positions,
    to_sample,
)
from teacher_server.config import VllmBackendConfig
from teacher_server.errors import CaptureError, TeacherError

NEVER_SAMPLED = -100.0
"""Added to the logits of padded ids: the strongest bias that vLLM accepts."""

HIGHEST_TEMPERATURE = 2.0

MOST_LOGPROBS = 2**20
"""More than any vocabulary has: the self-test reads whole rows."""


def vllm_environment(backend: VllmBackendConfig) -> dict[str, str]:
    """Environment of a process that will run vLLM; must be set before vllm is imported.

    On CPU vLLM would claim 92 % of the memory and spin with all cores unless told otherwise.
    """
    return {
        "OMP_NUM_THREADS": str(backend.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(backend.kv_cache_gib))),
        # one process per engine: what kills the engine kills its worker, nothing is orphaned
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if backend.tensor_parallel == 1 else "1",
        # the label capture was tested with this model runner
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks that vLLM can be told to make room for."""


def _require_possible(job: TeacherJob, adapter: Adapter | None) -> None:
    """Refuse what vLLM would refuse for every sample, before an engine is started."""
    sampling = job.spec.generation.sampling
    if sampling is not None and sampling.temperature > HIGHEST_TEMPERATURE:
        raise TeacherError(
            f"label.sampling.temperature is {sampling.temperature}, vLLM takes at most "
            f"{HIGHEST_TEMPERATURE}; lower it or use the transformers backend"
        )
    if adapter is not None and adapter.rank > LORA_RANKS[-1]:
        raise TeacherError(
            f"adapter {adapter.directory!r} has rank {adapter.rank}, vLLM takes at most "
            f"{LORA_RANKS[-1]}; merge it into the model or use the transformers backend"
        )


class VllmBackend:
    """Labels through one in-process vLLM engine.

    Exact tail mass and optional columns come out of vLLM's worker (``vllm_capture.py``). Labels
    with ``tail: topk`` and no columns are read from vLLM's public log-probs.

    Raises:
        TeacherError: if the labels need private parts of an unsupported vLLM, or what vLLM or this
            backend cannot do.
        CaptureError: if the labels of a short self-test disagree with vLLM's public log-probs.
    """

    def __init__(self, job: TeacherJob) -> None:
        assert isinstance(job.backend, VllmBackendConfig)
        self._adapter = job.lora()
        _require_possible(job, self._adapter)
        os.environ.update(vllm_environment(job.backend))
        import vllm
        import vllm.inputs
        import vllm.lora.request
        import vllm.platforms
        import vllm.sampling_params

        self._vllm = vllm
        self._job = job
        self._needs_hook = job.spec.tail == "exact" or bool(job.spec.columns)
        if self._needs_hook:
            vllm_capture.require_supported(vllm.__version__)
        self.forward_tokens = 0
        self._on_cpu = vllm.platforms.current_platform.is_cpu()
        self._llm = vllm.LLM(**self._engine_options(job.backend))
        self._model_vocab_size: int = self._llm.model_config.get_vocab_size()
        # rows of a padded embedding must not be sampled; the recorded log-probs are taken before
        padded = range(job.spec.vocab_size, self._model_vocab_size)
        self._padding_bias = dict.fromkeys(padded, NEVER_SAMPLED) or None
        # without the hook ids of the padding may be among the likeliest, and are left out here
        self._layout = RowLayout(job.spec.kind.width + len(padded))
        self._facts = {"capture": "public"}
        self._lora = None if self._adapter is None else self._load(self._adapter)
        self._start_capture()

    def _engine_options(self, backend: VllmBackendConfig) -> dict[str, Any]:
        generation = self._job.spec.generation
        max_model_len = self._job.max_model_len
        options: dict[str, Any] = {
            "model": self._job.model,
            "dtype": generation.compute_dtype,
            "tensor_parallel_size": backend.tensor_parallel,
            "max_num_seqs": backend.max_num_seqs,
            "max_num_batched_tokens": max(backend.max_num_batched_tokens, backend.max_num_seqs),
            "max_model_len": max_model_len,
            "max_logprobs": MOST_LOGPROBS,
            "logprobs_mode": "raw_logprobs",
            "trust_remote_code": generation.teacher.trust_remote_code,
            "enforce_eager": backend.enforce_eager or self._on_cpu,
            "disable_log_stats": True,
            "seed": 0,
        }
        if self._needs_hook:
            options["worker_extension_cls"] = vllm_capture.EXTENSION
        if generation.teacher.quantization is not None:
            options["quantization"] = generation.teacher.quantization
        if generation.head_dtype != generation.compute_dtype:
            options["hf_overrides"] = {"head_dtype": generation.head_dtype}
        if self._adapter is not None:
            options["enable_lora"] = True
            options["max_lora_rank"] = min(r for r in LORA_RANKS if r >= self._adapter.rank)
            # the output layer must stay as it is: with room for adapters it takes as many rows as
            # tokens are sampled, and ours of a prompt are others
            options["lora_target_modules"] = self._adapter.module_names
        if self._on_cpu:
            # a prompt in pieces kills vLLM on CPU when its request has a seed
            options["enable_chunked_prefill"] = False
            room = max_model_len + backend.max_num_seqs
            options["max_num_batched_tokens"] = max(backend.max_num_batched_tokens, room)
        else:
            options["gpu_memory_utilization"] = backend.gpu_memory_utilization
        return options

    def _load(self, adapter: Adapter) -> Any:
        """The adapter in the engine, as every request names it.

        Raises:
            TeacherError: if vLLM does not take it for this model.
        """
        lora = self._vllm.lora.request.LoRARequest("adapter", 1, adapter.directory)
        try:
            self._llm.llm_engine.add_lora(lora)
        except vllm_capture.HOOK_ERRORS as error:
            raise TeacherError(
                f"vLLM does not take the adapter {adapter.directory!r}: {error}; merge it into the "
                "model or use the transformers backend"
            ) from error
        return lora

    def describe(self) -> dict[str, str]:
        """Engine, version and device; how the labels are captured and how rows are collected."""
        return {
            "backend": "vllm",
            "engine_version": self._vllm.__version__,
            "device": self._vllm.platforms.current_platform.device_name,
            **self._facts,
        }

    # -- labelling --------------------------------------------------------------------------------
    def label(self, requests: Iterable[SampleRequest]) -> Iterator[LabelledSample]:
        """See the protocol. The engine always holds up to twice its decoding slots.

        Raises:
            CaptureError: if the rows of a sample are not those of its tokens.
        """
        assert isinstance(self._job.backend, VllmBackendConfig)
        room = self._job.backend.in_flight
        engine = self._llm.llm_engine
        pending: dict[str, SampleRequest] = {}
        source = iter(requests)
        exhausted = False
        try:
            while pending or not exhausted:
                while not exhausted and len(pending) < room:
                    request = next(source, None)
                    if request is None:
                        exhausted = True
                    else:
                        pending[request.key] = request
                        self._add(*self._engine_request(request))
                if not pending:
                    break
                for output in engine.step():
                    if output.finished:
                        yield self._sample(pending.pop(output.request_id), output)
        finally:
            if pending:  # the caller gave up, or the engine did
                engine.abort_request(list(pending))

    def _add(self, request_id: str, prompt: Any, params: Any) -> None:
        engine = self._llm.llm_engine
        engine.add_request(request_id, prompt, params, lora_request=self._lora)

    def _engine_request(self, request: SampleRequest, *, with_flat: bool = False) -> Any:
        """Id, prompt and parameters.

        A given response goes to the engine as part of the prompt, but for its last token: that one
        is sampled as the only one allowed, so that no step and no room is spent behind it.
        """
        ids = request.prompt_ids_P.tolist()
        rows = None
        if request.response_ids_R is None:
            params = self._generating(request)
        else:
            ids += request.response_ids_R[:-1].tolist()
            rows = len(request.prompt_ids_P) + self._prompt_positions(request)
            params = self._scoring(int(request.response_ids_R[-1]), bool(len(rows)))
        params.extra_args = vllm_capture.ticket(
            key=request.key,
            prompt_tokens=len(request.prompt_ids_P),
            labelled_rows=rows,
            with_flat=with_flat,
        )
        return request.key, self._vllm.inputs.TokensPrompt(prompt_token_ids=ids), params

    def _prompt_positions(self, request: SampleRequest) -> Any:
        """Labelled positions of a given response, without its last."""
        assert request.response_ids_R is not None
        num_tokens = len(request.response_ids_R)
        positions_N = labelled_positions(request, num_tokens)
        return positions_N[positions_N < num_tokens - 1]

    def _generating(self, request: SampleRequest) -> Any:
        sampling = self._sampling_of(request)
        room = self._job.max_model_len - len(request.prompt_ids_P)
        if room < 1:
            raise TeacherError(
                f"sample {request.key}: its prompt of {len(request.prompt_ids_P)} tokens leaves no "
                f"room for a response in {self._job.max_model_len} tokens"
            )
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=min(sampling.max_tokens, room),
            stop=list(sampling.stop) or None,
            seed=sampling_seed(sampling.seed, request.key),
            logit_bias=self._padding_bias,
            logprobs=self._layout.num_logprobs,
            # decoding the candidates of every position costs more than sampling them
            detokenize=bool(sampling.stop),
            flat_logprobs=True,
            output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )

    def _sampling_of(self, request: SampleRequest) -> SamplingSpec:
        sampling = self._job.spec.generation.sampling
        if sampling is None:
            raise TeacherError(
                f"sample {request.key} has no response, and a label set of mode score has no "
                "sampling to make one; give the response"
            )
        return sampling

    def _scoring(self, last_token: int, has_prompt_rows: bool) -> Any:
        return self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=1,
            allowed_token_ids=[last_token],
            logprobs=self._layout.num_logprobs,
            prompt_logprobs=self._layout.num_logprobs if has_prompt_rows else None,
            detokenize=False,
            flat_logprobs=True,
            output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )

    def _sample(self, request: SampleRequest, output: Any) -> LabelledSample:
        completion = output.outputs[0]
        sampled = engine_rows(completion.logprobs)
        if request.response_ids_R is None:
            response_R = np.array(completion.token_ids, dtype=np.int32)
            # rows behind a stop string belong to no token
            rows = sampled.pick(slice(0, len(response_R)))
            finish_reason = str(completion.finish_reason)
            found = completion.stop_reason
            # the id of a further end-of-sequence token is no stop string
            stop_reason = found if isinstance(found, str) else None
        else:
            response_R = request.response_ids_R
            rows = self._given_rows(request, output, sampled)
            finish_reason, stop_reason = request.finish_reason, request.stop_reason
        self.forward_tokens += len(request.prompt_ids_P) + len(response_R)
        return to_sample(
            request,
            response_R,
            rows,
            self._job.spec,
            self._layout,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )

    def _given_rows(self, request: SampleRequest, output: Any, sampled: EngineRows) -> EngineRows:
        """Rows of the labelled tokens of a given response."""
        assert request.response_ids_R is not None
        last = len(request.response_ids_R) - 1
        parts = []
        positions = self._prompt_positions(request)
        if len(positions):
            found = engine_rows(output.prompt_logprobs)
            if self._facts["capture"] == "public":  # all rows of the prompt, from its second token
                found = found.pick(positions + len(request.prompt_ids_P) - 1)
            parts.append(found)
        if last in labelled_positions(request, last + 1):
            parts.append(sampled)
        return joined(parts)

    # -- start-up ---------------------------------------------------------------------------------
    def _start_capture(self) -> None:
        """Install the hooks that the labels need, and compare what they give."""
        spec = self._job.spec
        probe = vllm_self_test.probe_request(spec)
        vllm_capture.forget_arrays()
        dense = vllm_self_test.dense_labels(probe, self._public_rows(probe), spec)
        if self._needs_hook:
            try:
                runners = self._llm.collective_rpc(
                    "install_label_capture", args=(spec.model_dump_json(),)
                )
            except vllm_capture.HOOK_ERRORS as error:
                raise self._refused(f"the worker does not take it: {error}") from error
            self._layout = captured_layout(spec)
            self._facts |= {"capture": "worker", "model_runner": runners[0]}
        supported = vllm_capture.is_supported(self._vllm.__version__)
        self._facts["rows"] = "arrays" if supported and self._keeps_arrays(probe) else "flat"
        try:
            sample = self._sample(probe, self._run(probe))
            padding = self._model_vocab_size - spec.vocab_size
            vllm_self_test.require_same_labels(
                sample, dense, spec, rank_slack=0 if self._needs_hook else padding
            )
        except (*vllm_capture.HOOK_ERRORS, CaptureError) as error:
            raise self._refused(str(error)) from error

    def _refused(self, reason: str) -> CaptureError:
        version = self._vllm.__version__
        head = f"the label capture failed its self-test with vLLM {version}: {reason}"
        if not self._needs_hook:
            return CaptureError(f"{head}. Use the transformers backend")
        return CaptureError(
            f"{head}. Install a supported vLLM, use the transformers backend, or declare labels "
            "that every vLLM can give: label.tail: topk and label.columns: []"
        )

    def _keeps_arrays(self, probe: SampleRequest) -> bool:
        """Whether the front end takes the array hook; if not, it is as it was."""
        try:
            vllm_capture.keep_arrays()
            vllm_self_test.require_equal_arrays(self._run(probe, with_flat=True))
        except (*vllm_capture.HOOK_ERRORS, CaptureError):
            vllm_capture.forget_arrays()
            return False
        return True

    def _public_rows(self, probe: SampleRequest) -> EngineRows:
        """All log-probs of every token of the probe, through vLLM's public interface."""
        _, prompt, params = self._engine_request(probe)
        params.extra_args = None
        params.logprobs = params.prompt_logprobs = self._model_vocab_size
        return vllm_self_test.public_rows(self._finish("public probe", prompt, params))

    def _run(self, probe: SampleRequest, *, with_flat: bool = False) -> Any:
        return self._finish(*self._engine_request(probe, with_flat=with_flat))

    def _finish(self, request_id: str, prompt: Any, params: Any) -> Any:
        """Run one request alone."""
        engine = self._llm.llm_engine
        self._add(request_id, prompt, params)
        self.forward_tokens += len(prompt["prompt_token_ids"]) + 1
        try:
            while True:
                for output in engine.step():
                    if output.finished:
                        return output
        except vllm_capture.HOOK_ERRORS:
            engine.abort_request([request_id])
            raise

    def close(self) -> None:
        """Free the engine."""
        self._llm.llm_engine.engine_core.shutdown()
