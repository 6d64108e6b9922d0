"""Each function against torch.nn.functional's: every form of input, and every error."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from fastdl import functional
from tests.parity import assert_as_accurate_as_torch

pytestmark = pytest.mark.usefixtures("seed")
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
SIZES = [0, 1, 2, 3, 13, 17, 67]


def _grads(output, inputs, upstream):
    return torch.autograd.grad(output, inputs, upstream.to(output.dtype), allow_unused=True)


@pytest.mark.parametrize("relu", [False, True])
@each_dtype
def test_linear_over_odd_shapes(dtype, relu, uninitialised_is_nan):
    ours = functional.linear_relu if relu else functional.linear

    def theirs(*layer):
        return F.relu(F.linear(*layer)) if relu else F.linear(*layer)

    for num_rows, num_inputs, num_outputs in [
        (n, k, m) for n in SIZES for k in SIZES for m in (1, 10, 33)
    ] + [(256, 784, 10), (5, 300, 256)]:
        layer = [
            torch.randn(size, dtype=dtype, requires_grad=True)
            for size in ((num_rows, num_inputs), (num_outputs, num_inputs), (num_outputs,))
        ]
        upstream = torch.randn(num_rows, num_outputs, dtype=dtype)
        truths = [tensor.detach().double().requires_grad_() for tensor in layer]
        output, expected, truth = ours(*layer), theirs(*layer), theirs(*truths)
        # a sum of K products of size up to 4 x 4 has terms of that size
        assert_as_accurate_as_torch(output, expected, truth, scale=4.0 * max(1, num_inputs) ** 0.5)
        grads = zip(
            _grads(output, layer, upstream),
            _grads(expected, layer, upstream),
            _grads(truth, truths, upstream),
            (num_outputs, num_rows, num_rows),
            strict=True,
        )
        for grad, torch_grad, true_grad, num_terms in grads:
            assert_as_accurate_as_torch(grad, torch_grad, true_grad, scale=4.0 * max(1, num_terms) ** 0.5)


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 6), (0, 6), (2, 0, 6), (1, 1, 1, 6)])
def test_linear_takes_any_leading_dimensions(shape):
    input = torch.randn(shape, requires_grad=True)
    weight, bias = torch.randn(4, 6, requires_grad=True), torch.randn(4, requires_grad=True)
    output, expected = functional.linear(input, weight, bias), F.linear(input, weight, bias)
    assert output.shape == expected.shape
    torch.testing.assert_close(output, expected)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        _grads(output, (input, weight, bias), upstream), _grads(expected, (input, weight, bias), upstream)
    )


def test_linear_with_a_vector_of_weights_is_torchs():
    input, weight = torch.randn(3, 6), torch.randn(6)
    torch.testing.assert_close(functional.linear(input, weight), F.linear(input, weight))


@pytest.mark.parametrize(
    "shapes", [((3, 4), (5, 6), (5,)), ((3, 4), (5, 4), (6,)), ((), (5, 4), (5,)), ((3, 4), (2, 5, 4), None)]
)
def test_linear_refuses_the_shapes_that_torch_refuses(shapes):
    layer = [None if shape is None else torch.randn(shape) for shape in shapes]
    with pytest.raises(RuntimeError) as theirs:
        F.linear(*layer)
    with pytest.raises(type(theirs.value)):
        functional.linear(*layer)


def test_linear_names_the_shapes_at_fault():
    with pytest.raises(RuntimeError, match=r"\(3, 4\).*\(5, 6\)"):
        functional.linear(torch.randn(3, 4), torch.randn(5, 6))
    with pytest.raises(RuntimeError, match=r"[Dd]ouble|dtype"):
        functional.linear(torch.randn(3, 4), torch.randn(5, 4, dtype=torch.float64))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_spread_as_in_torch(value):
    input, weight, bias = torch.randn(5, 6), torch.randn(4, 6), torch.randn(4)
    weight[1, 2] = value
    input[0] = 0
    input[3, 2] = value
    layer = [tensor.requires_grad_() for tensor in (input, weight, bias)]
    for ours, theirs in (
        (functional.linear, F.linear),
        (functional.linear_relu, lambda *layer: F.relu(F.linear(*layer))),
    ):
        output, expected = ours(*layer), theirs(*layer)
        torch.testing.assert_close(output, expected, equal_nan=True)
        upstream = torch.randn_like(expected)
        torch.testing.assert_close(
            _grads(output, layer, upstream), _grads(expected, layer, upstream), equal_nan=True
        )
    torch.testing.assert_close(functional.relu(input), F.relu(input), equal_nan=True)
    torch.testing.assert_close(
        functional.mse_loss(input, input * 0), F.mse_loss(input, input * 0), equal_nan=True
    )


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (100_003,)])
@each_dtype
def test_relu_of_any_shape(shape, dtype):
    input = torch.randn(shape, dtype=dtype, requires_grad=True)
    output = functional.relu(input)
    assert torch.equal(output, F.relu(input))
    upstream = torch.randn_like(output)
    assert torch.equal(*(_grads(f(input), input, upstream)[0] for f in (functional.relu, F.relu)))


def test_relu_in_place_writes_over_its_input():
    input = torch.randn(5)
    expected = F.relu(input)
    assert functional.relu(input, inplace=True) is input
    assert torch.equal(input, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (50_000,)])
@each_dtype
def test_mse_loss_of_any_shape(shape, reduction, dtype, uninitialised_is_nan):
    pair = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2)]
    truths = [tensor.detach().double().requires_grad_() for tensor in pair]
    output, expected, truth = (
        function(*tensors, reduction=reduction)
        for function, tensors in ((functional.mse_loss, pair), (F.mse_loss, pair), (F.mse_loss, truths))
    )
    assert_as_accurate_as_torch(output, expected, truth)
    upstream = torch.randn_like(expected)
    for grad, torch_grad, true_grad in zip(
        _grads(output, pair, upstream),
        _grads(expected, pair, upstream),
        _grads(truth, truths, upstream),
        strict=True,
    ):
        assert_as_accurate_as_torch(grad, torch_grad, true_grad)


def test_mse_loss_broadcasts_with_torchs_warning_and_takes_its_other_forms():
    input, target = torch.randn(4, 1), torch.randn(4)
    with pytest.warns(UserWarning, match="target size"):
        output = functional.mse_loss(input, target)
    with pytest.warns(UserWarning, match="target size"):
        expected = F.mse_loss(input, target)
    torch.testing.assert_close(output, expected)
    weight = torch.rand(4, 1)
    torch.testing.assert_close(
        functional.mse_loss(input, input + 1, weight=weight), F.mse_loss(input, input + 1, weight=weight)
    )
    with pytest.raises(ValueError, match="average"):
        functional.mse_loss(input, input, reduction="average")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@each_dtype
def test_cross_entropy_over_shapes(dtype, weighted, label_smoothing, reduction, uninitialised_is_nan):
    for shape in [(5,), (1, 1), (7, 3), (0, 4), (257, 10), (2, 3, 4), (2, 3, 0), (2, 5, 2, 3)]:
        class_dimension = 0 if len(shape) == 1 else 1
        num_classes = shape[class_dimension]
        target = torch.randint(num_classes, shape[:class_dimension] + shape[class_dimension + 1 :])
        if target.dim() and target.numel() > 2:
            target.view(-1)[1] = -100
        logits = (3 * torch.randn(shape, dtype=dtype)).requires_grad_()
        weight = torch.rand(num_classes, dtype=dtype) + 0.1 if weighted else None
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        double_logits = logits.detach().double().requires_grad_()
        double_weight = None if weight is None else weight.double()
        output = functional.cross_entropy(logits, target, weight, **options)
        expected = F.cross_entropy(logits, target, weight, **options)
        truth = F.cross_entropy(double_logits, target, double_weight, **options)
        assert_as_accurate_as_torch(output, expected, truth, name=f"loss of {shape}")
        upstream = torch.randn_like(expected)
        grads = [
            _grads(loss, tensor, upstream)[0]
            for loss, tensor in ((output, logits), (expected, logits), (truth, double_logits))
        ]
        assert_as_accurate_as_torch(
            *grads, name=f"grad_logits of {shape}", scale=upstream.abs().amax() if upstream.numel() else 1.0
        )


@pytest.mark.parametrize("offset", [1e4, -1e4, 100.0])
def test_cross_entropy_of_great_logits_is_finite_and_a_shift_changes_nothing(offset):
    # a power of two apart, so that the shift itself rounds nothing away
    logits = torch.randint(-8, 8, (20, 10)).float().requires_grad_()
    target = torch.randint(10, (20,))
    loss, shifted = (functional.cross_entropy(z, target) for z in (logits, logits + offset))
    torch.testing.assert_close(loss, shifted)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, shifted)))
    great = (logits.detach().sign() * 1e4).requires_grad_()
    loss = functional.cross_entropy(great, target)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, great)[0]).all()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_rows=st.integers(1, 12),
    num_classes=st.integers(1, 12),
    size=st.floats(0.01, 1e4),
    seed=st.integers(0, 2**31),
)
def test_cross_entropy_has_the_properties_of_a_loss(num_rows, num_classes, size, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (size * torch.randn(num_rows, num_classes, generator=generator)).requires_grad_()
    target = torch.randint(num_classes, (num_rows,), generator=generator)
    losses = functional.cross_entropy(logits, target, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert (losses >= 0).all()
    # p - onehot: each row sums to 0, and only the label's entry is not positive; 2 C roundings of at most 1
    assert grad.sum(dim=1).abs().max() <= 2 * num_classes * torch.finfo(grad.dtype).eps
    assert (grad.gather(1, target.unsqueeze(1)) <= 0).all()
    assert (grad.scatter(1, target.unsqueeze(1), 0.0) >= 0).all()


def test_cross_entropy_of_nan_and_inf_logits_is_torchs():
    logits = torch.randn(6, 4)
    logits[0, 1], logits[1, 2], logits[2, 0] = float("nan"), float("inf"), -float("inf")
    logits[3] = -float("inf")
    logits.requires_grad_()
    target = torch.tensor([1, 0, 1, 2, -100, 3])
    for options in ({}, {"label_smoothing": 0.1}, {"reduction": "none"}):
        output, expected = (f(logits, target, **options) for f in (functional.cross_entropy, F.cross_entropy))
        torch.testing.assert_close(output, expected, equal_nan=True)
        grads = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (output, expected)]
        torch.testing.assert_close(*grads, equal_nan=True)


def test_rows_that_are_all_ignored_give_torchs_nan_and_zero():
    logits = torch.randn(3, 4, requires_grad=True)
    target = torch.full((3,), 7)
    for reduction in ("mean", "sum", "none"):
        options = {"ignore_index": 7, "reduction": reduction}
        output, expected = (f(logits, target, **options) for f in (functional.cross_entropy, F.cross_entropy))
        torch.testing.assert_close(output, expected, equal_nan=True)
        grads = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (output, expected)]
        torch.testing.assert_close(*grads, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, [1, 0, 2], [1, math.inf, 2], [1, 1, math.nan]], ids=str)
def test_an_ignored_row_has_torchs_nan(weight, reduction, smoothing):
    rows = [[math.nan, 1, 2], [1, math.inf, 2], [-math.inf, 1, 2], [-math.inf] * 3, [1e300, 1, 2], [1, 2, 3]]
    options = {"ignore_index": 1, "reduction": reduction, "label_smoothing": smoothing}
    options["weight"] = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    for labels in ([1] * 6, [1] * 5 + [0]):
        logits = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
        losses = [
            f(logits, torch.tensor(labels), **options) for f in (functional.cross_entropy, F.cross_entropy)
        ]
        grads = [torch.autograd.grad(loss.sum(), logits)[0] for loss in losses]
        assert torch.equal(*(grad[:5].isnan() for grad in grads))
        assert torch.equal(*(grad[:5] == 0 for grad in grads))


# whose sums over rows are infinite, NaN or 0
_WEIGHTS = [[value, *rest] for value in (math.inf, -math.inf, math.nan) for rest in ([1, 1], [0, 1])]
_WEIGHTS += [[1, math.inf, -math.inf], [math.nan] * 3, [-1, 1, 2], [2, -2, 0]]


def _assert_torchs_by_weights(cross_entropy, rows, torchs=F.cross_entropy, **options):
    for weight, row, label in itertools.product(_WEIGHTS, rows, range(3)):
        logits = torch.tensor([row, [1, 2, 4]], dtype=torch.float64, requires_grad=True)
        arguments = logits, torch.tensor([label, 1]), torch.tensor(weight, dtype=torch.float64)
        losses = [f(*arguments, **options) for f in (cross_entropy, torchs)]
        grads = [torch.autograd.grad(loss.sum(), logits) for loss in losses]
        torch.testing.assert_close(*losses, equal_nan=True)
        torch.testing.assert_close(*grads, equal_nan=True)


_ROWS = [[1.0, 2, 3], [3, 2, 1], [2, 2, 2], [1000, 0, 0]]


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_class_weights_that_are_not_finite_or_sum_to_0_give_torchs_numbers(reduction, smoothing):
    identity = torch.eye(3, dtype=torch.float64)

    def fused(logits, target, weight, **options):
        return functional.linear_cross_entropy(logits, identity, target, weight=weight, **options)

    def torchs(logits, *arguments, **options):
        return F.cross_entropy(F.linear(logits, identity), *arguments, **options)

    options = {"reduction": reduction, "label_smoothing": smoothing}
    _assert_torchs_by_weights(functional.cross_entropy, [*_ROWS, [math.inf, 1, 2]], **options)
    _assert_torchs_by_weights(fused, _ROWS, torchs, **options)


@pytest.mark.parametrize(("reduction", "smoothing"), [("mean", 0.0), ("mean", 0.3), ("none", 0.3)])
def test_such_class_weights_give_a_compiled_function_torchs_numbers(reduction, smoothing):
    torch.compiler.reset()
    compiled = torch.compile(functional.cross_entropy, backend="aot_eager", fullgraph=True)
    _assert_torchs_by_weights(compiled, _ROWS, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("label", [-1, 4, 2**40, -(2**62)])
@pytest.mark.parametrize("spatial", [False, True])
def test_a_label_that_is_no_class_is_an_index_error_that_names_it(label, spatial):
    logits = torch.randn((3, 4, 2) if spatial else (3, 4), requires_grad=True)
    target = torch.zeros((3, 2) if spatial else (3,), dtype=torch.int64)
    target.view(-1)[2] = label
    with pytest.raises(IndexError):
        F.cross_entropy(logits, target)
    with pytest.raises(IndexError, match=str(label)):
        functional.cross_entropy(logits, target)
    if not spatial:
        with pytest.raises(IndexError, match=str(label)):
            functional.linear_cross_entropy(torch.randn(3, 5), torch.randn(4, 5), target)


@pytest.mark.parametrize(
    ("logits", "target", "options"),
    [
        (torch.randn(3, 4), torch.zeros(2, dtype=torch.int64), {}),
        (torch.randn(3, 4), torch.zeros(3), {}),
        (torch.randn(3, 4), torch.zeros(3, dtype=torch.int64), {"reduction": "average"}),
        (torch.randn(3, 4), torch.zeros(3, dtype=torch.int64), {"label_smoothing": 1.5}),
        (torch.randn(3, 4), torch.zeros(3, dtype=torch.int64), {"weight": torch.ones(5)}),
        (torch.randn(3, 4), torch.zeros(3, dtype=torch.int64), {"weight": torch.ones(4).double()}),
        (torch.randn(3, 4, 2), torch.zeros(3, 3, dtype=torch.int64), {}),
        (torch.randn(()), torch.zeros((), dtype=torch.int64), {}),
    ],
)
def test_cross_entropy_refuses_what_torch_refuses(logits, target, options):
    with pytest.raises((ValueError, RuntimeError, IndexError)) as theirs:
        F.cross_entropy(logits, target, **options)
    with pytest.raises(type(theirs.value)):
        functional.cross_entropy(logits, target, **options)


def test_class_probabilities_and_class_weights_that_require_a_gradient_are_torchs():
    logits = torch.randn(3, 4, requires_grad=True)
    probabilities = torch.randn(3, 4).softmax(1).requires_grad_()
    output, expected = (f(logits, probabilities) for f in (functional.cross_entropy, F.cross_entropy))
    inputs = (logits, probabilities)
    torch.testing.assert_close(torch.autograd.grad(output, inputs), torch.autograd.grad(expected, inputs))
    weight = torch.rand(4, requires_grad=True)
    for function in (functional.cross_entropy, F.cross_entropy):
        with pytest.raises(RuntimeError, match="weight"):
            function(logits, torch.tensor([0, 1, 2]), weight)


@pytest.mark.parametrize(
    ("input_shape", "weight_shape", "target_shape"),
    [((6,), (4, 6), ()), ((3, 6), (4, 6), (3,)), ((3, 6), (4, 2, 6), (3, 2)), ((0, 6), (4, 6), (0,))],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_cross_entropy_in_all_its_forms(input_shape, weight_shape, target_shape, with_bias):
    input = torch.randn(input_shape, requires_grad=True)
    weight = torch.randn(weight_shape, requires_grad=True)
    bias = torch.randn(weight_shape[:-1], requires_grad=True) if with_bias else None
    target = torch.randint(4, target_shape)
    options = {"weight": torch.rand(4), "reduction": "sum", "label_smoothing": 0.1}
    output = functional.linear_cross_entropy(input, weight, target, linear_bias=bias, **options)
    flat_bias = None if bias is None else bias.reshape(-1)
    logits = F.linear(input, weight.reshape(-1, 6), flat_bias).reshape(*input_shape[:-1], *weight_shape[:-1])
    expected = F.cross_entropy(logits, target, **options)
    torch.testing.assert_close(output, expected)
    inputs = [tensor for tensor in (input, weight, bias) if tensor is not None]
    torch.testing.assert_close(torch.autograd.grad(output, inputs), torch.autograd.grad(expected, inputs))


@pytest.mark.parametrize(
    ("input", "weight", "target", "options"),
    [
        (torch.randn(2, 3, 6), torch.randn(4, 6), torch.zeros(2, dtype=torch.int64), {}),
        (torch.randn(2, 6), torch.randn(6), torch.zeros(2, dtype=torch.int64), {}),
        (torch.randn(2, 5), torch.randn(4, 6), torch.zeros(2, dtype=torch.int64), {}),
        (
            torch.randn(2, 6),
            torch.randn(4, 6),
            torch.zeros(2, dtype=torch.int64),
            {"linear_bias": torch.ones(3)},
        ),
        (torch.randn(6), torch.randn(4, 2, 6), torch.zeros(2, dtype=torch.int64), {}),
        (torch.randn(2, 6), torch.randn(4, 6), torch.rand(2, 4), {"ignore_index": 1}),
    ],
)
def test_linear_cross_entropy_refuses_with_a_runtime_error(input, weight, target, options):
    with pytest.raises(RuntimeError):
        functional.linear_cross_entropy(input, weight, target, **options)


def test_a_lazily_negated_input_is_not_read_as_its_memory():
    negated = torch.randn(4, 3, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(functional.relu(negated), F.relu(negated))
    torch.testing.assert_close(
        functional.linear(negated, torch.ones(2, 3)), F.linear(negated, torch.ones(2, 3))
    )


LABELS = {
    "negated": lambda target: torch._neg_view(-target),
    "zeros without memory": lambda target: torch._efficientzerotensor(target.shape, dtype=torch.int64),
    "expanded": lambda target: target[1:2].expand(target.shape),
    "every second": lambda target: torch.stack([target, target + 9], 1)[:, 0],
    "sparse": lambda target: target.to_sparse(),
    "meta": lambda target: target.to("meta"),
    "parameter": lambda target: torch.nn.Parameter(target, requires_grad=False),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_of_any_kind_do_what_they_do_in_torch(name):
    logits, target = torch.randn(4, 3, requires_grad=True), LABELS[name](torch.tensor([0, 2, 1, 2]))
    results = []
    for op in (functional.cross_entropy, F.cross_entropy):
        try:
            loss = op(logits, target)
            results.append((loss.detach(), *torch.autograd.grad(loss, logits)))
        except (RuntimeError, NotImplementedError) as error:
            results.append(type(error))
    if isinstance(results[1], type) or results[1][0].is_meta:
        assert str(results[0]) == str(results[1])
    else:
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["negated", "zeros without memory"])
def test_labels_that_a_hook_has_unpacked_are_not_read_as_their_memory(name):
    logits, target = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 0, 0, 0])
    expected = torch.autograd.grad(F.cross_entropy(logits, target), logits)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: saved, lambda saved: saved if saved.is_floating_point() else LABELS[name](saved)
    ):
        loss = functional.cross_entropy(logits, target)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), expected)


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3), (2, 0, 3)])
@pytest.mark.parametrize("op", ["linear", "linear_relu", "cross_entropy"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_result_is_no_view_that_forbids_changes_in_place(op, shape, mode):
    """A view that was made without grad mode can't take part in a graph by an operation in place."""
    input, weight = torch.randn(shape), torch.randn(5, 3)
    scale = torch.tensor(3.0, requires_grad=True)
    with mode():
        if op == "cross_entropy":
            logits = input.movedim(-1, min(1, input.dim() - 1))
            target = torch.zeros(shape[:-1], dtype=torch.int64)
            output = functional.cross_entropy(logits, target, reduction="none")
        else:
            output = getattr(functional, op)(input, weight)
    expected = output.clone() * 3
    if mode is torch.inference_mode:
        with pytest.raises(RuntimeError, match="Inference"):
            output.mul_(scale)
        return
    output.mul_(scale).sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(scale.grad, expected.sum() / 3)


