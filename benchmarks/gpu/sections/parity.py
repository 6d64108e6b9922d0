"""Every op beside torch, against float64, in each precision: what has no parity gets no time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import precision
from benchmarks.gpu.precision import Precision
from benchmarks.gpu.settings import Settings, attempt, key
from benchmarks.results import Section, Table
from fastdl import functional, optim
from fastdl.reference.parity import TIMES_TORCH, Check

LINEAR, RELU, CROSS_ENTROPY, MSE_LOSS, SGD = "linear", "relu", "cross_entropy", "mse_loss", "sgd"
_NUM_STEPS = 3

Results = Sequence[Tensor]
# makes a tensor of a shape, normally distributed
Normal = Callable[..., Tensor]


@dataclass(frozen=True)
class _Sizes:
    """Layers by (rows, inputs, outputs), logits by (rows, classes), and vectors."""

    layers: tuple[tuple[int, int, int], ...]
    logits: tuple[tuple[int, int], ...]
    vectors: tuple[int, ...]


# the models' own, ragged ones, and a product that is torch's
_SIZES = _Sizes(
    layers=((10, 2, 1), (256, 784, 10), (256, 784, 256), (1000, 17, 130), (2048, 512, 1024)),
    logits=((256, 10), (1000, 130), (300, 5000)),
    vectors=(10, 1001, 1_000_000),
)
# a millionth is below what float16 can tell apart
_SIZES_OF_FLOAT16 = replace(_SIZES, vectors=(10, 1001))
_QUICK = _Sizes(layers=((10, 2, 1), (33, 65, 31)), logits=((33, 10),), vectors=(1001,))


@dataclass(frozen=True)
class _Case:
    """One op on one set of inputs, by fastdl and by torch: results to compare, one by one."""

    op: str
    size: str
    names: tuple[str, ...]
    ours: Callable[[Sequence[Tensor]], Results]
    torchs: Callable[[Sequence[Tensor]], Results]
    inputs: tuple[Tensor, ...]


def measure(settings: Settings) -> Section:
    """Compare every op in every precision."""
    section = Section(
        "Parity of the ops",
        "norm(result - truth) / norm(truth) of outputs and gradients, the truth in float64 from the same "
        "inputs. Allowed are the precision's own bound and 4 times torch's error, of which the lower counts; "
        "torch's may be 0 by luck, so that a rounding is added to it.",
    )
    green: list[str] = []
    rows: list[list[str]] = []
    failed: list[str] = []
    for block in precision.ALL:
        with block.active():
            for op in (LINEAR, RELU, CROSS_ENTROPY, MSE_LOSS, SGD):
                worst, torchs, own_failed = _compare(op, block, settings)
                failed += own_failed
                if not own_failed:
                    green.append(key(op, block))
                verdict = "FAIL" if own_failed else "pass"
                rows.append([block.name, op, f"{worst:.1e}", f"{torchs:.1e}", f"{block.error:.0e}", verdict])
        section.figures |= {"green": green, "failed": failed}
        section.failures = failed
        section.tables = [Table("", ["precision", "op", "worst error", "torch's worst", "at most", ""], rows)]
        settings.save(section)
    return section


def _compare(op: str, block: Precision, settings: Settings) -> tuple[float, float, list[str]]:
    """Return the worst error of an op, torch's worst, and a line for each result that is off."""
    worst, torchs_worst = 0.0, 0.0
    failed: list[str] = []
    with attempt(failed, f"{block.name}, {op}"):
        for case in _cases(op, block, settings):
            truths = case.torchs([_double(tensor) for tensor in case.inputs])
            results = zip(case.names, case.ours(case.inputs), case.torchs(case.inputs), truths, strict=True)
            for name, actual, expected, truth in results:
                error, torchs = (relative_error(result, truth) for result in (actual, expected))
                check = Check(f"{block.name}, {op} {case.size}, {name}", error, allowed(torchs, block))
                if not check.passes:
                    failed.append(str(check))
                # max() of Python would pass a NaN over
                worst = error if math.isnan(error) or error > worst else worst
                torchs_worst = max(torchs_worst, torchs)
    return worst, torchs_worst, failed


