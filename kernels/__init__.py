"""The numeric side of fastdl: compiled kernels on arrays. Knows NumPy and Numba, never torch."""


class CompilerDisabledError(RuntimeError):
    """Numba's compiler is switched off; the message says how to switch it on."""
