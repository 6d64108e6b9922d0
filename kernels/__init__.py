"""The numeric side of fastdl: compiled kernels on arrays. Knows NumPy and Numba, never torch."""
