"""The way from a call to the driver, without a GPU: the driver is replaced, everything before it is real."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: no launch was checked")

from cuda.core._kernel_arg_handler import ParamHolder

from fastdl.kernels import cuda as kernels
from fastdl.kernels import disk
from fastdl.kernels.cuda import launch
from fastdl.kernels.cuda.head import MOST_OUTPUTS
from fastdl.kernels.cuda.launch import KERNELS, Kernel, Stream
from fastdl.kernels.options import CrossEntropyOptions, SGDOptions
from tests.compile_report import build


def _at(address):
    return SimpleNamespace(data_ptr=lambda: address)


ARGUMENTS = {"values": _at(1), "output": _at(2), "masked": _at(3), "size": 4, "wide": True}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


class _Driver:
    """What is replaced: devices, streams, loading and launching. It keeps what it was asked for."""

    LEGACY_DEFAULT_STREAM = "the default stream"

    def __init__(self, real):
        self.capability, self.capturing = (9, 0), False
        self.launches, self.loaded = [], []
        self.LaunchConfig, self.Linker = real.LaunchConfig, real.Linker
        self.LinkerOptions = real.LinkerOptions
        self.ObjectCode = SimpleNamespace(from_ptx=real.ObjectCode.from_ptx, from_cubin=self._from_cubin)
        self.Stream = SimpleNamespace(from_handle=lambda handle: f"stream {handle}")

    def Device(self, ordinal):
        return SimpleNamespace(compute_capability=self.capability)

    def _from_cubin(self, code):
        assert code[:4] == b"\x7fELF"
        self.loaded.append(len(code))
        return SimpleNamespace(get_kernel=lambda name: name)

    def launch(self, stream, configuration, kernel, *arguments):
        self.launches.append((stream, configuration, kernel, arguments))


@pytest.fixture
def driver(monkeypatch):
    driver = _Driver(launch.core)
    monkeypatch.setattr(launch, "core", driver)
    monkeypatch.setattr(Stream, "is_capturing", lambda self: driver.capturing)
    launch.stream.cache_clear()
    yield driver
    launch.stream.cache_clear()


@pytest.fixture
def loaded(driver, monkeypatch):
    """Take every kernel for loaded, and return the launches."""
    for name, kernel in KERNELS.items():
        monkeypatch.setattr(kernel, "_loaded", {"sm_90a": name})
    return driver.launches


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_folders", lambda configuration: (tmp_path,))
    return tmp_path


def _kernel():
    """Return a kernel of its own beside the ones that ship."""
    shipped = KERNELS["relu_float32"]
    kernel = Kernel("relu_float32", shipped.function, shipped.threads, "float32")
    KERNELS["relu_float32"] = shipped
    return kernel


def test_a_kernel_is_compiled_and_loaded_once_for_each_architecture(driver, cache, monkeypatch):
    kernel, compiled = _kernel(), []
    ptx = Kernel.ptx
    monkeypatch.setattr(Kernel, "ptx", lambda self: compiled.append(self.name) or ptx(self))
    driver.capability = (9, 0)
    for handle in (0, 7, 7):
        kernel.launch(launch.stream(0, handle), 3, **ARGUMENTS)
    assert len(compiled) == len(driver.loaded) == 1
    driver.capability = (8, 6)
    kernel.launch(launch.stream(1, 0), 3, **ARGUMENTS)
    assert len(compiled) == len(driver.loaded) == 2
    names = sorted(path.name.split("-")[1] for path in cache.iterdir())
    assert names == ["sm_86", "sm_90a"], "one file for each architecture, and no temporary one"
    # another process finds the machine code on the disk
    _kernel().launch(launch.stream(0, 0), 3, **ARGUMENTS)
    assert len(compiled) == 2
    assert len(driver.loaded) == 3


@pytest.mark.parametrize("release", ["", "-cu12", "-cu13"])
@pytest.mark.parametrize(
    "package", ["nvidia-cuda-nvcc", "nvidia-nvjitlink", "nvidia-nvvm", "numba-cuda", "cuda-core"]
)
def test_another_release_of_what_makes_machine_code_has_files_of_its_own(package, release, monkeypatch):
    installed = {}

    def version(name):
        if name not in installed:
            raise ImportError(name)
        return installed[name]

    monkeypatch.setattr(launch, "version", version)
    digests = []
    for found in ("1.0", "1.1"):
        installed[f"{package}{release}"] = found
        launch._toolchain.cache_clear()
        digests.append(launch._toolchain())
    launch._toolchain.cache_clear()
    assert digests[0] != digests[1]


@pytest.mark.parametrize("variable", ["NUMBA_CUDA_DEBUGINFO", "CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX"])
def test_other_settings_of_cuda_have_files_of_their_own(variable, monkeypatch):
    launch._toolchain.cache_clear()
    before = launch._toolchain()
    monkeypatch.setenv(variable, "/elsewhere")
    launch._toolchain.cache_clear()
    assert launch._toolchain() != before
    launch._toolchain.cache_clear()


@pytest.mark.parametrize(
    "damage", [lambda code: code[: len(code) // 2], lambda code: b"", lambda code: code[::-1]]
)
def test_damaged_machine_code_is_made_anew(damage, driver, cache):
    _kernel().machine_code("sm_90a")
    (path,) = cache.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    code = _kernel().machine_code("sm_90a")
    assert code[:4] == b"\x7fELF"
    # written anew, and read by the next
    assert _kernel().machine_code("sm_90a") == code == disk.read(path.name)


def test_without_a_folder_to_write_to_kernels_still_load(driver, monkeypatch):
    monkeypatch.setattr(disk, "_folders", lambda configuration: ())
    _kernel().launch(launch.stream(0, 0), 1, **ARGUMENTS)
    assert len(driver.loaded) == len(driver.launches) == 1


def test_the_launch_goes_to_the_given_stream_with_the_given_blocks(driver, cache):
    kernel = _kernel()
    for handle in (0, 7):
        kernel.launch(launch.stream(0, handle), 3, **ARGUMENTS)
    streams, configurations, names, arguments = zip(*driver.launches, strict=True)
    assert streams == ("the default stream", "stream 7")
    assert {(config.grid, config.block) for config in configurations} == {((3, 1, 1), (kernel.threads, 1, 1))}
    assert set(names) == {"relu_float32"}
    assert set(arguments) == {(1, 2, 3, 4, 1)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": None}, r"relu_float32\(\) missing 1 required keyword-only argument: 'size'"),
        ({"length": 4}, r"relu_float32\(\) got an unexpected keyword argument 'length'"),
        ({"size": None, "sizes": 4}, r"relu_float32\(\) got an unexpected keyword argument 'sizes'"),
    ],
    ids=["missing", "unknown", "misspelt"],
)
def test_a_launch_with_a_wrong_argument_names_kernel_and_argument(loaded, changes, message):
    arguments = {key: value for key, value in (ARGUMENTS | changes).items() if value is not None}
    with pytest.raises(TypeError, match=message):
        KERNELS["relu_float32"].launch(launch.stream(0, 0), 1, **arguments)
    assert not loaded


def test_a_launch_with_an_argument_twice_or_by_position_names_it(loaded):
    kernel, stream = KERNELS["relu_float32"], launch.stream(0, 0)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'size'"):
        kernel.launch(stream, 1, **ARGUMENTS, **{"size": 4})
    with pytest.raises(TypeError, match="positional"):
        kernel.launch(stream, 1, *ARGUMENTS.values())
    assert not loaded


def test_a_launch_takes_its_arguments_in_any_order(loaded):
    stream = launch.stream(0, 0)
    for arguments in (ARGUMENTS, dict(reversed(ARGUMENTS.items()))):
        KERNELS["relu_float32"].launch(stream, 1, **arguments)
    assert loaded[0] == loaded[1]


@pytest.mark.parametrize("name", KERNELS)
def test_no_kernel_has_a_long_list_of_arguments(name):
    code = KERNELS[name].function.__code__
    assert code.co_argcount + code.co_kwonlyargcount <= 8


def test_one_stream_object_is_kept_for_each_handle_of_each_device(driver):
    assert launch.stream(0, 7) is launch.stream(0, 7)
    assert len({id(launch.stream(*key)) for key in ((0, 0), (0, 7), (1, 0), (1, 7))}) == 4


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((12, 1), "sm_121")]
)
def test_machine_code_is_for_the_devices_own_architecture(driver, capability, name):
    driver.capability = capability
    assert launch.stream(0, 0).architecture == name


def test_an_older_gpu_is_refused_by_name(driver):
    driver.capability = (7, 5)
    with pytest.raises(RuntimeError, match=r"compute capability 8\.0 or newer.*this one has 7\.5"):
        launch.stream(0, 0)


def test_a_kernel_that_a_capture_meets_first_says_what_to_do(driver, cache):
    kernel, stream = _kernel(), launch.stream(0, 7)
    driver.capturing = True
    with pytest.raises(RuntimeError, match="run the same step once before the capture"):
        kernel.launch(stream, 1, **ARGUMENTS)
    driver.capturing = False
    kernel.launch(stream, 1, **ARGUMENTS)
    driver.capturing = True
    kernel.launch(stream, 1, **ARGUMENTS)
    assert len(driver.launches) == 2


_BYTES = {"u64": ctypes.c_uint64, "f32": ctypes.c_float, "f64": ctypes.c_double}


def _packed(ptx, arguments):
    """Return the arguments as a kernel reads them from what cuda.core packs for the driver."""
    kinds = re.findall(r"\.param \.(\w+) \w+_param_\d+", ptx.partition("{")[0])
    assert len(kinds) == len(arguments)
    holder = ParamHolder(arguments)
    addresses = ctypes.cast(holder.ptr, ctypes.POINTER(ctypes.c_void_p))
    values = [_BYTES[kind].from_address(addresses[i]).value for i, kind in enumerate(kinds)]
    # a negative number is the unsigned one with the same bits
    return [value - (1 << 64) if value >= 1 << 63 else value for value in values]


def _calls(dtype):
    """Call every public function once, with all its options, and return what has to reach the kernel."""
    stream = launch.stream(0, 7)
    n, k, m = 6, 8, 5
    input, weight, bias = torch.randn(n, k), torch.randn(m, k), torch.randn(m)
    input, weight, bias = (tensor.to(dtype) for tensor in (input, weight, bias))
    output, grad_input, grad_weight, grad_bias = (
        torch.empty(*shape, dtype=dtype) for shape in ((n, m), (n, k), (m, k), (m,))
    )
    target = torch.zeros(n, dtype=torch.int64)
    loss = torch.empty(1, dtype=dtype)
    kernels.linear_forward(input, weight, bias, True, output, stream)
    yield (input, n, k, 1, 0, weight, m, k, 1, bias, 1, output, 0)
    kernels.linear_grad_input(output, None, weight, grad_input, stream)
    # rows of 5 numbers don't begin at multiples of 16 bytes
    yield (output, n, m, 0, 0, weight, m, k, 1, 0, 0, grad_input, 0)
    kernels.linear_grad_weight(output, output, input, grad_weight, grad_bias, stream)
    yield (output, n, m, 0, output, input, n, k, 1, 0, 0, grad_weight, grad_bias)
    kernels.relu_forward(input, grad_input, stream)
    yield (input, input, grad_input, n * k, 1)
    kernels.relu_backward(input, input, grad_input, stream)
    yield (input, input, grad_input, n * k, 1)
    options = CrossEntropyOptions(-100, 0.25, 1)
    kernels.cross_entropy_forward(output, target, bias, options, loss, None, None, stream)
    yield (output, target, bias, -100, 0.75, 0.05, 1, loss, 0, 0, n, m, 2, 1, 0)
    kernels.cross_entropy_backward(loss, output, target, -100, output, stream)
    yield (loss, output, target, -100, output, 1, n, m, 2, 1, 0)
    kernels.mse_loss_forward(input, input, 1, loss, None, stream)
    yield (input, input, 0, loss, 1 / (n * k), n * k, 1, 1)
    kernels.mse_loss_backward(loss, input, input, 2, grad_input, stream)
    yield (loss, input, input, 2.0, grad_input, n * k, 1, 1)
    table = [(weight.data_ptr(), grad_weight.data_ptr(), bias.data_ptr(), m * k, 1)]
    kernels.sgd(table, weight, SGDOptions(0.5, 0.25, 0.125, 2.0, True, False), stream)
    yield (*table[0], *[0] * 15, 0.5, 0.25, 0.125, 2.0, 1, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_argument_reaches_its_place_as_the_type_that_the_kernel_has_there(loaded, ahead, dtype):
    for expected in _calls(dtype):
        _, _, name, arguments = loaded[-1]
        assert name.endswith(str(dtype).partition(".")[2])
        wanted = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in expected]
        packed = _packed(ahead(build, name).result().ptx, arguments)
        exact = [np.float32(value) if isinstance(value, float) else value for value in wanted]
        assert packed in (wanted, exact)
    assert len(loaded) == 10


def _steps(dtype, examples, num_outputs):
    """Launch a training step and a small epoch of networks with these examples."""
    stream = launch.stream(0, 7)
    X, order = torch.zeros(8, 12).to(examples), torch.arange(8)
    reals = {"dtype": dtype}

    def layer(num_inputs, num_outputs, relu):
        weights, biases = (
            torch.zeros(2, num_outputs, num_inputs, **reals),
            torch.zeros(2, num_outputs, **reals),
        )
        outputs = torch.zeros(2, 4, num_outputs, **reals)
        return kernels.step.Layer(weights[0], biases[0], weights[1], biases[1], *outputs, relu)

    layers = [layer(12, 8, True), layer(8, 8, True), layer(8, num_outputs, False)]
    source = kernels.step.source_of(X, 0.25, True)
    loss = kernels.loss_row.Loss(
        kernels.loss_row.CROSS_ENTROPY, True, order, None, torch.zeros(num_outputs, **reals), 2.5,
        torch.zeros(2, **reals), -100, 0.875, 0.125,
    )  # fmt: skip
    updates = kernels.step.Updates(torch.zeros(6, len(SGDOptions._fields), **reals), torch.zeros(6).long())
    results = kernels.loss_row.RowResults(torch.zeros(8, **reals), order)
    step = kernels.step.Step(3, 4, order, *torch.zeros(3, dtype=torch.int64).unbind())
    kernels.epoch.run_step(layers, source, loss, updates, results, step, True, stream)
    target = torch.zeros(8, 1, **reals)
    examples = kernels.small.Examples(X, order, target, 0.25, 8, 3)
    kernels.small.run_small_epoch(layer(3, 1, False), examples, True, updates, target[0], 4, stream)


@pytest.mark.parametrize("num_outputs", [4, 40])
@pytest.mark.parametrize(
    ("dtype", "examples"), [(torch.float32, torch.uint8), (torch.float64, torch.float64)], ids=str
)
def test_every_argument_of_a_training_step_arrives_as_the_type_that_the_kernel_has_there(
    loaded, ahead, dtype, examples, num_outputs
):
    _steps(dtype, examples, num_outputs)
    has_head = num_outputs <= MOST_OUTPUTS
    assert len(loaded) == (6 if has_head else 8)
    for _, configuration, name, arguments in loaded:
        assert _packed(ahead(build, name).result().ptx, arguments) == [
            argument.item() if isinstance(argument, np.generic) else argument for argument in arguments
        ]
        assert configuration.grid[0] >= 1


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_a_loss_over_much_data_adds_up_the_blocks_sums_last(loaded, reduction):
    stream = launch.stream(0, 0)
    logits, target = torch.empty(5000, 10), torch.empty(5000, dtype=torch.int64)
    loss = torch.empty(5000 if reduction == 0 else 1)
    partial = torch.empty(kernels.cross_entropy_partial_sums(5000, 10))
    options = CrossEntropyOptions(-100, 0.0, reduction)
    kernels.cross_entropy_forward(logits, target, None, options, loss, None, partial, stream)
    names = [name.removesuffix("_float32") for _, _, name, _ in loaded]
    total = ["cross_entropy_total_weight"] if reduction == 1 else []
    last = ["add_partial_sums"] if reduction else []
    assert names == [*total, "cross_entropy_rows", *last]
    loaded.clear()
    partial = torch.empty(kernels.mse_loss_partial_sums(50000))
    loss = torch.empty(50000 if reduction == 0 else 1)
    kernels.mse_loss_forward(logits, logits, reduction, loss, partial, stream)
    names = [name.removesuffix("_float32") for _, _, name, _ in loaded]
    assert names == (["mse_loss_block_sums", "add_partial_sums"] if reduction else ["mse_loss_elements"])


def test_misaligned_and_ragged_arrays_are_never_called_wide():
    array = torch.empty(64)
    assert launch.is_wide(8, array) == 1
    assert launch.is_wide(6, array) == 0
    assert launch.is_wide(8, array, array[1:]) == 0
    assert launch.is_wide(8, array, None) == 1


def _import_with(setup):
    program = f"import sys, types, numba\n{setup}\nimport fastdl.kernels.cuda"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


def test_without_numba_cuda_the_import_says_what_to_install():
    message = _import_with("sys.modules['numba.cuda'] = None")
    assert message.startswith("ImportError: the CUDA kernels need numba-cuda, and numba.cuda is missing")
    assert "install fastdl[cu13], or fastdl[cu12]" in message


def test_numbas_own_deprecated_target_is_refused():
    message = _import_with(
        "numba.cuda = sys.modules['numba.cuda'] = types.ModuleType('numba.cuda')\n"
        "numba.cuda.implementation = 'Built-in'"
    )
    assert "numba.cuda is Numba's own deprecated CUDA target: install fastdl[cu13]" in message