@pytest.mark.parametrize("change", [False, True])
def test_the_mask_of_a_relu_that_was_changed_in_place_is_an_error(change):
    input, weight = torch.randn(2, 4, 3), torch.randn(5, 3, requires_grad=True)
    output = functional.linear_relu(input, weight)
    if change:
        with torch.no_grad():
            output.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            output.sum().backward()
    else:
        output.sum().backward()


class _Seen(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(getattr(function, "__name__", None))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["linear", "relu", "mse_loss", "cross_entropy", "linear_cross_entropy"])
def test_a_function_mode_sees_what_it_sees_in_torch(name):
    if not hasattr(F, name):
        pytest.skip("this torch doesn't have it")
    x, square, target = torch.randn(4, 3), torch.randn(3, 3), torch.tensor([0, 1, 2, 0])
    arguments = {
        "linear": (x, square), "relu": (x,), "mse_loss": (x, x + 1), "cross_entropy": (x, target),
        "linear_cross_entropy": (x, square, target),
    }[name]  # fmt: skip
    seen = []
    for home in (functional, F):
        with _Seen() as mode:
            getattr(home, name)(*arguments)
        seen.append(mode.names)
    assert seen[0] == seen[1]


def test_a_parameter_that_was_stepped_since_the_forward_is_an_error():
    weight = torch.nn.Parameter(torch.randn(2, 3))
    input = torch.randn(4, 3, requires_grad=True)
    output = functional.linear(input, weight)
    from fastdl.optim import SGD

    weight.grad = torch.ones_like(weight)
    SGD([weight], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("value", [None, 1.0, [1.0, 2.0], "x"])
def test_what_is_no_tensor_is_torchs_type_error(value):
    tensor, target = torch.randn(3, 4), torch.tensor([0, 1, 2])
    calls = [
        (functional.relu, F.relu, (value,)),
        (functional.linear, F.linear, (value, tensor)),
        (functional.linear, F.linear, (tensor, value)),
        (functional.cross_entropy, F.cross_entropy, (value, target)),
        (functional.cross_entropy, F.cross_entropy, (tensor, value)),
        (functional.cross_entropy, F.cross_entropy, (tensor, target, [1.0] * 4)),
        (functional.mse_loss, F.mse_loss, (value, tensor)),
        (functional.mse_loss, F.mse_loss, (tensor, value)),
    ]
    for ours, theirs, arguments in calls:
        with pytest.raises(Exception) as expected:  # noqa: PT011
            theirs(*arguments)
        with pytest.raises(type(expected.value)) as error:
            ours(*arguments)
        assert type(error.value) is type(expected.value)


@pytest.mark.parametrize(
    "options",
    [
        {"ignore_index": 1.0},
        {"ignore_index": None},
        {"ignore_index": 2**70},
        {"ignore_index": torch.tensor(1)},
        {"ignore_index": True},
        {"label_smoothing": 1},
        {"label_smoothing": "much"},
        {"label_smoothing": float("nan")},
        {"reduction": ["mean"]},
        {"reduction": None},
    ],
)
def test_options_of_another_type_do_what_they_do_in_torch(options):
    logits, target = torch.randn(3, 4), torch.tensor([0, 1, 2])

    def outcome(function):
        try:
            return function(logits, target, **options)
        except Exception as error:
            return type(error)

    ours, theirs = outcome(functional.cross_entropy), outcome(F.cross_entropy)
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs)
    else:
        assert ours is theirs


