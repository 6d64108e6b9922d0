"""A whole training step of each model, in a Python loop, beside torch eager and torch.compile."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.peers.steps import Model, all_models, steps

MODELS = all_models()


@pytest.mark.parametrize("peer", ["torch_eager", "torch_eager_fused_sgd", "torch_compile", "fastdl"])
@pytest.mark.parametrize("model", MODELS, ids=[model.name for model in MODELS])
def test_step(benchmark: BenchmarkFixture, model: Model, peer: str) -> None:
    """Time one training step, once its first losses are torch's."""
    by_peer = steps(model)
    for _ in range(5):
        assert by_peer["fastdl"]().item() == pytest.approx(by_peer["torch_eager"]().item(), rel=1e-4)
    benchmark.group = model.name
    step = by_peer[peer]
    for _ in range(3):
        step()
    benchmark(step)
