"""Engines, teachers and requests of the capture benchmark. Not a benchmark by itself."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.keys import (
    GenerationSpec,
    LabelSetSpec,
    SamplingSpec,
    TeacherFingerprint,
    TopKSpec,
    sample_key,
)
from storage.selection import SampleRequest
from storage.store import LabelStore
from teacher_server.backends.vllm_engine import VllmBackend
from teacher_server.config import VllmBackendConfig
from teacher_server.label import label_samples

K = 64
PROMPT_TOKENS = 16
MAX_MODEL_LEN = 256
TINY_VOCAB_SIZE = 4096
COMMIT_SAMPLES = 64
CONFIG = VllmBackendConfig(max_num_seqs=64, kv_cache_gib=2.0)
SCORED_AT_ONCE = 8
"""Samples in one forward pass of transformers; they are equally long, so nothing is padded."""

MOST_SCORED = 32
"""Samples that are scored."""

STOCK_METHODS = ("compute_logprobs", "gather_logprobs")
MEMORY_SAMPLES = 64
RAY_ROWS = (128, 128, 1024)
COMPARED_BLOCKS = 3
"""Parts into which compared steps fall, for the spread of their median."""

"""Rows of jobs through Ray Data: a warm-up, and two whose difference leaves the start of the engine
out."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is generated per round."""

    samples: int
    response_tokens: int
    compared_steps: int
    """Steps in which vLLM's sampler and ours take turns on the same logits."""


SIZES = {
    "tiny": {True: Size(128, 32, 120), False: Size(256, 64, 360)},
    "SmolLM2": {True: Size(64, 16, 24), False: Size(64, 48, 42)},
}
"""By teacher and ``--quick``."""


