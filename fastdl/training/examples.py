"""What `fit`, `evaluate` and `predict` take as data: tensors, arrays, torchvision's datasets; checked."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array: TypeAlias = Tensor | NDArray[Any]


def floating(net: nn.Module) -> Tensor | None:
    """Return the parameter whose dtype and device the net's inputs must have."""
    for parameter in net.parameters():
        if parameter.is_floating_point():
            return parameter
    return None


def unpacked(X: Any, y: Array | None, part: str = "") -> tuple[Array, Array]:
    """Return examples and labels, out of a torchvision dataset where that is what `X` is.

    Parameters
    ----------
    X : Tensor, ndarray or dataset
        A dataset holds its images in memory as ``data`` and its labels as ``targets``.
    y : Tensor or ndarray, optional
        Not with a dataset.
    part : str
        Stands before the names in a message.

    Raises
    ------
    TypeError
        If labels are missing, given twice, or `X` is something else.
    ValueError
        If the dataset transforms its images in another way than ``ToTensor`` does.
    """
    if isinstance(X, (Tensor, np.ndarray)):
        if y is None:
            raise TypeError(f"{part}y is missing: pass the labels of {part}X")
        return X, y
    images, labels = getattr(X, "data", None), getattr(X, "targets", None)
    if not isinstance(images, (Tensor, np.ndarray)) or not isinstance(labels, (Tensor, np.ndarray, list)):
        raise TypeError(
            f"{part}X is a {type(X).__name__}: it must be a tensor, an array, or a torchvision dataset that "
            "holds its images in memory, such as FashionMNIST"
        )
    if y is not None:
        raise TypeError(f"{part}y must be left out where {part}X is a dataset, which has its own labels")
    for name in ("transform", "target_transform"):
        transform = getattr(X, name, None)
        if transform is not None and not (name == "transform" and type(transform).__name__ == "ToTensor"):
            raise ValueError(
                f"the dataset's {name} is {transform}, which is not applied to images in memory: leave it "
                "None (or ToTensor), or pass X and y as tensors that are transformed already"
            )
    return images, torch.as_tensor(labels, device="cpu") if isinstance(labels, list) else labels


class _Unlocked:
    """The memory of a read-only array, for torch, which would warn of it; nothing here writes to examples."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array
        interface = array.__array_interface__
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}


def _as_tensor(array: Any, name: str) -> Tensor:
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array: fill it, e.g. {name.split()[-1]}.filled(0)")
    if isinstance(array, np.ndarray):
        # torch takes no negative strides and no foreign byte order, and a kernel no odd addresses
        array = np.require(array, array.dtype.newbyteorder("="), ["C", "A"])
        return torch.from_numpy(array if array.flags.writeable else np.asarray(_Unlocked(array)))
    if not isinstance(array, Tensor) or array.is_nested:
        kind = "nested tensor" if isinstance(array, Tensor) else type(array).__name__
        raise TypeError(f"{name} is a {kind}: it must be a tensor or an array")
    return array.resolve_neg() if array.is_neg() else array


def _check_dtype(parameter: Tensor | None, tensor: Tensor, name: str) -> None:
    if parameter is not None and tensor.is_floating_point() and tensor.dtype != parameter.dtype:
        raise TypeError(
            f"{name} is {tensor.dtype}, but the net's parameters are {parameter.dtype}: "
            f"convert one of them, e.g. torch.as_tensor({name.split()[-1]}, dtype={parameter.dtype})"
        )


def checked_examples(parameter: Tensor | None, X: Array, part: str = "") -> Tensor:
    """Return examples for a net with such a parameter, or raise an error that says what doesn't fit."""
    X = _as_tensor(X, f"{part}X")
    if X.dim() == 0 or X.shape[0] == 0:
        raise ValueError(f"{part}X has shape {tuple(X.shape)}: it must have at least one row")
    _check_dtype(parameter, X, f"{part}X")
    return X


def check_labels(y: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise IndexError if a label is neither a class nor the one that is ignored."""
    # by numpy, as the threads that torch would wake spin on while the first epoch trains
    labels = y.cpu().numpy()
    if len(labels) == 0 or (labels.min() >= 0 and labels.max() < num_classes):
        return
    wrong = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if wrong.any():
        row = int(wrong.argmax())
        raise IndexError(
            f"Target {int(y[row])} is out of bounds: row {row} of y must be a class from 0 to "
            f"{num_classes - 1} or the ignore_index {ignore_index}"
        )


def checked(parameter: Tensor | None, X: Array, y: Array, part: str = "") -> tuple[Tensor, Tensor]:
    """Return examples and labels for such a net as tensors, or raise an error that says what doesn't fit."""
    X = checked_examples(parameter, X, part)
    y = _as_tensor(y, f"{part}y")
    if y.dim() == 0 or X.shape[0] != y.shape[0]:
        raise ValueError(
            f"{part}X and {part}y must have one row for each example, but their shapes are "
            f"{tuple(X.shape)} and {tuple(y.shape)}"
        )
    _check_dtype(parameter, y, f"{part}y")
    return X, y if y.is_floating_point() or y.is_complex() else y.long()
