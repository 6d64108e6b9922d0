"""What both image sources give: ten classes of garments as uint8 tensors in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


class DataUnavailableError(RuntimeError):
    """The data cannot be had here; the message says why, and what to do."""


@dataclass(frozen=True, eq=False)
class ImageData:
    """Grey 28 x 28 images of ten classes of garments, in memory.

    Attributes
    ----------
    name : str
        ``"fashion-mnist"`` or ``"garments"``.
    X_train, X_test : Tensor
        The images, (N, 28, 28) uint8, 0 is the background.
    y_train, y_test : Tensor
        The classes, (N,) int64, from 0 to 9.
    classes : tuple of str
        The name of each class.
    """

    name: str
    X_train: Tensor
    y_train: Tensor
    X_test: Tensor
    y_test: Tensor
    classes: tuple[str, ...]

    def dataset(self, train: bool) -> Dataset[tuple[Tensor, int]]:
        """Return one part as the textbook loads it: item by item, through a PIL image and ``ToTensor``.

        Parameters
        ----------
        train : bool
            The training images, or else the test images.

        Returns
        -------
        Dataset
            Items are (image, label): a float (1, 28, 28) tensor from 0 to 1, and an int.

        Raises
        ------
        DataUnavailableError
            If torchvision cannot be imported.
        """
        X, y = (self.X_train, self.y_train) if train else (self.X_test, self.y_test)
        return _Items(X, y, torchvision().transforms.ToTensor())


class _Items(Dataset[tuple[Tensor, int]]):
    """The work of torchvision's FashionMNIST for an item, on images that no file holds."""

    def __init__(self, images: Tensor, targets: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.images = images
        self.targets = targets
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index].numpy())), int(self.targets[index])

    def __len__(self) -> int:
        return len(self.targets)


def torchvision() -> Any:
    """Import torchvision, or say in one sentence why it cannot be."""
    try:
        import torchvision.datasets
        import torchvision.transforms
    # beside a torch of another build the import fails with RuntimeError, OSError or AttributeError
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise DataUnavailableError(
            f"torchvision cannot be imported beside torch {torch.__version__} "
            f"({type(error).__name__}: {reason}): install the torchvision of torch's own release and build"
        ) from error
    return torchvision


def to_float(X: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bring pixels to floating point: uint8 from 0 to 255 becomes 0 to 1, as ``ToTensor`` does it.

    Parameters
    ----------
    X : Tensor
        Any shape; uint8 pixels, or values that are floating point already.
    dtype : torch.dtype
        The floating dtype of the result; the division by 255 is done in it.

    Returns
    -------
    Tensor
        The shape of `X`; `X` itself where it has `dtype` already.

    Raises
    ------
    TypeError
        If `X` is neither uint8 nor floating point, or `dtype` is not a floating dtype.

    Examples
    --------
    >>> to_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    """
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating dtype, not {dtype}")
    if X.dtype == torch.uint8:
        return X.to(dtype).div_(255)
    if X.is_floating_point():
        return X.to(dtype)
    raise TypeError(f"X must be uint8 pixels or floating point, not {X.dtype}: convert it first")
