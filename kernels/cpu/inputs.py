"""How the first layer reads examples: each way gathers a batch, multiplies it, and updates the weight.

DENSE    in the dtype of the net
NONZERO  as they are, skipping zeros
BYTES    as bytes, which are widened as they are loaded; for a skinny layer
INTEGER  as bytes, by digits of the weight and of the gradient (``integer_layer``)

A step of INTEGER in which a column of the weight or of the gradient has no fixed point is done as NONZERO
does it, but for zeros, which are multiplied too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastdl.kernels.cpu import dense, integer_layer
from fastdl.kernels.cpu.balance import part_by_work, part_of
from fastdl.kernels.cpu.intrinsics import Matrix
from fastdl.kernels.cpu.layout import BYTES, INPUT_BLOCK, INTEGER, NONZERO
from fastdl.kernels.cpu.panels import panel_of, panels_of
from fastdl.kernels.cpu.parallel import share
from fastdl.kernels.jit import inlined_jit

# the first layer's weight is done so many panels of inputs at a time
_PREFETCH_PANELS = 2

_GROUP_PANELS = integer_layer.GROUP_PANELS


class Part(NamedTuple):
    """A thread's part of the first layer in a step, for a batch of ``num_rows``.

    The thread gathers ``own_rows``, and multiplies ``rows`` for ``panels`` of the outputs: all rows where the
    product is split ``by_columns``. Of the weight it has ``own_inputs``, but in integers ``inputs`` for its
    panels.
    """

    thread: int
    num_rows: int
    by_columns: bool
    own_rows: Any
    rows: Any
    panels: Any
    own_inputs: Any
    inputs: Any


@inlined_jit
def find_part(layer, inputs, by_columns, count, own_rows, bounds, thread):
    """Return a thread's part of the first layer."""
    num_inputs, panel = layer.num_inputs, panel_of(inputs.panels)
    block, num_panels = max(INPUT_BLOCK, panel), panels_of(layer.num_outputs, panel)
    start, stop = part_by_work(inputs.work, bounds, thread)
    own_inputs = min(start * block, num_inputs), min(stop * block, num_inputs)
    rows, panels, weight_inputs = own_rows, (0, num_panels), own_inputs
    is_split = by_columns and not layer.is_skinny
    if is_split:
        panels = share(num_panels, thread, bounds.size - 1)
    elif inputs.mode == INTEGER:
        num_groups = panels_of(num_panels, _GROUP_PANELS)
        is_split, groups = inputs.integers.by_columns, (0, num_groups)
        if is_split:
            groups, weight_inputs = part_of(num_groups, bounds, thread), (0, num_inputs)
        panels = groups[0] * _GROUP_PANELS, min(groups[1] * _GROUP_PANELS, num_panels)
    if is_split:
        rows = 0, count
    return Part(thread, count, is_split, own_rows, rows, panels, own_inputs, weight_inputs)


@inlined_jit
def begin_run(net, inputs, part):
    """Note, before a barrier, what the first step is to know of the weight."""
    if inputs.mode == INTEGER:
        inputs.integers.members[part.thread].is_written = False
        integer_layer.note_weight(net.state, net.layers[0], inputs, part.thread, part.inputs, part.panels)


@inlined_jit
def gather_batch(net, examples, inputs, batch, part, stride, members):
    """Copy the thread's rows of a batch to where the first layer reads them.

    Returns whether it reads what others write: then a barrier must follow.
    """
    layer = net.layers[0]
    if inputs.mode == INTEGER:
        integer_layer.find_digits(net.state, layer, inputs, part, net.state.dtype.type(examples.scale))
        member = inputs.integers.members[part.thread]
        marking = dense.UNMARKED if member.has_digits else dense.ALL
        dense.gather(examples.X, inputs, batch, part.own_rows, stride, marking)
        return part.by_columns or (member.has_digits and member.has_changed)
    if inputs.mode == NONZERO:
        skips_zeros = True
        for thread in range(members.size):
            skips_zeros &= members[thread].has_finite_weight
        marking = dense.NOT_ZERO if skips_zeros else dense.ALL
        dense.gather(examples.X, inputs, batch, part.own_rows, stride, marking)
    elif inputs.mode == BYTES:
        dense.gather_panels(examples.X, batch, part.own_rows, inputs.values, stride, inputs.panels)
    else:
        dense.gather_panels(examples.X, batch, part.own_rows, inputs.panels, stride, inputs.panels)
    return part.by_columns


