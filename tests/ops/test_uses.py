"""What users do with parameters, optimizers and gradients around the functions: all of it as with torch."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from fastdl import functional, optim

pytestmark = pytest.mark.usefixtures("seed")
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
each_momentum = pytest.mark.parametrize("momentum", [0.0, 0.9])
# a function's results beside torch's after a few steps: roundings of terms of size 1
ROUNDINGS = 200


class Net(nn.Module):
    """Two layers whose functions are those of a module: fastdl.functional or torch.nn.functional."""

    def __init__(self, module, dtype=torch.float32):
        super().__init__()
        self.module = module
        generator = torch.Generator().manual_seed(0)
        sizes = ((8, 6), (8,), (3, 8), (3,))
        self.weight, self.bias, self.head, self.head_bias = (
            nn.Parameter(torch.randn(size, generator=generator, dtype=dtype) / 2) for size in sizes
        )

    def hidden(self, input):
        """Return the first layer's output."""
        return self.module.relu(self.module.linear(input, self.weight, self.bias))

    def forward(self, input):
        return self.module.linear(self.hidden(input), self.head, self.head_bias)


def _examples(dtype=torch.float32, rows=10):
    return torch.randn(rows, 6, dtype=dtype), torch.randint(3, (rows,))


def _pair(dtype=torch.float32, **options):
    """Return (net, optimizer, functions) of fastdl and of torch."""
    pair = []
    for module, kind in ((functional, optim.SGD), (F, torch.optim.SGD)):
        net = Net(module, dtype)
        pair.append((net, kind(net.parameters(), lr=0.1, **options), module))
    return pair


def _assert_same(ours, theirs):
    for our, their in zip(ours, theirs, strict=True):
        eps = torch.finfo(our.dtype).eps
        torch.testing.assert_close(our, their, rtol=0, atol=ROUNDINGS * eps)


def _train(net, optimizer, module, examples, steps=3):
    input, target = examples
    for _ in range(steps):
        optimizer.zero_grad()
        module.cross_entropy(net(input), target).backward()
        optimizer.step()


@each_dtype
@each_momentum
@pytest.mark.parametrize("foreach", [False, True])
def test_clip_grad_norm(foreach, momentum, dtype):
    examples = _examples(dtype)
    pair = _pair(dtype, momentum=momentum)
    norms = []
    for net, optimizer, module in pair:
        for _ in range(3):
            optimizer.zero_grad()
            module.cross_entropy(net(examples[0]), examples[1]).backward()
            norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.05, foreach=foreach))
            optimizer.step()
        nn.utils.clip_grad_value_(net.parameters(), 0.01)
    _assert_same(norms[:3], norms[3:])
    _assert_same(pair[0][0].parameters(), pair[1][0].parameters())


@each_dtype
@each_momentum
def test_gradient_accumulation(momentum, dtype):
    batches = [_examples(dtype) for _ in range(4)]
    pair = _pair(dtype, momentum=momentum)
    for net, optimizer, module in pair:
        for i, (input, target) in enumerate(batches):
            (module.cross_entropy(net(input), target) / 2).backward()
            if i % 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=i == 1)
    _assert_same(pair[0][0].parameters(), pair[1][0].parameters())


@pytest.mark.parametrize("has_inf", [False, True])
def test_grad_scaler_with_autocast_on_the_cpu(has_inf):
    examples = _examples()
    pair = _pair(momentum=0.9)
    scales = []
    for net, optimizer, module in pair:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for step in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = module.cross_entropy(net(examples[0]), examples[1])
            scaler.scale(loss).backward()
            if has_inf and step == 1:
                net.weight.grad[0, 0] = float("inf")
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        scales.append(scaler.get_scale())
    assert scales[0] == scales[1]
    _assert_same(pair[0][0].parameters(), pair[1][0].parameters())