# -- teachers -------------------------------------------------------------------------------------
def make_tiny_teacher(directory: Path) -> None:
    """Two layers with random weights; a tokenizer of letters and many pairs of characters.

    All ASCII: half of a character would take vLLM's default settings far longer to decode.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = [chr(code) for code in range(33, 127)]
    pairs = [one + other for one in alphabet for other in alphabet]
    tokens = ["<|end|>", *alphabet, *pairs][:TINY_VOCAB_SIZE]
    tokenizer = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(
        directory
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TINY_VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_MODEL_LEN,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def make_spec(vocab_size: int, dtype: str, max_tokens: int) -> LabelSetSpec:
    """The labels of a request that leaves everything at its default."""
    return LabelSetSpec(
        generation=GenerationSpec(
            teacher=TeacherFingerprint(weights="w", config="c"),
            mode="generate",
            compute_dtype=dtype,
            head_dtype="float32",
            sampling=SamplingSpec(
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                min_p=0.0,
                max_tokens=max_tokens,
                stop=(),
                seed=0,
            ),
        ),
        kind=TopKSpec(k=K),
        columns=("entropy",),
        tail="exact",
        vocab_size=vocab_size,
    )


def make_requests(count: int, vocab_size: int) -> list[SampleRequest]:
    """Prompts of random tokens: what they say does not change what a step costs."""
    ids_NP = np.random.default_rng(0).integers(10, vocab_size, size=(count, PROMPT_TOKENS))
    return [
        SampleRequest(sample_key(ids_P, 0), 0, ids_P, None, ()) for ids_P in ids_NP.astype(np.int32)
    ]


# -- contenders -----------------------------------------------------------------------------------
class Meter:
    """Seconds that this thread spends in some methods, while it is on."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    @contextlib.contextmanager
    def on(self, methods: Sequence[tuple[Any, str]]) -> Iterator[None]:
        """Replace the methods (owner and name) by ones that are timed."""
        own = [(owner, name, vars(owner).get(name)) for owner, name in methods]
        for owner, name in methods:
            setattr(owner, name, self._timed(getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, before in own:
                if before is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, before)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.thread_time()
            self._depth += 1
            try:
                return function(*arguments, **options)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.thread_time() - start

        return timed


class _Turns:
    """Runs vLLM's sampler beside ours; what ours says goes on.

    Args:
        sampler: vLLM's, with our hooks in it.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.steps: list[tuple[int, float, float]] = []
        """Rows, seconds of ours and seconds of vLLM's, of every step."""

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Let both work, for every step of the block."""
        hooks = {name: vars(self._sampler).pop(name) for name in STOCK_METHODS}
        stock = {name: getattr(self._sampler, name) for name in STOCK_METHODS}
        spent = [0.0, 0.0]
        kept: list[Any] = []

        def both(name: str, ours: Sequence[Any], theirs: Sequence[Any]) -> list[Any]:
            calls = [(0, hooks[name], ours), (1, stock[name], theirs)]
            found = [None, None]
            for which, function, arguments in calls[:: 1 - 2 * (len(self.steps) % 2)]:
                start = time.thread_time()
                found[which] = function(*arguments)
                spent[which] += time.thread_time() - start
            return found

        def compute_logprobs(logits_NV: Any) -> Any:
            spent[:] = 0.0, 0.0
            kept[:] = both("compute_logprobs", (logits_NV,), (logits_NV,))
            return kept[0]

        def gather_logprobs(logprobs_NV: Any, num_logprobs: int, token_ids: Any) -> Any:
            ours = (logprobs_NV, num_logprobs, token_ids)
            found = both("gather_logprobs", ours, (kept[1], K, token_ids))
            self.steps.append((len(logprobs_NV), spent[0], spent[1]))
            return found[0]

        vars(self._sampler).update(
            compute_logprobs=compute_logprobs, gather_logprobs=gather_logprobs
        )
        try:
            yield
        finally:
            vars(self._sampler).update(hooks)


@dataclass
class Bench:
    """One engine and the requests that all contenders answer."""

    teacher: VllmBackend
    requests: list[SampleRequest]
    folder: Path
    num_tokens: int = 0
    """Response tokens of one round, alike for all."""
    parts: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of what was metered, round by round."""

    @property
    def engine(self) -> Any:
        """The engine."""
        return self.teacher._llm.llm_engine

    @property
    def runner(self) -> Any:
        """The model runner, which lives in this process."""
        return self.engine.model_executor.driver_worker.worker.model_runner

    def count(self, num_tokens: int) -> None:
        """Every contender must generate the same tokens."""
        assert self.num_tokens in (0, num_tokens), f"{num_tokens} tokens, not {self.num_tokens}"
        self.num_tokens = num_tokens

    def drive(self, change: Callable[[Any], None]) -> None:
        """Generate through the engine with changed parameters; the output is dropped."""
        room, waiting, num_tokens = 2 * CONFIG.max_num_seqs, iter(self.requests), 0
        pending = 0
        exhausted = False
        while pending or not exhausted:
            while not exhausted and pending < room:
                request = next(waiting, None)
                if request is None:
                    exhausted = True
                else:
                    key, prompt, params = self.teacher._engine_request(request)
                    params.extra_args = None
                    change(params)
                    self.engine.add_request(key, prompt, params)
                    pending += 1
            for output in self.engine.step():
                if output.finished:
                    pending -= 1
                    num_tokens += len(output.outputs[0].token_ids)
        self.count(num_tokens)

    def plain(self) -> None:
        """Generation without labels."""

        def change(params: Any) -> None:
            params.logprobs = None

        meter = Meter()
        with meter.on(self._plumbing()):
            self.drive(change)
        self.parts.setdefault("plain plumbing", []).append(meter.seconds)

    def defaults(self) -> None:
        """Generation with vLLM's own top-k and default settings."""

        def change(params: Any) -> None:
            params.logprobs = K
            params.flat_logprobs, params.detokenize = False, True

        with self._stock_sampler():
            self.drive(change)

    def job(self) -> None:
        """The whole job: from prompts to committed shards."""
        plumbing = Meter()
        with (
            tempfile.TemporaryDirectory(dir=self.folder) as folder,
            plumbing.on([*self._plumbing(), (self.teacher, "_sample")]),
        ):
            self.count(self.label_into(folder, self.requests))
        self.parts.setdefault("plumbing", []).append(plumbing.seconds)

    def samplers(self, num_steps: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Our sampler and vLLM's on the same logits, in turns within every step.

        Log-probs and their gathering; sums over different rounds would drown the difference.

        Returns:
            Microseconds per row of ours and of vLLM's, float64[num_steps] each.
        """
        turns = _Turns(self.runner.sampler)
        steps: list[tuple[int, float, float]] = []
        while len(steps) < num_steps:
            with turns.taken():
                list(self.teacher.label(self.requests[: CONFIG.max_num_seqs]))
            # the first steps fill caches; some responses end early, and leave fewer rows
            steps = [step for step in turns.steps if step[0] > CONFIG.max_num_seqs // 2][2:]
        rows, ours, stock = np.array(steps[:num_steps]).T
        return 1e6 * ours / rows, 1e6 * stock / rows

    def label_into(
        self,
        folder: str,
        requests: Sequence[SampleRequest],
        watch: Callable[[int], None] = lambda finished: None,
    ) -> int:
        """Label requests into a new store; returns the response tokens."""
        label_set = LabelStore(folder, create=True).create(self.teacher._job.spec, {})
        for progress in label_samples(
            self.teacher, requests, label_set, commit_samples=COMMIT_SAMPLES, provenance={}
        ):
            watch(progress.finished_samples)
        return progress.response_tokens

    def _plumbing(self) -> list[tuple[Any, str]]:
        """Where log-probs pass on their way out of the engine."""
        scheduler = self.engine.engine_core.engine_core.scheduler
        return [
            (self.engine.output_processor, "process_outputs"),
            (scheduler, "update_from_output"),
        ]

    @contextlib.contextmanager
    def _stock_sampler(self) -> Iterator[None]:
        """Without the worker hook."""
        sampler = self.runner.sampler
        hooks = {name: vars(sampler).pop(name) for name in STOCK_METHODS}
        try:
            yield
        finally:
            vars(sampler).update(hooks)

    def part(self, name: str) -> npt.NDArray[np.float64]:
        """Microseconds per token of what was metered, without the warm-up round."""
        return 1e6 * np.array(self.parts[name][1:]) / self.num_tokens


# -- scoring --------------------------------------------------------------------------------------
class Transformers:
    """A forward pass with the same precision, and the same numbers per token but the entropy."""

    def __init__(self, directory: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype)
        ).eval()
        self._head_VH = self._model.get_output_embeddings().weight.float()

    def score(self, requests: Sequence[SampleRequest]) -> list[Any]:
        """Top-k, token log-prob and rank of all response tokens."""
        import torch

        found = []
        with torch.inference_mode():
            for begin in range(0, len(requests), SCORED_AT_ONCE):
                found.append(self._score_together(requests[begin : begin + SCORED_AT_ONCE]))
        return found

    def _score_together(self, requests: Sequence[SampleRequest]) -> Any:
        import torch

        tokens = [np.concatenate([r.prompt_ids_P, _response(r)]) for r in requests]
        ids_BT = torch.from_numpy(np.stack(tokens)).long()
        hidden_BTH = self._model.base_model(input_ids=ids_BT[:, :-1]).last_hidden_state
        logits_BRV = hidden_BTH[:, PROMPT_TOKENS - 1 :].float() @ self._head_VH.T
        logprobs_BRV = logits_BRV.log_softmax(dim=-1)
        token_BR1 = logprobs_BRV.gather(2, ids_BT[:, PROMPT_TOKENS:, None])
        ranks = 1 + (logprobs_BRV > token_BR1).sum(dim=-1)
        return logprobs_BRV.topk(K, dim=-1), token_BR1.numpy(), ranks.numpy()


def _response(request: SampleRequest) -> npt.NDArray[np.int32]:
    assert request.response_ids_R is not None
    return request.response_ids_R
