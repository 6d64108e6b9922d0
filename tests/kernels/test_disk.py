"""Machine code on disk: run only if it is what was written, where nobody else can write; never in the way."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import stat
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import llvmlite
import numba
import numpy as np
import pytest
from numba.core import event

import fastdl
from fastdl.kernels import disk, numba_private
from fastdl.kernels.jit import jit

ROOT = Path(fastdl.__file__).parents[1]
NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")


class _Listener(event.Listener):
    def __init__(self):
        self.compiled = []

    def on_start(self, started):
        self.compiled.append(started.data["dispatcher"].py_func.__name__)

    def on_end(self, ended):
        pass


def _add_one(x):
    return x + 1


def _add_two(x):
    return x + 2


def _third(x):
    return x[3]


for _function in (_add_one, _add_two, _third):
    # kernels of the package are kept, and these are as quick to compile as any
    _function.__module__ = "fastdl.kernels.tests"


def compiles(function=_add_one, argument=1, result=2):
    """Call a kernel as a new process would; return whether it was compiled, not loaded."""
    listener = _Listener()
    with event.install_listener("numba:compile", listener):
        assert jit(function)(argument) == result
    return bool(listener.compiled)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Have a folder for the cache, and forget afterwards which it was."""
    chosen = tmp_path / "cache"
    chosen.mkdir()
    monkeypatch.setenv("FASTDL_CACHE_DIR", str(chosen))
    # no other place to fall back to
    monkeypatch.setattr(disk, "_PACKAGE", tmp_path / "absent" / "file")
    (tmp_path / "absent").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "absent"))
    disk._folders.cache_clear()
    yield chosen
    monkeypatch.undo()
    numba_private.configuration()
    disk._folders.cache_clear()
    disk._version.cache_clear()


@pytest.fixture
def file(root):
    """Have a kernel on the disk, and return its file."""
    assert compiles()
    assert not compiles()
    (file,) = root.glob("kernels-*/*.nbc")
    return file


def leftovers(root):
    return [path.name for path in root.rglob("*") if path.is_file() and path.suffix not in {".nbc", ".TAG"}]


class _Trap:
    """A pickle that makes a folder when it is read."""

    def __init__(self, sprung):
        self.sprung = sprung

    def __reduce__(self):
        return os.mkdir, (str(self.sprung),)


