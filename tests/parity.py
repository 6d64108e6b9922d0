"""The parity rule for one result, under the name by which the tests know it."""

from fastdl.reference.parity import assert_as_accurate_as_torch

__all__ = ["assert_as_accurate_as_torch"]
