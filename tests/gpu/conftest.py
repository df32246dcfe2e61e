"""What needs a GPU: skipped, with the reason, where torch sees none. ``MOETRAIN_GPU_TESTS=cpu`` runs it on the CPU, to
prove the tests themselves. The folder runs last: once this process has started CUDA, forked ranks could not use it."""

import os
from pathlib import Path

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looking for a GPU does not start CUDA in this process
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matmul, which may come before a Trainer

import pytest
import torch

DEVICE = os.environ.get("MOETRAIN_GPU_TESTS", "cuda")
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    items[:] = [item for item in items if HERE not in item.path.parents] + mine
    if DEVICE == "cuda" and not torch.cuda.is_available():
        for item in mine:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: torch sees none here"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    if DEVICE == "cuda":
        torch.cuda.set_device(0)
        return torch.device("cuda", 0)
    return torch.device("cpu")
