"""``SGD``, a drop-in for ``torch.optim.SGD`` that updates all parameters in one kernel call."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _use_grad_for_differentiable
from torch.optim.sgd import sgd as torch_sgd

from fastdl.arrays import accepts
from fastdl.ops.sgd import sgd, takes

__all__ = ["SGD"]


class SGD(torch.optim.SGD):
    """Stochastic gradient descent, as ``torch.optim.SGD`` in every option, with one kernel call per step.

    A parameter group goes to torch's own update where the kernel doesn't apply: parameters or gradients
    that are not dense contiguous tensors of float32 or float64 (float16 and bfloat16 too on an NVIDIA GPU), a
    learning rate on the GPU, ``foreach=True``, ``fused=True`` or ``differentiable=True`` asked for by name,
    and under ``torch.compile``. A state_dict can be loaded from and into ``torch.optim.SGD``.

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

    @_use_grad_for_differentiable
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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            buffers: list[Tensor | None] = []
            has_sparse_grad = self._init_group(group, params, grads, buffers)  # type: ignore[no-untyped-call]
            if _kernel_applies(group, params, grads, buffers):
                self._update(group, params, grads, buffers)
            elif params:
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
        return loss

    def _update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor | None],
    ) -> None:
        first_step = [buffer is None for buffer in buffers] or [False] * len(params)
        for i, buffer in enumerate(buffers):
            if buffer is None:
                buffers[i] = torch.empty_like(params[i], requires_grad=False)
        indices = sorted(range(len(params)), key=lambda i: (str(params[i].dtype), str(params[i].device)))
        for _, alike in groupby(indices, key=lambda i: (params[i].dtype, params[i].device)):
            chosen = list(alike)
            sgd(
                [params[i] for i in chosen],
                [grads[i] for i in chosen],
                [buffers[i] for i in chosen] if buffers else [],
                [first_step[i] for i in chosen],
                float(group["lr"]),
                float(group["momentum"]),
                float(group["dampening"]),
                float(group["weight_decay"]),
                group["nesterov"],
                group["maximize"],
            )


def _kernel_applies(
    group: dict[str, Any], params: list[Tensor], grads: list[Tensor], buffers: list[Tensor | None]
) -> bool:
    if not params or group["foreach"] or group["fused"] or group["differentiable"]:
        return False
    # to read a learning rate on the GPU is to wait for it
    if torch.compiler.is_compiling() or (isinstance(group["lr"], Tensor) and group["lr"].is_cuda):
        return False
    tensors_of_each = zip(params, grads, buffers or [None] * len(params), strict=True)
    return all(accepts(*tensors) for tensors in tensors_of_each) and takes(params, grads, buffers)
