"""What people do with modules in PyTorch, done on the kernels: accelerated nets, and fastdl's own modules.

float64 throughout, so torch's default tolerance for it, 1e-7, covers sums in another order.
"""

from __future__ import annotations

import copy
import functools
import io
import multiprocessing
import os
import pickle
import shutil
import traceback

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fastdl
from fastdl import models, optim
from fastdl import nn as fastdl_nn

pytestmark = pytest.mark.usefixtures("seed")


def plain_net(dtype=torch.float64):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    ).to(dtype)


def _accelerated(plain):
    return fastdl.accelerate(copy.deepcopy(plain), report=None)


def _model(plain):
    net = models.MLP(12, 3, (8, 8)).to(next(plain.parameters()).dtype)
    net.load_state_dict(plain.state_dict())
    return net


def _modules(plain):
    net = nn.Sequential(
        nn.Flatten(), fastdl_nn.Linear(12, 8), fastdl_nn.ReLU(), fastdl_nn.LinearReLU(8, 8), nn.Identity(),
        fastdl_nn.Linear(8, 3),
    ).to(next(plain.parameters()).dtype)  # fmt: skip
    net.load_state_dict(plain.state_dict())
    return net


KINDS = {"accelerated": _accelerated, "model": _model, "modules": _modules}


@pytest.fixture(params=KINDS)
def nets(request, seed):
    """Return a net on the kernels and its plain twin."""
    plain = plain_net()
    return KINDS[request.param](plain), plain


def batch(num_examples=7):
    return torch.randn(num_examples, 3, 4).double(), torch.randint(3, (num_examples,))


def step(net, optimizer, input, target, loss=None):
    optimizer.zero_grad()
    value = (loss or nn.functional.cross_entropy)(net(input), target)
    value.backward()
    optimizer.step()
    return value.detach()


def assert_same_training(nets, optimizers, num_steps=4):
    for _ in range(num_steps):
        input, target = batch()
        losses = [
            step(net, optimizer, input, target) for net, optimizer in zip(nets, optimizers, strict=True)
        ]
        torch.testing.assert_close(*losses)
    assert_same_parameters(*nets)


def assert_same_parameters(ours, theirs):
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()))


@pytest.mark.parametrize("optimizer", [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop,
    lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
], ids=["SGD", "fastdl SGD", "Adam", "AdamW", "RMSprop", "foreach"])  # fmt: skip
def test_torchs_optimizers_train_the_modules(nets, optimizer):
    assert_same_training(nets, [optimizer(net.parameters()) for net in nets])


def test_lbfgs_trains_the_modules(nets):
    input, target = batch(20)
    for net in nets:
        optimizer = torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=5, line_search_fn="strong_wolfe")

        def closure(net=net, optimizer=optimizer):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(input), target)
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
    # the line search amplifies what the order of sums leaves
    torch.testing.assert_close(list(nets[0].parameters()), list(nets[1].parameters()), rtol=1e-5, atol=1e-7)


def _copied(net, optimizer):
    return copy.deepcopy((net, optimizer))


def _pickled(net, optimizer):
    return pickle.loads(pickle.dumps((net, optimizer)))


def _saved(net, optimizer):
    buffer = io.BytesIO()
    torch.save((net, optimizer), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("clone", [_copied, _pickled, _saved])
@pytest.mark.parametrize("kind", [torch.optim.SGD, optim.SGD])
def test_a_copy_of_net_and_optimizer_goes_on_alone(nets, kind, clone):
    optimizers = [kind(net.parameters(), lr=0.1, momentum=0.9) for net in nets]
    assert_same_training(nets, optimizers)
    ours, optimizer = clone(nets[0], optimizers[0])
    before = copy.deepcopy(nets[0].state_dict())
    assert_same_training((ours, nets[1]), (optimizer, optimizers[1]))
    torch.testing.assert_close(nets[0].state_dict(), before, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_resumes_fit_where_it_was(kind, dtype, compiled):
    X, y = torch.randn(50, 3, 4, dtype=dtype), torch.randint(3, (50,))

    def start():
        net = KINDS[kind](plain_net(dtype))
        return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)

    def train(net, optimizer, epochs, generator):
        return fastdl.fit(
            net, nn.CrossEntropyLoss(), optimizer, X, y, epochs=epochs, batch_size=8, generator=generator,
            compiled=compiled, progress=False,
        ).train_loss  # fmt: skip

    net, optimizer = start()
    saved = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), saved)
    generator = torch.Generator().manual_seed(5)
    expected = train(net, optimizer, 4, generator)

    history = []
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        saved.seek(0)
        net_state, optimizer_state = torch.load(saved)
        resumed, optimizer = start()
        resumed.load_state_dict(net_state)
        optimizer.load_state_dict(optimizer_state)
        history += train(resumed, optimizer, 2, generator)
        saved = io.BytesIO()
        torch.save((resumed.state_dict(), optimizer.state_dict()), saved)
    assert history == expected
    torch.testing.assert_close(resumed.state_dict(), net.state_dict(), rtol=0, atol=0)


