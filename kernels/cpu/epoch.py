"""A whole epoch of training, or of evaluation, in one call: order, forward, loss, backward, update.

Every thread of a run calls ``run_epoch`` with its number. A step has two phases with a barrier after each:

1. by rows of the batch: gather the examples, forward, loss, and the gradients back to the first layer. A
   thread needs no other's rows, so however deep the network is, nobody waits.
2. by inputs of each layer: the gradients of weights and biases, over all rows, and at once the update. No
   gradient of a weight is ever in memory.

A batch of few rows is split by columns in phase 1 too, with a barrier after each layer. Sums are never split,
so a result depends neither on the number of threads nor on their timing; and the parts may follow how fast
each thread is (``balance``).

Zeros of the examples are skipped while what they are multiplied with is finite. Each thread notes whether
what it wrote is; all read the notes behind the next barrier, and none is written anew before the next.

Floor of a step, N rows, for each layer of K inputs and M outputs: 6 N K M FLOPs (4 for the first layer, less
the share of its inputs that is 0), and the weights read twice and written once.
"""

from __future__ import annotations

import numpy as np

from fastdl.kernels.cpu import cross_entropy, dense
from fastdl.kernels.cpu.balance import find_bounds, part_of, read_clock, record_speed
from fastdl.kernels.cpu.barrier import STEPS, wait
from fastdl.kernels.cpu.inputs import (
    begin_run,
    find_part,
    forward_first,
    gather_batch,
    note_grad,
    update_first,
)
from fastdl.kernels.cpu.intrinsics import TILE, Matrix
from fastdl.kernels.cpu.layout import CROSS_ENTROPY, INTEGER, Batch, Workspace
from fastdl.kernels.cpu.panels import panel_of, panels_of
from fastdl.kernels.cpu.parallel import share
from fastdl.kernels.cpu.reduction import MEAN
from fastdl.kernels.jit import inlined_jit, jit, linked_jit
from fastdl.kernels.options import CrossEntropyOptions

_VECTORS = TILE.vectors


