"""The number formats that a visit measures in, each in a block of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """A number format, and what torch and JAX are told so that they compute in it.

    Attributes
    ----------
    name : str
    dtype : torch.dtype
        Of tensors.
    matmul : str
        For ``torch.set_float32_matmul_precision``.
    jax : str
        JAX's precision of a product.
    error : float
        What a product's error, ``norm(result - truth) / norm(truth)``, may be.
    """

    name: str
    dtype: torch.dtype
    matmul: str
    jax: str
    error: float

    @contextmanager
    def active(self) -> Iterator[None]:
        """Set torch's precision of products, and set it back afterwards."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.matmul)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


FLOAT32 = Precision("float32", torch.float32, "highest", "highest", error=2e-6)
TF32 = Precision("TF32", torch.float32, "high", "high", error=1e-3)
BFLOAT16 = Precision("bfloat16", torch.bfloat16, "highest", "highest", error=1e-2)
FLOAT16 = Precision("float16", torch.float16, "highest", "highest", error=2e-3)
# float16 is held to parity, and has the time of bfloat16
TIMED = (FLOAT32, TF32, BFLOAT16)
ALL = (*TIMED, FLOAT16)
