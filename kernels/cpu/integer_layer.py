"""The first layer on examples of bytes, by digits of its weight and of its gradient (``integer``).

Each thread has a part of the product, and one of the weight. The digits of a weight are written while it is
updated, by the scales of the step before. In the next step all threads find the scales anew, from the
greatest magnitudes that each has noted of its part, and write those tile columns again whose scales have
changed: bits don't depend on the past. They agree on what has changed, and on whether a column has no scale,
as all read the same notes.
"""

from __future__ import annotations

from typing import Any

from numba import types

from fastdl.kernels.cpu.dense import update_part
from fastdl.kernels.cpu.integer import (
    PANEL,
    SIDE,
    Bytes,
    Tiles,
    blocks_of,
    digits_of,
    find_scales,
    multiply_bytes,
    note_largest,
    transpose_bytes,
    write_columns,
)
from fastdl.kernels.cpu.intrinsics import FROM_BIAS, FROM_ZERO, Epilogue, Matrix
from fastdl.kernels.cpu.tiles import USES_INTEGERS, tile_begin, tile_end
from fastdl.kernels.jit import inlined_jit, linked_jit

# Threads share columns in groups, which are whole panels and whole tiles.
GROUP_PANELS = max(1, SIDE // PANEL)
# So many inputs of a group are updated at a time: more, and their gradient isn't in L1 when it is used;
# fewer, and what is used in between drives the digits of the layer's gradient from there.
_INPUTS = 256


def _in_integers(argument_types: tuple[Any, ...]) -> bool:
    """Return whether a function whose first argument is the net's state is for integers."""
    return USES_INTEGERS and argument_types[0].dtype == types.float32


@inlined_jit
def _num_tiles(layer):
    return (layer.num_outputs + SIDE - 1) // SIDE


@inlined_jit
def _tiles_of(layer, panels):
    """Return the tile columns of some groups of panels."""
    return panels[0] * PANEL // SIDE, min((panels[1] * PANEL + SIDE - 1) // SIDE, _num_tiles(layer))


@inlined_jit
def _own_tiles(integers, thread):
    return Tiles(integers.tiles.registers[thread], integers.tiles.sums[thread])


@inlined_jit
def _weight(layer, state):
    return Matrix(state, layer.weight.start, layer.num_inputs * PANEL)


@inlined_jit
def _grad(layer, workspace):
    return Matrix(workspace.scratch, layer.grad, workspace.stride * PANEL)


@inlined_jit
def _transposed(layer, inputs):
    """Return the memory in which all threads transpose a batch, each its own inputs."""
    return Bytes(inputs.transposed[0], (layer.num_inputs + SIDE - 1) // SIDE * SIDE)


@linked_jit(applies=_in_integers)
def note_weight(state, layer, inputs, thread, own_inputs, panels):
    """Note the greatest magnitudes of some inputs' weights for some panels of outputs, before a barrier."""
    largest = inputs.integers.weight.largest[thread]
    largest[:] = 0
    note_largest(_weight(layer, state), own_inputs, _tiles_of(layer, panels), largest)


@linked_jit(applies=_in_integers)
def note_grad(state, layer, inputs, workspace, part):
    """Note the greatest magnitudes of the gradient of the thread's rows, before a barrier."""
    largest = inputs.integers.grad.largest[part.thread]
    largest[:] = 0
    note_largest(_grad(layer, workspace), part.own_rows, (0, _num_tiles(layer)), largest)


@linked_jit(applies=_in_integers)
def find_digits(state, layer, inputs, part, scale):
    """Find the scales of the weight, and write the digits of the thread's part that aren't the weight's."""
    member = inputs.integers.members[part.thread]
    has_changed = inputs.integers.has_changed[part.thread]
    weight = digits_of(inputs.integers.weight, part.thread)
    member.has_digits, member.has_changed = True, not member.is_written
    for tile in range(_num_tiles(layer)):
        has_scale, has_changed[tile] = find_scales(weight, tile, layer.num_outputs, scale)
        member.has_digits &= has_scale
        member.has_changed |= has_changed[tile]
    first, last = _tiles_of(layer, part.panels)
    for tile in range(first, last):
        if member.has_digits and (has_changed[tile] or not member.is_written):
            size = layer.num_inputs, layer.num_outputs
            write_columns(weight, _weight(layer, state), part.inputs, size, (tile, tile + 1))
    member.is_written = member.has_digits


@linked_jit(applies=_in_integers)
def forward(state, layer, inputs, workspace, part):
    """Write the thread's part of the layer's output."""
    values = Bytes(inputs.values, workspace.stride)
    if part.by_columns:
        transpose_bytes(values, part.num_rows, part.own_inputs, _transposed(layer, inputs))
    tiles = _own_tiles(inputs.integers, part.thread)
    tile_begin(tiles.registers)
    multiply_bytes(
        tiles, values, part.rows,
        digits_of(inputs.integers.weight, part.thread), _tiles_of(layer, part.panels),
        blocks_of(layer.num_inputs), Matrix(workspace.scratch, layer.output, workspace.stride * PANEL),
        Epilogue(state, layer.bias.start, FROM_BIAS, layer.has_relu),
    )  # fmt: skip
    tile_end()


@linked_jit(applies=_in_integers)
def find_grad_scales(state, layer, inputs, part, scale):
    """Find the scales of the gradient; where it has none, nor has the weight digits after this step."""
    member = inputs.integers.members[part.thread]
    grad = digits_of(inputs.integers.grad, part.thread)
    for tile in range(_num_tiles(layer)):
        has_scale, _ = find_scales(grad, tile, layer.num_outputs, scale)
        member.has_digits &= has_scale
    member.is_written = member.has_digits


@linked_jit(applies=_in_integers)
def update(state, layer, inputs, workspace, part):
    """Update the thread's part of the weight, and write its digits by the scales that the weight has had.

    The gradient's scales have been found.
    """
    integers, own, thread = inputs.integers, workspace.own, part.thread
    grad, weight = digits_of(integers.grad, thread), digits_of(integers.weight, thread)
    tiles, transposed = _own_tiles(integers, thread), _transposed(layer, inputs)
    if not part.by_columns:
        transpose_bytes(Bytes(inputs.values, workspace.stride), part.num_rows, part.own_inputs, transposed)
    size = layer.num_inputs, layer.num_outputs
    columns = _tiles_of(layer, part.panels)
    write_columns(
        grad, _grad(layer, workspace), (0, part.num_rows), (part.num_rows, layer.num_outputs), columns
    )
    largest = integers.weight.largest[thread]
    largest[:] = 0
    # columns behind the last tile stay 0
    own_stride = _INPUTS * PANEL
    own[: GROUP_PANELS * own_stride] = 0
    start, stop = part.inputs
    tile_begin(tiles.registers)
    for panel in range(part.panels[0], part.panels[1], GROUP_PANELS):
        columns = _tiles_of(layer, (panel, panel + GROUP_PANELS))
        for first in range(start, stop, _INPUTS):
            rows = first, min(first + _INPUTS, stop)
            output = Matrix(own, -panel * own_stride - first * PANEL, own_stride)
            epilogue = Epilogue(state, 0, FROM_ZERO, False)
            multiply_bytes(tiles, transposed, rows, grad, columns, blocks_of(part.num_rows), output, epilogue)
            for p in range(min(GROUP_PANELS, part.panels[1] - panel)):
                at = ((panel + p) * layer.num_inputs + first) * PANEL
                count = (rows[1] - first) * PANEL
                update_part(layer.weight, state, at, (own, p * own_stride), count, state.dtype.type(1))
            note_largest(_weight(layer, state), rows, columns, largest)
            write_columns(weight, _weight(layer, state), rows, size, columns)
    tile_end()