@inlined_jit
def _share_of_rows(count, bounds, thread, lanes):
    """Return a thread's rows: whole blocks of lanes, as blocks are transposed whole."""
    start, stop = part_of((count + lanes - 1) // lanes, bounds, thread)
    return start * lanes, min(stop * lanes, count)


@inlined_jit
def _total_weight(loss, batch, num_classes):
    """Return what the mean over a batch divides by: the sum of its rows' class weights."""
    total = 0.0
    for n in range(batch.first, batch.first + batch.size):
        label = loss.labels[batch.order[n]]
        if label != loss.ignore_index and 0 <= label < num_classes:
            total += loss.class_weight[label] if loss.class_weight.size > 0 else 1.0
    return total


@inlined_jit
def _squared_error_block(columns, loss, rows, scale, factor, loss_sums):
    """Do for the squared error what ``cross_entropy_block`` does; the losses are added, factor times."""
    for c in range(columns.shape[0] - cross_entropy.ROW_SUMS):
        column = columns[c]
        for n in range(rows.size):
            difference = column[n] - loss.targets[rows[n], c]
            loss_sums[n] += factor * (difference * difference)
            column[n] = scale * difference


@linked_jit
def _loss_rows(layer, workspace, loss, batch, rows, epoch, member):
    """Write the gradient of the last layer's product for some rows; add to their losses and right answers."""
    width = layer.num_outputs
    scratch = workspace.scratch
    panel = panel_of(scratch)
    panel_stride = workspace.stride * panel
    is_classifier = loss.kind == CROSS_ENTROPY
    # a mean counts for as many rows as the batch has; over rows without weight it is NaN
    scale = factor = 1.0
    if loss.is_mean and is_classifier:
        total = _total_weight(loss, batch, width)
        scale, factor = 1.0 / total, batch.size / total if total != 0 else np.nan
    elif loss.is_mean:
        scale, factor = 1.0 / (batch.size * width), 1.0 / width
    block = max(1, min(cross_entropy.block_rows(width), rows[1] - rows[0]))
    columns = np.empty((width + cross_entropy.ROW_SUMS, block), scratch.dtype)
    losses, labels = np.empty(block, scratch.dtype), np.empty(block, np.int64)
    best = np.empty(block, np.int32)
    options = CrossEntropyOptions(loss.ignore_index, loss.label_smoothing, int(MEAN))
    for start in range(rows[0], rows[1], block):
        size = min(block, rows[1] - start)
        sums = epoch.loss_sums[start : start + size]
        cross_entropy.read_block(scratch, layer.output + start * panel, panel, panel_stride, size, columns)
        if is_classifier:
            for n in range(size):
                row = batch.order[batch.first + start + n]
                label = loss.labels[row]
                if label != loss.ignore_index and not 0 <= label < width:
                    # the run ends in an error, until which any class will do
                    member.wrong_row, label = min(member.wrong_row, row), 0
                labels[n] = label
            cross_entropy.cross_entropy_block(
                columns, labels[:size], loss.class_weight, options, scale, losses, best, epoch.trains
            )
            for n in range(size):
                sums[n] += losses[n] * factor
                member.num_correct += best[n] == labels[n]
        else:
            order = batch.order[batch.first + start :][:size]
            _squared_error_block(columns, loss, order, scratch.dtype.type(2 * scale), factor, sums)
        if epoch.trains:
            cross_entropy.write_block(columns, size, scratch, layer.grad + start * panel, panel, panel_stride)
    if epoch.trains:
        dense.mask_by_relu(layer, workspace, rows, (0, panels_of(width, panel)))


@jit
def run_epoch(thread, team, net, examples, loss, epoch, inputs, workspace):
    """Run one thread's part of an epoch; the threads of a run call this at the same time.

    Besides the thread's number, the arguments are ``team.Shared`` and the records of ``layout``.
    """
    layers, members, order, batch_size = net.layers, team.members, epoch.order, epoch.batch_size
    by_columns = epoch.by_columns
    own = Workspace(workspace.scratch, workspace.stride, workspace.own[thread])
    num_layers, num_threads = layers.shape[0], members.size
    panel = panel_of(workspace.scratch)
    lanes = panel // _VECTORS
    bounds = np.empty(num_threads + 1)
    one, scale = net.state.dtype.type(1), net.state.dtype.type(examples.scale)
    for step in range((order.size + batch_size - 1) // batch_size):
        first = step * batch_size
        count = min(batch_size, order.size - first)
        batch = Batch(order, first, count)
        find_bounds(members, bounds)
        own_rows = _share_of_rows(count, bounds, thread, lanes)
        part = find_part(layers[0], inputs, by_columns, count, own_rows, bounds, thread)
        if step == 0:
            begin_run(net, inputs, part)
            if inputs.mode == INTEGER and not wait(team, thread):
                return
        started: int = read_clock()
        # 1: the batch
        reads_others = gather_batch(net, examples, inputs, batch, part, own.stride, members)
        if (by_columns or reads_others) and not wait(team, thread):
            return
        # 2: forward
        forward_first(net, inputs, scale, own, part)
        if (by_columns or part.by_columns) and not wait(team, thread):
            return
        for index in range(1, num_layers):
            rows, panels = own_rows, (0, panels_of(layers[index].num_outputs, panel))
            if by_columns and not layers[index].is_skinny:
                rows, panels = (0, count), share(panels[1], thread, num_threads)
            source = Matrix(own.scratch, layers[index - 1].output, own.stride)
            dense.forward(layers[index], source, net.state, own, rows, panels, one)
            if by_columns and not wait(team, thread):
                return
        # 3: loss
        _loss_rows(layers[num_layers - 1], own, loss, batch, own_rows, epoch, members[thread])
        if epoch.trains:
            # 4: gradients back to the first layer
            rows, panels = own_rows, (0, panels_of(layers[num_layers - 1].num_outputs, panel))
            for index in range(num_layers - 1, 0, -1):
                panels = (0, panels_of(layers[index].num_inputs, panel))
                if by_columns:
                    if not wait(team, thread):
                        return
                    rows, panels = (0, count), share(panels[1], thread, num_threads)
                dense.backward_data(layers[index], layers[index - 1], net.state, own, count, rows, panels)
            note_grad(net, inputs, own, rows, panels, part, members)
            ticks = read_clock() - started
            if not wait(team, thread):
                return
            started = read_clock()
            # 5: weights and biases
            next_count = max(0, min(batch_size, order.size - first - count))
            next_rows = _share_of_rows(next_count, bounds, thread, lanes)
            upcoming = dense.Upcoming(
                examples.X, order, first + count + next_rows[0], first + count + next_rows[1]
            )
            for index in range(num_layers):
                layer = layers[index]
                panels = part_of(panels_of(layer.num_outputs, panel), bounds, thread)
                dense.backward_bias(layer, net.state, own, count, panels)
                if not layer.weight.trains:
                    continue
                if index == 0:
                    update_first(net, inputs, scale, own, part, members, upcoming)
                    continue
                source = Matrix(own.scratch, layers[index - 1].output, own.stride)
                panels = part_of(panels_of(layer.num_inputs, panel), bounds, thread)
                dense.backward_weight(layer, source, net.state, own, count, panels, one)
            if not by_columns:
                record_speed(members, thread, bounds, ticks + read_clock() - started)
        if thread == 0:
            team.counters[STEPS] = step + 1
        if not wait(team, thread):
            return
        # others read this again behind the next barrier
        if thread == 0 and epoch.trains:
            for index in range(num_layers):
                layers[index].weight.is_fresh = False
                layers[index].bias.is_fresh = False
