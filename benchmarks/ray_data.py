"""Generation with log-probs through Ray Data LLM, for comparison. Not a benchmark by itself."""

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Generated:
    """One job."""

    seconds: float
    """CPU seconds of all processes, the start of the engine included."""
    tokens: int


class ProcessTree:
    """CPU seconds of this process and its descendants, also of those that have ended."""

    def __init__(self) -> None:
        self._seen: dict[int, float] = {}
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            for process, seconds in _family_seconds().items():
                self._seen[process] = max(self._seen.get(process, 0.0), seconds)
            time.sleep(POLL_SECONDS)

    def seconds(self) -> float:
        """Until now."""
        time.sleep(5 * POLL_SECONDS)
        return sum(list(self._seen.values()))


def _family_seconds() -> dict[int, float]:
    """CPU seconds of this process and its descendants that live."""
    parents, seconds = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                text = (folder / "stat").read_text()
            except OSError:  # it has just ended
                continue
            fields = text.rpartition(")")[2].split()
            parents[int(folder.name)] = int(fields[1])
            ticks = int(fields[11]) + int(fields[12])
            seconds[int(folder.name)] = ticks / os.sysconf("SC_CLK_TCK")
    family, size = {os.getpid()}, 0
    while len(family) > size:
        size = len(family)
        family |= {process for process, parent in parents.items() if parent in family}
    return {process: seconds[process] for process in family if process in seconds}


def generated_through_ray_data(
    model: str,
    jobs: Sequence[Sequence[Sequence[int]]],
    *,
    engine: dict[str, Any],
    sampling: dict[str, Any],
) -> list[Generated]:
    """Run jobs one after another; results are materialised, not written.

    Args:
        model: Directory of the model.
        jobs: Prompts of every job, as token ids.
        engine: Engine arguments of vLLM.
        sampling: Sampling parameters of vLLM.
    """
    import ray
    import ray.data
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    tree = ProcessTree()
    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs=engine,
        batch_size=engine["max_num_seqs"],
        # prompts are token ids already
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        prepare_multimodal_stage=False,
        log_engine_metrics=False,
        # without a placement of its own it waits for a GPU
        accelerator_type=None,
        placement_group_config={"bundles": [{"CPU": 1}]},
    )
    processor = build_processor(
        config,
        preprocess=lambda row: {
            "tokenized_prompt": row["ids"],
            "prompt": "",
            "sampling_params": sampling,
        },
        postprocess=lambda row: {
            "tokens": row["num_generated_tokens"],
            "ids": row["generated_tokens"],
            "logprobs": row["logprobs"],
        },
    )
    found = []
    for prompts in jobs:
        before = tree.seconds()
        rows = ray.data.from_items([{"ids": list(prompt)} for prompt in prompts])
        tokens = processor(rows).materialize().sum("tokens")
        found.append(Generated(tree.seconds() - before, tokens))
    ray.shutdown()
    return found
