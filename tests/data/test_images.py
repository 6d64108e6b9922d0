"""Pixels as floats, and items as the textbook loads them."""

from __future__ import annotations

import builtins
import subprocess
import sys

import pytest
import torch

from fastdl import data

ALL_GREYS = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)


def _small():
    X = torch.arange(3 * 784).reshape(3, 28, 28).to(torch.uint8)
    y = torch.tensor([4, 0, 9])
    return data.ImageData("small", X, y, X[:1], y[:1], ("zero",))


def test_to_float_has_the_bits_of_to_tensor():
    from torchvision.transforms.functional import to_pil_image, to_tensor

    assert torch.equal(data.to_float(ALL_GREYS), to_tensor(to_pil_image(ALL_GREYS)))


def test_to_float_divides_in_the_dtype_asked_for():
    exact = torch.tensor([grey / 255 for grey in range(256)], dtype=torch.float64)
    assert torch.equal(data.to_float(ALL_GREYS, torch.float64).flatten(), exact)
    assert torch.equal(ALL_GREYS.flatten(), torch.arange(256, dtype=torch.uint8))


def test_to_float_leaves_floating_values_alone():
    X = torch.tensor([0.5, 300.0])
    assert data.to_float(X) is X
    assert torch.equal(data.to_float(X, torch.float64), X.double())


@pytest.mark.parametrize(
    ("X", "dtype"), [(torch.tensor([1]), torch.float32), (torch.tensor([1.0]), torch.int64)]
)
def test_to_float_refuses_what_is_no_pixel_and_no_float(X, dtype):
    with pytest.raises(TypeError, match="int64"):
        data.to_float(X, dtype)


@pytest.mark.parametrize("train", [True, False])
def test_dataset_gives_items_of_a_tensor_and_an_int(train):
    images = _small()
    items = images.dataset(train)
    X, y = (images.X_train, images.y_train) if train else (images.X_test, images.y_test)
    assert len(items) == len(X)
    for index in range(len(X)):
        image, label = items[index]
        assert torch.equal(image, data.to_float(X[index : index + 1]))
        assert type(label) is int
        assert label == y[index]


def test_a_torchvision_that_fails_to_import_is_one_sentence(monkeypatch, tmp_path):
    real_import = builtins.__import__

    def broken_import(name, *arguments, **options):
        if name.startswith("torchvision"):
            raise RuntimeError("operator torchvision::nms does not exist\nand more lines")
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", broken_import)
    for attempt in (lambda: data.fashion_mnist(tmp_path), lambda: _small().dataset(True)):
        with pytest.raises(
            data.DataUnavailableError, match=r"nms does not exist.*install the torch"
        ) as caught:
            attempt()
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_importing_the_data_does_not_import_torchvision():
    program = "import sys, fastdl.data; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
