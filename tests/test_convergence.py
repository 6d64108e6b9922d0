"""Whole training runs of the three models, held to torch's by the rule of fastdl.reference.parity."""

from __future__ import annotations

import pytest
import torch

from fastdl import data
from fastdl.programs import RECIPES, build, parity_run, run
from fastdl.reference import parity
from fastdl.reference.parity import Run
from fastdl.reproduce import LARGEST_LOSS, SMALLEST_ACCURACY

pytestmark = pytest.mark.slow

# a whole run in float64, three times over, has to fit into a test: a twentieth of the images, all ten epochs,
# and a last batch that is smaller than the others
NUM_IMAGES = 3000
LINEAR_SCRATCH_FACTOR = 2.0


@pytest.fixture(scope="module")
def garments():
    return data.garments()


class Case:
    """One model's programs on the same data, from the same start, in the same order."""

    def __init__(self, model, X, y, seed):
        self.model, self.X, self.y, self.seed = model, X, y, seed
        self.recipe = RECIPES[model]
        start = build(model, "concise", lr=0.0, generator=self.order()).state
        self.start = {name: tensor.clone() for name, tensor in start.items()}

    def order(self):
        return torch.Generator().manual_seed(self.seed)

    def factor(self, impl):
        return LINEAR_SCRATCH_FACTOR if (self.model, impl) == ("linear", "scratch") else 1.0

    def build(self, impl, dtype):
        return build(self.model, impl, lr=self.recipe.lr * self.factor(impl), start=self.start, dtype=dtype)

    def make_runs(self, dtype):
        impls = ("concise", "scratch", "fused", "compiled")
        return {impl: parity_run(self.build(impl, dtype), impl, self.factor(impl)) for impl in impls}

    def batches(self, num_epochs):
        order = self.order()
        for _ in range(num_epochs):
            yield from data.batches(self.X, self.y, self.recipe.batch_size, order)

    def history(self, impl, dtype, test=None):
        return self.train(self.build(impl, dtype), impl, test)

    def train(self, program, impl, test=None):
        X, y = (
            tensor.to(program.dtype) if tensor.is_floating_point() else tensor for tensor in (self.X, self.y)
        )
        return run(
            program,
            impl,
            X,
            y,
            num_epochs=self.recipe.num_epochs,
            batch_size=self.recipe.batch_size,
            generator=self.order(),
            test=test or (X, y),
        ).scaled(self.factor(impl))


def assert_passes(checks):
    failures = {name: [str(check) for check in found if not check.passes] for name, found in checks.items()}
    assert not any(failures.values()), failures


def assert_converges_as_torch_does(case, test=None):
    checks = parity.compare(case.make_runs, case.batches, case.recipe.num_epochs)
    truth = case.history("concise", torch.float64, test)
    for impl, found in checks.items():
        found += parity.check_epochs(case.history(impl, torch.float32, test), truth)
    programs = {impl: case.build(impl, torch.float64) for impl in ("concise", "compiled")}
    histories = {impl: case.train(program, impl, test) for impl, program in programs.items()}
    checks["compiled"] += parity.check_whole_run(
        histories["compiled"], Run(programs["compiled"]), histories["concise"], Run(programs["concise"])
    )
    assert_passes(checks)


def images_case(model, images, seed):
    return Case(model, images.X_train[:NUM_IMAGES], images.y_train[:NUM_IMAGES], seed)


def test_linear_regression_converges_as_torchs_does(seed):
    points = data.regression(1003, generator=torch.Generator().manual_seed(seed))
    assert_converges_as_torch_does(Case("linear", points.X, points.y, seed))


@pytest.mark.parametrize("model", ["softmax", "mlp"])
def test_image_classifiers_converge_as_torchs_do_on_garments(model, garments, seed):
    case = images_case(model, garments, seed)
    assert_converges_as_torch_does(case, (garments.X_test, garments.y_test))


@pytest.mark.real_data
@pytest.mark.parametrize("model", ["softmax", "mlp"])
def test_image_classifiers_converge_as_torchs_do_on_fashion_mnist(model, fashion_mnist_data, seed):
    case = images_case(model, fashion_mnist_data, seed)
    assert_converges_as_torch_does(case, (fashion_mnist_data.X_test, fashion_mnist_data.y_test))


@pytest.mark.parametrize("model", ["softmax", "mlp"])
def test_torch_passes_the_rule_against_itself(model, garments, seed):
    """Judge torch with one thread by the rule whose truth and yardstick are torch with all threads."""

    case = images_case(model, garments, seed)
    threads = torch.get_num_threads()

    class OneThreadRun(Run):
        def step(self, X, y):
            torch.set_num_threads(1)
            try:
                return super().step(X, y)
            finally:
                torch.set_num_threads(threads)

    def make_runs(dtype):
        return {
            "concise": Run(case.build("concise", dtype)),
            "one thread": OneThreadRun(case.build("concise", dtype)),
            "other rows": Run(
                case.build("concise", dtype), row_order=torch.Generator().manual_seed(seed + 1)
            ),
        }

    assert_passes(parity.compare(make_runs, case.batches, 3))


def assert_learns(model, images):
    case = Case(model, images.X_train, images.y_train, 0)
    history = case.history("compiled", torch.float32, (images.X_test, images.y_test))
    assert history.train_loss[-1] < LARGEST_LOSS
    assert SMALLEST_ACCURACY < history.train_accuracy[-1] <= 1
    assert SMALLEST_ACCURACY < history.test_accuracy[-1] <= 1
    return history


def test_both_classifiers_learn_garments_and_the_mlp_learns_more(garments):
    softmax, mlp = assert_learns("softmax", garments), assert_learns("mlp", garments)
    assert mlp.test_accuracy[-1] > softmax.test_accuracy[-1]


@pytest.mark.real_data
def test_figures_on_fashion_mnist_are_those_of_torch(fashion_mnist_data):
    """Hold the last epoch to what torch reaches over three seeds, a little widened for another seed."""
    softmax = assert_learns("softmax", fashion_mnist_data)
    assert softmax.train_loss[-1] == pytest.approx(0.4465, abs=0.002)
    assert softmax.train_accuracy[-1] == pytest.approx(0.8485, abs=0.002)
    mlp = assert_learns("mlp", fashion_mnist_data)
    assert mlp.train_loss[-1] == pytest.approx(0.3825, abs=0.005)
    assert mlp.train_accuracy[-1] == pytest.approx(0.865, abs=0.003)
