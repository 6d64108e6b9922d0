"""The command line as a user runs it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastdl import data, models, plots, programs
from fastdl.cli import app
from fastdl.cuda_arrays import DeviceUnavailableError
from fastdl.files import make_folder
from fastdl.training import evaluate

ROOT = Path(__file__).parent.parent
FILES = {"history.json", "curves.png", "predictions.png", "weights.safetensors"}
COMMAND = [sys.executable, "-m", "fastdl"]
# wide enough that no line of rich's is broken
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}


@pytest.fixture(scope="module")
def garments():
    return data.garments()


@pytest.fixture
def images(garments, monkeypatch):
    """Save each command the two seconds that garments take to draw."""
    monkeypatch.setattr(data, "load", lambda name, root, notify: garments)


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def pictures_are_drawn(folder):
    return all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))


@pytest.mark.parametrize("impl", ["scratch", "concise", "fused", "compiled"])
def test_train_linear_finds_the_plane_and_fills_the_folder(impl, tmp_path):
    result = invoke("train", "linear", "--impl", impl, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert pictures_are_drawn(tmp_path)
    saved = json.loads((tmp_path / "history.json").read_text())
    assert saved["settings"]["impl"] == impl
    assert saved["settings"] | {"epochs": 3, "lr": 0.03, "batch_size": 10} == saved["settings"]
    assert len(saved["test_loss"]) == 3
    weights = load_file(tmp_path / "weights.safetensors")
    assert "true_w - w: [" in result.stdout
    # the noise of 0.01 over 1,000 points, and three epochs of noisy steps
    torch.testing.assert_close(weights["0.weight"], torch.tensor([[2.0, -3.4]]), rtol=0, atol=0.01)
    torch.testing.assert_close(weights["0.bias"], torch.tensor([4.2]), rtol=0, atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["softmax", "mlp"])
def test_train_images_alike_in_every_implementation(model, images, garments, tmp_path):
    saved = {}
    for impl in ("scratch", "concise", "fused", "compiled"):
        folder = tmp_path / impl
        options = ["--examples", 600, "--epochs", 2, "--batch-size", 64, "--seed", 3, "--out", folder]
        result = invoke("train", model, "--impl", impl, *options)
        assert result.exit_code == 0, result.output
        assert "test accuracy" in result.stdout
        assert {path.name for path in folder.iterdir()} == FILES
        saved[impl] = json.loads((folder / "history.json").read_text())
        net = {"softmax": models.SoftmaxRegression, "mlp": models.MLP}[model]()
        net.load_state_dict(load_file(folder / "weights.safetensors"))
        scores = evaluate(net, garments.X_test[:600], garments.y_test[:600])
        assert scores.accuracy == pytest.approx(saved[impl]["test_accuracy"][-1], abs=0.005)
    for impl in ("scratch", "fused"):
        # twenty steps from the same start in the same order, in float32
        assert saved[impl]["train_loss"] == pytest.approx(saved["concise"]["train_loss"], rel=1e-4)


def test_every_option_reaches_the_run(images, tmp_path):
    result = invoke(
        *("train", "mlp", "--impl", "fused", "--epochs", 1, "--lr", 0.05, "--batch-size", 100),
        *("--hidden-units", 12, "--momentum", 0.9, "--weight-decay", 0.001, "--seed", 5, "--threads", 1),
        *("--data", "garments", "--examples", 300, "--out", tmp_path),
    )
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "history.json").read_text())["settings"]
    machine = settings.pop("machine")
    assert machine["threads"] == 1
    assert settings == {
        **{
            "model": "mlp",
            "impl": "fused",
            "data": "garments",
            "device": "cpu",
            "epochs": 1,
            "lr": 0.05,
            "batch_size": 100,
        },
        **{"num_hiddens": 12, "momentum": 0.9, "weight_decay": 0.001, "seed": 5, "examples": 300},
    }
    assert load_file(tmp_path / "weights.safetensors")["1.weight"].shape == (12, 784)


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("model", ["linear", "softmax"])
@pytest.mark.parametrize("option", ["--momentum", "--weight-decay"])
def test_scratch_says_that_it_has_only_the_plain_update(model, option, tmp_path):
    result = invoke("train", model, "--impl", "scratch", option, 0.5, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "no momentum and no weight decay" in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["train"],
        ["train", "cnn"],
        ["train", "linear", "--epochs", "0"],
        ["train", "mlp", "--impl", "magic"],
        ["train", "linear", "--hidden-units", "3"],
        ["reproduce", "cnn"],
        ["train", "linear", "--lr", "nan"],
        ["train", "linear", "--lr", "inf"],
        ["train", "linear", "--momentum", "inf"],
        ["train", "linear", "--weight-decay", "inf"],
        ["train", "linear", "--seed", str(2**70)],
        ["reproduce", "linear", "--seed", str(2**70)],
        # torch starts as many threads as it is told to, and the process dies of them
        ["train", "linear", "--threads", "100000"],
    ],
)
def test_wrong_usage_exits_with_two(arguments):
    assert invoke(*arguments).exit_code == 2


def test_a_run_that_diverges_says_so_and_is_saved(tmp_path):
    folder = tmp_path / "[a folder]"
    result = invoke("train", "linear", "--impl", "fused", "--lr", 1e6, "--out", folder)
    assert result.exit_code == 0, result.output
    assert {path.name for path in folder.iterdir()} == FILES
    assert "true_w - w: [nan, nan]" in result.stdout
    assert f"Saved to {folder}: history.json" in result.stdout


@pytest.mark.slow
def test_ctrl_c_leaves_the_epochs_done_so_far(tmp_path):
    folder = tmp_path / "out"
    command = [*COMMAND, "train", "linear", "--impl", "concise", "--epochs", "1000000", "--out", str(folder)]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        # a line for each finished epoch
        for _ in range(3):
            assert process.stderr.readline()
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted after" in stderr
    assert "Traceback" not in stderr
    assert {path.name for path in folder.iterdir()} == FILES
    saved = json.loads((folder / "history.json").read_text())
    assert len(saved["train_loss"]) == len(saved["test_loss"]) >= 3
    assert f"Interrupted after {len(saved['train_loss'])} of 1000000 epochs" in stderr
    assert "Saved to" in stdout


@pytest.mark.slow
def test_an_output_folder_that_cannot_be_made_is_one_sentence_before_the_training(tmp_path):
    (tmp_path / "file").touch()
    command = [*COMMAND, "train", "linear", "--out", str(tmp_path / "file" / "out")]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.startswith("fastdl: ")
    assert str(tmp_path / "file") in result.stderr
    assert len(result.stderr.splitlines()) == 1


def run_command(*arguments, limit=None, **variables):
    """Run the command line in a process of its own, in which no file may be longer than `limit`."""

    def forbid():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env=ENVIRONMENT | variables,
        preexec_fn=None if limit is None else forbid,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("command", [["train", "linear"], ["reproduce", "linear"]])
@pytest.mark.parametrize("kind", ["a file", "in a file", "a link that leads nowhere"])
def test_an_output_folder_that_is_none_is_named_before_the_training(command, kind, tmp_path):
    path = tmp_path / "taken"
    if kind == "a link that leads nowhere":
        path.symlink_to(tmp_path / "absent" / "deeper")
    else:
        path.write_text("mine")
    result = invoke(*command, "--out", path / "out" if kind == "in a file" else path)
    assert isinstance(result.exception, OSError)
    assert result.exception.filename.startswith(str(path))
    assert result.stderr == "", "nothing was trained"
    assert path.is_symlink() or path.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_without_permission_is_named_before_anything_is_written(tmp_path):
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(65534, 65534, 65534)
            make_folder(Path("/"))
        except PermissionError as error:
            os._exit(error.filename == "/")
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("limit", [10, 40])
def test_a_full_disk_is_one_sentence_and_leaves_no_part_of_a_file(limit, tmp_path):
    result = run_command("train", "linear", "--impl", "concise", "--out", tmp_path, limit=limit)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("fastdl: ")
    assert str(tmp_path / "weights.safetensors") in last
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["history.json", "weights.safetensors"])
def test_of_history_and_weights_one_that_cannot_be_written_costs_not_the_other(name, tmp_path):
    _block_by_a_folder(None, tmp_path, name)
    result = invoke("train", "linear", "--impl", "concise", "--out", tmp_path)
    assert isinstance(result.exception, OSError)
    assert result.exception.filename == str(tmp_path / name)
    kept = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert kept == {"history.json", "weights.safetensors"} - {name}


@pytest.mark.slow
def test_a_disk_that_has_no_place_for_pictures_keeps_all_else(tmp_path):
    # room for the weights and the history, which are short
    result = run_command("train", "linear", "--impl", "concise", "--out", tmp_path, limit=8000)
    assert result.returncode == 1
    assert {path.name for path in tmp_path.iterdir()} == {"history.json", "weights.safetensors"}
    assert "true_w - w: [" in result.stdout
    assert "Saved to" in result.stdout
    warnings = result.stderr.splitlines()[-2:]
    assert [line.split(":")[0] for line in warnings] == ["warning", "warning"]
    assert "curves.png" in warnings[0]
    assert "predictions.png" in warnings[1]


def _block_by_a_folder(monkeypatch, folder, name):
    (folder / name).mkdir(parents=True)


def _raise(error):
    def block(monkeypatch, folder, name):
        function = "curves" if "curves" in name else "speedup" if name == "speedup.png" else "residuals"

        def draw(*arguments, **options):
            raise error

        monkeypatch.setattr(plots, function, draw)

    return block


BLOCKS = [
    _block_by_a_folder,
    _raise(OSError(28, "No space left on device")),
    _raise(ValueError("no such format")),
    _raise(ImportError("no matplotlib")),
    _raise(MemoryError()),
]


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", ["curves.png", "predictions.png"])
def test_a_picture_that_cannot_be_drawn_is_a_warning_after_all_else(name, block, monkeypatch, tmp_path):
    block(monkeypatch, tmp_path, name)
    result = invoke("train", "linear", "--impl", "concise", "--out", tmp_path)
    assert result.exit_code == 1
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == FILES - {name}
    assert "true_w - w: [" in result.stdout
    assert f"warning: {name} can't be drawn: " in result.stderr
    assert result.stderr.splitlines()[-1].startswith("warning: ")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["nonsense", "tkagg"])
def test_no_backend_of_matplotlib_ends_a_command(backend, tmp_path):
    variables = {"MPLBACKEND": backend, "DISPLAY": ""}
    result = run_command("train", "linear", "--impl", "concise", "--out", tmp_path, **variables)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert pictures_are_drawn(tmp_path)


@pytest.mark.slow
def test_a_broken_backend_ends_no_other_command():
    assert run_command("env", MPLBACKEND="nonsense").returncode == 0
    assert run_command("--version", MPLBACKEND="nonsense").stdout.strip() == "0.1.0"


@pytest.mark.slow
def test_without_numbas_compiler_a_command_ends_with_a_sentence(tmp_path):
    result = run_command("train", "linear", "--out", tmp_path, NUMBA_DISABLE_JIT="1")
    assert result.returncode == 1
    assert result.stderr.startswith("fastdl: NUMBA_DISABLE_JIT=1 ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_data_that_cannot_be_had_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    command = [*COMMAND, "train", "softmax", "--data", "fashion-mnist"]
    command += ["--data-root", str(tmp_path / "file"), "--out", str(tmp_path / "out")]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("fastdl: Fashion-MNIST")


def test_a_gpu_that_cannot_be_had_is_one_sentence_and_auto_falls_back_with_a_line(tmp_path, monkeypatch):
    reason = "torch finds no NVIDIA GPU: check with nvidia-smi that a GPU and its driver are there"
    monkeypatch.setattr("fastdl.cuda_arrays.missing_link", lambda device: reason)
    folder = tmp_path / "out"
    result = invoke("train", "linear", "--device", "cuda", "--out", folder)
    assert isinstance(result.exception, DeviceUnavailableError)
    assert str(result.exception) == reason
    assert not folder.exists()
    result = invoke("train", "linear", "--device", "auto", "--out", folder)
    assert result.exit_code == 0, result.output
    assert f"Training on the CPU: {reason}" in result.stderr.splitlines()
    assert json.loads((folder / "history.json").read_text())["settings"]["device"] == "cpu"


@pytest.mark.slow
def test_without_a_gpu_the_command_line_ends_with_that_sentence(tmp_path):
    command = [*COMMAND, "train", "linear", "--device", "cuda", "--out", str(tmp_path / "out")]
    hidden = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=hidden, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.startswith("fastdl: torch ")
    assert len(result.stderr.splitlines()) == 1


def test_env_names_what_a_bug_report_needs():
    result = invoke("env")
    assert result.exit_code == 0
    for name in ("cpu", "threads", "vector bits", "integer units", "gpu", "torch", "numba", "kernel cache"):
        assert name in result.stdout
    assert torch.__version__.partition("+")[0] in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("columns", ["80", "41"])
def test_env_shows_a_long_path_whole_in_a_pipe(tmp_path, columns):
    # each folder's name is longer than a line of the table
    folder = tmp_path.joinpath(*(letter * 90 for letter in "ab"))
    result = run_command("env", FASTDL_CACHE_DIR=str(folder), COLUMNS=columns)
    assert result.returncode == 0, result.stderr
    # the second cell of each line of the table
    cells = [line.split("│")[2].strip() for line in result.stdout.splitlines() if line.count("│") == 3]
    assert str(folder) in "".join(cells)
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= int(columns)


def test_version_is_printed():
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.strip() == "0.1.0"


@pytest.fixture
def brief_timing(monkeypatch):
    monkeypatch.setattr("fastdl.reproduce._TIMED_SECONDS", 0.0)


def test_reproduce_linear_passes_and_saves_everything(brief_timing, tmp_path):
    result = invoke("reproduce", "linear", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {
        *("results.json", "speedup.png", "linear-curves.png", "linear-predictions.png")
    }
    assert pictures_are_drawn(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["failures"] == []
    linear = results["models"]["linear"]
    assert linear["data_loader_seconds_per_epoch"] > 0
    assert list(linear["programs"]) == ["scratch", "concise", "fused", "compiled"]
    losses = []
    for impl, program in linear["programs"].items():
        assert program["parity"] is True
        # in float64 the concise program is the truth
        dtypes = {"float32"} if impl == "concise" else {"float64", "float32"}
        assert {check["name"].partition(",")[0] for check in program["checks"]} == dtypes
        speedup = linear["data_loader_seconds_per_epoch"] / program["seconds_per_epoch"]
        assert program["speedup_over_data_loader"] == pytest.approx(speedup)
        losses.append(program["final_loss"])
    # the halved loss of the scratch run is doubled
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-3)
    assert linear["programs"]["concise"]["speedup_over_memory"] == 1
    for name in ("cpu", "cores", "threads", "torch", "numba"):
        assert str(results["machine"][name]) in result.stdout
    assert "that run has twice the learning rate" in " ".join(result.stdout.split())


@pytest.mark.slow
def test_reproduce_fails_where_a_model_has_not_learnt_enough(brief_timing, images, tmp_path):
    result = invoke("reproduce", "softmax", "mlp", "--examples", 512, "--epochs", 1, "--out", tmp_path)
    assert result.exit_code == 1
    results = json.loads((tmp_path / "results.json").read_text())
    for model in ("softmax", "mlp"):
        for program in results["models"][model]["programs"].values():
            assert program["parity"] is True, program["checks"]
            assert program["seconds_per_epoch"] > 0
    assert any("is not below 0.5" in failure for failure in results["failures"])
    assert "failed: softmax, fused: final train loss" in result.stderr
    assert {"softmax-curves.png", "softmax-predictions.png", "mlp-curves.png", "mlp-predictions.png"} < {
        path.name for path in tmp_path.iterdir()
    }


def test_reproduce_fails_and_shows_no_speed_where_the_numbers_differ(brief_timing, monkeypatch, tmp_path):
    def build(model, impl, *, lr, **options):
        return programs.build(model, impl, lr=lr * (1.0001 if impl == "fused" else 1), **options)

    monkeypatch.setattr("fastdl.reproduce.build", build)
    result = invoke("reproduce", "linear", "--out", tmp_path)
    assert result.exit_code == 1
    assert "failed: linear, fused: float64" in result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["models"]["linear"]["programs"]["scratch"]["parity"] is True
    assert results["models"]["linear"]["programs"]["fused"]["parity"] is False
    assert "seconds_per_epoch" not in results["models"]["linear"]["programs"]["scratch"]
    assert not (tmp_path / "speedup.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS[:2])
@pytest.mark.parametrize("name", ["linear-curves.png", "linear-predictions.png", "speedup.png"])
def test_a_picture_of_reproduce_that_cannot_be_drawn_is_a_warning_after_all_else(
    name, block, brief_timing, monkeypatch, tmp_path
):
    block(monkeypatch, tmp_path, name)
    result = invoke("reproduce", "linear", "--out", tmp_path)
    assert result.exit_code == 1
    assert json.loads((tmp_path / "results.json").read_text())["failures"] == []
    assert "compiled (fastdl.fit)" in result.stdout
    files = {"results.json", "speedup.png", "linear-curves.png", "linear-predictions.png"}
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == files - {name}
    assert result.stderr.splitlines()[-1].startswith(f"warning: {name} can't be drawn: ")


@pytest.mark.slow
def test_reproduce_gives_the_same_numbers_twice(brief_timing, tmp_path):
    histories = []
    for index in range(2):
        assert invoke("reproduce", "linear", "--seed", 7, "--out", tmp_path / str(index)).exit_code == 0
        found = json.loads((tmp_path / str(index) / "results.json").read_text())["models"]["linear"][
            "programs"
        ]
        histories.append([program["history"]["train_loss"] for program in found.values()])
    assert histories[0] == histories[1]
