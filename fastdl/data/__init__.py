"""The data that models train on: synthetic regression, Fashion-MNIST, and garments for a machine offline."""

from .batches import OrderSampler, batches, order
from .fashion_mnist import fashion_mnist
from .garments import garments
from .images import DataUnavailableError, ImageData, to_float
from .load import load
from .regression import RegressionData, regression

__all__ = [
    "DataUnavailableError",
    "ImageData",
    "OrderSampler",
    "RegressionData",
    "batches",
    "fashion_mnist",
    "garments",
    "load",
    "order",
    "regression",
    "to_float",
]
