"""Every private part of vLLM that this project touches: two hooks, one at each end of the engine.

vLLM reports the top-k log-probs of a position and the rank of its token, as Python numbers.

* In the worker, :class:`LabelCapture` replaces how rows of logits become log-probs. A request that
  asks for exactly the number of columns of our labels gets them (``vllm_rows.py``): the scalars and
  tail samples stand behind the top-k and travel vLLM's ordinary path, through preemption and tensor
  parallelism. Prompt rows are projected block by block, and only those that are labelled, so that
  memory does not grow with the prompt. On CPU the output layer is cast once, not at every step.
* In the front end, :func:`keep_arrays` replaces what collects the rows of a request. They arrive as
  arrays and stay arrays, where vLLM makes a Python number of every one.

Neither is trusted: ``vllm_self_test.py`` compares both with vLLM's public flat log-probs at every
start. Requests tell the hooks what they need by a ticket in ``SamplingParams.extra_args``.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from storage.keys import LabelSetSpec
from teacher_server.errors import TeacherError

SUPPORTED_VERSIONS: Final = ("0.32.",)
"""Beginnings of the vLLM releases whose private parts this module was tested against."""

EXTENSION: Final = f"{__name__}.LabelCapture"
"""For ``worker_extension_cls``: an import string, so it also works where only a working directory
is shipped."""

TICKET: Final = "distillcache"
"""Entry of ``extra_args`` that marks our requests."""

HOOK_ERRORS: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a hook raises in an engine that it does not fit; a worker process sends a RuntimeError."""

PROMPT_BLOCK_ELEMENTS: Final = 2**24
"""Logits of prompt rows that exist at a time on CPU (64 MiB); few rows make slow products."""

GPU_PROMPT_BLOCK_ELEMENTS: Final = 2**26

MOST_VIEWS: Final = 64
"""Steps whose rows, of all requests, a single request keeps in memory."""


def is_supported(version: str) -> bool:
    """Whether the hooks may be tried with this release of vLLM."""
    return version.startswith(SUPPORTED_VERSIONS)


def require_supported(version: str) -> None:
    """Refuse a release whose worker is unknown.

    Raises:
        TeacherError: naming the supported ones.
    """
    if not is_supported(version):
        raise TeacherError(
            f"vLLM {version} is installed; exact tail mass and optional columns need "
            f"{', '.join(v + 'x' for v in SUPPORTED_VERSIONS)}. Install that, or declare labels "
            "that every vLLM can give: label.tail: topk and label.columns: []"
        )


def ticket(
    *,
    key: str,
    prompt_tokens: int,
    labelled_rows: npt.NDArray[np.integer] | None = None,
    with_flat: bool = False,
) -> dict[str, Any]:
    """``extra_args`` of a request.

    Args:
        key: Sample key.
        prompt_tokens: Tokens of the sample's prompt; what follows in the engine's prompt is a given
            response.
        labelled_rows: int[N], ascending: which tokens of the engine's prompt are labelled. The
            worker hook gives these rows and no others; None where no prompt rows are wanted.
        with_flat: Also collect vLLM's own flat log-probs, for the self-test.
    """
    rows = None if labelled_rows is None else np.asarray(labelled_rows, dtype=np.int32).tobytes()
    return {
        TICKET: {"key": key, "prompt_tokens": prompt_tokens, "rows": rows, "with_flat": with_flat}
    }


# -- in the worker ---------------------------------------------------------------------------------
class LabelCapture:
    """Mixed into vLLM's worker by ``worker_extension_cls``; methods run in every worker."""

    def install_label_capture(self, spec: str) -> str:
        """Replace the sampler's arithmetic of log-probs.

        Args:
            spec: The label set spec, as JSON.

        Returns:
            Name of the model runner, for the provenance.
        """
        runner = self.model_runner  # type: ignore[attr-defined]  # of vLLM's worker
        capture = _WorkerCapture(runner, LabelSetSpec.model_validate_json(spec))
        runner.sampler.compute_logprobs = capture.compute_logprobs
        runner.sampler.gather_logprobs = capture.gather_logprobs
        runner._get_prompt_logprobs_dict = capture.prompt_logprobs
        return type(runner).__name__


