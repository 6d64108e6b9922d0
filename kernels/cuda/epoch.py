"""A training step, or one of evaluation, as the launches that it is made of.

For one hidden layer a step has three: ``dense.forward`` of the hidden layer, ``head``, and
``dense.backward_weight`` of both. A softmax regression has the last two alone. Each further hidden layer adds
a forward and a ``dense.backward_data``; a last layer of many outputs has a forward of its own, and
``output_loss`` instead of ``head``.

What one kernel has written the next one reads: the end of a kernel is the only barrier between blocks. So a
whole epoch of these launches, captured in a graph, is one launch for the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastdl.kernels.cuda import dense
from fastdl.kernels.cuda.head import MOST_OUTPUTS, head
from fastdl.kernels.cuda.launch import Stream
from fastdl.kernels.cuda.loss_row import Loss, RowResults
from fastdl.kernels.cuda.output_loss import output_loss
from fastdl.kernels.cuda.step import Layer, Source, Step, Updates, source_of


def run_step(
    layers: Sequence[Layer],
    examples: Source,
    loss: Loss,
    updates: Updates,
    results: RowResults,
    step: Step,
    trains: bool,
    stream: Stream,
) -> None:
    """Train on the rows of a step, or compute their losses alone.

    ``results`` gets each row's loss and outcome. Where it trains, the layers' parameters and momentum buffers
    are updated.
    """
    has_head = layers[-1].weight.shape[0] <= MOST_OUTPUTS
    inputs = examples
    for layer in layers[:-1] if has_head else layers:
        dense.forward(inputs, layer, step, stream)
        inputs = source_of(layer.output)
    if has_head:
        head(examples, layers, loss, results, step, trains, stream)
    else:
        output_loss(layers[-1], loss, results, step, trains, stream)
    if trains:
        # the head has computed the gradient of the layer before the last
        done = 2 if has_head else 1
        for index in range(len(layers) - done, 0, -1):
            dense.backward_data(layers[index], layers[index - 1], step, stream)
        dense.backward_weight(layers, examples, updates, step, stream)
