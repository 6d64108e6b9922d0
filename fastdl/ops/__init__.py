"""The ops as ``torch.autograd.Function``, one file each: kernel call, backward, registration, Function."""