class _WorkerCapture:
    """Stands in for three methods of vLLM's model runner and its sampler."""

    def __init__(self, runner: Any, spec: LabelSetSpec) -> None:
        # vllm and torch are imported by the worker, not by whoever wants the supported versions
        from vllm.model_executor.layers.logits_processor import LogitsProcessor
        from vllm.v1.outputs import LogprobsTensors

        from teacher_server.backends.vllm_rows import LabelRows

        self._runner = runner
        self._tensors = LogprobsTensors
        self._rows = LabelRows(spec)
        self._original_gather = runner.sampler.gather_logprobs
        self._original_prompt_logprobs = runner._get_prompt_logprobs_dict
        if runner.device.type == "cpu":
            for module in runner.model.modules():
                if isinstance(module, LogitsProcessor) and "_apply_head" not in vars(module):
                    module._apply_head = _KeptHead(module)
        self._logprobs: Any = None
        self._summary: Any = None
        self._buffer: Any = None

    def compute_logprobs(self, logits_NV: Any) -> Any:
        """Log-probs float32[N, V] of sampled rows; what else they say is kept for the gathering."""
        self._logprobs = self._room_for(logits_NV)
        self._summary = self._rows.summarize(logits_NV, self._logprobs)
        return self._logprobs

    def gather_logprobs(self, logprobs_NV: Any, num_logprobs: int, token_ids: Any) -> Any:
        """The label columns of sampled rows, once their tokens are known."""
        is_ours = num_logprobs == self._rows.layout.num_logprobs
        if not is_ours or logprobs_NV is not self._logprobs:
            return self._original_gather(logprobs_NV, num_logprobs, token_ids)
        samples = None
        if self._rows.layout.num_tail_samples:
            keys, positions = self._sampled_places(len(logprobs_NV))
            samples = self._rows.tail_samples(self._summary, logprobs_NV, keys, positions)
        columns = self._rows.assemble(self._summary, logprobs_NV, token_ids, samples)
        return self._tensors(*columns)

    def prompt_logprobs(self, hidden_NH: Any, num_scheduled: dict[str, int]) -> dict[str, Any]:
        """The label columns of labelled prompt rows, of every request whose prompt is through."""
        pending = self._runner.num_prompt_logprobs
        if any(width != self._rows.layout.num_logprobs for width in pending.values()):
            found: dict[str, Any] = self._original_prompt_logprobs(hidden_NH, num_scheduled)
            return found
        # a request that was preempted is not scheduled, and begins again later
        parts = [self._part(name, num_scheduled[name]) for name in pending if name in num_scheduled]
        self._fill(hidden_NH, [part for part in parts if len(part.token_ids_N)])
        finished = {part.request_id: part.tensors for part in parts if part.is_last}
        for request_id in finished:
            del pending[request_id]
            self._runner.requests[request_id].in_progress_prompt_logprobs_cpu = None
        if finished:
            self._runner._sync_device()
        return finished

    def _part(self, request_id: str, num_tokens: int) -> "_PromptPart":
        """The labelled rows among the prompt tokens of a request that this step computed."""
        request = self._runner.requests[request_id]
        start, prompt_ids = request.num_computed_tokens, request.prompt_token_ids
        note = (request.sampling_params.extra_args or {}).get(TICKET, {})
        if note.get("rows") is None:
            targets = np.arange(1, len(prompt_ids))
        else:
            targets = np.frombuffer(note["rows"], dtype=np.int32).astype(np.int64)
        tensors = request.in_progress_prompt_logprobs_cpu
        if tensors is None:
            tensors = self._tensors.empty_cpu(len(targets), 1 + self._rows.layout.num_logprobs)
            request.in_progress_prompt_logprobs_cpu = tensors
        # the hidden state of one token predicts the next
        end = start + num_tokens
        first, last = np.searchsorted(targets, (start + 1, end + 1)).tolist()
        offset = self._runner.query_start_loc.np[
            self._runner.input_batch.req_id_to_index[request_id]
        ]
        due = targets[first:last]
        return _PromptPart(
            request_id=request_id,
            tensors=tensors,
            first_row=first,
            places_N=due - 1 - start + int(offset),
            token_ids_N=np.array(prompt_ids)[due],
            key=note.get("key", ""),
            positions_N=due - note.get("prompt_tokens", 0),
            is_last=end >= len(prompt_ids),
        )

    def _fill(self, hidden_NH: Any, parts: "list[_PromptPart]") -> None:
        """Label the rows of some requests, and put them where vLLM expects them."""
        if not parts:
            return
        columns = self._label_prompts(hidden_NH, parts)
        begin = 0
        for part in parts:
            count = len(part.token_ids_N)
            rows = slice(part.first_row, part.first_row + count)
            for tensor, values in zip(part.tensors[:3], columns, strict=True):
                tensor[rows].copy_(values[begin : begin + count], non_blocking=True)
            begin += count

    def _label_prompts(self, hidden_NH: Any, parts: "list[_PromptPart]") -> tuple[Any, ...]:
        """Columns of all labelled rows, request after request.

        Blocks run over requests: the output layer is read once for every block.
        """
        import torch

        places_N = torch.from_numpy(np.concatenate([part.places_N for part in parts]))
        token_ids_N = torch.from_numpy(np.concatenate([part.token_ids_N for part in parts]))
        keys, positions = [], []
        if self._rows.layout.num_tail_samples:
            keys = [part.key for part in parts for _ in part.token_ids_N]
            positions = np.concatenate([part.positions_N for part in parts]).tolist()
        elements = GPU_PROMPT_BLOCK_ELEMENTS if hidden_NH.is_cuda else PROMPT_BLOCK_ELEMENTS
        size = max(1, elements // self._runner.model_config.get_vocab_size())
        found = []
        for begin in range(0, len(places_N), size):
            block = slice(begin, begin + size)
            places = places_N[block].to(hidden_NH.device)
            logits_NV = self._runner.model.compute_logits(hidden_NH[places])
            logprobs_NV = logits_NV if logits_NV.dtype.itemsize == 4 else logits_NV.float()
            summary = self._rows.summarize(logits_NV, logprobs_NV)
            samples = None
            if self._rows.layout.num_tail_samples:
                samples = self._rows.tail_samples(
                    summary, logprobs_NV, keys[block], positions[block]
                )
            token_ids = token_ids_N[block].to(hidden_NH.device)
            found.append(self._rows.assemble(summary, logprobs_NV, token_ids, samples))
        return tuple(torch.cat(columns) for columns in zip(*found, strict=True))

    def _sampled_places(self, num_rows: int) -> tuple[list[str], list[int]]:
        """Sample key and response position of every sampled row, which are one per request."""
        request_ids = self._runner.input_batch.req_ids[:num_rows]
        assert len(request_ids) == num_rows
        keys, positions = [], []
        for request_id in request_ids:
            request = self._runner.requests[request_id]
            note = request.sampling_params.extra_args[TICKET]
            length = len(request.prompt_token_ids) + len(request.output_token_ids)
            keys.append(note["key"])
            # below zero while the prompt is not through, whose rows vLLM throws away
            positions.append(max(0, length - note["prompt_tokens"]))
        return keys, positions

    def _room_for(self, logits_NV: Any) -> Any:
        """Memory for log-probs of sampled rows, until the next step; on CPU it is used again."""
        import torch

        if logits_NV.is_cuda:
            return torch.empty_like(logits_NV, dtype=torch.float32)
        if self._buffer is None or len(self._buffer) < len(logits_NV):
            self._buffer = torch.empty(logits_NV.shape, dtype=torch.float32)
        return self._buffer[: len(logits_NV)]


@dataclass(frozen=True, slots=True)
class _PromptPart:
    """Labelled prompt rows of one request that one step computed."""

    request_id: str
    tensors: Any
    """vLLM's, with room for all labelled rows of the request."""
    first_row: int
    """Row of ``tensors`` where these begin."""
    places_N: npt.NDArray[np.int64]
    """Of their hidden states in the step."""
    token_ids_N: npt.NDArray[np.int64]
    key: str
    positions_N: npt.NDArray[np.int64]
    """In the response."""
    is_last: bool
    """Whether the prompt is through."""


class _KeptHead:
    """Projects with a weight that was cast once; vLLM on CPU casts it at every step.

    Args:
        processor: vLLM's logits processor, which projects in another dtype than the model's.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._original = processor._apply_head
        self._weights: dict[int, tuple[Any, Any]] = {}

    def __call__(self, lm_head: Any, hidden_NH: Any, embedding_bias: Any) -> Any:
        import torch

        dtype = self._processor.head_dtype
        if embedding_bias is not None or dtype is None or dtype == hidden_NH.dtype:
            return self._original(lm_head, hidden_NH, embedding_bias)
        if id(lm_head) not in self._weights:
            logits_NV = self._original(lm_head, hidden_NH, None)  # refuses quantised weights
            self._weights[id(lm_head)] = (lm_head, lm_head.weight.to(dtype))
            return logits_NV
        _, weight_VH = self._weights[id(lm_head)]
        return torch.nn.functional.linear(hidden_NH.to(dtype), weight_VH)


# -- in the front end ------------------------------------------------------------------------------
class ArrayRows:
    """The rows of one request, as the engine sent them."""

    __slots__ = ("_folded", "_recent", "flat")

    def __init__(self, flat: Any) -> None:
        self._recent: list[tuple[Any, Any, Any]] = []
        self._folded: list[tuple[Any, Any, Any]] = []
        self.flat = flat
        """vLLM's own flat log-probs of the same rows, in the self-test."""

    def append(self, ids_NC: Any, numbers_NC: Any, ranks_N: Any) -> None:
        """Take rows, which are views of those of the whole batch."""
        self._recent.append((ids_NC, numbers_NC, ranks_N))
        if len(self._recent) == MOST_VIEWS:
            self._fold()

    def _fold(self) -> None:
        """Copy the views together, so that the rows of other requests can go."""
        ids, numbers, ranks = zip(*self._recent, strict=True)
        self._folded.append(
            (np.concatenate(ids), np.concatenate(numbers), np.concatenate(ranks, dtype=np.int32))
        )
        self._recent = []

    def arrays(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        """Ids int32[T, C], numbers float32[T, C] and ranks int32[T]; copies, of one row or more."""
        if self._recent:
            self._fold()
        if len(self._folded) > 1:
            ids, numbers, ranks = zip(*self._folded, strict=True)
            self._folded = [(np.concatenate(ids), np.concatenate(numbers), np.concatenate(ranks))]
        if not self._folded:
            return np.empty((0, 0), np.int32), np.empty((0, 0), np.float32), np.empty(0, np.int32)
        return self._folded[0]


def keep_arrays() -> None:
    """Collect the rows of requests with a ticket as :class:`ArrayRows`, in this process."""
    import vllm.v1.engine.output_processor as front_end
    from vllm.v1.engine.logprobs import LogprobsProcessor

    if front_end.LogprobsProcessor is not LogprobsProcessor:
        return  # another backend of this process did it

    class ArrayLogprobsProcessor(LogprobsProcessor):  # type: ignore[misc]  # vLLM is read as Any
        """Keeps what the engine sent."""

        logprobs: Any
        prompt_logprobs: Any

        @classmethod
        def from_new_request(cls, tokenizer: Any, request: Any) -> Any:
            note = (request.sampling_params.extra_args or {}).get(TICKET)
            if note is None:
                return LogprobsProcessor.from_new_request(tokenizer, request)
            processor = super().from_new_request(tokenizer, request)
            for name in ("logprobs", "prompt_logprobs"):
                flat = getattr(processor, name)
                if flat is not None:
                    setattr(processor, name, ArrayRows(flat if note["with_flat"] else None))
            return processor

        def _update_sample_logprobs(self, logprobs_lists: Any) -> None:
            rows = self.logprobs
            rows.append(*logprobs_lists[:3])
            if rows.flat is not None:
                self.logprobs = rows.flat
                super()._update_sample_logprobs(logprobs_lists)
                self.logprobs = rows

        def _update_prompt_logprobs(self, prompt_logprobs_tensors: Any) -> None:
            rows = self.prompt_logprobs
            rows.append(*(tensor.numpy() for tensor in prompt_logprobs_tensors[:3]))
            if rows.flat is not None:
                self.prompt_logprobs = rows.flat
                super()._update_prompt_logprobs(prompt_logprobs_tensors)
                self.prompt_logprobs = rows

    front_end.LogprobsProcessor = ArrayLogprobsProcessor


def forget_arrays() -> None:
    """Undo :func:`keep_arrays`."""
    import vllm.v1.engine.logprobs
    import vllm.v1.engine.output_processor as front_end

    front_end.LogprobsProcessor = vllm.v1.engine.logprobs.LogprobsProcessor
