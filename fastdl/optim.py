"""``SGD``, a drop-in for ``torch.optim.SGD`` that updates all parameters in one kernel call."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from inspect import signature
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.optim.sgd import sgd as torch_sgd

from fastdl.kernels.options import SGDOptions
from fastdl.ops.sgd import update
from fastdl.torch_private import has_step_hooks, init_group, is_profiled, use_grad_for_differentiable

__all__ = ["SGD"]

_options_of = itemgetter(*SGDOptions._fields)
_NUMBERS = frozenset({float, int})
# numbers beyond these aren't finite in float32, where torch raises, or round to 0, which takes no part
_LEAST, _GREATEST = 1e-37, 1e38


class SGD(torch.optim.SGD):
    """Stochastic gradient descent, as ``torch.optim.SGD`` in every option, with one kernel call per step.

    A parameter group goes to torch's own update where the kernel doesn't apply: parameters, gradients or
    momentum buffers that are not dense contiguous tensors of one shape, of one dtype, float32 or float64
    (float16 and bfloat16 too on an NVIDIA GPU), and one device; a parameter that stands twice in the group,
    or shares memory with another one; an option that is no finite Python number, such as a learning rate in
    a tensor; ``foreach=True``, ``fused=True`` or ``differentiable=True`` asked for by name; and under
    ``torch.compile``. A state_dict can be loaded from and into ``torch.optim.SGD``.

    Parameters
    ----------
    params
        Parameters, or parameter groups, as torch takes them.
    lr : float or Tensor
        Learning rate.
    momentum, dampening, weight_decay : float
    nesterov, maximize : bool
    foreach, differentiable, fused : bool
        torch's choice of its own implementations.

    Raises
    ------
    ValueError
        If an option is out of its range, as torch does.

    Examples
    --------
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = SGD([weight], lr=0.5)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> weight.data
    tensor([0.5000, 0.5000])
    """

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Update the parameters.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss anew and returns it.

        Returns
        -------
        The closure's loss, or None.
        """
        if (has_step_hooks(self) or is_profiled()) and not _runs_hooks(type(self).step):
            return _step_with_hooks(self, *args, **kwargs)
        return self._step(*args, **kwargs)

    # torch wraps the step of every class that isn't marked so; that costs 15 us where nothing watches
    step.hooked = True  # type: ignore[attr-defined]
    # hooks see the arguments as they were passed
    step.__signature__ = signature(torch.optim.SGD.step)  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, as torch does."""
        if not set_to_none or torch.compiler.is_compiling() or is_profiled():
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            buffers: list[Tensor | None] = []
            has_sparse_grad = init_group(self, group, params, grads, buffers)
            started = [i for i, buffer in enumerate(buffers) if buffer is None]
            options = self._kernel_options(group)
            if options is None or not params or not update(params, grads, buffers, options):
                self._update_by_torch(group, has_sparse_grad, params, grads, buffers)
            # no sooner than they are written: who is interrupted leaves no buffer that holds nothing
            for i in started:
                self.state[params[i]]["momentum_buffer"] = buffers[i]
        return loss

    def _kernel_options(self, group: dict[str, Any]) -> SGDOptions | None:
        """Return a group's options as the kernel takes them, or None where the update is torch's."""
        if (
            group["foreach"]
            or group["fused"]
            or self.defaults["differentiable"]
            or torch.compiler.is_compiling()
            # what GradScaler leaves for fused updates is an error for others
            or "found_inf" in vars(self)
            or "grad_scale" in vars(self)
        ):
            return None
        try:
            return _options(*_options_of(group))
        except TypeError:
            # an array can't be looked up
            return None

    @use_grad_for_differentiable
    def _update_by_torch(
        self,
        group: dict[str, Any],
        has_sparse_grad: bool,
        params: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor | None],
    ) -> None:
        options: dict[str, Any] = {key: group[key] for key in (*SGDOptions._fields, "foreach", "fused")}
        options |= {key: getattr(self, key, None) for key in ("grad_scale", "found_inf")}
        torch_sgd(params, grads, buffers, has_sparse_grad=has_sparse_grad, **options)


@lru_cache(maxsize=64, typed=True)
def _options(*options: Any) -> SGDOptions | None:
    *numbers, nesterov, maximize = options
    for number in numbers:
        if type(number) not in _NUMBERS or not (number == 0 or _LEAST < abs(number) < _GREATEST):
            return None
    return SGDOptions(*map(float, numbers), bool(nesterov), bool(maximize))  # type: ignore[call-arg, arg-type]


_step_with_hooks = Optimizer.profile_hook_step(SGD._step)


def _runs_hooks(step: Callable[..., Any]) -> bool:
    """Return whether torch has wrapped a step so that it runs the hooks, as it does for a subclass's own."""
    return getattr(step, "__code__", None) is _step_with_hooks.__code__
