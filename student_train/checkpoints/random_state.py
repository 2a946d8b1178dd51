"""The random numbers of a process, as plain values that no loader has to unpickle."""

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """State of the generators of torch (CPU and GPU), numpy and Python, for JSON."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return {
        "torch": _hex(torch.get_rng_state()),
        "torch_gpu": [_hex(state) for state in gpu],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss_next],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Continue the sequences that :func:`random_state` saw."""
    torch.set_rng_state(_tensor(state["torch"]))
    for gpu_state in state["torch_gpu"]:
        torch.cuda.set_rng_state(_tensor(gpu_state))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), position, has_gauss, cached))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def seed_random_state(seed: int, *, rank: int, step: int) -> None:
    """Start sequences of their own for a rank that has none to continue."""
    entropy = np.random.SeedSequence([seed, rank, step]).generate_state(3, np.uint32)
    torch.manual_seed(int(entropy[0]))
    np.random.seed(int(entropy[1]))
    random.seed(int(entropy[2]))


def _hex(state: torch.Tensor) -> str:
    return bytes(state.cpu().numpy()).hex()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
