"""What holds for every test: the folder is its tier, and nothing leaves the machine."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Set at import, before any test module imports a library that reads them.
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "AWS_EC2_METADATA_DISABLED": "true",
}.items():
    os.environ.setdefault(name, value)

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("ci")

TIMEOUT_S = {"unit": 60, "integration": 600, "e2e": 900, "soak": 3600}
"""Tier, which is a folder and a marker, and how long one of its tests may take by default."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    has_gpu = Path("/dev/nvidiactl").exists()
    for item in items:
        tier = item.path.relative_to(root).parts[0]
        if tier not in TIMEOUT_S:
            raise pytest.UsageError(
                f"{item.nodeid}: tests live in tests/{{{','.join(TIMEOUT_S)}}}/"
            )
        item.add_marker(tier)
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S[tier]))
        if item.get_closest_marker("gpu") is not None and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
