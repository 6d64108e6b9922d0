"""Every kernel at small sizes, and training steps: what compute-sanitizer watches.

``python -m benchmarks.gpu.exercise`` runs it alone.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from fastdl import fit, functional, models, nn, optim
from fastdl.training.lower import UnsupportedError

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# less than a tile, around its edges, a thin product, and one of several tiles and slices
_PRODUCTS = ((1, 1, 1), (33, 65, 31), (70, 17, 130), (10, 2, 1), (40, 784, 10))
# lanes of a warp, a whole warp, a block for each row
_LOGITS = ((5, 10), (64, 130), (3, 2000))


def exercise(device: str) -> list[str]:
    """Run everything; return a line on each part that fastdl refused."""
    torch.manual_seed(0)
    for dtype in _DTYPES:
        if device == "cpu" and dtype in (torch.float16, torch.bfloat16):
            continue
        for sizes in _PRODUCTS:
            _differentiate(functional.linear_relu, _layer(*sizes, dtype, device))
        for num_rows, num_classes in _LOGITS:
            _cross_entropy(num_rows, num_classes, dtype, device)
        x, y = (torch.randn(1001, dtype=dtype, device=device) for _ in range(2))
        _differentiate(functional.relu, (x,))
        _differentiate(functional.mse_loss, (x, y))
    refused = []
    for name, net, X, y in _problems(device):
        loss = nn.CrossEntropyLoss() if not y.is_floating_point() else nn.MSELoss()
        optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            loss(net(X), y).backward()
            optimizer.step()
        try:
            fit(net, loss, optimizer, X, y, epochs=2, batch_size=32, progress=False)
        except UnsupportedError as error:
            refused.append(f"fit, {name}: {error}")
    if device == "cuda":
        torch.cuda.synchronize()
    return refused


def _layer(
    num_rows: int, num_inputs: int, num_outputs: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, ...]:
    shapes = ((num_rows, num_inputs), (num_outputs, num_inputs), (num_outputs,))
    return tuple(torch.randn(shape, dtype=dtype, device=device) for shape in shapes)


def _differentiate(function: object, inputs: tuple[Tensor, ...]) -> None:
    assert callable(function)
    inputs = tuple(tensor.requires_grad_() for tensor in inputs)
    output = function(*inputs)
    torch.autograd.grad(output, inputs, torch.ones_like(output))


def _cross_entropy(num_rows: int, num_classes: int, dtype: torch.dtype, device: str) -> None:
    target = torch.randint(num_classes, (num_rows,), device=device)
    target[::3] = -100
    weight = torch.rand(num_classes, dtype=dtype, device=device)
    for reduction in ("mean", "none"):
        logits = torch.randn(num_rows, num_classes, dtype=dtype, device=device)

        def loss(logits: Tensor, reduction: str = reduction) -> Tensor:
            return functional.cross_entropy(logits, target, weight, reduction=reduction, label_smoothing=0.1)

        _differentiate(loss, (logits,))


def _problems(device: str) -> list[tuple[str, torch.nn.Module, Tensor, Tensor]]:
    images = torch.rand(100, 784, device=device)
    labels = torch.randint(10, (100,), device=device)
    points = torch.randn(100, 2, device=device)
    return [
        ("linear regression", models.LinearRegression().to(device), points, points.sum(1, keepdim=True)),
        ("softmax regression", models.SoftmaxRegression().to(device), images, labels),
        ("MLP", models.MLP(num_hiddens=(40, 33)).to(device), images, labels),
    ]


if __name__ == "__main__":
    for line in exercise(sys.argv[1] if len(sys.argv) > 1 else "cuda"):
        sys.stdout.write(line + "\n")
