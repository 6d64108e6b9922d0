"""Pins and records the threads, and puts the machine into the saved results."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch

from benchmarks.measuring import pin_threads


@pytest.fixture(autouse=True, scope="session")
def threads() -> int:
    """Start Numba's threads before anything is timed, then pin torch's count."""
    num_threads = torch.get_num_threads()
    pin_threads(num_threads)
    return num_threads


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add what the figures depend on."""
    import numba

    machine_info["torch"] = torch.__version__
    machine_info["numba"] = numba.__version__
    machine_info["torch_threads"] = torch.get_num_threads()
    machine_info["platform"] = platform.platform()