def test_elementwise_results_keep_the_memory_format_as_torchs_do():
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for input in (images, torch.randn(3, 4).t()):
        assert functional.relu(input).stride() == F.relu(input).stride()
        ours, theirs = (f(input, input + 1, reduction="none") for f in (functional.mse_loss, F.mse_loss))
        assert ours.stride() == theirs.stride()


@each_dtype
@pytest.mark.parametrize("num_elements", [1, 2, 3, 7, 8, 15, 16, 17, 33, 100, 100_003])
def test_relu_of_negative_zero_is_torchs_in_every_lane(num_elements, dtype):
    input = torch.full((num_elements,), -0.0, dtype=dtype)
    input[::3] = 0.0
    input[1::5] = -1.0
    ours, theirs = functional.relu(input), F.relu(input)
    assert torch.equal(ours.signbit(), theirs.signbit())
    leaf = input.clone().requires_grad_()
    for function in (functional.relu, F.relu):
        assert not torch.autograd.grad(function(leaf).sum(), leaf)[0].any()


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 17), (9, 33), (70, 40)])
@pytest.mark.parametrize("num_inputs", [1, 3, 784])
def test_linear_relu_keeps_the_sign_of_zero_that_the_linear_layer_gives(shape, num_inputs, dtype):
    num_rows, num_outputs = shape
    # a product of 0 and a bias of -0.0: whatever the linear layer makes of it
    input, weight = torch.full((num_rows, num_inputs), -0.0, dtype=dtype), torch.ones(num_outputs, num_inputs)
    weight, bias = weight.to(dtype), torch.full((num_outputs,), -0.0, dtype=dtype)
    expected = F.relu(functional.linear(input, weight, bias))
    output = functional.linear_relu(input, weight, bias)
    assert torch.equal(output, expected)
    assert torch.equal(output.signbit(), expected.signbit())