@inlined_jit
def _has_digits(inputs, thread):
    return inputs.mode == INTEGER and inputs.integers.members[thread].has_digits


@inlined_jit
def forward_first(net, inputs, scale, workspace, part):
    """Write the thread's part of the first layer's output."""
    layer, stride = net.layers[0], workspace.stride
    if _has_digits(inputs, part.thread):
        integer_layer.forward(net.state, layer, inputs, workspace, part)
    elif inputs.mode == NONZERO or inputs.mode == INTEGER:
        dense.forward_nonzero(layer, inputs, net.state, workspace, part.rows, part.panels, scale)
    elif inputs.mode == BYTES:
        dense.forward_skinny(
            layer, Matrix(inputs.values, 0 * stride, stride), net.state, workspace, part.rows, scale
        )
    else:
        source = Matrix(inputs.panels, 0 * stride, stride)
        dense.forward(layer, source, net.state, workspace, part.rows, part.panels, scale)


@inlined_jit
def note_grad(net, inputs, workspace, rows, panels, part, members):
    """Note, before a barrier, what the update is to know of the gradient that the thread has written."""
    if inputs.mode == NONZERO:
        grad = Matrix(workspace.scratch, net.layers[0].grad, workspace.stride)
        members[part.thread].has_finite_grad = dense.are_finite(grad, rows, panels)
    elif inputs.mode == INTEGER:
        integer_layer.note_grad(net.state, net.layers[0], inputs, workspace, part)


@inlined_jit
def update_first(net, inputs, scale, workspace, part, members, upcoming):
    """Update the thread's part of the first layer's weight; prefetch some of the next batch on the way."""
    layer, panel = net.layers[0], panel_of(workspace.scratch)
    if _has_digits(inputs, part.thread):
        integer_layer.find_grad_scales(net.state, layer, inputs, part, scale)
    if _has_digits(inputs, part.thread):
        integer_layer.update(net.state, layer, inputs, workspace, part)
    elif inputs.mode == NONZERO or inputs.mode == INTEGER:
        panels = 0, panels_of(layer.num_outputs, panel)
        transposed = inputs.transposed[part.thread], inputs.transposed_masks[part.thread]
        skips_zeros = inputs.mode == NONZERO
        for thread in range(members.size):
            skips_zeros &= members[thread].has_finite_grad
        dense.transpose_examples(
            inputs.values, workspace.stride, part.own_inputs, part.num_rows, transposed, skips_zeros
        )
        dense.backward_weight_nonzero(
            layer, transposed, net.state, workspace, part.num_rows, part.own_inputs, scale, upcoming
        )
        if inputs.mode == NONZERO:
            weight = Matrix(net.state, layer.weight.start, layer.num_inputs)
            members[part.thread].has_finite_weight = dense.are_finite(weight, part.own_inputs, panels)
        else:
            integer_layer.note_weight(net.state, layer, inputs, part.thread, part.own_inputs, panels)
    else:
        _update_panels(net, inputs, scale, workspace, part, upcoming)


@inlined_jit
def _update_panels(net, inputs, scale, workspace, part, upcoming):
    """Do what ``update_first`` does for DENSE and BYTES: a few panels at a time, prefetching in between."""
    layer, panel, stride = net.layers[0], panel_of(workspace.scratch), workspace.stride
    panels = panels_of(part.own_inputs[0], panel), panels_of(part.own_inputs[1], panel)
    shares = (panels[1] - panels[0]) // _PREFETCH_PANELS
    shares = max(1, min(shares, upcoming.stop - upcoming.start))
    for index in range(shares):
        start, stop = share(panels[1] - panels[0], index, shares)
        some = (panels[0] + start, panels[0] + stop)
        if inputs.mode == BYTES:
            source = Matrix(inputs.values, 0 * stride, stride)
            dense.backward_weight_skinny(layer, source, net.state, workspace, part.num_rows, some, scale)
        else:
            source = Matrix(inputs.panels, 0 * stride, stride)
            dense.backward_weight(layer, source, net.state, workspace, part.num_rows, some, scale)
        start, stop = share(upcoming.stop - upcoming.start, index, shares)
        dense.prefetch_examples(upcoming, upcoming.start + start, upcoming.start + stop)