DAMAGES = {
    "nothing": lambda old: b"",
    "first half": lambda old: old[: len(old) // 2],
    "all but a byte": lambda old: old[:-1],
    "a byte more": lambda old: old + b"\0",
    "zeros": lambda old: bytes(len(old)),
    "text": lambda old: b"damaged",
    "another pickle": lambda old: pickle.dumps({"a": 1}),
    "a pickle of two": lambda old: pickle.dumps(([], ())),
    "the header alone": lambda old: old[: disk._HEADER_BYTES],
    "without its header": lambda old: old[disk._HEADER_BYTES :],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_what_was_written_is_compiled_and_written_anew(damage, file, root):
    whole = file.read_bytes()
    file.write_bytes(DAMAGES[damage](whole))
    assert disk.read(file.name) is None
    assert compiles()
    assert not compiles()
    assert leftovers(root) == []


@pytest.mark.parametrize("content", [pickle.dumps({"a": 1}), pickle.dumps(([], ())), b"no pickle", b""])
def test_a_file_with_the_right_checksum_that_is_no_kernel_is_compiled_anew(content, file):
    disk.write(file.name, content)
    assert disk.read(file.name) == content
    assert compiles()
    assert not compiles()


def test_a_folder_a_pipe_or_a_link_in_the_files_place_is_not_read(file, root, tmp_path):
    whole = tmp_path / "whole"
    file.rename(whole)
    file.symlink_to(whole)
    assert compiles()
    file.unlink()
    os.mkfifo(file)
    assert compiles()
    file.unlink()
    file.mkdir()
    assert compiles()
    assert compiles(), "a folder stays where it is, and is nobody's error"
    assert leftovers(root) == []


def test_the_file_of_another_kernel_or_another_version_is_not_read(root):
    disk.write("one", b"content")
    folder = disk.cache_folder()
    shutil.copy(folder / "one", folder / "two")
    assert disk.read("one") == b"content"
    assert disk.read("two") is None
    folder.rename(root / "kernels-other")
    (root / "kernels-other").rename(folder)
    assert disk.read("one") == b"content"
    shutil.copytree(folder, root / "kernels-0123456789")
    assert disk.read("one") == b"content"
    disk._folders.cache_clear()
    (root / "kernels-0123456789" / "one").replace(folder / "one")
    assert disk.read("one") == b"content", "copied back, it is the same file"


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Return a folder with real files: kernels that need others, and what passes for CUDA's machine code."""
    chosen = tmp_path_factory.mktemp("filled")
    program = (
        "import numpy as np\n"
        "from fastdl.kernels import disk\n"
        "from fastdl.kernels.cpu.relu import relu_forward\n"
        "x = np.ones(2, np.float32)\n"
        "relu_forward((x.ctypes.data, x.ctypes.data), 2, 1, x[:0])\n"
        "disk.write('cuda.relu-sm_90a.cubin', bytes(range(256)) * 40)\n"
    )
    _run(ROOT, program, FASTDL_CACHE_DIR=str(chosen))
    (folder,) = chosen.iterdir()
    return folder


@pytest.fixture
def filled_files(filled, monkeypatch):
    monkeypatch.setattr(disk, "_folders", lambda configuration: (filled,))
    files = [path for path in filled.iterdir() if path.name != "CACHEDIR.TAG"]
    assert len(files) >= 2
    assert all(disk.read(path.name) is not None for path in files)
    return files


def test_no_flipped_bit_is_read(filled_files, seed):
    drawn = random.Random(seed)
    for path in filled_files:
        whole = path.read_bytes()
        for place in [*range(0, 8 * disk._HEADER_BYTES, 7), *drawn.choices(range(8 * len(whole)), k=300)]:
            flipped = bytearray(whole)
            flipped[place // 8] ^= 1 << place % 8
            path.write_bytes(flipped)
            assert disk.read(path.name) is None, (path.name, place)
        path.write_bytes(whole)
        assert disk.read(path.name) is not None


def test_no_truncated_file_is_read(filled_files, seed):
    drawn = random.Random(seed)
    for path in filled_files:
        whole = path.read_bytes()
        for length in [*range(disk._HEADER_BYTES + 2), *drawn.choices(range(len(whole)), k=100)]:
            path.write_bytes(whole[:length])
            assert disk.read(path.name) is None, (path.name, length)
        path.write_bytes(whole)
        assert disk.read(path.name) is not None


def _open_to_all(path, root):
    path.chmod(0o777)


def _open_to_group(path, root):
    path.chmod(path.stat().st_mode | stat.S_IWGRP)


def _given_away(path, root):
    os.chown(path, NOBODY, -1)


def _linked(path, root):
    elsewhere = root.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("of", ["the file", "its folder", "the folder's folder"])
@pytest.mark.parametrize(
    "made",
    [_open_to_all, pytest.param(_given_away, marks=needs_root), _open_to_group, _linked],
    ids=lambda made: made.__name__.strip("_"),
)
def test_what_somebody_else_could_have_written_is_not_run(made, of, root, file, tmp_path):
    sprung = tmp_path / "sprung"
    disk.write(file.name, pickle.dumps(_Trap(sprung)))
    assert compiles()
    assert sprung.exists(), "the trap works"
    sprung.rmdir()
    disk.write(file.name, pickle.dumps(_Trap(sprung)))
    path = {"the file": file, "its folder": file.parent, "the folder's folder": root}[of]
    made(path, root)
    if of == "the folder's folder" and made is _open_to_group:
        # a group of one's own, which makes folders so, is no other user
        os.chown(root, -1, NOBODY)
    disk._folders.cache_clear()
    if of == "the folder's folder" and made is _linked:
        # a link that the user set leads to a folder of the user's
        assert not sprung.exists()
        return
    assert compiles()
    assert not sprung.exists()


@needs_root
def test_a_group_that_is_not_the_users_cannot_be_in_the_way(root):
    os.chown(root, -1, NOBODY)
    root.chmod(0o2775)
    disk._folders.cache_clear()
    assert disk.cache_folder() is None


def test_a_folder_that_all_write_to_but_nobody_can_rename_in_is_used(root):
    root.chmod(0o1777)
    disk._folders.cache_clear()
    assert compiles()
    assert not compiles()


def as_nobody(function):
    """Return what a function returns in a forked process of a user who has no rights."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            os.write(writer, repr(function()).encode())
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    os.waitpid(child, 0)
    return said


@pytest.fixture
def public(root, tmp_path):
    """Let other users come as far as the cache's folder."""
    for folder in (root, *root.parents):
        if folder.stat().st_uid == os.geteuid() and not folder.stat().st_mode & stat.S_IXOTH:
            if not folder.is_relative_to(tmp_path.parents[1]):
                pytest.skip(f"another user can't enter {folder}")
            folder.chmod(0o755)
    return root


@needs_root
def test_what_root_wrote_serves_other_users_who_cannot_write_there(public, file):
    assert stat.S_IMODE(file.stat().st_mode) == 0o644

    def work():
        disk._folders.cache_clear()
        return compiles(), compiles(_add_two, 1, 3), compiles(_add_two, 1, 3)

    assert as_nobody(work) == "(False, True, True)"


@needs_root
@pytest.mark.parametrize("mode", [0o000, 0o200])
def test_a_file_or_a_folder_without_permission_is_compiled_anew(mode, public, file):
    os.chown(file, NOBODY, -1)
    file.chmod(mode)
    assert as_nobody(lambda: (disk.read(file.name), compiles())) == "(None, True)"
    file.parent.chmod(mode)
    assert as_nobody(lambda: (disk.read(file.name), compiles())) == "(None, True)"


@needs_root
def test_what_another_user_wrote_is_not_run_by_root(public, tmp_path):
    sprung = tmp_path / "sprung"
    public.chmod(0o1777)

    def set_trap():
        disk._folders.cache_clear()
        compiles()
        (file,) = public.glob("kernels-*/*.nbc")
        disk.write(file.name, pickle.dumps(_Trap(sprung)))
        return file.stat().st_uid

    assert as_nobody(set_trap) == str(NOBODY)
    disk._folders.cache_clear()
    assert compiles()
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("umask", "file_mode", "folder_mode"),
    [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o644, 0o755), (0o000, 0o644, 0o755)],
)
def test_permissions_are_those_of_the_umask_but_never_let_others_write(umask, file_mode, folder_mode, root):
    before = os.umask(umask)
    try:
        root.rmdir()
        assert compiles()
        assert not compiles()
    finally:
        os.umask(before)
    (folder,) = root.iterdir()
    assert {stat.S_IMODE(path.stat().st_mode) for path in (root, folder)} == {folder_mode}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {file_mode}


def test_a_folder_below_the_users_home_is_found(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.setenv("FASTDL_CACHE_DIR", "~/kept")
    disk._folders.cache_clear()
    assert disk.cache_folder().parent == root / "kept"


def test_a_folder_that_is_removed_while_a_process_runs_is_made_anew(file, root):
    shutil.rmtree(root)
    assert compiles(_add_two, 1, 3)
    assert not compiles(_add_two, 1, 3)
    shutil.rmtree(file.parent)
    assert compiles()
    assert not compiles()
    # and where it can't be, nothing happens
    shutil.rmtree(root)
    root.touch()
    assert compiles()
    assert compiles()


_FULL = """
import os, resource, signal, sys
from fastdl.kernels import disk
from fastdl.kernels.jit import jit
def work(x): return x + 1
work.__module__ = "fastdl.kernels.tests"
signal.signal(signal.SIGXFSZ, getattr(signal, sys.argv[2]))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
print(jit(work)(1))
disk.write("cuda.work.cubin", bytes(1 << 20))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(disk.read("cuda.work.cubin"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("handler", ["SIG_DFL", "SIG_IGN"])
@pytest.mark.parametrize("limit", [0, 100, 5000])
def test_a_full_disk_stops_no_computation_and_leaves_no_part_of_a_file(limit, handler, tmp_path):
    done = _run(ROOT, _FULL, str(limit), handler, FASTDL_CACHE_DIR=str(tmp_path))
    assert done.split() == ["2", "None"]
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "CACHEDIR.TAG"] == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(122, "Quota exceeded")])
@pytest.mark.parametrize("call", ["open", "replace", "mkdir"])
def test_a_write_that_fails_anywhere_stops_nothing_and_leaves_nothing(call, error, root, monkeypatch):
    def fail(*arguments, **options):
        raise error

    with monkeypatch.context() as patched:
        disk._create(disk.cache_folder())
        shutil.rmtree(disk.cache_folder())
        patched.setattr(os, call, fail)
        assert compiles()
    assert list(root.rglob("*.tmp")) == []
    assert compiles(), "nothing was kept"


def test_an_interrupted_write_leaves_nothing(root, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    disk.write("before", b"")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            disk.write("name", b"content")
    assert sorted(path.name for path in disk.cache_folder().iterdir()) == ["CACHEDIR.TAG", "before"]


def test_pruning_leaves_alone_what_fastdl_did_not_make(root):
    kept = {f"kernels-{letter * 20}" for letter in "abcdef"} | {"kernels-of-mine", "kernels-"}
    for name in kept:
        (root / name).mkdir()
        (root / name / "mine").touch()
    (root / "kernels-of-mine" / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55\n")
    (root / "kernels-file").touch()
    made = []
    for index in range(8):
        folder = root / f"kernels-{index:020x}"
        disk._create(folder)
        os.utime(folder, (1000 + index, 1000 + index))
        made.append(folder)
    elsewhere = root.parent / "elsewhere"
    shutil.copytree(made[-1], elsewhere)
    (root / "kernels-link").symlink_to(elsewhere)
    os.utime(elsewhere, (1, 1))
    assert compiles()
    folders = {path.name for path in root.iterdir()}
    assert kept | {"kernels-file", "kernels-link"} < folders
    assert all((root / name / "mine").exists() for name in kept)
    assert (elsewhere / "CACHEDIR.TAG").exists()
    # the oldest made way for the one in use
    assert [folder.exists() for folder in made] == [False] * 5 + [True] * 3
    assert disk.cache_folder().exists()


CHANGES_CODE = {
    **{"OPT": "0", "BOUNDSCHECK": "1", "DEBUGINFO": "1", "LOOP_VECTORIZE": "0", "SLP_VECTORIZE": "1"},
    **{"CPU_NAME": "generic", "CPU_FEATURES": "+sse2", "ENABLE_AVX": "0", "DISABLE_INTEL_SVML": "1"},
    **{"DEBUG_NRT": "1", "NRT_STATS": "1", "LLVM_REFPRUNE_PASS": "0", "ENABLE_PROFILING": "1"},
    **{"DEBUG_ARRAY_OPT_RUNTIME": "1", "EXTEND_VARIABLE_LIFETIMES": "1", "PARFOR_MAX_TUPLE_SIZE": "3"},
}
CHANGES_NONE = {
    **{"COLOR_SCHEME": "dark_bg", "CACHE_DIR": "/tmp", "FULL_TRACEBACKS": "1", "SHOW_HELP": "1"},
    **{"THREADING_LAYER": "workqueue", "NUM_THREADS": "1", "CUDA_LOG_LEVEL": "DEBUG", "ENABLE_CUDASIM": "1"},
}


@pytest.mark.parametrize("setting", [*CHANGES_CODE, *CHANGES_NONE])
def test_each_setting_of_numba_that_changes_code_has_code_of_its_own(setting, root, monkeypatch):
    before = disk.cache_folder()
    monkeypatch.setenv(f"NUMBA_{setting}", (CHANGES_CODE | CHANGES_NONE)[setting])
    assert (disk.cache_folder() != before) == (setting in CHANGES_CODE)


def test_a_kernel_that_checks_bounds_is_not_the_one_that_does_not(root, monkeypatch):
    x = np.arange(4.0)
    # one that reads past the end of a view, inside of the memory
    assert compiles(_third, x[:3], 3.0)
    monkeypatch.setenv("NUMBA_BOUNDSCHECK", "1")
    with pytest.raises(IndexError):
        jit(_third)(x[:3])


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (numba, "__version__"),
        (llvmlite, "__version__"),
        (np, "__version__"),
        (sys, "version"),
        (sys, "abiflags"),
    ],
)
def test_each_tools_version_has_code_of_its_own(where, name, root, monkeypatch):
    before = disk.cache_folder()
    monkeypatch.setattr(where, name, f"{getattr(where, name)}x")
    disk._version.cache_clear()
    assert disk.cache_folder() == before
    disk._folders.cache_clear()
    assert disk.cache_folder() != before


_RELU = """
import numpy as np
from numba.core import event
from fastdl.kernels.cpu.relu import relu_forward
compiled = []
class Listener(event.Listener):
    def on_start(self, e): compiled.append(1)
    def on_end(self, e): pass
with event.install_listener("numba:compile", Listener()):
    x = np.array([-1.0, 2.0], np.float32); out = np.empty_like(x)
    relu_forward((x.ctypes.data, out.ctypes.data), 2, 1, x[:0])
print(out.tolist(), "compiled" if compiled else "loaded")
"""


def _run(root, program, *arguments, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTDL_")}
    environment |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"} | variables
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _as_archive(install):
    shutil.make_archive(str(install), "zip", install)
    return install.with_suffix(".zip")


def _as_bytecode(install):
    subprocess.run(
        [sys.executable, "-m", "compileall", "-b", "-q", str(install / "fastdl" / "kernels")], check=True
    )
    for source in (install / "fastdl" / "kernels").rglob("*.py"):
        source.unlink()
    return install


@pytest.mark.slow
@pytest.mark.parametrize("pack", [_as_archive, _as_bytecode], ids=["archive", "bytecode"])
def test_an_upgrade_of_a_package_without_sources_on_the_disk_is_never_stale(pack, tmp_path):
    said = []
    for number, added in enumerate(["", " + 40"]):
        install = tmp_path / f"install {number}"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(fastdl.__file__).parent, install / "fastdl", ignore=ignored)
        relu = install / "fastdl" / "kernels" / "cpu" / "relu.py"
        text = relu.read_text()
        assert text.count("else input[i]") == 1
        relu.write_text(text.replace("else input[i]", f"else input[i]{added}"))
        said += [
            _run(pack(install), _RELU, FASTDL_CACHE_DIR=str(tmp_path / "cache")) for _ in range(2 - number)
        ]
    assert said == ["[0.0, 2.0] compiled", "[0.0, 2.0] loaded", "[0.0, 42.0] compiled"]


def test_threads_that_compile_at_once_all_get_the_kernel(root):
    results, start = [], threading.Barrier(8)

    def work():
        start.wait()
        results.append(jit(_add_one)(1))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [2] * 8
    assert not compiles()
    assert leftovers(root) == []


def test_forked_processes_that_compile_at_once_all_get_the_kernel(root):
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            try:
                os._exit(jit(_add_one)(1))
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [2] * 4
    (file,) = root.glob("kernels-*/*.nbc")
    assert disk.read(file.name)
    assert leftovers(root) == []


_DISABLED = """
import fastdl, torch
from torch import nn
for _ in range(2):
    try:
        fastdl.functional.relu(torch.ones(3))
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.slow
def test_without_numbas_compiler_the_first_kernel_says_so_in_a_sentence():
    first, second = _run(ROOT, _DISABLED, NUMBA_DISABLE_JIT="1").splitlines()
    assert first == second
    assert first.startswith(
        "NUMBA_DISABLE_JIT=1 switches off the compiler that fastdl's kernels need: unset it"
    )


def test_numba_is_the_release_that_the_private_names_were_looked_up_in():
    assert tuple(map(int, version("numba").split(".")[:2])) < (0, 69)