@each_dtype
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("labels", [[0, 1, 2], [0, -100, 1], [-100] * 3, []], ids=str)
@pytest.mark.parametrize("class_weight", [[0, 0, 0, 0], [0, 0, 0, 2], [0, 1, 0, 0]], ids=str)
def test_class_weights_of_zero_give_torchs_nan(class_weight, labels, label_smoothing, reduction, dtype):
    logits = torch.randn(len(labels), 4, dtype=dtype, requires_grad=True)
    input = torch.randn(len(labels), 5, dtype=dtype)
    layer = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    target, weight = torch.tensor(labels, dtype=torch.int64), torch.tensor(class_weight, dtype=dtype)
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "weight": weight}
    results = [
        (loss.detach(), *torch.autograd.grad(loss.sum(), inputs))
        for loss, inputs in (
            (functional.cross_entropy(logits, target, **options), logits),
            (F.cross_entropy(logits, target, **options), logits),
            (functional.linear_cross_entropy(input, layer, target, **options), layer),
            (F.cross_entropy(input @ layer.t(), target, **options), layer),
        )
    ]
    torch.testing.assert_close(results[0], results[1], equal_nan=True)
    torch.testing.assert_close(results[2], results[3], equal_nan=True)


MODES = {
    "default device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "anomaly": torch.autograd.detect_anomaly,
}