def allowed(torchs_error: float, block: Precision) -> float:
    """Return how large an error may be."""
    if block is precision.TF32:
        # fastdl may compute such a product in float32, or torch may
        return block.error
    return min(block.error, TIMES_TORCH * torchs_error + torch.finfo(block.dtype).eps)


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Return norm(result - truth) / norm(truth), in float64."""
    norm = float(truth.double().norm())
    error = float((result.double() - truth.double()).norm())
    return error / norm if norm else error


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _cases(op: str, block: Precision, settings: Settings) -> Iterator[_Case]:
    make = {
        LINEAR: _linear,
        RELU: _relu,
        CROSS_ENTROPY: _cross_entropy,
        MSE_LOSS: _mse_loss,
        SGD: _sgd,
    }[op]
    generator = torch.Generator(settings.device.name).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=settings.device.name).to(block.dtype)

    sizes = _QUICK if settings.quick else _SIZES_OF_FLOAT16 if block is precision.FLOAT16 else _SIZES
    return make(normal, sizes)


def _linear(normal: Normal, sizes: _Sizes) -> Iterator[_Case]:
    for n, k, m in sizes.layers:
        yield _differentiated(
            LINEAR,
            f"{n} x {k} x {m}",
            ("output", "grad_input", "grad_weight", "grad_bias"),
            functional.linear_relu,
            lambda *layer: F.relu(F.linear(*layer)),
            (normal(n, k), normal(m, k), normal(m)),
            normal(n, m),
        )


def _relu(normal: Normal, sizes: _Sizes) -> Iterator[_Case]:
    for size in sizes.vectors:
        names, upstream = ("output", "grad_input"), normal(size)
        yield _differentiated(RELU, f"{size}", names, functional.relu, F.relu, (normal(size),), upstream)


def _cross_entropy(normal: Normal, sizes: _Sizes) -> Iterator[_Case]:
    for n, c in sizes.logits:
        weight = normal(c).abs()
        target = torch.arange(n, device=weight.device) * 7 % c
        target[::5] = -100

        def loss(
            function: Callable[..., Tensor], logits: Tensor, target: Tensor = target, weight: Tensor = weight
        ) -> Tensor:
            return function(logits, target, weight.to(logits.dtype), label_smoothing=0.1)

        functions = partial(loss, functional.cross_entropy), partial(loss, F.cross_entropy)
        names = ("loss", "grad_logits")
        yield _differentiated(
            CROSS_ENTROPY, f"{n} x {c}", names, *functions, (normal(n, c),), weight.new_ones(())
        )


def _mse_loss(normal: Normal, sizes: _Sizes) -> Iterator[_Case]:
    for size in sizes.vectors:
        names, inputs = ("loss", "grad_input", "grad_target"), (normal(size), normal(size))
        functions = functional.mse_loss, F.mse_loss
        yield _differentiated(MSE_LOSS, f"{size}", names, *functions, inputs, inputs[0].new_ones(()))


def _sgd(normal: Normal, sizes: _Sizes) -> Iterator[_Case]:
    for size in sizes.vectors:
        # the parameter, and the gradient of each step
        inputs = tuple(normal(size) for _ in range(1 + _NUM_STEPS))
        yield _Case(SGD, f"{size}", ("parameter",), _updated(optim.SGD), _updated(torch.optim.SGD), inputs)


def _differentiated(
    op: str,
    size: str,
    names: tuple[str, ...],
    ours: Callable[..., Tensor],
    torchs: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    upstream: Tensor,
) -> _Case:
    def results(function: Callable[..., Tensor]) -> Callable[[Sequence[Tensor]], Results]:
        def call(inputs: Sequence[Tensor]) -> Results:
            leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
            output = function(*leaves)
            return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]

        return call

    return _Case(op, size, names, results(ours), results(torchs), inputs)


def _updated(optimizer: Callable[..., torch.optim.Optimizer]) -> Callable[[Sequence[Tensor]], Results]:
    def call(inputs: Sequence[Tensor]) -> Results:
        parameter = torch.nn.Parameter(inputs[0].detach().clone())
        update = optimizer([parameter], lr=0.1, momentum=0.9, weight_decay=0.01)
        for gradient in inputs[1:]:
            parameter.grad = gradient.clone()
            update.step()
        return [parameter.detach()]

    return call
