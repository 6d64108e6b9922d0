"""The peers train the same problem to the same numbers, and the gate notices one that doesn't."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.gate import Gate, same_epoch_loss
from benchmarks.peers import roster
from benchmarks.peers.fastdl_epochs import compiled_epoch_alone
from benchmarks.peers.problem import Problem, dense_problem, textbook_problem
from benchmarks.peers.torch_epochs import EagerTrainer
from fastdl import data
from fastdl.reproduce import image_examples, linear_examples

# a last batch that is smaller than the others
NUM_EXAMPLES = {"linear": 203, "softmax": 600, "mlp": 600}


@pytest.fixture(scope="module")
def images():
    return data.garments()


def problem_of(model, images, seed, num_epochs=2):
    if model == "linear":
        points = data.regression(NUM_EXAMPLES[model], generator=torch.Generator().manual_seed(seed))
        examples = linear_examples(points)
    else:
        examples = image_examples(images, NUM_EXAMPLES[model])
    return textbook_problem(model, examples, num_epochs=num_epochs, seed=seed)


@pytest.mark.parametrize("model", ["linear", "softmax", "mlp"])
def test_every_program_passes_the_gate(model, images, seed):
    problem = problem_of(model, images, seed)
    gate = Gate(problem)
    # compiled steps are in the report's own quick run
    programs = [
        program for program in roster.roster(problem, quick=True).programs if program.name != roster.COMPILE
    ]
    assert roster.FIT in [program.name for program in programs]
    for program in programs:
        if not program.has_parity:
            continue
        for variant, make in program.variants.items():
            checks = gate.checks(make, has_float64=program.has_float64)
            failures = [str(check) for check in checks if not check.passes]
            assert not failures, (program.name, variant, failures)
            assert len(checks) == (5 if program.has_float64 else 3)


class Wrong(EagerTrainer):
    """Changes one parameter by a little after its first epoch."""

    def train(self, num_epochs):
        losses = super().train(num_epochs)
        with torch.no_grad():
            # more than an activation that rounds across 0 makes of it
            self.net[1].weight[0, 0] += 1e-2
        return losses


class Nan(EagerTrainer):
    """Says that its loss is NaN."""

    def train(self, num_epochs):
        return [float("nan") for _ in super().train(num_epochs)]


@pytest.mark.parametrize("make", [Wrong, Nan])
def test_the_gate_stops_a_program_whose_numbers_differ(make, images, seed):
    checks = Gate(problem_of("mlp", images, seed)).checks(make)
    failed = {check.name.partition(",")[0] for check in checks if not check.passes}
    assert failed == {"float64", "float32"}


def test_a_cells_gate_wants_torchs_loss():
    losses = {"torch": 2.0, "near": 2.0009, "far": 2.0011, "lost": float("nan")}
    assert same_epoch_loss(losses, "torch") == {"torch": True, "near": True, "far": False, "lost": False}


@pytest.mark.parametrize("num_hiddens", [1, 2, 4])
def test_nets_of_other_sizes_have_torchs_start_and_leave_the_generator_alone(num_hiddens, seed):
    X, y = torch.randn(40, 12), torch.randint(10, (40,))
    before = torch.get_rng_state()
    problem = dense_problem(16, 8, num_hiddens, X, y)
    assert torch.equal(torch.get_rng_state(), before)
    assert [layer.out_features for layer in problem.net(torch.float32) if isinstance(layer, nn.Linear)] == [
        *[16] * num_hiddens,
        10,
    ]
    first, again = (EagerTrainer(problem, torch.float64).train(2) for _ in range(2))
    assert first == again
    # random labels: the loss of guessing, about
    assert first[0] == pytest.approx(2.3, abs=0.2)


def test_an_epochs_arithmetic_is_counted_without_the_examples_gradient():
    problem = Problem("", "", (784, 256, 10), torch.empty(5, 784), torch.zeros(5), 1, 1, 0.1, 0, {})
    hidden, last = 784 * 256, 256 * 10
    # forward and grad_weight of both layers, grad_input of the last one
    assert problem.multiply_adds == 5 * (2 * hidden + 3 * last)


def test_the_epoch_alone_trains(images, seed):
    problem = problem_of("linear", images, seed)
    # it hands nothing back, and so must not fail
    compiled_epoch_alone(problem)(3)


def test_what_is_not_installed_is_missing_with_its_reason(images, seed, monkeypatch):
    monkeypatch.setattr(roster, "find_spec", lambda name: None)
    monkeypatch.setattr(roster.shutil, "which", lambda name: None)
    found = roster.roster(problem_of("softmax", images, seed))
    assert set(found.missing) == {roster.COMPILE, roster.JAX, "scikit-learn"}
    assert "pip install -e '.[bench]'" in found.missing[roster.JAX]
    names = [program.name for program in found.programs]
    assert roster.EAGER in names
    assert roster.JAX not in names


def test_scans_variants_train_alike(images, seed):
    pytest.importorskip("jax")
    problem = problem_of("softmax", images, seed, num_epochs=1)
    gate = Gate(problem)
    variants = roster.jax_program(problem).variants
    assert len(variants) == 8
    for name, make in variants.items():
        failures = [str(check) for check in gate.checks(make) if not check.passes]
        assert not failures, (name, failures)


def test_loader_processes_give_the_batches_of_the_loop_itself(images, seed):
    problem = problem_of("softmax", images, seed, num_epochs=1)
    make = partial(roster.TextbookTrainer, num_workers=2)
    assert make(problem, torch.float32).train(2) == pytest.approx(
        roster.TextbookTrainer(problem, torch.float32).train(2), rel=1e-6
    )
