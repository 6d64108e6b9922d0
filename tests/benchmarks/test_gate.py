"""What is wrong gets no figure: epochs, steps, ops and products whose numbers aren't torch's."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from benchmarks import gate, internals, peak
from benchmarks.device import BFLOAT16, FLOAT32, TF32, Cpu, torch_threads
from benchmarks.gate import Gate
from benchmarks.peers.epochs import EagerTrainer, GraphTrainer
from benchmarks.peers.problem import dense_problem, textbook_problem
from benchmarks.test_ops import NAMES, check, op
from fastdl import data
from fastdl.reproduce import image_examples


@pytest.fixture(autouse=True)
def one_thread():
    """Compute on one thread: on a busy machine those that wait for a core take most of the time."""
    with torch_threads(1):
        yield


garments = cache(data.garments)


def problem_of(model, seed):
    return textbook_problem(model, image_examples(garments(), 600), num_epochs=2, seed=seed)


class Wrong(EagerTrainer):
    """Changes one parameter by a little after its first epoch."""

    def train(self, num_epochs):
        losses = super().train(num_epochs)
        # more than an activation that rounds across 0 makes of it
        self.state["1.weight"][0, 0] += 1e-2
        return losses


class Nan(EagerTrainer):
    """Says that its loss is NaN."""

    def epoch(self, order):
        return super().epoch(order) * float("nan")


@pytest.mark.slow
@pytest.mark.parametrize("make", [Wrong, Nan])
def test_the_gate_stops_a_program_whose_numbers_differ(make, seed):
    checks = Gate(problem_of("mlp", seed)).checks(make)
    assert {check.name.partition(",")[0] for check in checks if not check.passes} == {"float64", "float32"}
    with pytest.raises(AssertionError, match="no parity"):
        gate.passed(checks)


def test_an_epochs_loss_and_a_steps_loss_must_be_torchs():
    assert gate.same_loss(2.0009, 2.0) == "9e-04"
    for loss in (2.0011, float("nan")):
        with pytest.raises(AssertionError, match="no parity"):
            gate.same_loss(loss, 2.0)
        with pytest.raises(AssertionError, match="step 1"):
            gate.same_steps(lambda loss=loss: torch.tensor(loss), lambda: torch.tensor(2.0))


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_is_a_tenth_wrong_is_noticed_for_every_seed(name, seed):
    def wrong(first, *rest):
        # the same number, and 1.1 times its gradient
        return found.torchs(first + 0.1 * (first - first.detach()), *rest)

    for offset in range(5):
        found = op(name, seed=seed + offset)
        check(found, FLOAT32)
        with pytest.raises(AssertionError, match="gradient 1"):
            check(found._replace(ours=wrong), FLOAT32)


def test_a_rounding_of_the_precision_passes_and_more_does_not():
    truth = torch.randn(64, 64, dtype=torch.float64)
    exact, rounded = truth.float(), (truth * (1 + 2e-3)).float()
    gate.same_results([rounded], [exact], [truth], TF32)
    with pytest.raises(AssertionError):
        gate.same_results([rounded], [exact], [truth], FLOAT32)
    with pytest.raises(AssertionError, match="differs from torch's"):
        gate.same_norm(1.1 * exact, exact, BFLOAT16)


@pytest.mark.parametrize("name", internals.PRODUCTS)
def test_an_inaccurate_product_is_noticed(name):
    product = internals.product(256, 64, 64, name)
    product.ours(1), product.torchs()
    (ours, torchs), truth = product.results(), product.truth()
    gate.same_results([ours], [torchs], [truth])
    with pytest.raises(AssertionError):
        gate.same_results([ours * 1.0001], [torchs], [truth])


def test_one_partial_fit_an_epoch_is_one_for_each_batch_bit_for_bit(seed):
    pytest.importorskip("sklearn")
    from benchmarks.peers.sklearn_epochs import MLPTrainer

    problem = problem_of("mlp", seed)
    whole, by_batch = (MLPTrainer(problem, torch.float32) for _ in range(2))
    whole.train(1)
    for index in data.order(len(by_batch.X), by_batch.order).split(problem.batch_size):
        by_batch.estimator.partial_fit(by_batch.X[index.numpy()], by_batch.y[index.numpy()])
    assert torch.equal(whole.parameters(), by_batch.parameters())


def test_a_captured_loop_trains_as_the_eager_one(seed):
    arguments = problem_of("softmax", seed), torch.float64
    assert GraphTrainer(*arguments, device=Cpu()).train(2) == EagerTrainer(*arguments).train(2)


@pytest.mark.parametrize("num_hiddens", [1, 2, 4])
def test_nets_of_other_sizes_have_torchs_start_and_leave_the_generator_alone(num_hiddens, seed):
    X, y, before = torch.randn(40, 12), torch.randint(10, (40,)), torch.get_rng_state()
    problem = dense_problem(16, 8, num_hiddens, X, y)
    assert torch.equal(torch.get_rng_state(), before)
    assert problem.widths == (12, *[16] * num_hiddens, 10)
    # forward and grad_weight of the first layer, grad_input too of the others
    assert problem.multiply_adds == 40 * (2 * 12 * 16 + 3 * 16 * (16 * (num_hiddens - 1) + 10))
    # random labels: the loss of guessing, about
    assert EagerTrainer(problem, torch.float64).train(1)[0] == pytest.approx(2.3, abs=0.2)


@pytest.mark.parametrize("scales_the_sum", [True, False])
def test_the_peaks_loop_does_the_multiply_adds_that_it_counts(scales_the_sum):
    num_sums, count, factor, small = 8, 3, 0.5, 0.25
    sums = np.arange(num_sums, dtype=np.float64)
    for _ in range(count * peak._UNROLLED):
        sums = sums * factor + factor if scales_the_sum else factor * small + sums
    # all of these numbers are exact, or within a rounding of float32
    assert peak._loop(num_sums, scales_the_sum)(count, factor, small) == pytest.approx(sums.sum(), rel=1e-6)
    (_, one), (_, two) = (peak.peak_program(threads, seconds=1e-4) for threads in (1, 2))
    assert two == 2 * one > 0