def test_an_averaged_model(nets):
    averaged = [
        swa_utils.AveragedModel(net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9)) for net in nets
    ]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    for _ in range(3):
        assert_same_training(nets, optimizers, 1)
        for model, net in zip(averaged, nets, strict=True):
            model.update_parameters(net)
    input, _ = batch()
    torch.testing.assert_close(averaged[0](input), averaged[1](input))
    assert not torch.equal(averaged[0](input), nets[0](input))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(nets, use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, net, in_parts):
            super().__init__()
            self.net, self.in_parts = net, in_parts

        def forward(self, input):
            if self.in_parts:
                return checkpoint_sequential(self.net, 2, input, use_reentrant=use_reentrant)
            return checkpoint(self.net, input, use_reentrant=use_reentrant)

    for in_parts in (False, True):
        results = []
        input, _ = batch()
        for net in (*nets, Checkpointed(nets[0], in_parts), Checkpointed(nets[1], in_parts)):
            net.zero_grad()
            leaf = input.clone().requires_grad_()
            net(leaf).square().sum().backward()
            results.append([leaf.grad, *(p.grad.clone() for p in net.parameters())])
        for result in results[1:]:
            torch.testing.assert_close(result, results[0])


def test_activations_saved_on_the_cpu(nets):
    class Saved(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, input):
            with torch.autograd.graph.save_on_cpu():
                return self.net(input)

    wrapped = [Saved(net) for net in nets]
    assert_same_training(wrapped, [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets])


def test_inference_mode(nets):
    input, target = batch()
    expected = nets[1](input)
    with torch.inference_mode():
        output = nets[0](input)
        assert output.is_inference()
        loss = fastdl_nn.CrossEntropyLoss()(output, target)
        inference_input = torch.ones(7, 12).double()
    torch.testing.assert_close(output.clone(), expected.detach())
    torch.testing.assert_close(loss.clone(), nn.functional.cross_entropy(expected, target).detach())
    # an inference tensor as the input of a net that trains is torch's error
    for net in nets:
        with pytest.raises(RuntimeError, match="Inference tensors"):
            net(inference_input)


def test_accumulated_and_clipped_gradients(nets):
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.5) for net in nets]
    for _ in range(3):
        batches = [batch() for _ in range(3)]
        norms = []
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            for input, target in batches:
                nn.functional.cross_entropy(net(input), target).backward()
            norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.1))
            nn.utils.clip_grad_value_(net.parameters(), 0.05)
            optimizer.step()
        assert norms[1] > 0.1
        torch.testing.assert_close(*norms)
    assert_same_parameters(*nets)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, fastdl_nn.CrossEntropyLoss])
