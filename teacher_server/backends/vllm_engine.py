"""vLLM inside the labelling process: the real teacher."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from storage.keys import sampling_seed
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from storage.tail import log_tail_mass_of
from teacher_server.backends.base import TeacherJob
from teacher_server.backends.vllm_capture import EXTENSION, EXTRA_COLUMNS, SUPPORTED_VERSIONS
from teacher_server.config import VllmBackendConfig
from teacher_server.errors import CaptureError, TeacherError

NEVER_SAMPLED = -100.0
"""Added to the logits of padded ids: the strongest bias that vLLM accepts."""

SELF_TEST_TOKENS = 4
SELF_TEST_TOLERANCE_NATS = 1e-3
SELF_TEST_TAIL_TOLERANCE = 1e-4
"""Probability, not nats: the reference tail is one minus a float32 sum."""


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


class VllmBackend:
    """Labels through one in-process vLLM engine.

    Raises:
        TeacherError: if the installed vLLM is not a supported release.
        CaptureError: if the labels of a short self-test disagree with vLLM's public log-probs.
    """

    def __init__(self, job: TeacherJob) -> None:
        assert isinstance(job.backend, VllmBackendConfig)
        os.environ.update(vllm_environment(job.backend))
        import vllm
        import vllm.inputs
        import vllm.platforms
        import vllm.sampling_params

        if not vllm.__version__.startswith(SUPPORTED_VERSIONS):
            raise TeacherError(
                f"vLLM {vllm.__version__} is installed, supported are "
                f"{', '.join(v + 'x' for v in SUPPORTED_VERSIONS)}; run `distill doctor`"
            )
        self.forward_tokens = 0
        self._vllm = vllm
        self._job = job
        self._k = job.spec.kind.width
        self._on_cpu = vllm.platforms.current_platform.is_cpu()
        self._llm = vllm.LLM(**self._engine_options(job.backend))
        # rows of a padded embedding must not be sampled; the recorded log-probs are taken before
        padded = range(job.spec.vocab_size, self._llm.model_config.get_vocab_size())
        self._padding_bias = dict.fromkeys(padded, NEVER_SAMPLED) or None
        self._runner = "unpatched"
        self._install_capture()

    def _engine_options(self, backend: VllmBackendConfig) -> dict[str, Any]:
        generation = self._job.spec.generation
        options: dict[str, Any] = {
            "model": self._job.model,
            "dtype": generation.compute_dtype,
            "tensor_parallel_size": backend.tensor_parallel,
            "max_num_seqs": backend.max_num_seqs,
            "max_num_batched_tokens": max(
                backend.max_num_batched_tokens, self._job.max_model_len, backend.max_num_seqs
            ),
            "max_model_len": self._job.max_model_len,
            "max_logprobs": self._k + EXTRA_COLUMNS,
            "logprobs_mode": "raw_logprobs",
            "worker_extension_cls": EXTENSION,
            "trust_remote_code": generation.teacher.trust_remote_code,
            "enforce_eager": backend.enforce_eager or self._on_cpu,
            "disable_log_stats": True,
            "seed": 0,
        }
        if generation.head_dtype != generation.compute_dtype:
            options["hf_overrides"] = {"head_dtype": generation.head_dtype}
        if not self._on_cpu:
            options["gpu_memory_utilization"] = backend.gpu_memory_utilization
        return options

    def describe(self) -> dict[str, str]:
        """Engine, version, model runner and device."""
        return {
            "backend": "vllm",
            "engine_version": self._vllm.__version__,
            "model_runner": self._runner,
            "device": self._vllm.platforms.current_platform.device_name,
        }

    # -- labelling --------------------------------------------------------------------------------
    def label(self, requests: Iterable[SampleRequest]) -> Iterator[LabelledSample]:
        """See the protocol. The engine always holds up to twice its decoding slots."""
        assert isinstance(self._job.backend, VllmBackendConfig)
        room = 2 * self._job.backend.max_num_seqs
        engine = self._llm.llm_engine
        pending: dict[str, SampleRequest] = {}
        source = iter(requests)
        exhausted = False
        while pending or not exhausted:
            while not exhausted and len(pending) < room:
                request = next(source, None)
                if request is None:
                    exhausted = True
                else:
                    pending[request.key] = request
                    engine.add_request(request.key, self._prompt(request), self._params(request))
            if not pending:
                break
            for output in engine.step():
                if output.finished:
                    yield self._sample(pending.pop(output.request_id), output)

    def _prompt(self, request: SampleRequest) -> Any:
        ids = request.prompt_ids_P.tolist()
        if request.response_ids_R is not None:
            ids += request.response_ids_R.tolist()
        return self._vllm.inputs.TokensPrompt(prompt_token_ids=ids)

    def _params(self, request: SampleRequest) -> Any:
        num_logprobs = self._k + EXTRA_COLUMNS
        common = {
            "flat_logprobs": True,  # no object per token
            "output_kind": self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        }
        sampling = self._job.spec.generation.sampling
        if sampling is None:
            return self._vllm.SamplingParams(
                max_tokens=1,
                temperature=0.0,
                prompt_logprobs=num_logprobs,
                detokenize=False,
                **common,
            )
        room = self._job.max_model_len - len(request.prompt_ids_P)
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=min(sampling.max_tokens, room),
            stop=list(sampling.stop) or None,
            seed=sampling_seed(sampling.seed, request.key),
            logit_bias=self._padding_bias,
            logprobs=num_logprobs,
            # decoding the candidates of every position costs more than sampling them
            detokenize=bool(sampling.stop),
            **common,
        )

    def _sample(self, request: SampleRequest, output: Any) -> LabelledSample:
        completion = output.outputs[0]
        if request.response_ids_R is None:
            response_R = np.array(completion.token_ids, dtype=np.int32)
            flat, finish_reason = completion.logprobs, str(completion.finish_reason)
            stop_reason = completion.stop_reason
        else:
            response_R = request.response_ids_R
            flat, finish_reason, stop_reason = output.prompt_logprobs, "given", None
        self.forward_tokens += len(request.prompt_ids_P) + len(response_R)
        columns = 1 + self._k + EXTRA_COLUMNS
        # rows of the prompt itself come first in score mode, and its first token has none
        logprobs = np.array(flat.logprobs, dtype=np.float32).reshape(-1, columns)[
            -len(response_R) :
        ]
        ids = np.array(flat.token_ids, dtype=np.int32).reshape(-1, columns)[-len(response_R) :]
        ranks = np.array(flat.ranks[::columns], dtype=np.int32)[-len(response_R) :]
        return LabelledSample(
            key=request.key,
            sample_index=request.sample_index,
            prompt_ids_P=request.prompt_ids_P,
            response_ids_R=response_R,
            positions_N=np.arange(len(response_R), dtype=np.int32),
            token_logprob_N=logprobs[:, 0],
            token_rank_N=ranks,
            log_tail_mass_N=logprobs[:, 1 + self._k],
            topk_ids_NK=ids[:, 1 : 1 + self._k],
            topk_logprobs_NK=logprobs[:, 1 : 1 + self._k],
            entropy_N=logprobs[:, 2 + self._k] if "entropy" in self._job.spec.columns else None,
            finish_reason=finish_reason,
            stop_reason=None if stop_reason is None else str(stop_reason),
        )

    # -- start-up self-test -----------------------------------------------------------------------
    def _install_capture(self) -> None:
        """Install the capture and compare its labels with vLLM's public log-probs."""
        public = self._self_test_rows()
        runners = self._llm.collective_rpc(
            "install_label_capture", args=(self._k, self._job.spec.vocab_size)
        )
        self._runner = runners[0]
        captured = self._self_test_rows()
        top = slice(0, 1 + self._k)
        difference = float(np.abs(public[:, top] - captured[:, top]).max())
        tail = np.exp(captured[:, 1 + self._k])
        expected = np.exp(log_tail_mass_of(public[:, 1 : 1 + self._k]))
        tail_difference = float(np.abs(tail - expected).max())
        entropy = captured[:, 2 + self._k]
        plausible = bool((entropy >= 0).all() and (entropy <= np.log(2**20)).all())
        if (
            difference > SELF_TEST_TOLERANCE_NATS
            or tail_difference > SELF_TEST_TAIL_TOLERANCE
            or not plausible
        ):
            raise CaptureError(
                f"the label capture disagrees with vLLM {self._vllm.__version__}: top-k log-probs "
                f"differ by {difference:.2g} nats, tail mass by {tail_difference:.2g}, entropy "
                f"{entropy.tolist()}; use a supported vLLM or the transformers backend"
            )

    def _self_test_rows(self) -> np.ndarray:
        """Log-prob rows float32[T, 1 + k + 2] of a short greedy continuation of token 0."""
        params = self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=min(SELF_TEST_TOKENS, self._job.max_model_len - 1),
            ignore_eos=True,
            logprobs=self._k + EXTRA_COLUMNS,
            flat_logprobs=True,
            detokenize=False,
        )
        prompt = self._vllm.inputs.TokensPrompt(prompt_token_ids=[0])
        (output,) = self._llm.generate([prompt], params, use_tqdm=False)
        self.forward_tokens += 1 + len(output.outputs[0].token_ids)
        flat = output.outputs[0].logprobs
        return np.array(flat.logprobs, dtype=np.float32).reshape(-1, 1 + self._k + EXTRA_COLUMNS)

    def close(self) -> None:
        """Free the engine."""
        self._llm.llm_engine.engine_core.shutdown()
