"""``SGD``, a drop-in for ``torch.optim.SGD`` that updates all parameters in one kernel call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer
from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable
from torch.optim.sgd import sgd as torch_sgd

from fastdl.ops.sgd import can_update, sgd

__all__ = ["SGD"]


class SGD(torch.optim.SGD):
    """Stochastic gradient descent, as ``torch.optim.SGD`` in every option, with one kernel call per step.

    A parameter group goes to torch's own update where the kernel doesn't apply: parameters or gradients
    that are not dense contiguous tensors of one dtype, float32 or float64 (float16 and bfloat16 too on an
    NVIDIA GPU), and one device, a learning rate on the GPU, ``foreach=True``, ``fused=True`` or
    ``differentiable=True`` asked for by name, and under ``torch.compile``. A state_dict can be loaded from
    and into ``torch.optim.SGD``.

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

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss anew and returns it.

        Returns
        -------
        The closure's loss, or None.
        """
        # a subclass's own step is wrapped by torch, which then has run the hooks
        if type(self).step is SGD.step and self._is_watched():
            return _step_with_hooks(self, closure)
        return self._step(closure)

    # torch wraps the step of every class that isn't marked so; that costs 15 us where nothing watches
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, as torch does."""
        if not set_to_none or _is_profiled_or_compiled():
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    def _is_watched(self) -> bool:
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or optimizer._global_optimizer_pre_hooks
            or optimizer._global_optimizer_post_hooks
            or _is_profiled_or_compiled()
        )

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if not self._update_by_kernel(group):
                self._update_by_torch(group)
        return loss

    def _update_by_kernel(self, group: dict[str, Any]) -> bool:
        """Update a group's parameters; return False, with nothing done, where the kernel can't."""
        if group["foreach"] or group["fused"] or group["differentiable"] or torch.compiler.is_compiling():
            return False
        lr = group["lr"]
        # to read a learning rate on the GPU is to wait for it
        if type(lr) is not float and isinstance(lr, Tensor) and lr.is_cuda:
            return False
        params: list[Tensor] = []
        grads: list[Tensor] = []
        for param in group["params"]:
            grad = param.grad
            if grad is not None:
                params.append(param)
                grads.append(grad)
        if not params:
            return True
        momentum = group["momentum"]
        buffers: list[Tensor] = []
        first_step = [False] * len(params)
        if momentum != 0:
            found = [self.state[param].get("momentum_buffer") for param in params]
            first_step = [buffer is None for buffer in found]
            buffers = [
                torch.empty_like(param, requires_grad=False) if buffer is None else buffer
                for param, buffer in zip(params, found, strict=True)
            ]
        if not can_update(params, grads, buffers):
            return False
        for param, buffer in zip(params, buffers, strict=False):
            self.state[param]["momentum_buffer"] = buffer
        sgd(
            params,
            grads,
            buffers,
            first_step,
            float(lr),
            float(momentum),
            float(group["dampening"]),
            float(group["weight_decay"]),
            group["nesterov"],
            group["maximize"],
        )
        return True

    @_use_grad_for_differentiable
    def _update_by_torch(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor | None] = []
        has_sparse_grad = self._init_group(group, params, grads, buffers)  # type: ignore[no-untyped-call]
        torch_sgd(
            params,
            grads,
            buffers,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            has_sparse_grad=has_sparse_grad,
            foreach=group["foreach"],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )
        if group["momentum"] != 0:
            for param, buffer in zip(params, buffers, strict=True):
                self.state[param]["momentum_buffer"] = buffer


_step_with_hooks = Optimizer.profile_hook_step(SGD._step)


def _is_profiled_or_compiled() -> bool:
    return torch.compiler.is_compiling() or torch.autograd.profiler._is_profiler_enabled
