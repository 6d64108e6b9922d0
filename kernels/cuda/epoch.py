"""A training step, or one of evaluation, as the launches that it is made of.

For one hidden layer a step has three: ``dense.forward`` of the hidden layer, ``head``, and
``dense.backward_weight`` of both. A softmax regression has the last two alone. Each further hidden layer adds
a forward and a ``dense.backward_data``; a last layer of many outputs has a forward of its own, and ``loss``
in the place of ``head``.

What one kernel has written the next one reads: the end of a kernel is the only barrier between blocks. So a
whole epoch of these launches, captured in a graph, is one launch for the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastdl.kernels.cuda import dense, head
from fastdl.kernels.cuda.dense import Examples, Layer, Step
from fastdl.kernels.cuda.head import MOST_OUTPUTS, Loss, Notes
from fastdl.kernels.cuda.launch import Array, Stream


def run_step(
    layers: Sequence[Layer],
    examples: Examples,
    loss: Loss,
    options: Array,
    notes: Notes,
    step: Step,
    trains: bool,
    stream: Stream,
) -> None:
    """Train on the rows of a step, or compute their losses alone.

    Parameters
    ----------
    layers : sequence of Layer
    examples : Examples
    loss : Loss
    options : (2 * layers, dense.NUM_OPTIONS)
    notes : Notes
        Gets each row's loss and outcome.
    step : Step
    trains : bool
        Whether the layers' parameters and momentum buffers are updated.
    stream : Stream
    """
    last = layers[-1]
    has_head = last.weight.shape[0] <= MOST_OUTPUTS
    source, scale = examples.X, examples.scale
    order: Array | None = examples.order
    for layer in layers[:-1] if has_head else layers:
        dense.forward(source, order, layer, scale, step, stream)
        source, order, scale = layer.output, None, 1.0
    if has_head:
        before = layers[-2] if len(layers) > 1 else None
        head.head(examples, before, last, loss, notes, step, trains, stream)
    else:
        head.loss(examples, last, loss, notes, step, trains, stream)
    if trains:
        # the head has computed the gradient of the layer before the last
        done = 2 if has_head else 1
        for index in range(len(layers) - done, 0, -1):
            dense.backward_data(layers[index], layers[index - 1], step, stream)
        dense.backward_weight(layers, examples, options, step, stream)