@pytest.mark.parametrize("name", MODES)
@pytest.mark.filterwarnings("ignore:Anomaly")
def test_every_mode_does_what_it_does_in_torch(name):
    def outcome(module):
        with MODES[name]():
            hidden = module.relu(module.linear(input, weight, bias))
            loss = module.cross_entropy(hidden, target) + module.mse_loss(hidden, hidden.detach() + 1)
            if loss.requires_grad:
                loss.backward()
        grads = [tensor.grad for tensor in (weight, bias)]
        weight.grad = bias.grad = None
        return loss.detach().clone(), loss.is_inference(), *grads

    input, target = torch.randn(6, 4), torch.randint(3, (6,))
    weight, bias = torch.randn(3, 4, requires_grad=True), torch.randn(3, requires_grad=True)
    torch.testing.assert_close(outcome(functional), outcome(F))


@pytest.mark.filterwarnings("ignore:Anomaly")
def test_anomaly_mode_finds_nan_in_a_backward_pass():
    logits = torch.zeros(2, 3, requires_grad=True)
    with torch.autograd.detect_anomaly():
        loss = functional.cross_entropy(logits, torch.tensor([0, 1]), torch.zeros(3))
        with pytest.raises(RuntimeError, match="nan values"):
            loss.backward()


def test_tensors_of_inference_mode_can_be_read_but_not_saved():
    with torch.inference_mode():
        input = torch.randn(2, 3)
    weight = torch.randn(4, 3, requires_grad=True)
    torch.testing.assert_close(functional.linear(input, weight.detach()), F.linear(input, weight.detach()))
    for module in (functional, F):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            module.linear(input, weight)