@each_dtype
@each_momentum
@pytest.mark.parametrize("make", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_of_net_and_optimizer_goes_on_alone(make, momentum, dtype):
    examples = _examples(dtype)
    (net, optimizer, _), (torch_net, torch_optimizer, _) = _pair(dtype, momentum=momentum)
    net.module = torch_net.module = None
    _use(net, functional, optimizer, examples, 2)
    _use(torch_net, F, torch_optimizer, examples, 4)
    twin, twin_optimizer = make((net, optimizer))
    assert type(twin_optimizer) is optim.SGD
    _use(twin, functional, twin_optimizer, examples, 2)
    _assert_same(twin.parameters(), torch_net.parameters())
    _use(net, functional, optimizer, examples, 2)
    _assert_same(net.parameters(), torch_net.parameters())


def _use(net, module, optimizer, examples, steps):
    """Train a net that holds no module itself, as a pickle can't."""
    net.module = module
    _train(net, optimizer, module, examples, steps)
    net.module = None


@each_dtype
@each_momentum
@pytest.mark.parametrize(
    ("before", "after"), [("fastdl", "torch"), ("torch", "fastdl"), ("fastdl", "fastdl")]
)
def test_checkpoint_and_resume(before, after, momentum, dtype, tmp_path):
    examples = _examples(dtype)
    pair = dict(zip(("fastdl", "torch"), _pair(dtype, momentum=momentum, weight_decay=0.01), strict=True))
    again = dict(zip(("fastdl", "torch"), _pair(dtype), strict=True))
    net, optimizer, module = pair[before]
    _train(net, optimizer, module, examples, 2)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    resumed, resumed_optimizer, resumed_module = again[after]
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(kept["net"])
    resumed_optimizer.load_state_dict(kept["optimizer"])
    _train(resumed, resumed_optimizer, resumed_module, examples, 2)
    _train(net, optimizer, module, examples, 2)
    _assert_same(resumed.parameters(), net.parameters())


@pytest.mark.parametrize(
    "kind",
    [
        lambda params: torch.optim.Adam(params, lr=0.01),
        lambda params: torch.optim.AdamW(params, lr=0.01, foreach=True),
        lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=3, line_search_fn="strong_wolfe"),
    ],
)
def test_torchs_optimizers_over_the_functions(kind):
    examples = _examples(torch.float64)
    nets = [Net(functional, torch.float64), Net(F, torch.float64)]
    for net in nets:
        optimizer = kind(net.parameters())

        def closure(net=net, optimizer=optimizer):
            optimizer.zero_grad()
            loss = net.module.cross_entropy(net(examples[0]), examples[1])
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
    # Adam divides by the root of squares; a line search by differences, which many iterations make small
    for our, their in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(our, their, rtol=1e-7, atol=1e-7)


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:Trace had", "ignore:.*deprecated")
def test_jit_trace():
    input, target = _examples()
    net = Net(functional)
    traced = torch.jit.trace(net, (input,))
    other = torch.randn(4, 6)
    torch.testing.assert_close(traced(other), Net(F)(other))
    loss = torch.jit.trace(lambda logits: functional.cross_entropy(logits, target), (net(input).detach(),))
    logits = torch.randn(10, 3)
    torch.testing.assert_close(loss(logits), F.cross_entropy(logits, target))


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_export(is_dynamic):
    input, _ = _examples()
    rows = torch.export.Dim("rows", min=2, max=1000)
    shapes = ({0: rows},) if is_dynamic else None
    program = torch.export.export(Net(functional), (input,), dynamic_shapes=shapes)
    other = torch.randn(7 if is_dynamic else 10, 6)
    torch.testing.assert_close(program.module()(other), Net(F)(other))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("is_dynamic", [False, True])
def test_compile(backend, is_dynamic):
    torch._dynamo.reset()
    nets = [Net(functional), Net(F)]

    @torch.compile(backend=backend, dynamic=is_dynamic, fullgraph=True)
    def compute(input, target):
        return functional.cross_entropy(nets[0](input), target)

    for rows in (10, 7, 12) if is_dynamic else (10,):
        input, target = _examples(rows=rows)
        compute(input, target).backward()
        F.cross_entropy(nets[1](input), target).backward()
    grads = [[param.grad for param in net.parameters()] for net in nets]
    _assert_same(*grads)


def test_functional_call_with_vmap_over_an_ensemble():
    input, target = _examples()
    nets = [[Net(module) for _ in range(3)] for module in (functional, F)]
    results = []
    for group in nets:
        for i, net in enumerate(group):
            with torch.no_grad():
                net.weight.mul_(i + 1)
        params, buffers = torch.func.stack_module_state(group)
        base = copy.copy(group[0])

        def loss(params, buffers, base=base):
            logits = torch.func.functional_call(base, (params, buffers), (input,))
            return base.module.cross_entropy(logits, target)

        results.append(torch.func.vmap(torch.func.grad(loss))(params, buffers))
    torch.testing.assert_close(*results)


@each_dtype
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, dtype):
    input, target = _examples(dtype)
    grads = []
    for net, _, module in _pair(dtype):
        x = input.clone().requires_grad_()
        hidden = checkpoint(net.hidden, x, use_reentrant=use_reentrant)
        logits = checkpoint_sequential(
            [lambda h, net=net: net.module.linear(h, net.head, net.head_bias)],
            1,
            hidden,
            use_reentrant=use_reentrant,
        )
        module.cross_entropy(logits, target).backward()
        grads.append([x.grad, *(param.grad for param in net.parameters())])
    _assert_same(*grads)


@each_dtype
@pytest.mark.parametrize("pin_memory", [False])
def test_save_on_cpu(pin_memory, dtype):
    input, target = _examples(dtype)
    grads = []
    for net, _, module in _pair(dtype):
        with save_on_cpu(pin_memory=pin_memory):
            loss = module.cross_entropy(net(input), target) + module.mse_loss(net(input), input[:, :3])
        loss.backward()
        grads.append([param.grad for param in net.parameters()])
    _assert_same(*grads)


@each_dtype
def test_inference_mode_between_the_steps(dtype):
    examples = _examples(dtype)
    pair = _pair(dtype, momentum=0.9)
    for net, optimizer, module in pair:
        _train(net, optimizer, module, examples, 1)
        with torch.inference_mode():
            assert net(examples[0]).is_inference()
        _train(net, optimizer, module, examples, 1)
    _assert_same(pair[0][0].parameters(), pair[1][0].parameters())


def test_hooks_that_are_added_afterwards_see_the_gradients():
    input, target = _examples()
    seen = []
    for net, _, module in _pair():
        net.weight.register_hook(lambda grad: 2 * grad)
        net.bias.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad.clone()))
        hidden = net.hidden(input)
        hidden.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
        module.cross_entropy(module.linear(hidden, net.head, net.head_bias), target).backward()
        seen.append(net.weight.grad)
    _assert_same(seen[:2], seen[2:])


def test_a_scheduler_warns_of_nothing_and_changes_the_rate():
    examples = _examples()
    pair = _pair(momentum=0.9)
    for net, optimizer, module in pair:
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
        with warnings.catch_warnings(action="error"):
            for _ in range(4):
                _train(net, optimizer, module, examples, 1)
                scheduler.step()
    _assert_same(pair[0][0].parameters(), pair[1][0].parameters())
