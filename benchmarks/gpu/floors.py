"""The least time of a kernel: its bytes at the speed of a copy, its arithmetic at the GPU's peak."""

from __future__ import annotations

from dataclasses import dataclass

# float32 lanes of a multiprocessor, by compute capability: "Arithmetic Instructions" in the CUDA C++
# Programming Guide
_LANES = {(8, 0): 64}
_LANES_OF_OTHERS = 128
_FLOPS_PER_MULTIPLY_ADD = 2


@dataclass(frozen=True)
class Work:
    """What a call has to do, however it is done.

    Attributes
    ----------
    num_bytes : float
        Each input read once, each output written once.
    num_flops : float
        A multiply-add is two.
    """

    num_bytes: float
    num_flops: float = 0.0

    def floor(self, bandwidth: float, flops: float | None) -> float:
        """Return the seconds that it takes at least.

        Parameters
        ----------
        bandwidth : float
            Bytes a second, read and written together.
        flops : float or None
            FLOPs a second; None leaves the arithmetic out.
        """
        return max(self.num_bytes / bandwidth, self.num_flops / flops if flops else 0.0)


def product(num_rows: int, num_steps: int, num_cols: int, item_bytes: int = 4) -> Work:
    """Return the work of a matrix product, (rows, steps) by (steps, cols)."""
    numbers = num_rows * num_steps + num_steps * num_cols + num_rows * num_cols
    flops = _FLOPS_PER_MULTIPLY_ADD * num_rows * num_steps * num_cols
    return Work(float(item_bytes * numbers), float(flops))


def cross_entropy(num_rows: int, num_classes: int, item_bytes: int = 4) -> Work:
    """Return the work of loss and gradient in one pass: logits and labels read, the gradient written."""
    return Work(float(2 * item_bytes * num_rows * num_classes + 8 * num_rows))


def sgd(num_parameters: int, *, momentum: bool, item_bytes: int = 4) -> Work:
    """Return the work of an update: parameters and momentum read and written, gradients read."""
    return Work(float((5 if momentum else 3) * item_bytes * num_parameters))


def elementwise(num_elements: int, num_arrays: int, item_bytes: int = 4) -> Work:
    """Return the work of passing once over so many arrays."""
    return Work(float(num_arrays * item_bytes * num_elements))


def peak_flops(num_multiprocessors: int, capability: tuple[int, int], hertz: float) -> float:
    """Return the float32 FLOPs a second of a GPU whose multiprocessors run at a clock."""
    lanes = _LANES.get(capability, _LANES_OF_OTHERS)
    return float(_FLOPS_PER_MULTIPLY_ADD * num_multiprocessors * lanes * hertz)


def floor_of_products(num_multiply_adds: int, flops: float) -> float:
    """Return the seconds that so many multiply-adds take at least."""
    return _FLOPS_PER_MULTIPLY_ADD * num_multiply_adds / flops