def test_grad_scaler_and_autocast(nets, loss):
    optimizers = [torch.optim.SGD(net.float().parameters(), lr=0.1) for net in nets]
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) for _ in nets]
    compute_loss = loss()
    for _ in range(3):
        input, target = batch()
        for net, optimizer, scaler in zip(nets, optimizers, scalers, strict=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = net(input.float())
                assert output.dtype == torch.bfloat16
                value = compute_loss(output, target)
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    # under autocast everything is torch's, so bit by bit the same
    torch.testing.assert_close(list(nets[0].parameters()), list(nets[1].parameters()), rtol=0, atol=0)


def test_grad_scaler_skips_a_step_that_overflows(nets):
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    for net, optimizer in zip(nets, optimizers, strict=True):
        before = copy.deepcopy(net.state_dict())
        scaler = torch.amp.GradScaler("cpu")
        input, target = batch()
        scaler.scale(nn.functional.cross_entropy(net(input * float("inf")), target)).backward()
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_gradients_of_each_example_by_vmap(nets):
    input, target = batch()
    grads = []
    for net in nets:
        parameters = {name: p.detach() for name, p in net.named_parameters()}

        def loss(parameters, example, label, net=net):
            return nn.functional.cross_entropy(
                functional_call(net, parameters, (example[None],)), label[None]
            )

        grads.append(vmap(grad(loss), in_dims=(None, 0, 0))(parameters, input, target))
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("kind", KINDS)
def test_an_ensemble_by_vmap(kind):
    plain = [plain_net() for _ in range(3)]
    ours = [KINDS[kind](net) for net in plain]
    parameters, buffers = stack_module_state(ours)
    base = copy.deepcopy(ours[0]).to("meta")
    input, _ = batch()
    outputs = vmap(lambda p, b: functional_call(base, (p, b), (input,)))(parameters, buffers)
    torch.testing.assert_close(outputs, torch.stack([net(input) for net in plain]))


def test_functional_call_uses_the_given_parameters(nets):
    input, _ = batch()
    doubled = {name: p.detach() * 2 for name, p in nets[1].named_parameters()}
    torch.testing.assert_close(*(functional_call(net, doubled, (input,)) for net in nets))
    torch.testing.assert_close(nets[0](input), nets[1](input))


@pytest.mark.parametrize("strict", [True, False])
def test_export(nets, strict):
    input, _ = batch()
    expected = nets[1](input)
    program = torch.export.export(nets[0], (input,), strict=strict)
    torch.testing.assert_close(program.module()(input), expected)


def test_export_with_a_dynamic_batch_and_unflattened():
    plain = plain_net()
    net = _accelerated(plain)
    input, _ = batch()
    program = torch.export.export(net, (input,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    other, _ = batch(11)
    torch.testing.assert_close(program.module()(other), plain(other))
    torch.testing.assert_close(torch.export.unflatten(program)(other), plain(other))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*Trace had nondeterministic nodes")
def test_jit_trace(nets):
    input, _ = batch()
    traced = torch.jit.trace(nets[0], (input,))
    saved = io.BytesIO()
    torch.jit.save(traced, saved)
    saved.seek(0)
    other, _ = batch()
    for module in (traced, torch.jit.load(saved)):
        torch.testing.assert_close(module(other), nets[1](other))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("inside", [False, True])
def test_jit_script_of_an_accelerated_net(inside):
    plain = plain_net()
    net = _accelerated(plain)
    if inside:
        net = nn.Sequential(net)
    input, _ = batch()
    torch.testing.assert_close(torch.jit.script(net)(input), plain(input))


@pytest.fixture
def graphs():
    """Return the list of the graphs that torch.compile makes with the backend of that name."""
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_makes_one_graph_for_all_batches(nets, graphs, dynamic):
    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(nets[0], backend=backend, fullgraph=True, dynamic=dynamic)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    for num_examples in (7, 7, 9, 12, 5):
        input, target = batch(num_examples)
        torch.testing.assert_close(
            step(compiled, optimizers[0], input, target), step(nets[1], optimizers[1], input, target)
        )
    assert_same_parameters(*nets)
    # without dynamic=True, the second batch size is torch's reason to compile once more
    assert len(graphs) == (1 if dynamic else 2)


def test_compile_honours_a_hook_and_an_edit(graphs):
    plain = plain_net()
    net = _accelerated(plain)
    input, _ = batch()
    for model in (net, plain):
        model[1].register_forward_hook(lambda module, args, output: output + 1)
        model[4] = nn.Tanh()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input), plain(input))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler for inductor")
def test_inductor_on_the_cpu(graphs):
    plain = plain_net()
    net = _accelerated(plain)
    compiled = torch.compile(net, fullgraph=True)
    input, target = batch()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (net, plain)]
    for _ in range(2):
        torch.testing.assert_close(
            step(compiled, optimizers[0], input, target), step(plain, optimizers[1], input, target)
        )
    assert_same_parameters(net, plain)


def test_data_parallel_without_a_gpu_is_the_module(nets):
    if torch.cuda.is_available():
        pytest.skip("with a GPU it replicates the module there")
    wrapped = [nn.DataParallel(net) for net in nets]
    assert_same_training(wrapped, [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets])


def _in_rank(rank, num_ranks, store, results):
    try:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
        torch.manual_seed(3)
        mesh = init_device_mesh("cpu", (num_ranks,))
        for kind in KINDS.values():
            for wrap in (_ddp, _fsdp2_whole, _fsdp2_by_layer):
                _train_distributed(functools.partial(wrap, mesh), kind, rank, num_ranks)
        dist.destroy_process_group()
        results.put(None)
    except BaseException:
        results.put(traceback.format_exc())
        raise


def _train_distributed(wrap, kind, rank, num_ranks):
    plain = plain_net()
    nets = wrap(kind(plain)), wrap(plain)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in nets]
    for _ in range(3):
        input, target = batch(4 * num_ranks)
        mine = slice(4 * rank, 4 * rank + 4)
        losses = [
            step(net, optimizer, input[mine], target[mine])
            for net, optimizer in zip(nets, optimizers, strict=True)
        ]
        torch.testing.assert_close(*losses)
    parameters = [[getattr(p, "full_tensor", lambda p=p: p)() for p in net.parameters()] for net in nets]
    torch.testing.assert_close(*parameters)


def _ddp(mesh, net):
    return DistributedDataParallel(net)


def _fsdp2_whole(mesh, net):
    return fully_shard(net, mesh=mesh)


def _fsdp2_by_layer(mesh, net):
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
@pytest.mark.parametrize("num_ranks", [2])
def test_ddp_and_fsdp2_over_gloo(num_ranks, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    ranks = [
        context.Process(target=_in_rank, args=(rank, num_ranks, tmp_path / "store", results))
        for rank in range(num_ranks)
    ]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(timeout=120)
            assert rank.exitcode is not None, "a rank hangs"
            assert not results.empty()
            assert results.get() is None
    finally:
        for rank in ranks:
            rank.kill()
